"""Two faults of Triton 3.6's interpreter, mended for the tests in this folder; and a Launch's promises, checked."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from lorapar_kernels.triton_kernels import launch

launch.CHECKED = True
_patch_lang_tensor = interpreter._patch_lang_tensor
_create_dot = interpreter.InterpreterBuilder.create_dot


def _with_index(tensor, scope):
    """It turns a loop's bounds into integers in a way that NumPy 2.4 has stopped allowing."""
    _patch_lang_tensor(tensor, scope)
    # A scalar is an array of shape (1,) there; int() takes arrays without dimensions only.
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _dot_of_values(self, a, b, *rest):
    """It keeps bf16 as its bits and would multiply those; a product of two bf16 is exact in fp32."""
    return _create_dot(self, _widened(a), _widened(b), *rest)


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    values = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return interpreter.TensorHandle(values, tl.float32)


interpreter._patch_lang_tensor = _with_index
interpreter.InterpreterBuilder.create_dot = _dot_of_values
