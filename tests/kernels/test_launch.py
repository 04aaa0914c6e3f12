"""What a launch asks of the host: which device it goes to, what the launcher is given, how fp32 is multiplied there."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget

from lorapar_kernels.triton_kernels import launch as launches
from lorapar_kernels.triton_kernels.launch import FP_FUSION, INT32, Launch, launch, precision, recording


class OnGPU(torch.Tensor):
    """A tensor that says it is on cuda:`number`."""

    number: int
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def get_device(self) -> int:
        return self.number


def on_gpu(number: int) -> torch.Tensor:
    tensor = torch.zeros(2, 2).as_subclass(OnGPU)
    tensor.number = number
    return tensor


@pytest.fixture
def launched(monkeypatch):
    """A kernel that notes the current device of each launch; cuda:0 is current, `entered` the devices since."""
    devices, noted, entered = [0], [], []

    class Device:
        def __init__(self, number):
            self.number = number

        def __enter__(self):
            entered.append(self.number)
            devices.append(self.number)

        def __exit__(self, *_):
            devices.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: noted.append((devices[-1], grid, arguments, constants))

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices[-1])
    return SimpleNamespace(kernel=Kernel(), noted=noted, entered=entered, devices=devices)


@pytest.mark.parametrize("place", ["alone", "after others", "tuple", "descriptor"])
def test_a_launch_goes_to_its_tensors_device(launched, place):
    for number in (1, 0, 2):
        tensor = on_gpu(number)
        arguments = {
            "alone": (tensor, 3),
            "after others": (None, 7, torch.zeros(1), tensor),
            "tuple": ((None, tensor), tensor),
            "descriptor": (SimpleNamespace(base=tensor, block_shape=[16, 16]), 1),
        }[place]
        launch(launched.kernel, (4,), *arguments, BLOCK=8)
        assert launched.noted[-1] == (number, (4,), arguments, {"BLOCK": 8, "enable_fp_fusion": FP_FUSION})
        assert launched.devices == [0]
    # Not for the device that is current already.
    assert launched.entered == [1, 2]


def test_no_device_is_asked_for_or_entered_without_a_gpu(launched, monkeypatch):
    monkeypatch.delattr(torch.cuda, "current_device")
    launch(launched.kernel, (1,), torch.zeros(2), (torch.zeros(2, device="meta"), None), 5)
    assert len(launched.noted) == 1
    assert not launched.entered


@pytest.fixture
def as_it_was():
    """torch's switches for TF32, put back as they were."""
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"


def test_tf32_by_whichever_switch(as_it_was):
    x = torch.zeros(1)
    matmul = torch.backends.cuda.matmul
    assert precision(x) == "ieee"
    matmul.allow_tf32 = True
    assert precision(x) == "tf32"
    torch.set_float32_matmul_precision("highest")
    assert precision(x) == "ieee"
    torch.set_float32_matmul_precision("high")
    assert precision(x) == "tf32"
    matmul.fp32_precision = "ieee"
    assert precision(x) == "ieee"
    torch.set_float32_matmul_precision("highest")
    matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        assert matmul.allow_tf32
    assert precision(x) == "tf32"


def test_half_precision_does_not_ask_and_makes_no_other_kernel(as_it_was):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    for dtype in (torch.bfloat16, torch.float16):
        assert precision(torch.zeros(1, dtype=dtype)) == "ieee"


def add_kernel(
    x_ptr, absent_ptr, seed_ptr, out_ptr, n, stride, one, scale,
    BLOCK: tl.constexpr, NEGATE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i) * scale * one + tl.load(seed_ptr) + n * stride
    tl.store(out_ptr + i, -x if NEGATE else x)


