"""The decorator of what ``torch.compile`` is to leave alone.

The losses over ranks and the counts of domains wear it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo

Given = ParamSpec("Given")
Result = TypeVar("Result")


def untraced(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """The function, which a compiled graph breaks at.

    ``torch.compiler.disable`` imports torch._dynamo at once, and the private decorator that it is
    made of does so in the first call: 2 s, and 16 s on a busy machine. Where nobody compiles it has
    not been imported, and there is nothing to keep away.
    """
    apart: Callable[Given, Result] = _disable_dynamo(function)

    @functools.wraps(function)
    def call(*arguments: Given.args, **options: Given.kwargs) -> Result:
        if torch.compiler.is_compiling() or "torch._dynamo" in sys.modules:
            return apart(*arguments, **options)
        return function(*arguments, **options)

    return call
