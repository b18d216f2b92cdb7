"""The mathematics, in the order of the formulas. Every other backend is tested against this one.

For row ``i`` of ``B`` queries ``q``, its positive ``p_i`` and candidate ``j`` of ``N``, ``c_j``::

    z_ij  = <q_i, c_j> / tau_i - log Q_j       -inf where j is a hit of row i (the same id)
    z_i+  = <q_i, p_i> / tau_i - log Q+_i
    lse_i = log(exp z_i+ + sum_j exp z_ij)
    l_i   = lse_i - z_i+
    L     = sum_i a_i l_i                      a_i = w_i r_i / norm

    dL/dz_ij = a_i p_ij     dL/dz_i+ = a_i (p_i+ - 1)     p = exp(z - lse)

Where every row has candidates of its own, drawn from a table, ``c_j`` is ``c_ij``, ``[B, K, D]``.

With the refined correction (arXiv 2507.09331) the positive leaves the denominator and is not
corrected, ``lse_i = log sum_j exp z_ij + log(1 - Q+_i)``, and ``r_i = sigmoid(lse_i - log n_i -
z_i+)``, detached, weighs the row by how wrong it still is; ``n_i`` counts the row's candidates,
those that are no hits and not taken out by a log-Q of +inf. Then ``p_ij = exp z_ij / sum_k exp
z_ik`` and ``p_i+ = 0``. Otherwise ``r_i = 1``.

The dual scale (after arXiv 2602.07206, in this package's form) weighs the candidates of a row and
moves its temperature, both detached, by the strengths h, s and k::

    kappa_ij = n_i softmax_j(h <q_i, c_j> / tau + s <p_i, c_j> / tau)     over the row's candidates
    g_i      = mean over the slate of sigmoid(z_ij - z_i+)
    tau_i    = tau f_i / mean f,  f_i = clip(1 + k (g_i - mean g), 1/2, 2)
    z_ij     = <q_i, c_j> / tau_i - log Q_j + log kappa_ij
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dwl_kernels.core.problem import NO_ITEM, DualScale, Output, Problem, RowWeights, Wanted


def solve(
    problem: Problem,
    wanted: Wanted,
    row_grad: Tensor | None = None,  # [B], gradient of the row losses of reduction "none"
) -> Output:
    """The loss and the wanted gradients, with a ``[B, N]`` matrix of logits in memory."""
    weights = problem.row_weights()
    query, positive, candidates = embeddings(problem, weights)
    candidates = candidates_of(problem, weights, candidates, 0, len(query))
    tau = problem.temperatures(weights.active)  # [B]
    excluded = excluded_candidates(problem, weights, 0, len(query))

    bias = query.new_zeros(excluded.shape)  # [B, N] b_ij - log Q_j
    candidate_log_q = log_q_of_candidates(problem)
    if candidate_log_q is not None:
        bias = bias - candidate_log_q
    if problem.dual is not None:
        pull = problem.dual.hardness * query + problem.dual.similarity * positive
        x = (pull @ candidates.T / tau[:, None]).masked_fill(excluded, -torch.inf)
        plain = query @ candidates.T / tau[:, None] + bias
        z_positive = (query * positive).sum(1) / tau
        g = competition_on_slate(problem, plain.masked_fill(excluded, -torch.inf), z_positive)
        tau = tau * temperature_factor(problem.dual, g, weights)
        bias = bias + x.log_softmax(1) + (~excluded).sum(1, keepdim=True).to(x.dtype).log()
    z = scores(query, candidates) / tau[:, None] + bias
    z = z.masked_fill(excluded, -torch.inf)
    z_positive = (query * positive).sum(1) / tau  # [B]
    e, total, lse_candidates = exponentials(z)
    if problem.correction == "refined":
        lse, r = refine(lse_candidates, z_positive, problem.positive_log_q, (~excluded).sum(1))
        row_loss = torch.where(r == 0, 0.0, r * (lse - z_positive))  # r_i l_i
        p_positive_minus_1 = torch.full_like(lse, -1.0)
    else:
        positive_log_q = log_q_of_positives(problem)
        if positive_log_q is not None:
            z_positive = z_positive - positive_log_q
        r = torch.ones_like(z_positive)
        row_loss, p_positive_minus_1 = compete(lse_candidates, z_positive)
    loss = reduce_rows(row_loss, weights, problem.reduction)
    a = refined_coefficients(row_coefficients(weights, row_grad), r)
    # A row of weight zero gives exact zeros, also where its p overflowed or an embedding is NaN.
    nothing = (a == 0)[:, None]
    dz_positive = torch.where(nothing, 0.0, (a * p_positive_minus_1)[:, None])
    dz = torch.where(nothing, 0.0, e * shares(dz_positive, total))

    d_query = (weighted_sum(dz, candidates) + dz_positive * positive) / tau[:, None]
    d_query = torch.where(nothing, 0.0, d_query)
    if problem.by_row:
        d_candidates, d_positive = dz / tau[:, None], dz_positive[:, 0] / tau
    else:
        scaled_query = torch.where(nothing, 0.0, query / tau[:, None])
        d_candidates, d_positive = dz.T @ scaled_query, dz_positive * scaled_query
    d_log_q = -dz.sum(0)
    if problem.positive_competes:
        d_candidates.index_add_(0, problem.own_columns(), d_positive)
        d_log_q.index_add_(0, problem.own_columns(), -dz_positive[:, 0])
    clear_padding(problem, weights, d_candidates)
    gradients = Gradients(d_query, d_positive, d_candidates, d_log_q)
    return finish(problem, wanted, weights, loss, row_loss, row_grad, query, gradients)


class Gradients(NamedTuple):
    """In the accumulation dtype; None where not wanted."""

    query: Tensor | None  # [B, D]
    positive: Tensor | None  # [B, D]; dL/d<q_i, p_i> [B] where candidates are by row
    candidates: Tensor | None  # [N, D]; dL/d<q_i, c_ij> [B, K] where candidates are by row
    candidate_log_q: Tensor | None  # [N]


def embeddings(problem: Problem, weights: RowWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Query, positive and candidates in the accumulation dtype, padded rows set to zero.

    A table stays as it is, to be read by `candidates_of`.
    """
    rows = problem.query.shape[0]
    query = problem.query.to(problem.accumulate)
    candidates = problem.candidates
    if not problem.by_row:
        candidates = candidates.to(problem.accumulate)
    if problem.positive is None:
        positive = candidates[problem.own_columns()].to(problem.accumulate)
    else:
        positive = problem.positive.to(problem.accumulate)
    if weights.active is not None:
        padded = ~weights.active[:, None]
        query, positive = query.masked_fill(padded, 0), positive.masked_fill(padded, 0)
        if problem.in_batch:
            candidates = torch.cat((positive, candidates[rows:]))
    return query, positive, candidates


