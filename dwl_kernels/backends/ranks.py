"""Ranks and statistics in PyTorch over blocks, for `chunked` and backends without such kernels.

A block of scores is compared with two numbers of its row: what lies above `high` is ahead of the
target, what lies below `low` is not, and float64 decides about the few pairs in between, for the
reason that `core.ranking` gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dwl_kernels.backends.chunked import Parts, compete, exponentials, logits, parts_of
from dwl_kernels.core.candidates import (
    BLOCK_ELEMENTS,
    log_q_of_candidates,
    log_q_of_positives,
    row_blocks,
)
from dwl_kernels.core.problem import (
    NO_ITEM,
    Problem,
    RankProblem,
    SoftmaxStatistics,
    accumulate_dtype,
)
from dwl_kernels.core.ranking import own_items, seen_pairs
from dwl_kernels.core.rows import prepare


def unsupported_ranks(problem: RankProblem) -> str | None:
    """None: it takes every problem."""
    return None


def rank_targets(problem: RankProblem) -> Tensor:  # [B] int64
    """The rank of every target, with a block of the scores in memory at a time."""
    own, padded, outside = own_items(problem)
    nowhere = padded | outside
    rank = torch.ones_like(own)
    num_rows, num_items = len(own), len(problem.item_table)
    elements = BLOCK_ELEMENTS.get(own.device.type, 1 << 22)
    height = min(max(num_rows, 1), math.isqrt(elements))
    width = min(elements // height, 1 << 20)
    seen = None if problem.seen_ids is None else seen_pairs(problem)
    for start in range(0, num_rows, height):
        rows = slice(start, min(start + height, num_rows))
        mine = own[rows].masked_fill(nowhere[rows], NO_ITEM)
        left_out = [(torch.arange(len(mine), device=own.device), mine)]
        if seen is not None:
            here = (seen[0] >= start) & (seen[0] < rows.stop)
            left_out.append((seen[0][here] - start, seen[1][here]))
        pairs = tuple(torch.cat(part) for part in zip(*left_out, strict=True))
        block = _Block(problem, rows, own[rows], nowhere[rows])
        for first in range(0, num_items, width):
            rank[rows] += block.ahead(first, min(first + width, num_items), pairs)
    return rank.masked_fill_(padded, 0)


class _Block:
    """Some rows and their targets, past which the items come."""

    def __init__(self, problem: RankProblem, rows: slice, own: Tensor, nowhere: Tensor) -> None:
        self.table, self.bias = problem.item_table, problem.bias
        self.query = problem.query[rows].to(accumulate_dtype(problem.query.dtype))
        self.wide, self.target = self.query.double(), self.table[own].double()
        self.target_bias = None if self.bias is None else self.bias[own].double()
        score = (self.wide * self.target).sum(1)
        if self.target_bias is not None:
            score += self.target_bias
        self.score = score.masked_fill_(nowhere, torch.nan)
        self.lost = is_lost(self.score)
        self.length = finite_length(self.query)

    def ahead(self, first: int, last: int, left_out: tuple[Tensor, ...]) -> Tensor:  # [b]
        """How many of the items ``first : last`` are ahead of each target."""
        items = self.table[first:last].to(self.query.dtype)
        scores = self.query @ items.T
        most = self.length * finite_length(items).max()
        if self.bias is not None:
            scores += self.bias[first:last]
            most = most + largest_finite(self.bias[first:last])
        bounds = bounds_of(self.score, most, self.query.dtype, self.query.shape[1])
        rows, ids = left_out
        here = (ids >= first) & (ids < last)
        rows, places = rows[here], ids[here] - first
        scores[rows, places] = -torch.inf
        count, row, item = compared(scores, bounds)
        if bool(self.lost.any()):
            gone = torch.zeros_like(scores, dtype=torch.bool)
            gone[rows, places] = True
            count = torch.where(self.lost, (~gone).sum(1), count)
        for some, those in pieces(row, item, items.shape[1]):
            lead = (self.wide[some] * (items[those].double() - self.target[some])).sum(1)
            if self.bias is not None and self.target_bias is not None:
                lead += self.bias[first:last][those].double() - self.target_bias[some]
            count.index_add_(0, some, (lead < 0).to(count.dtype), alpha=-1)
        return count


def statistics(problem: Problem) -> SoftmaxStatistics:
    """What the loss knows of every row, with a block of the logits in memory at a time."""
    prepared = prepare(problem, None)
    parts = parts_of(problem, prepared)
    refined = problem.rows.correction == "refined"
    positive_log_q = None if refined else log_q_of_positives(problem)
    found = SoftmaxStatistics(
        torch.empty_like(prepared.weight),
        torch.empty_like(prepared.weight),
        torch.empty_like(prepared.weight, dtype=torch.int64),
    )
    for block in row_blocks(problem):
        z, c, excluded = logits(problem, prepared.active, parts, block, counted=True)
        z_positive = (parts.query[block] * parts.positive[block]).sum(1) / parts.tau[block, 0]
        if positive_log_q is not None:
            z_positive -= positive_log_q[block]
        z_positive.masked_fill_(prepared.weight[block].isnan(), torch.nan)  # no such item
        found.rank[block] = 1 + _ahead(problem, parts, block, z, z_positive, c, excluded)
        _, _, lse = exponentials(z)
        if refined:
            if problem.positive_log_q is not None:
                lse = lse + torch.log1p(-torch.exp(problem.positive_log_q[block]))
            found.log_probability[block] = z_positive - lse
        else:
            loss, _ = compete(lse, z_positive)
            found.log_probability[block] = -loss
            lse = torch.logaddexp(lse, z_positive)
        found.log_sum_exp[block] = lse
    if prepared.active is not None:
        for one in found:
            one.masked_fill_(~prepared.active, 0)
    return found


def _ahead(
    problem: Problem,
    parts: Parts,
    block: slice,
    z: Tensor,  # [b, N]
    z_positive: Tensor,  # [b]
    c: Tensor,  # [N, D] or [b, K, D]
    excluded: Tensor | None,  # [b, N]
) -> Tensor:  # [b]
    """How many candidates of each row are ahead of its positive."""
    query, positive = parts.query[block].double(), parts.positive[block].double()
    score, tau = parts.score[block].double(), parts.tau[block, 0].double()
    log_q, positive_log_q = log_q_of_candidates(problem), log_q_of_positives(problem)
    if problem.per_row and log_q is not None:
        log_q = log_q[block]
    shift = torch.zeros_like(tau)  # of a candidate's logit over the positive's, but for the product
    if parts.shift is not None:
        shift += parts.shift[block, 0]
    if positive_log_q is not None and problem.rows.correction == "standard":
        shift += positive_log_q[block]
    longest = finite_length(c)
    longest = longest.amax(-1) if longest.numel() else longest.new_zeros(())
    most = finite_length(score) * longest + finite_length(query) * finite_length(positive)
    most = most / tau + shift.abs()
    if log_q is not None and log_q.numel():
        most = most + largest_finite(log_q)
    # In float64 once more: the positive's logit is a sum of its own, not an entry of the product.
    exact = (query * positive).sum(1) / tau
    if positive_log_q is not None and problem.rows.correction == "standard":
        exact -= positive_log_q[block].double()
    bounds = bounds_of(exact.masked_fill(z_positive.isnan(), torch.nan), most, z.dtype, c.shape[-1])
    count, row, place = compared(z, bounds)
    valid = z.shape[1] if excluded is None else (~excluded).sum(1)
    count = torch.where(is_lost(z_positive), valid, count)
    for some, those in pieces(row, place, c.shape[-1]):
        own = c[some, those] if c.dim() == 3 else c[those]
        lead = (score[some] * (own.double() - positive[some])).sum(1)
        lead += ((score[some] - query[some]) * positive[some]).sum(1)  # the dual scale alone
        lead = lead / tau[some] + shift[some]
        if log_q is not None:
            lead -= (log_q[some, those] if problem.per_row else log_q[those]).double()
        count.index_add_(0, some, (lead < 0).to(count.dtype), alpha=-1)
    return count


def is_lost(score: Tensor) -> Tensor:
    """Which targets everything is ahead of. What is left out, -inf, is not below their scores."""
    return ~(score > -torch.inf)


def compared(scores: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor]:
    """How many scores of each row are not below its bounds, and the row and place of those between.

    What is left out is -inf, so that the rows of `is_lost` have to be counted otherwise.
    """
    low, high = bounds.low[:, None], bounds.high[:, None]
    # A comparison that is written as floats and summed takes a third of the time of one of bools.
    kept = torch.empty_like(scores)
    exact = torch.float64 if scores.shape[1] > 1 << 24 else scores.dtype  # whole numbers
    below = torch.lt(scores, low, out=kept).sum(1, dtype=exact)
    not_above = torch.le(scores, high, out=kept).sum(1, dtype=exact)
    unclear = (not_above != below).nonzero()[:, 0]
    some = scores[unclear]
    row, place = ((some >= low[unclear]) & (some <= high[unclear])).nonzero(as_tuple=True)
    return scores.shape[1] - below.long(), unclear[row], place


class Bounds(NamedTuple):
    """Between these two, the score of an item is the target's as far as a product can tell."""

    low: Tensor  # [b]
    high: Tensor  # [b]


