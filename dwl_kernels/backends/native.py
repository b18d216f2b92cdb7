"""The compiled kernels of ``csrc/``; the one for the CPU so far.

The kernel holds the three products and everything between them. What is linear in the rows, the
weights before and the gradients of weights and temperature after it, is shared with `eager`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dwl_kernels import _build
from dwl_kernels.backends import chunked, eager
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


def takes(problem: Problem) -> bool:
    return problem.query.dtype in DTYPES


def solve(
    problem: Problem,
    wanted: Wanted,
    row_grad: Tensor | None = None,  # [B], gradient of the row losses of reduction "none"
) -> Output:
    """The loss and the wanted gradients, with a block of logits per thread in memory."""
    weights = problem.row_weights()
    query, positive, candidates = (t.contiguous() for t in eager.embeddings(problem, weights))
    tau, score, shift = problem.temperatures(), None, None
    if problem.dual is not None:
        score, shift, tau = chunked.dual_scale(problem, weights, query, positive, candidates)
        shift, tau = shift[:, 0], tau[:, 0]
    row_loss, *gradients = torch.ops.dwl_kernels_native.sampled_softmax(
        query,
        None if problem.positive is None else positive,
        candidates,
        None if problem.target is None else problem.own_columns(),
        tau.contiguous(),
        eager.row_coefficients(weights, row_grad),
        *(_contiguous(t) for t in (eager.log_q_of_positives(problem), problem.candidate_log_q)),
        *(_contiguous(t) for t in (score, shift)),
        *(_contiguous(t, torch.int64) for t in (problem.positive_ids, problem.candidate_ids)),
        weights.active,
        problem.correction == "refined",
        wanted.query or wanted.temperature,
        wanted.positive,
        wanted.candidates,
        wanted.candidate_log_q,
    )
    loss = eager.reduce_rows(row_loss, weights, problem.reduction)
    return eager.finish(
        problem, wanted, weights, loss, row_loss, row_grad, query, eager.Gradients(*gradients)
    )


def _contiguous(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype or tensor.dtype).contiguous()


def _register_fake() -> None:
    @torch.library.register_fake("dwl_kernels_native::sampled_softmax")
    def fake(query, positive, candidates, *rest):  # type: ignore[no-untyped-def]
        *_, want_query, want_positive, want_candidates, want_log_q = rest
        return (
            query.new_empty(query.shape[0]),
            query.new_empty(query.shape if want_query else 0),
            query.new_empty(query.shape if want_positive else 0),
            query.new_empty(candidates.shape if want_candidates else 0),
            query.new_empty(candidates.shape[0] if want_log_q else 0),
        )
