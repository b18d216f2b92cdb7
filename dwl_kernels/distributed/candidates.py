"""Candidates of all ranks: a batch that is spread over a process group scores all of its items.

Each rank builds the problem of its own rows, as without a group, and tells the others its
candidates: embeddings, ids, log-Q and padding in one transfer. What comes back goes behind its own,
so the problem stays what it is, a batch with further candidates, for every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwl_kernels import backends
from dwl_kernels.autograd import loss_of, softmax_loss
from dwl_kernels.core.arguments import flag
from dwl_kernels.core.build import joined
from dwl_kernels.core.double_backward import once
from dwl_kernels.core.problem import Problem, Reduction, SharedProblem
from dwl_kernels.core.rows import Prepared, prepare
from dwl_kernels.core.untraced import untraced
from dwl_kernels.distributed import dual
from dwl_kernels.distributed.exchange import agree, gathered_blocks, summed
from dwl_kernels.distributed.group import Group, group_of
from dwl_kernels.distributed.reduction import kind_of, same_of_rows, whole_loss
from dwl_kernels.distributed.ring import ring_loss
from dwl_kernels.distributed.told import padded_positives, told_of


class Across(NamedTuple):
    """How the candidates of a loss are shared."""

    group: Group
    ring: bool = False  # whether they go round, so that no rank holds all of them
    replicated_negatives: bool = False  # whether all ranks hold the same ones


@untraced
def loss_across(
    name: str,
    build: Callable[[], Problem],
    query: Tensor,
    process_group: Any,
    backend: str,
    *,
    ring: bool,
    replicated_negatives: bool,
    sparse_grad: bool = False,
) -> Tensor:
    """The loss of a problem over the candidates of all ranks; `name` is that of the loss."""
    group = group_of(process_group)
    assert group is not None  # or this would be the loss of one process
    across = Across(group, ring, replicated_negatives)

    def local() -> tuple[tuple[Problem, Prepared], dict[str, Any], list[int]]:
        flag("ring", ring)
        flag("replicated_negatives", replicated_negatives)
        problem = build()
        backends.check_name(backend)
        backends.pick(backend, problem)  # raises if it cannot run
        if ring and getattr(problem, "dual", None) is not None:
            raise ValueError(
                "ring=True does not go with the dual scale, whose weights need all candidates of a "
                "row at once; leave ring out"
            )
        sizes = [len(problem.query), _shared(problem, across)]
        return (problem, prepare(problem, None)), _same(name, problem, across), sizes

    (problem, prepared), sizes = agree(group, query, local)
    reduction: Reduction = problem.rows.reduction
    if group.size == 1:
        return loss_of(problem, query, backend, sparse_grad)
    rows, shared = ([one[i] for one in sizes] for i in range(2))
    if ring and any(shared):
        assert isinstance(problem, SharedProblem)  # candidates per row are not shared
        own = ring_loss(problem, prepared, shared, group, backend)
    else:
        if isinstance(problem, SharedProblem):
            problem = _with_others(problem, prepared, rows, shared, across)
        if reduction != "none":
            problem = problem._replace(rows=problem.rows._replace(reduction="sum"))
        own = softmax_loss(problem, backend, sparse_grad)
    loss = whole_loss(own, prepared.norm, reduction, group)
    return loss.reshape(query.shape[:-1]) if reduction == "none" else loss


def _with_others(
    problem: SharedProblem,
    prepared: Prepared,
    rows: Sequence[int],
    shared: Sequence[int],
    across: Across,
) -> SharedProblem:
    """The problem with all that the other ranks have a say in."""
    whole = with_all_candidates(problem, shared, across) if any(shared) else problem
    if problem.dual is not None and problem.dual.competition:
        place = dual.places(problem, rows, shared, across.group)
        whole = dual.with_competition(whole, prepared, place, rows, across.group)
    return whole


def _shared(problem: Problem, across: Across) -> int:
    """How many of its candidates a rank tells the others: its positives come first."""
    if not isinstance(problem, SharedProblem):
        return 0
    if across.replicated_negatives:
        return len(problem.query) if problem.in_batch else 0
    return problem.num_candidates


def _same(name: str, problem: Problem, across: Across) -> dict[str, Any]:
    """What all ranks must agree on, by the names of the arguments."""
    same: dict[str, Any] = same_of_rows(name, problem)
    same["log-Q of the positives"] = kind_of(problem.positive_log_q)
    same["log-Q of the candidates"] = kind_of(problem.candidate_log_q)
    if not isinstance(problem, SharedProblem):
        return same
    return same | {
        "ids": kind_of(problem.candidate_ids),
        "query_ids": kind_of(problem.candidate_query_ids),
        "the options of the dual scale": problem.dual,
        "ring": across.ring,
        "replicated_negatives": across.replicated_negatives,
    }


def with_all_candidates(
    problem: SharedProblem, shared: Sequence[int], across: Across
) -> SharedProblem:
    """The problem with the candidates of all ranks: its own, then those of the others in order."""
    group, own = across.group, problem.num_candidates
    told = told_of(problem, shared[group.rank])
    padded = padded_positives(problem)
    call = (problem.candidates, *told, padded, tuple(shared), group)
    embeddings, *others = _OfAllRanks.apply(*call)
    found = (t if b is not None else None for t, b in zip(others, told[1:], strict=True))
    ids, query_ids, log_q = found
    own_log_q = problem.candidate_log_q
    if log_q is not None and own_log_q is None:
        own_log_q = log_q.new_zeros(own)
    return problem._replace(
        candidates=embeddings,
        candidate_ids=joined(problem.candidate_ids, ids),
        candidate_query_ids=joined(problem.candidate_query_ids, query_ids),
        candidate_log_q=joined(own_log_q, log_q),
    )


class _OfAllRanks(torch.autograd.Function):
    """The candidates of this rank and behind them those of the others, whose gradients go home."""

    @staticmethod
    def forward(
        ctx: Any,
        own: Tensor,  # [n, D]
        told: Tensor,  # [m, D], what the others are told of them
        ids: Tensor | None,  # [m]
        query_ids: Tensor | None,  # [m]
        log_q: Tensor | None,  # [m]
        padded: Tensor | None,  # [n] bool, positives of padded rows: no gradient
        shared: tuple[int, ...],
        group: Group,
    ) -> tuple[Tensor, ...]:
        blocks = gathered_blocks([told, ids, query_ids, log_q], shared, group)
        del blocks[group.rank]
        columns = list(zip(*blocks, strict=True))
        empty = own.new_empty(0)
        found = [torch.cat(column) if column[0] is not None else empty for column in columns]
        ctx.call = own.shape[0], shared, group
        ctx.save_for_backward(*() if padded is None else (padded[:, None],))
        embeddings = torch.cat((own, found[0]))
        ctx.mark_non_differentiable(*found[1:])
        return embeddings, *found[1:]

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        grad = upstream[0]
        own, shared, group = ctx.call
        told, before = shared[group.rank], sum(shared[: group.rank])
        others = grad[own:]
        # In the order of the ranks, with what this rank adds to its own among them.
        parts = torch.cat((others[:before], grad[:told], others[before:]))
        received = summed(parts, shared, group).to(grad.dtype)
        gradient = torch.cat((received, grad[told:own]))
        if ctx.saved_tensors:
            gradient.masked_fill_(ctx.saved_tensors[0], 0)
        return once(gradient, grad), *(None,) * 7
