"""What a launch asks of the host: which device it goes to, and how fp32 is multiplied there."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from lorapar_kernels.triton_kernels.launch import FP_FUSION, launch, precision


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
