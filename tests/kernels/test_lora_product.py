"""Which way a layer's product goes: forced, timed once for each kind of call, plain wherever in doubt."""

import contextlib
import json
import statistics

import pytest
import torch

import lorapar_kernels as lk
from lorapar_kernels import lora_product
from lorapar_kernels.lora_layer import LoraLayer
from lorapar_kernels.lora_product import _kind, _run_chosen

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("LORAPAR_PRODUCT", raising=False)
    monkeypatch.setattr(lora_product, "_chosen", {})
    monkeypatch.setattr(lora_product, "_given", {})


@pytest.fixture
def timed(monkeypatch):
    """Timing that finds what it is told, in seconds, as on a CUDA device; `timed["calls"]` counts."""
    told = {"plain": 1.0, "fused": 0.5, "calls": 0}

    def seconds(ways):
        told["calls"] += 1
        return {way: told[way] for way in ways}

    monkeypatch.setattr(lora_product, "seconds", seconds)
    monkeypatch.setattr(lora_product, "_may_time", lambda device: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return told


@pytest.fixture
def on_gpu(monkeypatch):
    """Calls that are made on a GPU, as far as the choice can see; gives them, of one kind each."""
    names = {0: "H100", 1: "L4"}
    monkeypatch.setattr(lora_product, "_gpu", lambda device: names[device.index])

    def call(tokens, device=0):
        x = torch.ones(4, 8).as_subclass(type("X", (torch.Tensor,), {"device": torch.device("cuda", device)}))
        layer = (torch.Size([6, 8]), torch.Size([6, 2]), torch.float32)
        kind = "forward", x.device, torch.bfloat16, tokens.bit_length(), False, (layer,)
        return _run_chosen({"plain": lambda: "plain", "fused": lambda: "fused"}, x, kind)  # type: ignore[arg-type]

    return call


def take(kind=("kind",)):
    return _run_chosen({"plain": lambda: "plain", "fused": lambda: "fused"}, torch.ones(4, 8), kind)


def layer():
    return torch.randn(3, 8), torch.randn(4, 8), torch.randn(2, 8), torch.randn(4, 2)


def one_layer(weight, factor):
    """A layer of which both factors are one tensor: a kind looks at B in a forward, at A in a backward."""
    return LoraLayer(weight, None, None, factor, factor, 1.0)


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


def test_nothing_is_timed_off_tritons_passes_and_for_no_tokens(timed):
    x, w, a, b = layer()
    lk.lora_linear(x, w, a, b, 1.0)
    lk.lora_linear(x[:0], w, a, b, 1.0)
    assert timed["calls"] == 0


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
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
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
        return _kind(direction, torch.ones(tokens, 8, dtype=dtype), [one_layer(weight, factor)], p)

    assert kind() == kind(512) == kind(1023)
    others = [kind(1024), kind(p=0.1), kind(dtype=torch.bfloat16), kind(weight=w[:3]), kind(factor=b[:, :1]),
              kind(factor=b.bfloat16()), kind(direction="backward")]  # fmt: skip
    assert len({kind(), *others}) == 8


def test_what_is_said_to_be_in_force(monkeypatch):
    cpu = torch.device("cpu")
    assert lora_product.in_force(cpu, False) == "plain  (fused: Triton's passes do not run here)"
    monkeypatch.setenv("LORAPAR_PRODUCT", "fused")
    assert lora_product.in_force(cpu, False).startswith("fails: LORAPAR_PRODUCT=fused")
    monkeypatch.setenv("LORAPAR_PRODUCT", "no")
    with pytest.raises(ValueError, match="LORAPAR_PRODUCT must be one of"):
        lora_product.in_force(cpu, True)
    monkeypatch.setenv("LORAPAR_PRODUCT", "plain")
    assert lora_product.in_force(cpu, True) == "plain  (LORAPAR_PRODUCT)"


FIRST = "forward bfloat16 4+ tokens 6x8+6x2:float32"


def test_another_process_takes_what_was_chosen_and_times_nothing(timed, on_gpu):
    assert [on_gpu(4), on_gpu(512)] == ["fused", "fused"]
    timed["fused"] = 2.0
    assert [on_gpu(1024), on_gpu(4, device=1)] == ["plain", "plain"]
    choices = lk.product_choices()
    assert choices == {
        "H100": {
            FIRST: "fused",
            "forward bfloat16 512+ tokens 6x8+6x2:float32": "fused",
            "forward bfloat16 1024+ tokens 6x8+6x2:float32": "plain",
        },
        "L4": {FIRST: "plain"},
    }
    written = json.loads(json.dumps(choices))
    # Another process, with a clock that says otherwise.
    lora_product._chosen.clear()
    timed["calls"] = 0
    lk.set_product_choices(written)
    assert lk.product_choices() == choices
    assert [on_gpu(5), on_gpu(600), on_gpu(1025), on_gpu(7, device=1)] == ["fused", "fused", "plain", "plain"]
    assert timed["calls"] == 0
    # What was not chosen yet is timed, and written down beside the rest.
    timed["fused"] = 0.1
    assert on_gpu(512, device=1) == "fused"
    assert timed["calls"] == 1
    assert lk.product_choices() == choices | {
        "L4": {FIRST: "plain", "forward bfloat16 512+ tokens 6x8+6x2:float32": "fused"}
    }


def test_choices_of_another_gpu_and_of_none_are_no_choices_here(timed, on_gpu):
    assert lk.product_choices() == {}
    lk.set_product_choices({"A100": {FIRST: "plain"}})
    assert on_gpu(4) == "fused"
    assert timed["calls"] == 1
    assert lk.product_choices() == {"A100": {FIRST: "plain"}, "H100": {FIRST: "fused"}}
    lk.set_product_choices({})
    assert lk.product_choices() == {"A100": {FIRST: "plain"}, "H100": {FIRST: "fused"}}
    assert on_gpu(4) == "fused"
    assert timed["calls"] == 1


def test_given_choices_replace_those_of_the_process(timed, on_gpu):
    assert on_gpu(4) == "fused"
    lk.set_product_choices({"H100": {FIRST: "plain"}})
    assert on_gpu(4) == "plain"


@pytest.mark.parametrize("wrong", [[], {"H100": "plain"}, {"H100": {"kind": "cublas"}}, {"H100": {"kind": ["plain"]}}])
def test_what_is_no_choices_is_refused_and_changes_nothing(wrong, timed, on_gpu):
    assert on_gpu(4) == "fused"
    with pytest.raises(ValueError, match="choice"):
        lk.set_product_choices(wrong)
    assert lk.product_choices() == {"H100": {FIRST: "fused"}}


def test_a_kind_in_words_tells_each_kind_from_each_other():
    _, w, _, b = layer()

    def words(*rest, tokens=600, p=0.0, dtype=torch.float32, weight=w, factor=b, direction="forward"):
        return lora_product._in_words(
            (*_kind(direction, torch.ones(tokens, 8, dtype=dtype), [one_layer(weight, factor)], p), *rest)
        )

    assert words() == words(tokens=512) == words(tokens=1023)
    others = [words(tokens=1024), words(p=0.1), words(dtype=torch.bfloat16), words(weight=w[:3]),
              words(factor=b[:, :1]), words(factor=b.bfloat16()), words(direction="backward"),
              words(True, direction="backward")]  # fmt: skip
    assert len({words(), *others}) == 9
    assert words(False, direction="backward") == words(direction="backward")


class Clock:
    """A GPU and a host, each with its own time: what is queued runs when the GPU has come to it."""

    def __init__(self, monkeypatch, captures=True):
        self.host = self.gpu = 0.0
        self.capturing = False
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.work(cycles / 2e9), raising=False)
        monkeypatch.setattr(lora_product.time, "perf_counter", lambda: self.host)
        if captures:
            monkeypatch.setattr(lora_product, "_captured", self.captured)
        else:
            monkeypatch.setattr(lora_product, "_captured", lambda ways: None)

    def captured(self, ways):
        return {way: lambda call=call: self.work(call.gpu, 1e-6) for way, call in ways.items()}

    def synchronize(self):
        self.host = self.gpu = max(self.host, self.gpu)

    def work(self, seconds, host=0.0):
        self.host += host
        self.gpu = max(self.gpu, self.host) + seconds