class Driver:
    """Triton's driver without a GPU: what it loads are numbers, and a launch is noted as the launcher is given it."""

    def __init__(self):
        self.current, self.launched, self.loaded = 30, [], []
        self.utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 1 << 20}, load_binary=self.load)

    def load(self, name, binary, shared, device):
        # Without a module, which Triton would unload, it loads again for each launch: the same is the same function.
        if (binary, device) not in self.loaded:
            self.loaded.append((binary, device))
        return None, self.loaded.index((binary, device)), 32, 0, 1024

    def launcher_cls(self, source, metadata):
        return lambda *arguments: self.launched.append(arguments)

    def get_current_device(self):
        return self.current

    def get_current_stream(self, device):
        return 1000 + device

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Triton's, so that what one test compiled is read by the next."""
    return str(tmp_path_factory.mktemp("triton"))


@pytest.fixture
def gpu(monkeypatch, cache):
    """The fake driver; `kernel` is fresh, `by_triton` the launches that went through Triton's own launcher."""
    driver = Driver()
    monkeypatch.setattr(knobs.cache, "dir", cache)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)

    class Device:
        def __init__(self, number):
            self.number = number

        def __enter__(self):
            self.before, driver.current = driver.current, self.number

        def __exit__(self, *_):
            driver.current = self.before

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_device", driver.get_current_device)
    kernel = triton.jit(do_not_specialize=["n"])(add_kernel)
    by_triton, run = [], kernel.run
    monkeypatch.setattr(kernel, "run", lambda *given, **named: by_triton.append(given) or run(*given, **named))
    return SimpleNamespace(driver=driver, kernel=kernel, by_triton=by_triton)


