"""Without a GPU Triton's programs run on the CPU, through its interpreter."""

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    triton = pytest.importorskip("triton")
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def _patch_index(tensor, scope, patch=interpreter._patch_lang_tensor) -> None:
        """Triton 3.6 reads loop bounds as `int(array of one element)`, which numpy 2.4 refuses."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def _dot(self, a, b, d, *precision, dot=interpreter.InterpreterBuilder.create_dot):
        """Triton 3.6 keeps bfloat16 as the upper halves of float32 and would multiply those as integers."""
        a, b = (
            interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)
            if x.dtype == interpreter.tl.bfloat16
            else x
            for x in (a, b)
        )
        return dot(self, a, b, d, *precision)

    def _interpret_library() -> None:
        """Triton's own functions, where it was imported before this file could say how."""
        for module in (interpreter.tl, interpreter.tl.standard, interpreter.tl.core):
            for name, value in vars(module).items():
                if isinstance(value, triton.JITFunction):
                    setattr(module, name, interpreter.InterpretedFunction(value.fn))

    _interpret_library()
    interpreter._patch_lang_tensor = _patch_index
    interpreter.InterpreterBuilder.create_dot = _dot


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
