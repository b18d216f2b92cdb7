"""Embeddings scaled to length 1, of any size and dtype, for modules with `normalize=True`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dwl_kernels.core.batching import backward_by_slices, is_batched
from dwl_kernels.core.double_backward import ReverseOnly, once, refuse_tangents, transforms_active
from dwl_kernels.core.problem import accumulate_dtype


def normalised(
    embedding: Tensor,  # [..., D]
    padded: Tensor | None = None,  # [...] bool
    *,
    drawn: bool = False,
) -> Tensor:  # [..., D]
    """Every embedding scaled to length 1; zero, without a gradient, where it is zero or padded.

    With `drawn` they are negatives, or a table, of which a part is left out: a row that holds NaN
    or Inf then takes no gradient, and without, NaN. Lengths are taken in float32, in float64 of
    float64.
    """
    # A wrong shape is left to the loss, which names it.
    if not embedding.dim() or not embedding.shape[-1]:
        return embedding
    masked = None
    if padded is not None and padded.shape == embedding.shape[:-1]:
        masked = padded[..., None]
    out: Tensor
    if transforms_active():
        out = _TransformedRows.apply(embedding, masked, drawn)[0]
        return out
    refuse_tangents((embedding,))
    out = _Normalised.apply(embedding, masked, drawn)[0]
    return out


class _Normalised(torch.autograd.Function):
    """A third of the time of F.normalize: its backward makes five temporary tensors."""

    @staticmethod
    def forward(
        embedding: Tensor,  # [..., D]
        masked: Tensor | None,  # [..., 1] bool
        drawn: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # [..., D], [..., 1], [..., 1]
        wide = embedding.to(accumulate_dtype(embedding.dtype))
        # Over its largest entry first: the square of a small or large one is 0 or infinite. Over
        # infinity a row of zeros is zero, and so is its gradient.
        largest = torch.maximum(wide.amax(-1, keepdim=True), -wide.amin(-1, keepdim=True))
        largest = largest.masked_fill(largest == 0, math.inf)
        unit = wide / largest
        length = torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp(min=1)
        unit = unit.div_(length)
        if masked is not None:
            unit = unit.masked_fill_(masked, 0.0)
        return unit.to(embedding.dtype), largest, length

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        embedding, masked, ctx.drawn = inputs
        _, largest, length = output
        ctx.save_for_backward(embedding, masked, largest, length)
        ctx.mark_non_differentiable(largest, length)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        if is_batched(upstream[0]):
            return backward_by_slices(_Normalised.backward, ctx, upstream[0])
        refuse_tangents(upstream[:1])
        embedding, masked, largest, length = ctx.saved_tensors
        # (g - <g, u> u) / |x|; in two divisions, because the length itself may not be finite.
        unit = embedding.detach().to(largest.dtype).div(largest).div_(length)
        g = upstream[0].detach().to(largest.dtype)
        along = (g * unit).sum(-1, keepdim=True)
        gradient = torch.addcmul(g, unit, along, value=-1).div_(length).div_(largest)
        if ctx.drawn:
            broken = ~length.isfinite()
            masked = broken if masked is None else masked | broken
        if masked is not None:
            gradient = gradient.masked_fill_(masked, 0.0)
        gradient = gradient.to(embedding.dtype)
        return once(once(gradient, embedding), upstream[0]), None, None


class _TransformedRows(ReverseOnly):
    """`_Normalised` for the transforms of ``torch.func``."""

    forward = staticmethod(_Normalised.forward)
    setup_context = staticmethod(_Normalised.setup_context)
    backward = staticmethod(_Normalised.backward)
