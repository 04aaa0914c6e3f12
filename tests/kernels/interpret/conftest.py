"""Triton 3.6's interpreter turns a loop's bounds into integers in a way that NumPy 2.4 has stopped allowing."""

import triton.runtime.interpreter as interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor


def _with_index(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    # A scalar is an array of shape (1,) there; int() takes arrays without dimensions only.
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _with_index
