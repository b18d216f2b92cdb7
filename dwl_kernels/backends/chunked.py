"""Pure PyTorch over blocks of rows: bounded memory on every device that PyTorch runs on.

The formulas are those of `reference`, with their gradients written out, a block of rows at a time
and in place. A block keeps its logits from the forward to the backward, so nothing is computed
twice, and the products are the three that any implementation must do, through the vendor's BLAS::

    dL/dz_ij = a_i p_ij     dL/dz_i+ = a_i (p_i+ - 1)     p = exp(z - lse)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from dwl_kernels.core.candidates import (
    dual_scale,
    excluded_candidates,
    log_q_of_candidates,
    log_q_of_positives,
    row_blocks,
    row_candidates,
)
from dwl_kernels.core.problem import GradMask, Output, Problem, SharedProblem, accumulate_dtype
from dwl_kernels.core.rows import Gradients, Prepared, clear_padding, embeddings, finish, prepare


def unavailable_reason(device_type: str) -> str | None:
    """None: it runs everywhere."""
    return None


def unsupported_reason(problem: Problem) -> str | None:
    """None: it takes every problem."""
    return None


def solve(
    problem: Problem,
    wanted: GradMask,
    row_grad: Tensor | None = None,  # [B], gradient of the row losses of reduction "none"
) -> Output:
    """The loss and the wanted gradients, with a block of the logits in memory at a time."""
    prepared = prepare(problem, row_grad)
    active = prepared.active
    parts = parts_of(problem, prepared)
    query, positive, candidates, tau = parts.query, parts.positive, parts.candidates, parts.tau
    per_row, own = problem.per_row, None  # the candidate that is the positive of each row
    if isinstance(problem, SharedProblem) and problem.positive is None:
        own = problem.own_columns()
    coefficients = prepared.coefficient[:, None]  # [B, 1]
    refined = problem.rows.correction == "refined"

    want_query = wanted.query or wanted.temperature
    want_positive = wanted.positive or (wanted.candidates and own is not None)
    positive_log_q = log_q_of_positives(problem)
    row_loss = query.new_empty(len(query))
    d_query = torch.empty_like(query) if want_query else None
    d_positive = torch.empty_like(row_loss if per_row else positive) if want_positive else None
    d_candidates = None
    if wanted.candidates:
        shape = candidates.shape if not per_row else (len(query), problem.num_candidates)
        d_candidates = query.new_zeros(shape)
    d_log_q = query.new_zeros(len(candidates)) if wanted.candidate_log_q else None

    for block in row_blocks(problem):
        z, c, excluded = logits(problem, active, parts, block, counted=refined)
        count = torch.full_like(tau[block, 0], z.shape[1])
        if refined and excluded is not None:
            count -= excluded.sum(1)
        del excluded
        z_positive = (query[block] * positive[block]).sum(1) / tau[block, 0]
        e, total, lse_candidates = exponentials(z)
        a = coefficients[block]
        if refined:
            log_q = None if problem.positive_log_q is None else problem.positive_log_q[block]
            lse, r = refine(lse_candidates, z_positive, log_q, count)
            row_loss[block] = torch.where(r == 0, 0.0, r * (lse - z_positive))
            a = torch.where(a == 0, 0.0, a * r[:, None])  # r may be NaN
            p_positive_minus_1 = torch.full_like(a, -1.0)
        else:
            if positive_log_q is not None:
                z_positive -= positive_log_q[block]
            row_loss[block], minus_1 = compete(lse_candidates, z_positive)
            p_positive_minus_1 = minus_1[:, None]
        if not any(wanted[:5]):
            continue
        # A row of weight zero gives exact zeros, also where its p overflowed or something is NaN.
        nothing = a == 0
        dz_positive = torch.where(nothing, 0.0, a * p_positive_minus_1)
        scaled_query = torch.where(nothing, 0.0, query[block] / tau[block])
        if d_positive is not None:
            one = dz_positive[:, 0] / tau[block, 0] if per_row else dz_positive * scaled_query
            d_positive[block] = one
        if d_query is None and d_candidates is None and d_log_q is None:
            continue
        dz = e.mul_(shares(dz_positive, total)).masked_fill_(nothing, 0)
        if d_query is not None:
            d = weighted_sum(dz, c).addcmul_(dz_positive, positive[block])
            d_query[block] = d.div_(tau[block]).masked_fill_(nothing, 0)
        if d_candidates is not None and per_row:
            d_candidates[block] = dz / tau[block]
        elif d_candidates is not None:
            d_candidates.addmm_(dz.T, scaled_query)
        if d_log_q is not None:
            d_log_q -= dz.sum(0)
            if own is not None:
                d_log_q.index_add_(0, own[block], -dz_positive[:, 0])

    if d_candidates is not None and d_positive is not None and own is not None:
        d_candidates.index_add_(0, own, d_positive)
        clear_padding(problem, active, d_candidates)
    gradients = Gradients(d_query, d_positive, d_candidates, d_log_q)
    return finish(problem, wanted, prepared, row_grad, row_loss, gradients, query)


class Parts(NamedTuple):
    """What the logits are made of: ``z_ij = <score_i, c_j> / tau_i + shift_i - log Q_j``."""

    query: Tensor  # [B, D]
    positive: Tensor  # [B, D]
    candidates: Tensor  # [N, D], or the table
    score: Tensor  # [B, D]
    shift: Tensor | None  # [B, 1]
    tau: Tensor  # [B, 1]


def parts_of(problem: Problem, prepared: Prepared) -> Parts:
    query, positive, candidates = embeddings(problem, prepared.active)
    score, shift, tau = query, None, prepared.tau[:, None]
    if isinstance(problem, SharedProblem) and problem.dual is not None:
        scaled = dual_scale(problem, problem.dual, prepared, query, positive, candidates)
        score, shift, tau = scaled.score, scaled.shift[:, None], scaled.tau[:, None]
    return Parts(query, positive, candidates, score, shift, tau)


def logits(
    problem: Problem, active: Tensor | None, parts: Parts, block: slice, counted: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The logits of a block of rows, -inf where excluded; their candidates; which are excluded.

    A log-Q of +inf makes -inf by itself, and is looked at only where candidates are `counted`.
    """
    c = row_candidates(problem, active, parts.candidates, block)
    z = scores(parts.score[block], c).div_(parts.tau[block])
    if parts.shift is not None:
        z += parts.shift[block]
    log_q = log_q_of_candidates(problem)
    if log_q is not None:
        z -= log_q[block] if problem.per_row else log_q
    excludes = problem.per_row or (counted and log_q is not None)
    if isinstance(problem, SharedProblem):
        excludes |= problem.positive is None or bool(problem.id_pairs())
    if not excludes:
        return z, c, None
    excluded = excluded_candidates(problem, active, block)
    return z.masked_fill_(excluded, -torch.inf), c, excluded


