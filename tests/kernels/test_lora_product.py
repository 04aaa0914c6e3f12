"""Which way a layer's product goes: forced, timed once for each kind of call, plain wherever in doubt."""

import pytest
import torch

import lorapar_kernels as lk
from lorapar_kernels import lora_passes, lora_product
from lorapar_kernels.lora_product import _kind, _take

TRITON = object()  # stands for lora_passes_triton: any module but the plain one
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("LORAPAR_PRODUCT", raising=False)
    monkeypatch.setattr(lora_product, "_chosen", {})


@pytest.fixture
def timed(monkeypatch):
    """Timing that finds what it is told, in seconds, as on a CUDA device; `timed["calls"]` counts."""
    told = {"plain": 1.0, "fused": 0.5, "calls": 0}

    def seconds(ways):
        told["calls"] += 1
        return {way: told[way] for way in ways}

    monkeypatch.setattr(lora_product, "seconds", seconds)
    monkeypatch.setattr(lora_product, "_may_time", lambda device: True)
    return told


def take(passes=TRITON, tokens=4, kind=("kind",)):
    return _take({"plain": lambda: "plain", "fused": lambda: "fused"}, passes, torch.ones(tokens, 8), kind)


def layer():
    return torch.randn(3, 8), torch.randn(4, 8), torch.randn(2, 8), torch.randn(4, 2)


def test_an_unknown_word_is_refused(monkeypatch):
    monkeypatch.setenv("LORAPAR_PRODUCT", "cublas")
    with pytest.raises(ValueError, match="LORAPAR_PRODUCT must be one of plain, fused, got 'cublas'"):
        lk.lora_linear(*layer(), 1.0)


def test_forced_fused_without_tritons_passes_is_refused(monkeypatch):
    monkeypatch.setenv("LORAPAR_BACKEND", "reference")
    monkeypatch.setenv("LORAPAR_PRODUCT", "fused")
    with pytest.raises(
        ValueError, match="LORAPAR_PRODUCT=fused cannot serve lora_linear: it goes with Triton's passes"
    ):
        lk.lora_linear(*layer(), 1.0)
    x, w, a, b = layer()
    # No product to choose: of no tokens, and of an opaque base.
    assert lk.lora_linear(x[:0], w, a, b, 1.0).shape == (0, 4)
    assert lk.lora_add(x @ w.t(), x, a, b, 1.0).shape == (3, 4)


def test_forced_serves_whatever_the_clock_would_say(monkeypatch, timed):
    for way in ("plain", "fused"):
        monkeypatch.setenv("LORAPAR_PRODUCT", way)
        assert take() == way
    assert timed["calls"] == 0


def test_the_faster_is_taken_and_kept(timed):
    assert take() == "fused"
    timed["fused"] = 2.0
    assert take() == "fused"
    assert timed["calls"] == 1
    assert take(kind=("another",)) == "plain"
    assert timed["calls"] == 2


def test_a_hundredth_is_noise(timed):
    timed["fused"] = 0.99
    assert take() == "plain"


def test_plain_without_timing_off_tritons_passes_and_for_no_tokens(timed):
    assert take(passes=lora_passes) == "plain"
    assert take(tokens=0) == "plain"
    assert timed["calls"] == 0
    assert take() == "fused"


def test_a_product_that_does_not_run_is_told_and_plain_serves(monkeypatch, timed):
    def seconds(ways):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(lora_product, "seconds", seconds)
    with pytest.warns(UserWarning, match="the fused product does not run here, so the plain one is taken: out of res"):
        assert take() == "plain"
    assert take() == "plain"


def test_nothing_is_timed_on_a_cpu_in_a_capture_or_where_runs_must_repeat(monkeypatch):
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert lora_product._may_time(CUDA)
    assert not lora_product._may_time(torch.device("cpu"))
    assert take() == "plain"
    assert not lora_product._chosen
    capturing = True
    assert not lora_product._may_time(CUDA)
    capturing = False
    torch.use_deterministic_algorithms(True)
    try:
        assert not lora_product._may_time(CUDA)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_kind_is_all_but_the_exact_number_of_tokens():
    _, w, _, b = layer()

    def kind(tokens=600, p=0.0, dtype=torch.float32, weight=w, factor=b, direction="forward"):
        return _kind(direction, torch.ones(tokens, 8, dtype=dtype), [weight], [factor], p)

    assert kind() == kind(512) == kind(1023)
    others = [kind(1024), kind(p=0.1), kind(dtype=torch.bfloat16), kind(weight=w[:3]), kind(factor=b[:, :1]),
              kind(factor=b.bfloat16()), kind(direction="backward")]  # fmt: skip
    assert len({kind(), *others}) == 8


def test_what_is_said_to_be_in_force(monkeypatch):
    cpu = torch.device("cpu")
    assert lora_product.in_force(cpu) == "plain  (fused: Triton's passes do not run here)"
    monkeypatch.setenv("LORAPAR_PRODUCT", "fused")
    assert lora_product.in_force(cpu).startswith("fails: LORAPAR_PRODUCT=fused")
    monkeypatch.setenv("LORAPAR_PRODUCT", "no")
    assert lora_product.in_force(cpu).startswith("fails: LORAPAR_PRODUCT must be one of")
    monkeypatch.setattr(lora_passes, "passes_for", lambda *_: TRITON)
    monkeypatch.setenv("LORAPAR_PRODUCT", "plain")
    assert lora_product.in_force(cpu) == "plain  (LORAPAR_PRODUCT)"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_times_each_kind_once_and_then_repeats_its_bits(monkeypatch):
    x = torch.randn(512, 256, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(384, 256, device=CUDA, dtype=torch.bfloat16)
    a = torch.randn(8, 256, device=CUDA, requires_grad=True)
    b = torch.randn(384, 8, device=CUDA, requires_grad=True)
    runs = []
    for _ in range(2):
        y = lk.lora_linear(x, w, a, b, 1.0, dropout_p=0.1, seed=torch.tensor([1], device=CUDA))
        runs.append([y.detach(), *torch.autograd.grad(y.square().sum(), (x, a, b))])
        assert sorted(kind[0] for kind in lora_product._chosen) == ["backward", "forward"]
    assert all(torch.equal(one, other) for one, other in zip(*runs))
    assert "so far" in lora_product.in_force(CUDA)
    more = torch.randn(4096, 256, device=CUDA, dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        monkeypatch.setenv("LORAPAR_PRODUCT", "plain")
        expected = lk.lora_linear(more, w, a, b, 1.0)
        monkeypatch.delenv("LORAPAR_PRODUCT")
        with torch.cuda.graph(graph):
            captured = lk.lora_linear(more, w, a, b, 1.0)
    graph.replay()
    assert torch.equal(captured, expected)
    assert len(lora_product._chosen) == 2