def candidates_of(
    problem: Problem, weights: RowWeights, candidates: Tensor, start: int, stop: int
) -> Tensor:
    """The candidates of rows ``start:stop``, ``[N, D]`` or, each row its own, ``[rows, K, D]``."""
    if problem.candidate_rows is None:
        return candidates
    ids = problem.candidate_rows[start:stop].clamp(0, len(candidates) - 1)
    own = candidates[ids].to(problem.accumulate)
    if weights.active is not None:
        own.masked_fill_(~weights.active[start:stop, None, None], 0)
    return own


def scores(query: Tensor, candidates: Tensor) -> Tensor:  # [B, N]
    """``<q_i, c_j>`` of candidates ``[N, D]``, ``<q_i, c_ij>`` of candidates ``[B, K, D]``."""
    if candidates.dim() == 3:
        return (candidates @ query[:, :, None])[:, :, 0]
    return query @ candidates.T


def weighted_sum(weight: Tensor, candidates: Tensor) -> Tensor:  # [B, D]
    """``sum_j weight_ij c_j``, weight ``[B, N]``, of candidates ``[N, D]`` or ``[B, K, D]``."""
    if candidates.dim() == 3:
        return (weight[:, None] @ candidates)[:, 0]
    return weight @ candidates


def excluded_candidates(problem: Problem, weights: RowWeights, start: int, stop: int) -> Tensor:
    """Which candidates rows ``start:stop`` do not compete with, bool ``[stop - start, N]``.

    Accidental hits, those that a log-Q of +inf takes out, a row's own positive, and in a batch the
    positives of padded rows.
    """
    log_q = log_q_of_candidates(problem)
    if problem.candidate_rows is not None and problem.target is not None:
        excluded = problem.candidate_rows[start:stop] == problem.target[start:stop, None]
        return excluded if log_q is None else excluded | (log_q[start:stop] == torch.inf)
    n = problem.candidates.shape[0]
    excluded = torch.zeros(stop - start, n, dtype=torch.bool, device=problem.query.device)
    if log_q is not None:
        excluded |= log_q == torch.inf
    if problem.positive_ids is not None and problem.candidate_ids is not None:
        ids = problem.positive_ids[start:stop, None]
        excluded |= (ids == problem.candidate_ids) & (ids != NO_ITEM)
    if problem.positive is None:
        excluded.scatter_(1, problem.own_columns()[start:stop, None], True)
    if problem.in_batch and weights.active is not None:
        excluded[:, : len(weights.active)] |= ~weights.active
    return excluded


