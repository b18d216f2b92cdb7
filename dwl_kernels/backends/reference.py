"""The specification, backend "eager": the losses as formulas, differentiated by autograd.

Nothing of the package imports this file but the registry, and it takes nothing from `core` but the
problem and the errors about values. Every backend is tested against it in float64.

For row ``i`` of ``B`` queries ``q``, its positive ``p_i`` and candidate ``j`` of ``N``, ``c_j``, or
``c_ij`` where every row has candidates of its own::

    z_ij  = <q_i, c_j> / tau_i - log Q_j       -inf where j has the id, or query, of row i
    z_i+  = <q_i, p_i> / tau_i - log Q+_i
    lse_i = log(exp z_i+ + sum_j exp z_ij)
    l_i   = lse_i - z_i+
    L     = sum_i w_i r_i l_i / norm           r_i = 1

Refined correction (arXiv 2507.09331): the positive leaves the denominator and is not corrected, and
``r_i``, detached, weighs the row by how wrong it still is; ``n_i`` counts the row's candidates,
those that are no hits and not taken out by a log-Q of +inf::

    lse_i = log sum_j exp z_ij + log(1 - Q+_i)       r_i = sigmoid(lse_i - log n_i - z_i+)

Dual scale (after arXiv 2602.07206, in this package's form): the strengths h, s and k weigh the
candidates of a row and move its temperature, both detached::

    kappa_ij = n_i softmax_j(h <q_i, c_j> / tau + s <p_i, c_j> / tau)     over the row's candidates
    g_i      = mean over the slate of sigmoid(z_ij - z_i+)
    tau_i    = tau f_i / mean f,  f_i = clip(1 + k (g_i - mean g), 1/2, 2)
    z_ij     = <q_i, c_j> / tau_i - log Q_j + log kappa_ij

The slate has the strongest candidate of each of ``slate_size`` equal groups of candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwl_kernels.core.problem import (
    NO_ITEM,
    GradMask,
    Output,
    Problem,
    RankProblem,
    SharedProblem,
    SoftmaxStatistics,
)
from dwl_kernels.core.values import not_negative, wrong_domains, wrong_rows

INF = torch.inf


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
        products = {"positive": s_positive, "candidates": s}
        leaves |= {name: one for name, one in products.items() if getattr(wanted, name)}
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
    options, dtype = p.rows, p.dtypes.accumulate
    refined = options.correction == "refined"
    parts = _rows(p, leaves)
    weights, active, rest = parts.weights, parts.active, parts.rest
    weight, logits = weights.detach(), parts.logits
    query, positive, candidates = parts.query, parts.positive, parts.candidates
    count = (~parts.excluded).sum(1).to(dtype)
    held = _products(*(x.detach() for x in (query, positive, candidates)))

    def row_losses(z_positive: Tensor, z: Tensor, r: Tensor) -> Tensor:  # r_i l_i
        lse = _log_sum_exp(z) + rest
        if refined:
            return torch.where(r == 0, 0.0, r * (lse - z_positive))
        return _standard_loss(lse, z_positive)

    with torch.no_grad():
        z_positive, z = logits(*held)
        r = torch.ones_like(z_positive)
        if refined:
            lse = _log_sum_exp(z) + rest
            r = torch.sigmoid(lse - count.log() - z_positive)
            r = torch.where(lse == -INF, 0.0, r)
        value = row_losses(z_positive, z, r)
    # Rows of weight zero give no gradient, not even zero times NaN: only their value is taken.
    dead = (weight == 0) | (r == 0)
    if row_grad is not None:
        dead = dead | (row_grad == 0)
    none = dead[:, None]
    living = query.masked_fill(none, 0), positive.masked_fill(none, 0)
    s_positive, s = _products(*living, candidates)
    if watch_products and not s.requires_grad:
        s, s_positive = s.requires_grad_(), s_positive.requires_grad_()
    # Candidates may be NaN too, and their products are multiplied by the temperature's gradient.
    z_positive, z = logits(s_positive.masked_fill(dead, 0), s.masked_fill(none, 0))
    alive = row_losses(z_positive.masked_fill(dead, 0), z.masked_fill(none, 0), r)
    row_loss = torch.where(dead, value, alive)

    rows = torch.where(weight == 0, 0.0, weight * row_loss)
    if options.reduction == "none":
        return rows, weights * value, s_positive, s
    norm = rows.new_ones(())
    if options.reduction == "mean":
        norm = active.sum().to(dtype)
    elif options.reduction == "weighted_mean":
        norm = weight.sum()
    loss = torch.where(norm == 0, 0.0, rows.sum() / torch.where(norm == 0, 1.0, norm))  # 0/0 is 0
    moved = loss.detach() if options.reduction == "weighted_mean" else 0.0  # the norm, too
    share = torch.where(norm == 0, 0.0, (value - moved) / norm)
    return loss, (weights * share).sum(), s_positive, s


def _standard_loss(lse: Tensor, z_positive: Tensor) -> Tensor:  # [B], lse over the candidates
    """``l_i = log(1 + exp(lse_i - z_i+))``, which keeps the digits of a small loss."""
    nobody = (lse == -INF) & (z_positive == -INF)
    odds = torch.where(nobody, -INF, lse - z_positive)
    return torch.logaddexp(odds, torch.zeros_like(odds))


class Rows(NamedTuple):
    """What the rows are made of, and who competes in each."""

    weights: Tensor  # [B] w_i
    active: Tensor  # [B] bool, what is no padding
    query: Tensor  # [B, D], padded rows zero
    positive: Tensor  # [B, D], likewise
    candidates: Tensor  # [N, D] or [B, K, D]
    tau: Tensor  # [B] or []
    positive_log_q: Tensor  # [B], 0 where the positive is not corrected
    log_q: Tensor  # [N] or [B, K]
    log_kappa: Tensor  # [B, N] or []
    excluded: Tensor  # [B, N] or [B, K] bool
    rest: Tensor  # [B], what the refined correction adds to the log-sum-exp

    def logits(self, s_positive: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:  # [B], [B, N]
        z = s / self.tau[:, None] - self.log_q + self.log_kappa
        return s_positive / self.tau - self.positive_log_q, z.masked_fill(self.excluded, -INF)


def _rows(p: Problem, leaves: dict[str, Tensor]) -> Rows:
    options, dtype = p.rows, p.dtypes.accumulate
    weights, active = _weights(p, leaves.get("domain_weights", options.domain_weights))
    padded = ~active[:, None]
    query = leaves.get("query", p.query.to(dtype)).masked_fill(padded, 0)
    positive, candidates = _positive_and_candidates(p, leaves, padded)
    tau = leaves.get("temperature", options.temperature)
    tau = query.new_ones(()) if tau is None else tau
    tau = torch.where(active, tau * options.tau, 1.0)
    positive_log_q, log_q = _log_q(p, leaves)
    excluded = _excluded(p, active, log_q)
    log_kappa, rest = query.new_zeros(()), torch.zeros_like(tau)
    if isinstance(p, SharedProblem) and p.dual is not None:
        with torch.no_grad():
            x = p.dual.hardness * query + p.dual.similarity * positive
            x = (x @ candidates.T / tau[:, None]).masked_fill(excluded, -INF)
            log_kappa = x.log_softmax(1) + (~excluded).sum(1, keepdim=True).to(dtype).log()
            s_positive, s = _products(query, positive, candidates)
            z = (s / tau[:, None] - log_q).masked_fill(excluded, -INF)
            g = _competition(z, s_positive / tau - positive_log_q, p.dual.slate_size)
            factor = _temperature_factor(p.dual.competition, g, active & ~g.isnan())
            if options.competition_factor is not None:
                factor = options.competition_factor
        tau = tau * factor
    if options.correction == "refined":
        positive_log_q = torch.zeros_like(positive_log_q)
        if p.positive_log_q is not None:
            rest = torch.log1p(-p.positive_log_q.exp())
    parts = (query, positive, candidates, tau, positive_log_q, log_q, log_kappa, excluded, rest)
    return Rows(weights, active, *parts)


def statistics(problem: Problem) -> SoftmaxStatistics:
    """``lse_i``, ``z_i+ - lse_i``, and 1 + the candidates ``j`` without ``z_ij < z_i+``.

    Products are sums of their own, so that candidates with the embedding of the positive tie.
    """
    with torch.no_grad():
        rows = _rows(problem, {})
        query, own = rows.query[:, None], rows.candidates.dim() == 3
        per_row = rows.candidates if own else [rows.candidates] * len(query)
        s = [(c * q).sum(1) for c, q in zip(per_row, query, strict=True)]
        s_positive = (query * rows.positive[:, None]).sum(2)[:, 0]
        z_positive, z = rows.logits(
            s_positive, torch.stack(s) if s else query.new_empty(rows.excluded.shape)
        )
        z_positive = z_positive.masked_fill(rows.weights.isnan(), torch.nan)  # no such item
        lse = _log_sum_exp(z) + rows.rest
        log_probability = z_positive - lse
        if problem.rows.correction == "standard":
            log_probability = -_standard_loss(lse, z_positive)
            lse = torch.logaddexp(lse, z_positive)
        rank = 1 + (~(z < z_positive[:, None]) & ~rows.excluded).sum(1)
        dead = ~rows.active
        return SoftmaxStatistics(*(x.masked_fill(dead, 0) for x in (lse, log_probability, rank)))


def rank_targets(problem: RankProblem) -> Tensor:  # [B] int64
    """``1 + #{v unseen, v != y : not <q, c_v> + b_v < <q, c_y> + b_y}`` in float64, 0 for padding.

    A target outside the table ranks as one whose score is NaN.
    """
    p, ranks = problem, []
    bias = 0.0 if p.bias is None else p.bias.double()
    for row, (query, target) in enumerate(zip(p.query, p.target, strict=True)):
        if target == p.ignore_index:
            ranks.append(0)
            continue
        scores = (p.item_table.double() * query.double()).sum(1) + bias
        inside = bool(0 <= target < len(scores))
        ahead = ~(scores < (scores[target] if inside else INF * 0))
        if p.seen_offsets is not None and p.seen_ids is not None:
            seen = p.seen_ids[p.seen_offsets[row] : p.seen_offsets[row + 1]]
            ahead[seen[seen != NO_ITEM]] = False
        if inside:
            ahead[target] = False
        ranks.append(1 + int(ahead.sum()))
    return p.target.new_tensor(ranks)


def _weights(p: Problem, domain_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """``w_i``, the example weight times the mean over the row's domains, and what is no padding."""
    given, ids = p.rows.example_weights, p.rows.domain_ids
    weight = p.query.new_ones(len(p.query), dtype=p.dtypes.accumulate) if given is None else given
    active = weight != 0
    if isinstance(p, SharedProblem) and p.target is not None:
        active = active & (p.target != p.rows.ignore_index)
    if ids is not None and domain_weights is not None:
        ids = ids.masked_fill(~active[:, None], -1)
        outside, _ = wrong_domains(ids, len(domain_weights))
        present = (ids >= 0) & (ids < len(domain_weights))
        of_slots = torch.where(present, domain_weights[ids.clamp(0, len(domain_weights) - 1)], 0.0)
        count = present.sum(1)
        mean = torch.where(count == 0, 1.0, of_slots.sum(1) / count.clamp(min=1))
        weight = weight * mean
        if outside is not None:
            weight = weight.masked_fill(outside.any(1), torch.nan)
    wrong = wrong_rows(p, active)
    if wrong is not None:
        weight = weight.masked_fill(wrong, torch.nan)
    return not_negative(torch.where(active, weight, 0.0)), active


