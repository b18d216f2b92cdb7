"""Ranks of targets by the Triton kernel, from the host: what it takes, and where it runs.

This module imports Triton on first use, as `solve` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwl_kernels.backends.triton.launch import on
from dwl_kernels.backends.triton.solve import MAX_CANDIDATES, one_at_a_time
from dwl_kernels.backends.triton.specialize import interpreting
from dwl_kernels.core.problem import RankProblem


def unsupported_ranks(problem: RankProblem) -> str | None:
    """Why the kernel does not rank these targets; None where it does."""
    if problem.query.dtype == torch.float64 and not interpreting():
        return "it takes float64 in the interpreter only; backend='chunked' takes it"
    sizes = len(problem.query), len(problem.item_table)
    if max(sizes) > MAX_CANDIDATES:
        return (
            f"it takes at most {MAX_CANDIDATES} rows and items, and these are {sizes[0]} and "
            f"{sizes[1]}; backend='chunked' takes them"
        )
    return None


def rank_targets(problem: RankProblem) -> Tensor:  # [B] int64
    """As `ranks.rank_targets`; scores that differ by rounding are compared as they are."""
    from dwl_kernels.backends.triton.kernels import rank_targets as triton_ranks

    if interpreting():
        with one_at_a_time:
            return triton_ranks.rank_targets(problem)
    return on(problem.query.device, triton_ranks.rank_targets, problem)