def log_q_of_positives(problem: Problem) -> Tensor | None:  # [B]
    """``log Q+_i``; that of the candidate where the positive is one."""
    if problem.positive_competes and problem.positive_log_q is None:
        own = problem.own_columns()
        return None if problem.candidate_log_q is None else problem.candidate_log_q[own]
    return problem.positive_log_q


def log_q_of_candidates(problem: Problem) -> Tensor | None:  # [N] or [B, K]
    """``log Q_j``. A positive of the batch that is never drawn (-inf) is no candidate of others.

    +inf takes a candidate out, as if it were not there.
    """
    log_q = problem.candidate_log_q
    if log_q is None or not problem.in_batch:
        return log_q
    of_batch = torch.arange(len(log_q), device=log_q.device) < problem.query.shape[0]
    return log_q.masked_fill(of_batch & (log_q == -torch.inf), torch.inf)


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


def clear_padding(problem: Problem, weights: RowWeights, d_candidates: Tensor) -> None:
    """Zeros for the positives of padded rows of a batch, also where another row made NaN of all."""
    if problem.in_batch and weights.active is not None:
        d_candidates[: len(weights.active)].masked_fill_(~weights.active[:, None], 0)


def competition_on_slate(
    problem: Problem,
    z: Tensor,  # [B, N] before the dual scale, -inf where excluded
    z_positive: Tensor,  # [B] without log-Q
    start: int = 0,  # the first of these rows
) -> Tensor:  # [B]
    """``g_i``: candidates fall into ``slate_size`` equal groups, the strongest of each competes.

    Candidates are drawn at random, so this is a stochastic top-K that one pass over tiles finds.
    """
    assert problem.dual is not None
    log_q = log_q_of_positives(problem)
    if log_q is not None:
        z_positive = z_positive - log_q[start : start + len(z)]
    n, groups = z.shape[1], problem.dual.slate_size
    group = torch.arange(n, device=z.device) * groups // max(n, 1)
    slate = z.new_full((len(z), groups), -torch.inf)
    slate = slate.scatter_reduce(1, group.expand_as(z), z, "amax")
    empty = slate == -torch.inf
    wins = torch.sigmoid(slate - z_positive[:, None]).masked_fill(empty, 0)
    return wins.sum(1) / (~empty).sum(1).clamp(min=1)


def temperature_factor(dual: DualScale, g: Tensor, weights: RowWeights) -> Tensor:  # [B]
    """``f_i / mean f``. Padding and rows that are NaN stay out of the means, and get 1."""
    active = ~g.isnan()
    if weights.active is not None:
        active = active & weights.active
    count = active.sum().clamp(min=1)
    g = torch.where(active, g, 0.0)
    f = (1 + dual.competition * (g - g.sum() / count)).clamp(0.5, 2.0)
    mean = torch.where(active, f, 0.0).sum() / count
    return torch.where(active, f / mean, 1.0)


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