def at(offset=0, number=30, dtype=torch.float32):
    """A tensor on cuda:`number`, `offset` elements after a multiple of 16 bytes."""
    memory = torch.zeros(80, dtype=dtype)
    tensor = memory[-(memory.data_ptr() // memory.element_size()) % 16 + offset :][:48].as_subclass(OnGPU)
    tensor.number = number
    return tensor


CONSTANTS = {"BLOCK": 512, "NEGATE": False, "num_warps": 2}


def arguments_at(*offsets, number=30, n=40):
    x, seed, out = (at(offset, number) for offset in offsets or (0, 0, 0))
    return x, None, seed, out, n, 16, 1, 0.5


def as_launched(gpu, grid, arguments):
    """What Triton gives the launcher: grid, stream, function and its metadata; then the kernel's arguments."""
    gpu.kernel[grid](*arguments, enable_fp_fusion=FP_FUSION, **CONSTANTS)
    gpu.by_triton.clear()
    return shown(gpu.driver.launched.pop())


def shown(given):
    """A launch without what is for hooks, which are not there, and with addresses for tensors."""
    *first, _, enter, leave = given[:9]
    assert not getattr(enter, "calls", None)
    assert not getattr(leave, "calls", None)
    return first, [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in given[9:]]


def test_a_kept_launch_gives_the_launcher_what_triton_does(gpu):
    kept = Launch(gpu.kernel, **CONSTANTS)
    kept((3,), *arguments_at())
    assert len(gpu.by_triton) == 1
    for grid, n in (((3,), 40), ((2, 5), 16), ((7, 1, 2), 1), ((1,), 32)):
        arguments = arguments_at(n=n)
        expected = as_launched(gpu, grid, arguments)
        gpu.driver.launched.clear()
        kept(grid, *arguments)
        assert shown(gpu.driver.launched[-1]) == expected
        assert not gpu.by_triton


def test_a_kept_launch_is_of_the_kernel_that_the_alignment_asks_for(gpu):
    kept, functions = Launch(gpu.kernel, **CONSTANTS), set()
    for offsets in [(0, 0, 0), (1, 0, 0), (0, 0, 2), (0, 0, 0), (1, 1, 2), (1, 0, 0), (0, 0, 2)]:
        arguments = arguments_at(*offsets)
        expected = as_launched(gpu, (3,), arguments)
        kept((3,), *arguments)
        assert shown(gpu.driver.launched.pop()) == expected
        functions.add(expected[0][4])
    assert len(functions) == 4
    gpu.by_triton.clear()
    kept((3,), *arguments_at(2, 3, 1))
    assert not gpu.by_triton


def test_a_kept_launch_goes_to_its_tensors_device(gpu):
    kept, functions = Launch(gpu.kernel, **CONSTANTS), []
    for number in (30, 31, 30, 31, 32):
        kept((3,), *arguments_at(number=number))
        _, _, _, stream, function, *_ = gpu.driver.launched.pop()
        assert stream == 1000 + number
        assert gpu.driver.current == 30
        functions.append(function)
    assert functions == [0, 1, 0, 1, 2]
    assert len(gpu.by_triton) == 3


def test_where_hooks_watch_triton_launches(gpu, monkeypatch):
    kept, seen = Launch(gpu.kernel, **CONSTANTS), []
    kept((3,), *arguments_at())
    switches = knobs.runtime
    chain = knobs.HookChain()
    chain.add(seen.append)
    for name, value in (("launch_enter_hook", chain), ("launch_exit_hook", chain), ("launch_enter_hook", seen.append)):
        with monkeypatch.context() as patch:
            patch.setattr(switches, name, value)
            gpu.by_triton.clear()
            kept((3,), *arguments_at())
            assert len(gpu.by_triton) == 1
            assert value in gpu.driver.launched[-1][7:9]
    monkeypatch.setattr(switches, "launch_enter_hook", None)
    gpu.by_triton.clear()
    kept((3,), *arguments_at())
    assert not gpu.by_triton
    gpu.kernel.add_pre_run_hook(lambda *_, **__: seen.append("before"))
    kept((3,), *arguments_at())
    assert seen == ["before"]


def test_triton_says_what_is_wrong_with_a_tensor_on_the_cpu_and_takes_a_size_of_64_bits(gpu):
    kept = Launch(gpu.kernel, **CONSTANTS)
    kept((3,), *arguments_at())
    gpu.by_triton.clear()
    x, *rest = arguments_at()
    forgotten = torch.zeros(48)
    kept((3,), x, rest[0], forgotten, *rest[2:])
    # The tensor itself, whose address the launcher looks up.
    assert any(value is forgotten for value in gpu.driver.launched[-1])
    kept((3,), *arguments_at(n=INT32 + 1))
    assert len(gpu.by_triton) == 2
    kept((3,), *arguments_at(n=INT32))
    assert len(gpu.by_triton) == 2


def test_what_was_not_compiled_is_asked_for_again(gpu, monkeypatch):
    kept = Launch(gpu.kernel, **CONSTANTS)
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "jit_cache_hook", lambda **_: True)
        kept((3,), *arguments_at())
    assert not gpu.driver.launched
    for _ in range(3):
        kept((3,), *arguments_at())
    assert len(gpu.driver.launched) == 3
    assert len(gpu.by_triton) == 2


def test_a_kept_launch_is_recorded_and_not_made(gpu):
    kept = Launch(gpu.kernel, room=1, **CONSTANTS)
    kept((3,), *arguments_at())
    gpu.driver.launched.clear()
    with recording() as variants:
        kept((3,), *arguments_at())
        kept((4,), *arguments_at())
    assert not gpu.driver.launched
    assert [(variant.kernel, variant.room) for variant in variants] == [(gpu.kernel, 1)]


def test_a_broken_promise_is_found_where_it_is_checked(gpu, monkeypatch):
    monkeypatch.setattr(launches, "CHECKED", True)
    kept = Launch(gpu.kernel, **CONSTANTS)
    arguments = arguments_at()
    kept((3,), *arguments)
    kept((4,), *arguments_at(1, 0, 2, number=31, n=7)[:5], 32, 1, 2.0)
    names = ["x_ptr", "absent_ptr", "seed_ptr", "out_ptr", "n", "stride", "one", "scale"]
    for name, value in (
        ("x_ptr", at(dtype=torch.float64)),
        ("x_ptr", None),
        ("absent_ptr", at()),
        ("n", 40.0),
        ("stride", 24),
        ("one", 16),
        ("stride", 1 << 40),
        ("scale", 1),
    ):
        given = list(arguments)
        given[names.index(name)] = value
        with pytest.raises(AssertionError, match=f"add_kernel: {name} was .* in this Launch's first call, now "):
            kept((3,), *given)
    with pytest.raises(AssertionError, match="add_kernel: one call has more arguments"):
        kept((3,), *arguments[:-1])