def _products(query: Tensor, positive: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """``<q_i, p_i>``, ``[B]``, and ``<q_i, c_j>`` or ``<q_i, c_ij>``, ``[B, N]``."""
    if candidates.dim() == 3:
        return (query * positive).sum(1), (candidates * query[:, None]).sum(2)
    return (query * positive).sum(1), query @ candidates.T


def _positive_and_candidates(
    p: Problem, leaves: dict[str, Tensor], padded: Tensor
) -> tuple[Tensor, Tensor]:  # [B, D]; [N, D] or [B, K, D]
    """The embeddings; zeros for padded rows, which may hold anything."""
    dtype = p.dtypes.accumulate
    if not isinstance(p, SharedProblem):
        last = len(p.item_table) - 1
        positive = p.positives().to(dtype)
        candidates = p.item_table[p.candidate_rows.clamp(0, last)].to(dtype)
        nothing = padded | (p.candidate_rows == NO_ITEM)
        return positive.masked_fill(padded, 0), candidates.masked_fill(nothing[:, :, None], 0)
    candidates = leaves.get("candidates", p.candidates.to(dtype))
    if p.in_batch:
        others = padded.new_zeros(len(candidates) - len(padded), 1)
        candidates = candidates.masked_fill(torch.cat((padded, others)), 0)
    if p.positive is None:
        positive = candidates[p.own_columns()]
    else:
        positive = leaves.get("positive", p.positive.to(dtype))
    return positive.masked_fill(padded, 0), candidates


def _log_q(p: Problem, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:  # [B]; [N] or [B, K]
    """``log Q+_i`` and ``log Q_j``; zeros where not given."""
    log_q = leaves.get("candidate_log_q", p.candidate_log_q)
    if log_q is None:
        log_q = p.query.new_zeros(p.num_candidates, dtype=p.dtypes.accumulate)
    # In a batch the log-Q of a positive has both roles, and a gradient of both.
    of_positive = None if "candidate_log_q" in leaves else p.positive_log_q
    if of_positive is None and isinstance(p, SharedProblem) and p.positive is None:
        of_positive = log_q[p.own_columns()]
    if of_positive is None:
        of_positive = p.query.new_full((len(p.query),), 0.0, dtype=p.dtypes.accumulate)
    if p.in_batch:  # a positive of the batch that is never drawn is no candidate of the others
        never = torch.arange(len(log_q), device=log_q.device) < len(p.query)
        log_q = log_q.masked_fill(never & (log_q == -INF), INF)
    return of_positive, log_q


def _excluded(p: Problem, active: Tensor, log_q: Tensor) -> Tensor:  # [B, N] bool
    """Hits, the row's own positive and others of its query, those of padded rows, log-Q +inf."""
    out = (log_q == INF).expand(len(active), p.num_candidates)
    if not isinstance(p, SharedProblem):
        return out | (p.candidate_rows == NO_ITEM)
    columns = torch.arange(p.num_candidates, device=out.device)
    for row_ids, candidate_ids in p.id_pairs():
        out = out | ((row_ids[:, None] == candidate_ids) & (candidate_ids != NO_ITEM))
    if p.positive is None:
        out = out | (columns == p.own_columns()[:, None])
    if p.in_batch:
        others = active.new_zeros(p.num_candidates - len(active))
        out = out | torch.cat((~active, others))
    return out


def _log_sum_exp(z: Tensor) -> Tensor:  # [B, N] -> [B]
    """``log sum_j exp z_ij``; -inf, without a gradient, where all logits are."""
    largest = z.detach().amax(1) if z.shape[1] else z.new_full((len(z),), -INF)
    largest = largest.masked_fill(largest.isinf(), 0)  # inf - inf is NaN
    total = (z - largest[:, None]).exp().sum(1)
    nothing = total == 0
    return torch.where(nothing, -INF, largest + torch.where(nothing, 1.0, total).log())


def _competition(z: Tensor, z_positive: Tensor, slate_size: int) -> Tensor:  # [B, N], [B] -> [B]
    """``g_i``, from the strongest candidate of each group that has one."""
    n = z.shape[1]
    slate_size = min(slate_size, n)  # more groups than candidates: each is alone
    wins, size = torch.zeros_like(z_positive), torch.zeros_like(z_positive)
    for group in range(slate_size):
        start, stop = -(-group * n // slate_size), -(-(group + 1) * n // slate_size)
        best = z[:, start:stop].amax(1)
        there = best != -INF
        wins = wins + torch.where(there, torch.sigmoid(best - z_positive), 0.0)
        size = size + there
    return wins / size.clamp(min=1)


def _temperature_factor(competition: float, g: Tensor, counts: Tensor) -> Tensor:  # [B]
    """``f_i / mean f``, means over the rows that count; 1 for the others."""
    n = counts.sum().clamp(min=1)
    f = (1 + competition * (g - torch.where(counts, g, 0.0).sum() / n)).clamp(0.5, 2.0)
    return torch.where(counts, f / (torch.where(counts, f, 0.0).sum() / n), 1.0)
