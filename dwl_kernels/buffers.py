"""What the modules of this package share about their buffers and ids."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dwl_kernels.problem import INTEGERS


class Tables(nn.Module):
    """Module whose buffers change device but keep their dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tables:
        # `model.half()` or `model.to(torch.bfloat16)` would round probabilities to three digits.
        def keep_dtype(buffer: Tensor) -> Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self


def int64_ids(ids: Tensor, device: torch.device) -> Tensor:
    if not isinstance(ids, Tensor) or ids.dtype not in INTEGERS:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids is {got}, wanted an integer tensor such as torch.int64")
    if ids.device != device:
        raise ValueError(f"ids is on {ids.device}, wanted {device}; move one with .to(device)")
    return ids.long()


def positive_int(name: str, value: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {type(value).__name__}, wanted an integer")
    if value <= 0:
        raise ValueError(f"{name} is {value}, wanted at least 1")
    return operator.index(value)
