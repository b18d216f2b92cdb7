"""The CPU kernel, from the host: what it takes, and a problem as its arguments.

The kernel holds the three products and everything between them. What is linear in the rows, their
weights before it and the reduction after it, `rows` does.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from dwl_kernels.backends.cache import BuildError
from dwl_kernels.backends.cpu import build
from dwl_kernels.core.candidates import dual_scale, log_q_of_positives
from dwl_kernels.core.checks import cast_to
from dwl_kernels.core.problem import (
    NO_GRADIENTS,
    GradMask,
    Output,
    PerRowProblem,
    Problem,
    RankProblem,
    SharedProblem,
    SoftmaxStatistics,
    accumulate_dtype,
)
from dwl_kernels.core.ranking import own_items
from dwl_kernels.core.rows import Gradients, Prepared, embeddings, finish, prepare, skippable_below


@functools.cache
def does_not_build() -> str | None:
    """Why there is no kernel and the mend; None where there is one. Compiles on first use."""
    try:
        build.load_cpu()
    except BuildError as error:
        return str(error)
    _register_fake()
    return None


def unavailable_reason(device_type: str) -> str | None:
    """Why the kernel cannot run on such a device here and the mend; None where it can."""
    if device_type != "cpu":
        return f"it runs on CPU tensors, and these are on {device_type}"
    return does_not_build()


def unsupported_reason(problem: Problem) -> str | None:
    """None: it takes every problem."""
    return None


def solve(
    problem: Problem,
    wanted: GradMask,
    row_grad: Tensor | None = None,  # [B], gradient of the row losses of reduction "none"
) -> Output:
    """The loss and the wanted gradients, with the logits of a block of rows in memory."""
    prepared = prepare(problem, row_grad)
    query, found = _run(problem, wanted, prepared)
    row_loss, *gradients = found[:-_KNOWN]
    return finish(problem, wanted, prepared, row_grad, row_loss, Gradients(*gradients), query)


def statistics(problem: Problem) -> SoftmaxStatistics:
    """As `ranks.statistics`, without the gradients."""
    _, found = _run(problem, NO_GRADIENTS, prepare(problem, None), want_statistics=True)
    return SoftmaxStatistics(*found[-_KNOWN:])


_KNOWN = len(SoftmaxStatistics._fields)  # the last outputs of the kernels


def _run(
    problem: Problem, wanted: GradMask, prepared: Prepared, want_statistics: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    run: Any = _run_shared if isinstance(problem, SharedProblem) else _run_per_row
    found: tuple[Tensor, tuple[Tensor, ...]] = run(problem, wanted, prepared, want_statistics)
    return found


def _run_shared(
    problem: SharedProblem, wanted: GradMask, prepared: Prepared, want_statistics: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    query, positive, candidates = (t.contiguous() for t in _embeddings(problem, prepared.active))
    tau, score, shift = prepared.tau, None, None
    if problem.dual is not None:
        scaled = dual_scale(problem, problem.dual, prepared, query, positive, candidates)
        tau, score, shift = scaled.tau, scaled.score, scaled.shift
    refined = problem.rows.correction == "refined"
    positive_log_q = problem.positive_log_q if refined else log_q_of_positives(problem)
    return query, torch.ops.dwl_kernels_native.sampled_softmax(
        query=query,
        positive=None if problem.positive is None else positive,
        candidates=candidates,
        target=None if problem.target is None else problem.own_columns(),
        tau=tau.contiguous(),
        coefficient=prepared.coefficient,
        positive_log_q=_contiguous(positive_log_q),
        candidate_log_q=_contiguous(problem.candidate_log_q),
        score=_contiguous(score),
        shift=_contiguous(shift),
        row_ids=[ids.long().contiguous() for ids, _ in problem.id_pairs()],
        candidate_ids=[ids.long().contiguous() for _, ids in problem.id_pairs()],
        skip_below=skippable_below(problem, prepared.weight),
        active=prepared.active,
        refined=refined,
        want_query=wanted.query or wanted.temperature,
        want_positive=wanted.positive,
        want_candidates=wanted.candidates,
        want_log_q=wanted.candidate_log_q,
        want_statistics=want_statistics,
    )


def _run_per_row(
    problem: PerRowProblem, wanted: GradMask, prepared: Prepared, want_statistics: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    query = problem.query.to(problem.dtypes.accumulate)
    if prepared.active is not None:
        query = query.masked_fill(~prepared.active[:, None], 0)
    query = query.contiguous()
    return query, torch.ops.dwl_kernels_native.indexed_softmax(
        query=query,
        table=problem.item_table.contiguous(),
        positive=_contiguous(problem.positive),
        positive_ids=_contiguous(problem.positive_rows),
        candidate_ids=problem.candidate_rows.contiguous(),
        tau=prepared.tau.contiguous(),
        coefficient=prepared.coefficient.contiguous(),
        positive_log_q=_contiguous(problem.positive_log_q),
        candidate_log_q=_contiguous(problem.candidate_log_q),
        active=prepared.active,
        refined=problem.rows.correction == "refined",
        want_query=wanted.query or wanted.temperature,
        want_table=wanted.candidates or wanted.positive,
        want_statistics=want_statistics,
    )


def _embeddings(problem: SharedProblem, active: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `rows.embeddings`, without copies of positives that the kernel finds itself."""
    dtype = problem.dtypes.accumulate
    if problem.query.dtype in (torch.bfloat16, torch.float16) and problem.dual is None:
        dtype = problem.query.dtype  # of which the kernel makes float32 where it has to
    padded_batch = problem.in_batch and active is not None
    if problem.positive is not None or problem.dual is not None or padded_batch:
        return embeddings(problem, active, dtype)
    query, candidates = cast_to(dtype, problem.query), cast_to(dtype, problem.candidates)
    if active is not None:
        query = query.masked_fill(~active[:, None], 0)
    return query, query, candidates


