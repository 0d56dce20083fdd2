"""A call that stays outside an enclosing torch.compile.

This is a file of its own because its decorator loads the compiler, which takes seconds and 170 MB.
"""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable
def call_uncompiled(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, computed as without torch.compile."""
    return function(*inputs)
