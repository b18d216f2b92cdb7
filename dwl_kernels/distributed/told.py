"""What a rank tells the others of its candidates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dwl_kernels.core.candidates import log_q_of_candidates
from dwl_kernels.core.problem import SharedProblem
from dwl_kernels.core.rows import active_rows


class Told(NamedTuple):
    """What other ranks need to know of a rank's candidates."""

    embeddings: Tensor  # [m, D], zeros for the positives of padded rows
    ids: Tensor | None  # [m]
    query_ids: Tensor | None  # [m]
    log_q: Tensor | None  # [m], +inf for those positives and for what is never drawn


def padded_positives(problem: SharedProblem) -> Tensor | None:  # [n] bool
    """Which candidates are the positives of padded rows; None where none can be."""
    active = active_rows(problem)
    if not problem.in_batch or active is None:
        return None
    padded = torch.zeros(problem.num_candidates, dtype=torch.bool, device=active.device)
    padded[: len(active)] = ~active
    return padded


def told_of(problem: SharedProblem, count: int) -> Told:
    """What is told of the first candidates."""
    candidates, log_q = problem.candidates, log_q_of_candidates(problem)
    padded = padded_positives(problem)
    if padded is not None:
        candidates = candidates.masked_fill(padded[:, None], 0)
        if log_q is None:
            log_q = candidates.new_zeros(len(candidates), dtype=problem.dtypes.accumulate)
        log_q = log_q.masked_fill(padded, torch.inf)
    told = problem.candidate_ids, problem.candidate_query_ids, log_q
    return Told(candidates.detach()[:count], *(t if t is None else t[:count] for t in told))