def scores(query: Tensor, candidates: Tensor) -> Tensor:  # [B, N]
    """``<q_i, c_j>`` of candidates ``[N, D]``, ``<q_i, c_ij>`` of candidates ``[B, K, D]``."""
    if candidates.dim() == 3:
        # As the product of the positive is made: a candidate with its embedding ties with it.
        return (candidates * query[:, None]).sum(2)
    return query @ candidates.T


def weighted_sum(weight: Tensor, candidates: Tensor) -> Tensor:  # [B, D]
    """``sum_j weight_ij c_j``, weight ``[B, N]``, of candidates ``[N, D]`` or ``[B, K, D]``."""
    if candidates.dim() == 3:
        return (weight[:, None] @ candidates)[:, 0]
    return weight @ candidates


def exponentials(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [B, N] -> [B, N], [B], [B]
    """``e_ij = exp(z_ij - max_j z_ij)`` in place of `z`, their sums, and ``log sum_j exp z_ij``."""
    largest = z.amax(1) if z.shape[1] else z.new_full(z.shape[:1], -torch.inf)
    largest = largest.masked_fill(largest.isinf(), 0)  # inf - inf is NaN
    # On a CPU PyTorch's exp takes 16 times as long where it underflows, and exp2 never does.
    e = z.sub_(largest[:, None]).mul_(1 / math.log(2)).exp2_()
    total = e.sum(1)
    return e, total, largest + total.log()


def shares(
    dz_positive: Tensor,  # [B, 1]
    total: Tensor,  # [B]
) -> Tensor:  # [B, 1]
    """What ``e_ij`` is multiplied by to be ``dL/dz_ij``: the candidates share what p_i+ lacks to 1.

    ``exp(z - lse)`` would round lse once more, which large logits show.
    """
    return torch.where(total == 0, 0.0, -dz_positive[:, 0] / total)[:, None]


def compete(
    lse_candidates: Tensor,  # [B]
    z_positive: Tensor,  # [B]
) -> tuple[Tensor, Tensor]:
    """``l_i`` and ``p_i+ - 1`` from the log-odds against the positive, which may be infinite.

    The loss of a positive that the sampler never draws (log-Q -inf) is 0, the limit, and so is that
    of a row without competitors.
    """
    odds = lse_candidates - z_positive
    nobody = (lse_candidates == -torch.inf) & (z_positive == -torch.inf)
    odds = odds.masked_fill(nobody, -torch.inf)
    return torch.logaddexp(odds, torch.zeros_like(odds)), -torch.sigmoid(odds)


def refine(
    lse_candidates: Tensor,  # [B]
    z_positive: Tensor,  # [B], without log-Q
    positive_log_q: Tensor | None,  # [B]
    count: Tensor,  # [B] n_i
) -> tuple[Tensor, Tensor]:
    """``lse_i`` and ``r_i`` of arXiv 2507.09331; ``r_i = 0`` where nothing is left to compete."""
    lse = lse_candidates
    if positive_log_q is not None:
        lse = lse + torch.log1p(-torch.exp(positive_log_q))
    r = torch.sigmoid(lse - torch.log(count.to(lse.dtype)) - z_positive)
    return lse, torch.where(lse == -torch.inf, 0.0, r)


def takes_table(source: Tensor, dtype: torch.dtype) -> bool:
    """True: it sums the gradient of every table."""
    return True


def table_gradient(
    source: Tensor,  # [R, D]
    ids: list[Tensor],  # each [R, J]
    coefficients: list[Tensor],  # each [R, J], or none at all for 1
    table_rows: int,
    dtype: torch.dtype,
    compact: bool,
) -> tuple[Tensor, Tensor]:
    """For every id, the sum over its places of ``coefficient * source``, in a fixed order.

    Places whose id is outside the table or whose coefficient is 0 go nowhere: padding may hold NaN.

    Returns:
        The sums, ``[V, D]``, and nothing; or ``compact`` those of the different ids, and the ids.
    """
    source = source.to(accumulate_dtype(dtype))
    rows = torch.arange(len(source), device=source.device)[:, None]
    row = torch.cat([rows.expand_as(one).flatten() for one in ids])
    if coefficients:
        coefficient = torch.cat([one.flatten() for one in coefficients])
    else:
        coefficient = source.new_ones(len(row))
    id = torch.cat([one.flatten() for one in ids])
    nowhere = (id < 0) | (id >= table_rows) | (coefficient == 0)
    id, order = id.masked_fill(nowhere, table_rows).sort(stable=True)  # these come last
    if compact:
        distinct, counts = id.unique_consecutive(return_counts=True)
        offsets = counts.cumsum(0) - counts
        distinct = distinct[: int((distinct < table_rows).sum())]
    else:
        offsets = torch.searchsorted(id, torch.arange(table_rows + 1, device=id.device))
        distinct = id.new_empty(0)
    # A bag reads its rows one after the other: no matrix of all products, and no atomics.
    sums = embedding_bag(
        row[order], source, offsets, mode="sum", per_sample_weights=coefficient[order]
    )
    return sums[: len(distinct) if compact else table_rows].to(dtype), distinct
