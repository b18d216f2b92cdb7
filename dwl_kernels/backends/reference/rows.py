"""What the fields of a problem mean: the rows of the formulas. Called by `solve` and `ranks`.

Padded rows are zeros here, whatever they hold.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dwl_kernels.backends.reference.formulas import (
    INF,
    competition,
    log_kappa,
    products,
    temperature_factor,
)
from dwl_kernels.core.problem import NO_ITEM, Problem, SharedProblem
from dwl_kernels.core.values import not_negative, wrong_domains, wrong_rows


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


def rows_of(p: Problem, leaves: dict[str, Tensor]) -> Rows:
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
    kappa, rest = query.new_zeros(()), torch.zeros_like(tau)
    if isinstance(p, SharedProblem) and p.dual is not None:
        with torch.no_grad():
            x = p.dual.hardness * query + p.dual.similarity * positive
            x = (x @ candidates.T / tau[:, None]).masked_fill(excluded, -INF)
            kappa = log_kappa(x, (~excluded).sum(1).to(dtype))
            s_positive, s = products(query, positive, candidates)
            z = (s / tau[:, None] - log_q).masked_fill(excluded, -INF)
            g = competition(z, s_positive / tau - positive_log_q, p.dual.slate_size)
            factor = temperature_factor(p.dual.competition, g, active & ~g.isnan())
            if options.competition_factor is not None:
                factor = options.competition_factor
        tau = tau * factor
    if options.correction == "refined":
        positive_log_q = torch.zeros_like(positive_log_q)
        if p.positive_log_q is not None:
            rest = torch.log1p(-p.positive_log_q.exp())
    parts = (query, positive, candidates, tau, positive_log_q, log_q, kappa, excluded, rest)
    return Rows(weights, active, *parts)


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