class Event:
    def __init__(self, clock):
        self.clock = clock

    def record(self):
        self.at = max(self.clock.gpu, self.clock.host)

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


class Way:
    def __init__(self, clock, gpu, host):
        self.clock, self.gpu, self.host = clock, gpu, host

    def __call__(self):
        self.clock.work(self.gpu, self.host)


@pytest.mark.parametrize("captures", [True, False])
def test_it_is_the_gpus_time_that_decides(monkeypatch, captures):
    """Python takes longer than the GPU, and longer for the way that is faster on the GPU: a decode or a small batch."""
    clock = Clock(monkeypatch, captures)
    ways = {"plain": Way(clock, gpu=80e-6, host=200e-6), "fused": Way(clock, gpu=60e-6, host=300e-6)}
    times = lora_product.seconds(ways)
    assert times == pytest.approx({"plain": 80e-6, "fused": 60e-6}, rel=0.02)
    assert lora_product._faster(ways) == "fused"


def test_events_around_a_call_would_have_timed_python(monkeypatch):
    """Of what the test above says: that its clock shows the difference."""
    clock = Clock(monkeypatch)
    call, took = Way(clock, gpu=60e-6, host=300e-6), []
    for _ in range(5):
        began, ended = Event(clock), Event(clock)
        began.record()
        call()
        ended.record()
        took.append(began.elapsed_time(ended) / 1e3)
    assert statistics.median(took) > 290e-6


def test_what_cannot_be_captured_is_timed_queued(monkeypatch):
    """A capture that fails is ended, and nothing of it is kept."""
    ended = []

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            assert capture_error_mode == "thread_local"

        def capture_end(self):
            ended.append(self)

        def pool(self):
            return 1

        def replay(self):
            return "replayed"

    class Stream:
        def wait_stream(self, other): ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(lora_product, "_side_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def fails():
        raise RuntimeError("operation not permitted when stream is capturing")

    assert lora_product._captured({"plain": lambda: None, "fused": fails}) is None
    assert len(ended) == 2
    replays = lora_product._captured({"plain": lambda: None, "fused": lambda: None})
    assert replays is not None
    assert {way: replay() for way, replay in replays.items()} == {"plain": "replayed", "fused": "replayed"}


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
    assert "so far" in lora_product.in_force(CUDA, True)
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