def reduce_rows(row_loss: Tensor, weights: RowWeights, reduction: str) -> Tensor:
    """``sum_i w_i r_i l_i / norm``, or the rows themselves for "none"."""
    rows = torch.where(weights.weight == 0, 0.0, weights.weight * row_loss)
    if reduction == "none":
        return rows
    total = rows.sum()
    return total if weights.norm is None else divide(total, weights.norm)


def row_coefficients(weights: RowWeights, row_grad: Tensor | None) -> Tensor:
    """``a_i / r_i``, ``[B]``: what the gradient of row loss ``i`` is multiplied by."""
    if row_grad is not None:
        return weights.weight * row_grad
    return weights.weight if weights.norm is None else divide(weights.weight, weights.norm)


def refined_coefficients(coefficients: Tensor, r: Tensor) -> Tensor:
    """``a_i``: 0 where the row counts for nothing, also if its ``r_i`` is NaN."""
    return torch.where(coefficients == 0, 0.0, coefficients * r)


def divide(value: Tensor, norm: Tensor) -> Tensor:
    """``value / norm``, where 0/0 is 0: a batch of padding has loss and gradients zero."""
    return torch.where(norm == 0, 0.0, value / norm)


def finish(
    problem: Problem,
    wanted: Wanted,
    weights: RowWeights,
    loss: Tensor,  # [] or [B]
    row_loss: Tensor,  # [B] r_i l_i
    row_grad: Tensor | None,  # [B]
    query: Tensor,  # [B, D] in the accumulation dtype, padded rows zero
    gradients: Gradients,
) -> Output:
    """The wanted gradients in their dtypes; the last two follow from the others."""
    d_query, d_positive, d_candidates, d_log_q = gradients
    d_temperature = d_weights = None

    def to(dtype: torch.dtype, gradient: Tensor | None, want: bool) -> Tensor | None:
        return gradient.to(dtype) if want and gradient is not None else None

    if wanted.temperature:
        assert problem.temperature is not None
        assert d_query is not None
        d_temperature = -(query * d_query).sum(1) / problem.temperatures(
            weights.active
        )  # dL/dtau_i
        d_temperature = torch.where(weights.weight == 0, 0.0, d_temperature)
        if problem.temperature.dim() == 0:
            d_temperature = d_temperature.sum()
    if wanted.domain_weights:
        d_weights = domain_weights_gradient(problem, weights, row_loss, row_grad)
    return Output(
        loss=loss,
        query=to(problem.gradient, d_query, wanted.query),
        positive=to(problem.candidate_gradient, d_positive, wanted.positive),
        candidates=to(problem.candidate_gradient, d_candidates, wanted.candidates),
        candidate_log_q=d_log_q if wanted.candidate_log_q else None,
        temperature=d_temperature,
        domain_weights=d_weights,
    )


def domain_weights_gradient(
    problem: Problem,
    weights: RowWeights,
    row_loss: Tensor,  # [B] r_i l_i
    row_grad: Tensor | None,  # [B]
) -> Tensor:  # [num_domains]
    """``dL/dW_d``: the losses of the rows of domain ``d``, each by its share of the weight."""
    assert problem.domain_ids is not None
    assert problem.domain_weights is not None
    ids = problem.domain_ids
    if row_grad is not None:
        d_weight = row_grad * row_loss
    else:
        if problem.reduction == "weighted_mean":
            # The norm is the sum of the weights and moves with them.
            row_loss = row_loss - reduce_rows(row_loss, weights, problem.reduction)
        d_weight = row_loss if weights.norm is None else divide(row_loss, weights.norm)
    if problem.example_weights is not None:
        d_weight = d_weight * problem.example_weights
    if weights.active is not None:
        d_weight = torch.where(weights.active, d_weight, 0.0)
    present = (ids >= 0) & (ids < problem.domain_weights.shape[0])
    share = d_weight[:, None] / present.sum(1, keepdim=True).clamp(min=1)
    share = torch.where(present, share, 0.0)  # an infinite loss goes to its own domains only
    gradient = torch.zeros_like(problem.domain_weights)
    slots = ids.masked_fill(~present, 0).long()
    return gradient.index_add_(0, slots.flatten(), share.flatten())
