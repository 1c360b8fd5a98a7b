"""Triton 3.6's interpreter beside numpy 2.4, which made it an error to take a `[1]` array for a
number: loops with bounds known at run time only need that.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def install() -> None:
    """Let the interpreter's scalars count as Python integers again."""
    patch = interpreter._patch_lang_tensor

    def patch_and_fix(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_fix
