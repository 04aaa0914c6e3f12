"""The adapter as llama.cpp adds it to a base: `adapter.gguf` (ggml-org/llama.cpp, convert_lora_to_gguf.py).

A twin start has rank 2r: beside each trained slice bᵢaᵢ stands the start's negative, −b₀a₀, inactive for ever
(adapter/attach.py). Where their sum is one slice exactly, one is written, so llama.cpp computes less.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .gguf_model import architecture, as_laid_out, tensor_names


@dataclass(frozen=True)
class Factors:
    """A layer's A [r, in] and B [out, r] in fp32, its scaling, and the trained rank: half of a twin start's r."""

    a: Tensor
    b: Tensor
    scaling: float
    trained: int


def fold_twins(a: Tensor, b: Tensor, trained: int) -> tuple[Tensor, Tensor]:
    """A [n, in] and B [out, n] with the same B·A as those of a twin start, of as low a rank n as is exact.

    A slice that has not moved cancels its twin: both are dropped. Where its row of A has not moved, they are one slice
    with the difference of their columns of B; where its column of B has not, likewise. Both stay where both have moved,
    and where a difference is no fp32 number. trained: r; A of rank r has no twin and is returned as it is.
    """
    if a.shape[0] == trained:
        return a, b
    rows, columns, rows_0, columns_0 = a[:trained], b[:, :trained], a[trained:], -b[:, trained:]
    of_a, of_b = rows - rows_0, columns - columns_0
    exact_a = (of_a.double() == rows.double() - rows_0.double()).all(1).tolist()
    exact_b = (of_b.double() == columns.double() - columns_0.double()).all(0).tolist()
    moved_a, moved_b = (of_a != 0).any(1).tolist(), (of_b != 0).any(0).tolist()
    kept_a, kept_b = [], []
    for i in range(trained):
        if not moved_a[i] and exact_b[i]:
            slices = [(rows[i], of_b[:, i])] if moved_b[i] else []
        elif not moved_b[i] and exact_a[i]:
            slices = [(of_a[i], columns[:, i])]
        else:
            slices = [(rows[i], columns[:, i]), (rows_0[i], -columns_0[:, i])]
        kept_a += [row for row, _ in slices]
        kept_b += [column for _, column in slices]
    if not kept_a:
        return a[:0], b[:, :0]
    return torch.stack(kept_a), torch.stack(kept_b, dim=1)


def folded(layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """The layers with twins folded, without those that have not changed."""
    found = {}
    for at, one in layers.items():
        a, b = fold_twins(one.a, one.b, one.trained)
        if len(a):
            found[at] = Factors(a, b, one.scaling, one.trained)
    return found


def write_adapter(path: Path, config: Any, layers: Mapping[str, Factors], name: str) -> str:
    """Write `layers`, {the parameter that each adds to: its factors}, in fp32 and folded; returns what ranks resulted.

    llama.cpp scales a tensor by alpha / its own rank: alpha is that of the layer of the highest rank, and what another
    layer's scaling and rank differ by is multiplied into its B.
    """
    import gguf

    changed = folded(layers)
    if not changed:
        raise InputError("export.gguf: the adapter is as it started, so there is nothing to add to the base")
    ranks = [len(one.a) for one in changed.values()]
    alpha = max((len(one.a), len(one.a) * one.scaling) for one in changed.values())[1]
    writer = gguf.GGUFWriter(path, architecture(config))
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for at, called in tensor_names(config, list(changed)).items():
        one = changed[at]
        b = (one.b.double() * (one.scaling * len(one.a) / alpha)).float()
        writer.add_tensor(f"{called}.lora_a", one.a.contiguous().numpy())
        writer.add_tensor(f"{called}.lora_b", as_laid_out(config, at, b).contiguous().numpy())
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    held = max(len(one.a) for one in layers.values())
    span = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
    dropped = f", {len(layers) - len(changed)} layers that have not changed left out" * (len(changed) < len(layers))
    return f"rank {span} of the {held} that training holds{dropped}"
