"""Launching a Triton kernel that has run before.

Triton looks at every argument of every call to find out which compiled kernel it is for, and the
losses have dozens. What decides is known here in a few comparisons, so that a second call with the
same key goes straight to the compiled kernel.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

ALIGNMENT = 16  # Triton compiles one kernel for pointers and integers that are multiples of it
_compiled: dict[Hashable, Any] = {}


def specialised(numbers: Sequence[int]) -> tuple[tuple[bool, bool, bool], ...]:
    """What Triton compiles for of integers inside a tuple, whatever ``do_not_specialize`` says."""
    return tuple((n == 1, n % ALIGNMENT == 0, n >= 2**31) for n in numbers)


def entry_of(kernel: Any, key: Hashable, tensors: Sequence[Tensor | None]) -> Hashable:
    """What one compiled kernel serves; the arguments are those of `launch`."""
    device = next(t.device for t in tensors if t is not None)
    return (kernel.fn, key, device, *[None if t is None else t.dtype for t in tensors])


def launch(
    kernel: Any,
    programs: int,
    key: Hashable,
    tensors: Sequence[Tensor | None],
    arguments: Sequence[Any],
    options: dict[str, Any],
) -> None:
    """``kernel[(programs,)](*arguments, **options)``.

    Args:
        key: what the kernel is compiled for, but for the dtypes of `tensors` and their device.
        tensors: all tensors among the arguments.
        arguments: integers among them must be marked ``do_not_specialize``, and where they can
            pass 2^31, which changes their type, the key says whether they do; or they are part of
            the key. Of integers inside a tuple the key holds :func:`specialised`.
    """
    grid = (programs, 1, 1)
    entry = entry_of(kernel, key, tensors)
    # One compiled kernel serves aligned pointers; the rare others take Triton's own way.
    if any(t is not None and t.data_ptr() % ALIGNMENT for t in tensors):
        kernel[grid](*arguments, **options)
    elif entry in _compiled:
        _compiled[entry][grid](*arguments)
    else:
        compiled = kernel[grid](*arguments, **options)
        if compiled is not None:  # the interpreter compiles nothing
            _compiled[entry] = compiled
