"""What the modules of this package share about their state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Tables(nn.Module):
    """Module whose tensors keep their dtype, and whose arguments no checkpoint overrides."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tables:
        # `model.half()` or `model.to(torch.bfloat16)` would round probabilities to three digits.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        if recurse:
            for child in self.children():
                child._apply(fn)
        super()._apply(keep_dtype, recurse=False)
        return self

    def contradiction(self, saved: dict[str, Tensor]) -> str | None:
        """How a checkpoint contradicts the constructor's arguments, and the mend; None if not."""
        return None

    def bring_up_to_date(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Makes a checkpoint of an earlier version one of this."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        named = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        # Tensors without values, of a subclass or on `meta`, cannot be compared.
        saved = {k: v for k, v in named.items() if type(v) in (Tensor, nn.Parameter)}
        message = self.contradiction({k: v for k, v in saved.items() if not v.is_meta})
        if message is not None:
            error_msgs: list[str] = more[-1]
            error_msgs.append(f"{prefix.removesuffix('.') or type(self).__name__}: {message}.")
            return
        self.bring_up_to_date(state_dict, prefix)
        for name, own in (*self._parameters.items(), *self._buffers.items()):
            if name in self._non_persistent_buffers_set:
                state_dict.pop(prefix + name, None)  # earlier versions saved some of them
            elif name in saved and own is not None:  # which it replaces with assign=True
                state_dict[prefix + name] = state_dict[prefix + name].to(own.dtype)
        super()._load_from_state_dict(state_dict, prefix, *more)


def difference(
    name: str,
    saved: dict[str, Tensor],
    own: Tensor,  # [n]
) -> str | None:
    """Where a tensor of a checkpoint is not this module's own; None if it is, or is not there."""
    if name not in saved or own.is_meta:
        return None
    theirs = saved[name].to(own)
    if theirs.shape != own.shape:
        return f"{name} has shape {list(theirs.shape)} in the checkpoint but {list(own.shape)} here"
    if own.is_floating_point():
        rounding = max(torch.finfo(dtype).eps for dtype in (saved[name].dtype, own.dtype))
        differs, style = ~torch.isclose(theirs, own, rtol=max(1e-5, rounding)), ".6g"
    else:
        differs, style = theirs != own, "d"
    if not bool(differs.any()):
        return None
    place = int(differs.nonzero()[0])
    got, wanted = (format(values[place].item(), style) for values in (theirs, own))
    return f"{name}[{place}] is {got} in the checkpoint but {wanted} here"
