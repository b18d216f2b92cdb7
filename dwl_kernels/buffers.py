"""What the modules of this package share about their buffers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Tables(nn.Module):
    """Module whose buffers change device but keep their dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tables:
        # `model.half()` or `model.to(torch.bfloat16)` would round probabilities to three digits.
        def keep_dtype(buffer: Tensor) -> Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self
