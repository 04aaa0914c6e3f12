"""One process of a launch, for test_launch.py: gradients averaged by `GradientExchange` beside a dense all-reduce."""

import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from lorapar.distributed import processes
from lorapar.distributed.exchange import GradientExchange
from lorapar.errors import InputError


def _fail(error: Exception) -> int:
    raise error


def _one() -> list[int]:
    return processes.gather(1)


def _other() -> list[int]:
    return processes.gather(1)


def main(folder: Path) -> None:
    PartialState(cpu=True)
    rank, count = processes.rank(), processes.count()
    generator = torch.Generator().manual_seed(100 + rank)
    shapes, dtypes = [(4, 64), (64, 4), (3, 5), (7,), (2, 2)], [torch.float32, torch.bfloat16] + 3 * [torch.float32]
    masks = [torch.rand(shape, generator=torch.Generator().manual_seed(i)) < 0.4 for i, shape in enumerate(shapes)]
    masks[4] = torch.zeros(2, 2, dtype=torch.bool)
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in zip(shapes, dtypes)]
    given = [torch.randn(shape, generator=generator) * mask for shape, mask in zip(shapes, masks)]
    # The third has a gradient in process 0 alone, the fourth in none.
    there = [True, True, rank == 0, False, False]
    for parameter, gradient, has in zip(parameters, given, there):
        parameter.grad = gradient.to(parameter.dtype, copy=True) if has else None
    exchange = GradientExchange(dict(zip(parameters, masks)))
    exchange.average()
    wanted = []
    for parameter, gradient, has in zip(parameters, given, there):
        dense = (gradient.to(parameter.dtype) * has).double()
        torch.distributed.all_reduce(dense)
        wanted.append(dense / count)
    assert parameters[3].grad is None
    assert parameters[4].grad is None
    worst = {}
    for i in range(3):
        got, mask = parameters[i].grad, masks[i]
        assert got is not None
        assert got.dtype == parameters[i].dtype
        assert not bool(got[~mask].any())
        worst[str(i)] = float((got.double() - wanted[i]).abs().max())
    active = sum(int(mask.sum()) for mask in masks[:4])
    assert exchange.elements == active
    assert exchange.bytes == 4 * (active + 4)
    # What one process says, in all of them; what each says, in their order.
    assert processes.from_main(lambda: ("main", processes.rank())) == ("main", 0)
    assert processes.gather(rank * rank) == [r * r for r in range(count)]
    # More than the store takes at once.
    long = [bytes([r]) * (9 << 20) for r in range(count)]
    assert processes.gather(long[rank]) == long
    big = 2.0**60
    (total,) = processes.sum_in_order([torch.tensor([1.0, big if rank == 0 else -big if rank == 1 else 3.0])])
    assert total.tolist() == [count, 3.0 * (count - 2)]
    # What fails in the main process fails in all, and they stay in step.
    for error in (InputError("label.enough: too few"), OSError("a disk")):
        with pytest.raises(type(error), match=str(error)):
            processes.from_main(lambda error=error: _fail(error))
    assert processes.from_main(lambda: 7) == 7
    with pytest.raises(RuntimeError, match="every process of a launch makes the same calls in the same order"):
        _one() if rank == 0 else _other()
    assert processes.gather(rank) == list(range(count))
    if rank == 0:
        (folder / "worst.json").write_text(json.dumps(worst))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