def unsupported_ranks(problem: RankProblem) -> str | None:
    """None: it takes every problem."""
    return None


def rank_targets(problem: RankProblem) -> Tensor:  # [B] int64
    """As `ranks.rank_targets`."""
    target, padded, outside = own_items(problem)
    found: Tensor = torch.ops.dwl_kernels_native.rank_targets(
        query=problem.query.to(accumulate_dtype(problem.query.dtype)).contiguous(),
        table=problem.item_table.contiguous(),
        target=target,
        padded=padded,
        nowhere=outside,
        bias=_contiguous(problem.bias),
        offsets=_contiguous(problem.seen_offsets),
        seen=_contiguous(problem.seen_ids),
    )
    return found


def takes_table(source: Tensor, dtype: torch.dtype) -> bool:
    """True: it sums the gradient of every table."""
    return True


def table_gradient(
    source: Tensor,  # [R, D]
    ids: list[Tensor],  # each [R, J]
    coefficients: list[Tensor],  # each [R, J], or empty
    table_rows: int,
    dtype: torch.dtype,
    compact: bool,
) -> tuple[Tensor, Tensor]:
    """As `chunked.table_gradient`."""
    widest = torch.promote_types(source.dtype, dtype)  # nothing is rounded before it is summed
    values, distinct = torch.ops.dwl_kernels_native.table_gradient(
        source.to(widest).contiguous(),
        [one.contiguous() for one in ids],
        [one.to(accumulate_dtype(widest)).contiguous() for one in coefficients],
        table_rows,
        compact,
    )
    return values.to(dtype), distinct


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _register_fake() -> None:
    def known(tau, wanted):  # type: ignore[no-untyped-def]
        rows = tau.shape[0] if wanted else 0
        dtypes = (tau.dtype, tau.dtype, torch.int64)
        return [tau.new_empty(rows, dtype=dtype) for dtype in dtypes]

    @torch.library.register_fake("dwl_kernels_native::sampled_softmax")
    def fake(query, positive, candidates, target, tau, *rest):  # type: ignore[no-untyped-def]
        *_, want_query, want_positive, want_candidates, want_log_q, want_statistics = rest
        return (
            tau.new_empty(query.shape[0]),
            tau.new_empty(query.shape if want_query else 0),
            tau.new_empty(query.shape if want_positive else 0),
            tau.new_empty(candidates.shape if want_candidates else 0),
            tau.new_empty(candidates.shape[0] if want_log_q else 0),
            *known(tau, want_statistics),
        )

    @torch.library.register_fake("dwl_kernels_native::indexed_softmax")
    def fake_indexed(query, table, positive, positive_ids, candidate_ids, *rest):  # type: ignore[no-untyped-def]
        *_, want_query, want_table, want_statistics = rest
        return (
            query.new_empty(query.shape[0]),
            query.new_empty(query.shape if want_query else 0),
            query.new_empty(query.shape[0] if want_table else 0),
            query.new_empty(candidate_ids.shape if want_table else 0),
            *known(query, want_statistics),
        )

    @torch.library.register_fake("dwl_kernels_native::rank_targets")
    def fake_ranks(query, table, target, *rest):  # type: ignore[no-untyped-def]
        return target.new_empty(target.shape)

    @torch.library.register_fake("dwl_kernels_native::table_gradient")
    def fake_gradient(source, ids, coefficients, table_rows, compact):  # type: ignore[no-untyped-def]
        rows = torch.library.get_ctx().new_dynamic_size() if compact else table_rows
        values = source.new_empty((rows, source.shape[1]))
        return values, source.new_empty(rows if compact else 0, dtype=torch.int64)
