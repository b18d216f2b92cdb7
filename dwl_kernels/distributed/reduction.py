"""The loss of all ranks from the sums of each, so that gradients are right after an average.

Every rank solves its own rows with reduction "sum". The trainers of ranks average gradients over
them, so what is differentiated here is the loss of all rows times the number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dwl_kernels.core.double_backward import once
from dwl_kernels.core.problem import GradMask, Problem, Reduction
from dwl_kernels.distributed.exchange import all_gather
from dwl_kernels.distributed.group import Group


def same_of_rows(name: str, problem: Problem) -> dict[str, Any]:
    """What all ranks must agree on in every loss, by the names of the arguments."""
    rows, dim = problem.rows, problem.query.shape[1]
    weights = rows.domain_weights
    sources = zip(GradMask._fields, problem.sources(), strict=True)
    learned = [name for name, t in sources if t is not None and t.requires_grad]
    given = {
        "temperature": rows.temperature,
        "domain_weights": weights,
        "example_weights": rows.example_weights,
    }
    return {
        "the loss": name,
        "query": f"[B, {dim}] of {problem.query.dtype} on {problem.query.device.type}",
        "correction": rows.correction,
        "reduction": rows.reduction,
        "temperature as a number": rows.tau,
        "num_domains": None if weights is None else len(weights),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "arguments that require a gradient": learned,
        "temperature per row": rows.temperature is not None and rows.temperature.dim() > 0,
        **{key: kind_of(tensor) for key, tensor in given.items()},
    }


def kind_of(tensor: Tensor | None) -> str | None:
    return None if tensor is None else f"a tensor of {tensor.dtype}"


def weighted(losses: Tensor, weight: Tensor) -> Tensor:  # [B]
    """``w_i l_i``, exactly 0 in a row of weight 0."""
    return _Weighted.apply(losses, weight)


def log_odds(losses: Tensor) -> Tensor:
    """``log(exp l - 1)`` of row losses ``l``, without overflow or cancellation."""
    return torch.where(losses > 1, losses + torch.log1p(-torch.exp(-losses)), losses.expm1().log())


def whole_loss(
    own: Tensor,  # [] the sum of this rank's rows, or for "none" its rows [B]
    norm: Tensor | None,  # [] what the rows of this rank add to the norm; None for "sum"
    reduction: Reduction,
    group: Group,
) -> Tensor:
    """The loss of the rows of all ranks, ``[]``, the same on all; for "none" the rows as they are.

    Averaged over the ranks, its gradients are those of one process that holds all rows.
    """
    if reduction == "none":
        return _OfAverage.apply(own, group.size)
    return _Whole.apply(own, norm, group)


class _Weighted(torch.autograd.Function):
    """A row of weight 0 gives no gradient to its loss, but its loss one to the weight."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(losses, weight)
        return torch.where(weight == 0, 0.0, weight * losses)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad, (losses, weight) = upstream[0].detach(), ctx.saved_tensors
        d_losses = torch.where(weight == 0, 0.0, grad * weight)
        return once(d_losses, upstream[0]), once(grad * losses, upstream[0])


class _OfAverage(torch.autograd.Function):
    """Identity whose gradient is times the number of ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, size: int) -> Tensor:
        ctx.size = size
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return once(upstream[0] * ctx.size, upstream[0]), None


class _Whole(torch.autograd.Function):
    """``sum_r S_r / sum_r n_r`` of the ranks' sums and norms, 0 for 0/0; 16 bytes a rank."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, norm: Tensor | None, group: Group) -> Tensor:
        pair = torch.stack((own, torch.full_like(own, 1 / group.size) if norm is None else norm))
        pair = pair.double()
        every = pair.new_empty(2 * group.size)
        all_gather(every, pair, group)
        total, whole = every.view(group.size, 2).sum(0)
        loss = torch.where(whole == 0, 0.0, total / whole)
        factor = torch.where(whole == 0, 0.0, group.size / whole)
        ctx.save_for_backward(factor.to(own.dtype), loss.to(own.dtype))
        ctx.has_norm = norm is not None
        return loss.to(own.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = upstream
        factor, loss = ctx.saved_tensors
        d_own = once(grad.detach() * factor, grad)
        return d_own, once(-grad.detach() * factor * loss, grad) if ctx.has_norm else None, None
