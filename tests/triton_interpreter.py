"""Triton 3.6's interpreter beside numpy 2.4, which made it an error to take a `[1]` array for a
number: loops with bounds known at run time only need that. And its products, whose bits depend on
the shape with some BLAS libraries: here they are rounded from double precision.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime import interpreter


def install() -> None:
    """Let the interpreter's scalars count as Python integers again."""
    patch = interpreter._patch_lang_tensor

    def patch_and_fix(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter._patch_lang_tensor = patch_and_fix
    interpreter.InterpreterBuilder.create_dot = dot
