"""Which candidates a row competes with, and what the dual scale makes of the rows.

For the backends that do not fuse this into their kernel. All of it goes over blocks of rows, so
that no matrix of logits is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dwl_kernels.core.problem import NO_ITEM, DualScale, Problem, SharedProblem
from dwl_kernels.core.rows import Prepared

# Logits kept at once. On a CPU every operation ends with its threads spinning until the last one is
# done, which on a busy machine may have lost its core: blocks of 2^19 took up to 14 times the
# processor time of one thread, these twice. Without other work 2^20 to 2^22 are fastest. A GPU
# wants products that fill it.
BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}


def row_blocks(problem: Problem) -> Iterator[slice]:
    """Blocks of rows whose logits, and candidates where they are per row, are kept at once."""
    elements = BLOCK_ELEMENTS.get(problem.query.device.type, 1 << 22)
    num_rows, dim = problem.query.shape
    of_row = problem.num_candidates * (dim if problem.per_row else 1)
    step = max(elements // max(of_row, 1), 1)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def row_candidates(
    problem: Problem, active: Tensor | None, candidates: Tensor, block: slice
) -> Tensor:
    """The candidates of a block of rows, ``[N, D]`` or, each row its own, ``[rows, K, D]``."""
    if isinstance(problem, SharedProblem):
        return candidates
    rows = problem.candidate_rows[block]
    own = candidates[rows.clamp(0, len(candidates) - 1)].to(problem.dtypes.accumulate)
    nothing = rows == NO_ITEM
    if active is not None:
        nothing |= ~active[block, None]
    return own.masked_fill_(nothing[:, :, None], 0)


def excluded_candidates(problem: Problem, active: Tensor | None, block: slice) -> Tensor:
    """Which candidates a block of rows does not compete with, bool ``[rows, N]``.

    Hits, those that a log-Q of +inf takes out, a row's own positive, and in a batch the positives
    of padded rows and others of its query.
    """
    log_q = log_q_of_candidates(problem)
    if not isinstance(problem, SharedProblem):
        excluded = problem.candidate_rows[block] == NO_ITEM
        return excluded if log_q is None else excluded | (log_q[block] == torch.inf)
    shape = block.stop - block.start, problem.num_candidates
    excluded = torch.zeros(shape, dtype=torch.bool, device=problem.query.device)
    if log_q is not None:
        excluded |= log_q == torch.inf
    for row_ids, candidate_ids in problem.id_pairs():
        ids = row_ids[block, None]
        excluded |= (ids == candidate_ids) & (ids != NO_ITEM)
    if problem.positive is None:
        excluded.scatter_(1, problem.own_columns()[block, None], True)
    if problem.in_batch and active is not None:
        excluded[:, : len(active)] |= ~active
    return excluded


def log_q_of_positives(problem: Problem) -> Tensor | None:  # [B]
    """``log Q+_i``; that of the candidate where the positive is one."""
    log_q, of_candidates = problem.positive_log_q, problem.candidate_log_q
    if not isinstance(problem, SharedProblem) or problem.positive is not None:
        return log_q
    if log_q is not None or of_candidates is None:
        return log_q
    if problem.in_batch:
        return of_candidates[: problem.query.shape[0]]
    return of_candidates[problem.own_columns()]


def log_q_of_candidates(problem: Problem) -> Tensor | None:  # [N] or [B, K]
    """``log Q_j``. A positive of the batch that is never drawn (-inf) is no candidate of others.

    +inf takes a candidate out, as if it were not there.
    """
    log_q = problem.candidate_log_q
    if log_q is None or not problem.in_batch:
        return log_q
    rows = problem.query.shape[0]
    of_batch = log_q if len(log_q) == rows else log_q[:rows]
    of_batch = of_batch.masked_fill(of_batch == -torch.inf, torch.inf)
    return of_batch if len(log_q) == rows else torch.cat((of_batch, log_q[rows:]))


class Scaled(NamedTuple):
    """The rows of the dual scale: ``z_ij = <score_i, c_j> / tau_i + shift_i - log Q_j``."""

    score: Tensor  # [B, D]
    shift: Tensor  # [B]
    tau: Tensor  # [B]


def dual_scale(
    problem: SharedProblem,
    dual: DualScale,
    prepared: Prepared,
    query: Tensor,  # [B, D] as `rows.embeddings` gives them, like the next two
    positive: Tensor,  # [B, D]
    candidates: Tensor,  # [N, D]
) -> Scaled:
    """What the dual scale makes of the rows.

    ``log kappa_ij`` is linear in ``c_j`` but for a constant of the row, so that all logits of the
    row are still one product.
    """
    tau, factor = prepared.tau, problem.rows.competition_factor
    pull = dual.hardness * query + dual.similarity * positive
    slate = Slate(problem, dual, prepared, query, positive, candidates)
    g, shift = torch.zeros_like(tau), torch.empty_like(tau)
    for block in row_blocks(problem):
        excluded = excluded_candidates(problem, prepared.active, block)
        x = (pull[block] @ candidates.T).div_(tau[block, None]).masked_fill_(excluded, -torch.inf)
        count = (~excluded).sum(1).to(x.dtype)
        shift[block] = torch.where(count > 0, count.log() - x.logsumexp(1), 0.0)
        if factor is None and dual.competition:
            g[block] = slate.intensity(block, excluded)
    if factor is None:
        factor = temperature_factor(dual, g, prepared.active)
    return Scaled(query + factor[:, None] * pull, shift, tau * factor)


class Slate:
    """How hard the strongest candidates of each row compete with its positive."""

    def __init__(
        self,
        problem: SharedProblem,
        dual: DualScale,
        prepared: Prepared,
        query: Tensor,  # [B, D] as `rows.embeddings` gives them, like the next two
        positive: Tensor,  # [B, D]
        candidates: Tensor,  # [N, D]
        place: Tensor | None = None,  # [N], by default 0 to N - 1: neighbours are of one group
    ) -> None:
        self.query, self.candidates, self.tau = query, candidates, prepared.tau
        self.size, many = dual.slate_size, len(candidates)
        if place is None:
            place = torch.arange(many, device=query.device)
        self.group = place * self.size // max(many, 1)
        self.candidate_log_q = log_q_of_candidates(problem)
        self.z_positive = (query * positive).sum(1) / self.tau
        positive_log_q = log_q_of_positives(problem)
        if positive_log_q is not None:
            self.z_positive -= positive_log_q

    def intensity(self, block: slice, excluded: Tensor) -> Tensor:  # [rows, N] -> [rows]
        """``g_i`` of a block of rows: the strongest candidate of each group competes.

        Candidates are drawn at random, so this is a stochastic top-K that one pass over tiles
        finds.
        """
        z = (self.query[block] @ self.candidates.T).div_(self.tau[block, None])
        if self.candidate_log_q is not None:
            z -= self.candidate_log_q
        z.masked_fill_(excluded, -torch.inf)
        best = z.new_full((len(z), self.size), -torch.inf)
        best = best.scatter_reduce(1, self.group.expand_as(z), z, "amax")
        empty = best == -torch.inf
        wins = torch.sigmoid(best - self.z_positive[block, None]).masked_fill(empty, 0)
        return wins.sum(1) / (~empty).sum(1).clamp(min=1)


def temperature_factor(dual: DualScale, g: Tensor, active: Tensor | None) -> Tensor:  # [B]
    """``f_i / mean f``. Padding and rows that are NaN stay out of the means, and get 1."""
    counts = ~g.isnan() if active is None else ~g.isnan() & active
    count = counts.sum().clamp(min=1)
    g = torch.where(counts, g, 0.0)
    f = (1 + dual.competition * (g - g.sum() / count)).clamp(0.5, 2.0)
    mean = torch.where(counts, f, 0.0).sum() / count
    return torch.where(counts, f / mean, 1.0)
