"""Ranks of targets and statistics of rows, as formulas. Called by the registry."""

from __future__ import annotations

import torch
from torch import Tensor

from dwl_kernels.backends.reference.formulas import INF, log_sum_exp, standard_loss
from dwl_kernels.backends.reference.rows import rows_of
from dwl_kernels.core.problem import NO_ITEM, Problem, RankProblem, SoftmaxStatistics


def unsupported_ranks(problem: RankProblem) -> str | None:
    """None: it takes every problem."""
    return None


def statistics(problem: Problem) -> SoftmaxStatistics:
    """``lse_i``, ``z_i+ - lse_i``, and 1 + the candidates ``j`` without ``z_ij < z_i+``.

    Products are sums of their own, so that candidates with the embedding of the positive tie.
    """
    with torch.no_grad():
        rows = rows_of(problem, {})
        query, own = rows.query[:, None], rows.candidates.dim() == 3
        per_row = rows.candidates if own else [rows.candidates] * len(query)
        s = [(c * q).sum(1) for c, q in zip(per_row, query, strict=True)]
        s_positive = (query * rows.positive[:, None]).sum(2)[:, 0]
        z_positive, z = rows.logits(
            s_positive, torch.stack(s) if s else query.new_empty(rows.excluded.shape)
        )
        z_positive = z_positive.masked_fill(rows.weights.isnan(), torch.nan)  # no such item
        lse = log_sum_exp(z) + rows.rest
        log_probability = z_positive - lse
        if problem.rows.correction == "standard":
            log_probability = -standard_loss(lse, z_positive)
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
