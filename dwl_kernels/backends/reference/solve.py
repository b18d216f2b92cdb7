"""Backend "eager": the formulas, differentiated by autograd. Called by the registry alone.

It takes nothing from `core` but the problem and the errors about values. Every backend is tested
against it in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dwl_kernels.backends.reference.formulas import (
    log_sum_exp,
    norm,
    products,
    refined_factor,
    row_losses,
)
from dwl_kernels.backends.reference.rows import rows_of
from dwl_kernels.core.problem import GradMask, Output, Problem, RankProblem


def unavailable_reason(device_type: str) -> str | None:
    """None: it runs everywhere."""
    return None


def unsupported_reason(problem: Problem) -> str | None:
    """None: it takes every problem."""
    return None


def unsupported_ranks(problem: RankProblem) -> str | None:
    """None: it takes every problem."""
    return None


def solve(
    problem: Problem,
    wanted: GradMask,
    row_grad: Tensor | None = None,  # [B], gradient of the row losses of reduction "none"
) -> Output:
    """The loss and, by autograd, the wanted gradients; with matrices ``[B, N]`` in memory."""
    accumulate, gradient = problem.dtypes
    sources = dict(zip(GradMask._fields, problem.sources(), strict=True))
    if problem.per_row:
        del sources["positive"], sources["candidates"]  # the gradients are those of the products
    with _autograd():
        leaves = {
            name: source.detach().to(accumulate).requires_grad_()
            for name, source in sources.items()
            if source is not None and getattr(wanted, name)
        }
        made = _loss(problem, leaves, row_grad, problem.per_row and any(wanted))
    loss, of_weights, s_positive, s = made
    gradients: dict[str, Tensor | None] = dict.fromkeys(GradMask._fields)
    if "domain_weights" in leaves:
        leaf = leaves.pop("domain_weights")
        (gradients["domain_weights"],) = torch.autograd.grad(
            of_weights, [leaf], row_grad, materialize_grads=True
        )
    if problem.per_row:
        of_products = {"positive": s_positive, "candidates": s}
        leaves |= {name: one for name, one in of_products.items() if getattr(wanted, name)}
    if leaves:
        found = torch.autograd.grad(loss, [*leaves.values()], row_grad, materialize_grads=True)
        gradients |= dict(zip(leaves, found, strict=True))
    dtypes = {"query": gradient, "positive": problem.candidate_gradient}
    dtypes["candidates"] = problem.candidate_gradient
    for name, value in gradients.items():
        gradients[name] = None if value is None else value.to(dtypes.get(name, accumulate))
    return Output(loss.detach(), **gradients)


def _same(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd of its own: compiled graphs call ops below it, checkpoints count what is kept."""
    key = torch._C.DispatchKey.AutogradFunctionality
    kept: AbstractContextManager[Any] = nullcontext()
    autograd: Any = torch._C._autograd
    if autograd._saved_tensors_hooks_is_enabled():  # not in a transform of torch.func
        kept = torch.autograd.graph.saved_tensors_hooks(_same, _same)
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch.enable_grad(), kept:
        yield


def _loss(
    p: Problem, leaves: dict[str, Tensor], row_grad: Tensor | None, watch_products: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``L`` or the rows ``w_i r_i l_i``, the same for the weights alone, and the products.

    Of the second, whose value is not ``L``, the gradient of the weights is ``(l_i - L) / norm``.
    """
    options, parts = p.rows, rows_of(p, leaves)
    weights, logits, weight = parts.weights, parts.logits, parts.weights.detach()
    query, positive, candidates = parts.query, parts.positive, parts.candidates

    def of_rows(z_positive: Tensor, z: Tensor) -> Tensor:  # r_i l_i
        return row_losses(options.correction, log_sum_exp(z) + parts.rest, z_positive, r)

    with torch.no_grad():
        z_positive, z = logits(*products(query, positive, candidates))
        r = torch.ones_like(z_positive)
        if options.correction == "refined":
            count = (~parts.excluded).sum(1).to(r.dtype)
            r = refined_factor(log_sum_exp(z) + parts.rest, z_positive, count)
        value = of_rows(z_positive, z)
    # Rows of weight zero give no gradient, not even zero times NaN: only their value is taken.
    dead = (weight == 0) | (r == 0)
    if row_grad is not None:
        dead = dead | (row_grad == 0)
    none = dead[:, None]
    living = query.masked_fill(none, 0), positive.masked_fill(none, 0)
    s_positive, s = products(*living, candidates)
    if watch_products and not s.requires_grad:
        s, s_positive = s.requires_grad_(), s_positive.requires_grad_()
    # Candidates may be NaN too, and their products are multiplied by the temperature's gradient.
    z_positive, z = logits(s_positive.masked_fill(dead, 0), s.masked_fill(none, 0))
    alive = of_rows(z_positive.masked_fill(dead, 0), z.masked_fill(none, 0))
    rows = torch.where(weight == 0, 0.0, weight * torch.where(dead, value, alive))
    if options.reduction == "none":
        return rows, weights * value, s_positive, s
    total = norm(options.reduction, weight, parts.active)
    loss = torch.where(total == 0, 0.0, rows.sum() / torch.where(total == 0, 1.0, total))  # 0/0 = 0
    moved = loss.detach() if options.reduction == "weighted_mean" else 0.0  # the norm, too
    share = torch.where(total == 0, 0.0, (value - moved) / total)
    return loss, (weights * share).sum(), s_positive, s
