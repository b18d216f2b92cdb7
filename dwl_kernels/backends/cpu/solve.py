"""The compiled kernels of ``csrc/``; the one for the CPU so far.

The kernel holds the three products and everything between them. What is linear in the rows, the
weights before and the gradients of weights and temperature after it, is shared with `eager`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dwl_kernels.backends import chunked, eager
from dwl_kernels.backends.cache import BuildError
from dwl_kernels.backends.cpu import build as cpu_build
from dwl_kernels.core.problem import Output, Problem, RowWeights, Wanted, accumulate_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@functools.cache
def why_not() -> str | None:
    """Why the CPU kernel cannot run here and the mend; None where it can. Compiles on first use."""
    try:
        cpu_build.load_cpu()
    except BuildError as error:
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
    """The loss and the wanted gradients, with the logits of a block of rows in memory."""
    weights = problem.row_weights()
    query, positive, candidates = (t.contiguous() for t in _embeddings(problem, weights))
    if problem.candidate_rows is not None:
        output = torch.ops.dwl_kernels_native.indexed_softmax(
            query,
            candidates,
            _contiguous(problem.target),
            _contiguous(problem.candidate_rows),
            problem.temperatures(weights.active).contiguous(),
            eager.row_coefficients(weights, row_grad).contiguous(),
            *(_contiguous(t) for t in (problem.positive_log_q, problem.candidate_log_q)),
            weights.active,
            problem.correction == "refined",
            wanted.query or wanted.temperature,
            wanted.candidates,
        )
        return _output(problem, wanted, weights, row_grad, query, *output)
    tau, score, shift = problem.temperatures(weights.active), None, None
    if problem.dual is not None:
        score, shift, tau = chunked.dual_scale(problem, weights, query, positive, candidates)
        shift, tau = shift[:, 0], tau[:, 0]
    output = torch.ops.dwl_kernels_native.sampled_softmax(
        query,
        None if problem.positive is None else positive,
        candidates,
        None if problem.target is None else problem.own_columns(),
        tau.contiguous(),
        eager.row_coefficients(weights, row_grad),
        *(
            _contiguous(t)
            for t in (eager.log_q_of_positives(problem), eager.log_q_of_candidates(problem))
        ),
        *(_contiguous(t) for t in (score, shift)),
        *(_contiguous(t, torch.int64) for t in (problem.positive_ids, problem.candidate_ids)),
        problem.skippable_below(weights),
        weights.active,
        problem.correction == "refined",
        wanted.query or wanted.temperature,
        wanted.positive,
        wanted.candidates,
        wanted.candidate_log_q,
    )
    return _output(problem, wanted, weights, row_grad, query, *output)


def table_gradient(
    source: Tensor,  # [R, D]
    ids: list[Tensor],  # each [R, J]
    coefficients: list[Tensor],  # each [R, J], or empty
    table_rows: int,
    dtype: torch.dtype,
    compact: bool,
) -> tuple[Tensor, Tensor]:
    """As :func:`dwl_kernels.backends.chunked.table_gradient`."""
    values, distinct = torch.ops.dwl_kernels_native.table_gradient(
        source.to(accumulate_dtype(dtype)).contiguous(),
        [one.contiguous() for one in ids],
        [one.contiguous() for one in coefficients],
        table_rows,
        dtype,
        compact,
    )
    return values, distinct


def _embeddings(problem: Problem, weights: RowWeights) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`eager.embeddings`, without copies of positives that the kernel finds itself."""
    padded_batch = problem.in_batch and weights.active is not None
    if problem.positive is not None or problem.dual is not None or padded_batch:
        return eager.embeddings(problem, weights)
    query, candidates = problem.query.to(problem.accumulate), problem.candidates
    if weights.active is not None:
        query = query.masked_fill(~weights.active[:, None], 0)
    if not problem.by_row:
        candidates = candidates.to(problem.accumulate)
    return query, query, candidates


def _output(
    problem: Problem,
    wanted: Wanted,
    weights: RowWeights,
    row_grad: Tensor | None,  # [B]
    query: Tensor,  # [B, D] padded rows zero
    row_loss: Tensor,  # [B] r_i l_i
    d_query: Tensor,
    d_positive: Tensor,
    d_candidates: Tensor,
    d_log_q: Tensor | None = None,
) -> Output:
    loss = eager.reduce_rows(row_loss, weights, problem.reduction)
    gradients = eager.Gradients(d_query, d_positive, d_candidates, d_log_q)
    return eager.finish(problem, wanted, weights, loss, row_loss, row_grad, query, gradients)


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

    @torch.library.register_fake("dwl_kernels_native::indexed_softmax")
    def fake_indexed(query, table, positive_ids, candidate_ids, *rest):  # type: ignore[no-untyped-def]
        *_, want_query, want_table = rest
        return (
            query.new_empty(query.shape[0]),
            query.new_empty(query.shape if want_query else 0),
            query.new_empty(query.shape[0] if want_table else 0),
            query.new_empty(candidate_ids.shape if want_table else 0),
        )

    @torch.library.register_fake("dwl_kernels_native::table_gradient")
    def fake_gradient(source, ids, coefficients, table_rows, dtype, compact):  # type: ignore[no-untyped-def]
        rows = torch.library.get_ctx().new_dynamic_size() if compact else table_rows
        values = source.new_empty((rows, source.shape[1]), dtype=dtype)
        return values, source.new_empty(rows if compact else 0, dtype=torch.int64)
