"""The compiled kernels of ``csrc/``; the one for the CPU so far.

The kernel holds the three products and everything between them. What is linear in the rows, the
weights before and the gradients of weights and temperature after it, is shared with `eager`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dwl_kernels import _build
from dwl_kernels.backends import eager
from dwl_kernels.problem import Output, Problem, Wanted

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@functools.cache
def why_not() -> str | None:
    """Why the CPU kernel cannot run here and the mend; None where it can. Compiles on first use."""
    try:
        _build.load_cpu()
    except _build.BuildError as error:
        return str(error)
    _register_fake()
    return None


def refuses(problem: Problem) -> str | None:
    """Why the kernel does not take this problem; None where it does."""
    if problem.query.dtype in DTYPES:
        return None
    return f"it does not take {problem.query.dtype}; backend='chunked' does"


def solve(
    problem: Problem,
    wanted: Wanted,
    row_grad: Tensor | None = None,  # [B], gradient of the row losses of reduction "none"
) -> Output:
    """The loss and the wanted gradients, with a block of logits per thread in memory."""
    weights = problem.row_weights()
    query, positive, candidates = (t.contiguous() for t in eager.embeddings(problem, weights))
    row_loss, *gradients = torch.ops.dwl_kernels_native.sampled_softmax(
        query,
        None if problem.in_batch else positive,
        candidates,
        problem.temperatures().contiguous(),
        eager.row_coefficients(weights, row_grad),
        *(_contiguous(t) for t in (problem.positive_log_q, problem.candidate_log_q)),
        *(_contiguous(t, torch.int64) for t in (problem.positive_ids, problem.candidate_ids)),
        weights.active,
        problem.correction == "refined",
        wanted.query or wanted.temperature,
        wanted.positive and not problem.in_batch,
        wanted.candidates,
    )
    loss = eager.reduce_rows(row_loss, weights, problem.reduction)
    return eager.finish(problem, wanted, weights, loss, row_loss, row_grad, query, *gradients)


def _contiguous(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype or tensor.dtype).contiguous()


def _register_fake() -> None:
    @torch.library.register_fake("dwl_kernels_native::sampled_softmax")
    def fake(query, positive, candidates, *rest):  # type: ignore[no-untyped-def]
        *_, want_query, want_positive, want_candidates = rest
        return (
            query.new_empty(query.shape[0]),
            query.new_empty(query.shape if want_query else 0),
            query.new_empty(query.shape if want_positive else 0),
            query.new_empty(candidates.shape if want_candidates else 0),
        )