def bounds_of(score: Tensor, most: Tensor, dtype: torch.dtype, dim: int) -> Bounds:
    """The bounds around the float64 scores of the targets, in the dtype of a block of scores.

    A sum of D products, in whatever order, is wrong by at most ``D u sum |q_k c_k|``, and that is
    at most ``D u |q| |c|``; `most` is the largest of these. On a GPU a sum may drop digits that a
    CPU rounds, which doubles it, and a lower precision of float32 products rounds every factor.
    """
    unit = torch.finfo(dtype).eps / 2
    factors = 0.0 if dtype == torch.float64 else _ROUNDING[torch.get_float32_matmul_precision()]
    slack = ((2 * dim + 16) * unit + 3 * factors) * (most + score.abs().nan_to_num(0, 0, 0))
    slack = slack + 4 * dim * torch.finfo(dtype).tiny  # products that underflow
    low = (score - slack).to(dtype).clamp(min=torch.finfo(dtype).min)  # above what is left out
    return Bounds(low, (score + slack).to(dtype))


# Of a factor of a float32 product: tf32 keeps 11 digits of it, bfloat16 8.
_ROUNDING = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}


def finite_length(vectors: Tensor) -> Tensor:  # [..., D] -> [...]
    """``|c|`` in float64; 0 where it is not finite: such scores are infinite, or NaN, anyway."""
    return torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float64).nan_to_num_(0, 0, 0)


def largest_finite(values: Tensor) -> Tensor:  # [..., N] -> [...]
    return values.abs().nan_to_num(0, 0, 0).amax(-1)


def pieces(row: Tensor, column: Tensor, dim: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs, so many at a time that their embeddings are no more than a block of scores."""
    most = max((1 << 20) // dim, 1)
    for start in range(0, len(row), most):
        yield row[start : start + most], column[start : start + most]
