"""From the arguments of the public functions to a validated problem, one builder for each loss.

The public functions call them. What is wrong with a single argument, `checks` says; with several of
them, the builder. Its `row_options` are the arguments of `checks.row_arguments`, which every loss
takes.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from dwl_kernels.core.arguments import flag, ignored_id, integer, integers, number
from dwl_kernels.core.checks import (
    as_given,
    both_or_none,
    check_embeddings,
    check_shape,
    flat_ids,
    flat_log_q,
    flat_rows,
    floating,
    leave_out,
    padded_by_id,
    row_arguments,
)
from dwl_kernels.core.drawn import checked_table_ids, item_ids, without_taken_out
from dwl_kernels.core.problem import (
    DTYPES,
    NO_ITEM,
    DualScale,
    PerRowProblem,
    Problem,
    SharedProblem,
)
from dwl_kernels.core.values import checks_values


def sampled_problem(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    positive_log_q: Any,  # a tensor, or `checks.Calibrated`
    negative_log_q: Any,
    positive_ids: Tensor | None,
    negative_ids: Tensor | None,
    remove_accidental_hits: bool = True,
    ignore_index: int | None = None,
    dual: DualScale | None = None,
    **row_options: Any,
) -> Problem:
    """The problem of ``sampled_softmax_loss``: candidates that all rows share, or of every row."""
    query, positive, negative = check_embeddings(query, positive=positive, negative=negative)
    leading, drawn, per_row = query.shape[:-1], negative.shape[:-1], negative.ndim != 2
    if dual is not None:
        check_shared("the dual scale", negative)
    if remove_accidental_hits:
        both_or_none("positive_ids", positive_ids, "negative_ids", negative_ids)
    example = row_options["example_weights"]
    if ignore_index is not None:
        example = padded_by_id("positive_ids", positive_ids, query, ignore_index, example)
        row_options["example_weights"] = example
    ids = flat_ids(query, positive_ids=(positive_ids, leading), negative_ids=(negative_ids, drawn))
    rows = row_arguments(query, **row_options)
    weights, given = rows.example_weights, (positive_log_q, negative_log_q)
    ignored = None if ignore_index is None or ids[1] is None else ids[1].long() == ignore_index
    if ignored is not None and not per_row:
        negative_log_q = leave_out(ignored, negative_log_q)
    if not remove_accidental_hits:
        ids = [None, None]
    positive_log_q = flat_log_q("positive_log_q", positive_log_q, leading, query, weights)
    of_rows = weights if per_row else None
    negative_log_q = flat_log_q("negative_log_q", negative_log_q, drawn, query, of_rows)
    if (positive_log_q is None) != (negative_log_q is None):
        both_or_none("positive_log_q", as_given(given[0]), "negative_log_q", as_given(given[1]))
    if per_row:
        shape = (math.prod(leading), drawn[-1])
        places = torch.arange(math.prod(shape), device=query.device).view(shape)
        if ids[0] is not None and ids[1] is not None:
            hits = (ids[1].view(shape) == ids[0][:, None]) & (ids[0] != NO_ITEM)[:, None]
            places = places.masked_fill(hits, NO_ITEM)
        if ignored is not None:
            places = places.masked_fill(ignored.view(shape), NO_ITEM)
        if negative_log_q is not None:
            negative_log_q = negative_log_q.view(shape)
        return PerRowProblem(
            query=flat_rows(query),
            item_table=flat_rows(negative),
            positive_rows=None,
            candidate_rows=without_taken_out(places, negative_log_q),
            positive=flat_rows(positive),
            positive_log_q=positive_log_q,
            candidate_log_q=negative_log_q,
            rows=rows,
        )
    return SharedProblem(
        query=flat_rows(query),
        positive=flat_rows(positive),
        candidates=zero_where_taken_out(negative, negative_log_q, ignored is not None),
        positive_log_q=positive_log_q,
        candidate_log_q=negative_log_q,
        positive_ids=ids[0],
        candidate_ids=ids[1],
        dual=None if dual is None else effective_dual(dual),
        rows=rows,
    )


def zero_where_taken_out(
    candidates: Tensor,  # [N, D]
    log_q: Tensor | None,  # [N], +inf takes a candidate out
    always: bool = False,
) -> Tensor:
    """Candidates whose numbers leak nowhere if they are taken out: 0 times NaN is NaN.

    Where values are looked at, only what would leak makes a copy. Elsewhere one is made `always`,
    for padding, which may hold anything, or never.
    """
    if log_q is None:
        return candidates
    looks = checks_values(log_q)
    if not looks and not always:
        return candidates
    absent = log_q == math.inf
    if looks and (not absent.any() or candidates.detach()[absent].isfinite().all()):
        return candidates
    return candidates.masked_fill(absent[:, None], 0)


def check_shared(what: str, negative: Tensor) -> None:
    """ValueError for negatives of every row's own."""
    if negative.dim() != 2:
        raise ValueError(
            f"negative has shape {list(negative.shape)}, negatives per row, and {what} take those "
            "that all rows share: pass [N, D]"
        )


def effective_dual(dual: DualScale) -> DualScale | None:
    """The strengths, checked; None where they change nothing."""
    strengths = {}
    for name in ("hardness", "similarity", "competition"):
        strengths[name] = value = number(name, getattr(dual, name))
        if not abs(value) < float("inf"):
            raise ValueError(f"{name} is {value}; wanted a finite number")
    slate_size = integer("slate_size", dual.slate_size, least=1)
    return DualScale(slate_size=slate_size, **strengths) if any(strengths.values()) else None


def in_batch_problem(
    query: Tensor,
    positive: Tensor,
    *,
    log_q: Tensor | None,
    ids: Tensor | None,
    negative: Tensor | None,
    negative_log_q: Any,
    negative_ids: Tensor | None,
    remove_accidental_hits: bool = True,
    query_ids: Tensor | None = None,
    ignore_index: int | None = None,
    dual: DualScale | None = None,
    prefix: str = "",
    **row_options: Any,
) -> SharedProblem:
    """The problem of ``in_batch_softmax_loss``: the positives of the batch, then ``negative``.

    `prefix` is what the names of `log_q` and `ids` start with in the function that was called.
    """
    log_q_name, ids_name = prefix + "log_q", prefix + "ids"
    if negative is None:
        if negative_log_q is not None or negative_ids is not None:
            raise ValueError(
                "negative_log_q and negative_ids describe `negative`, which is not given; pass "
                f"`negative`, or use {log_q_name} and {ids_name} for the in-batch candidates"
            )
        query, positive = check_embeddings(query, positive=positive)
    else:
        query, positive, negative = check_embeddings(query, positive=positive, negative=negative)
        if remove_accidental_hits:
            both_or_none(ids_name, ids, "negative_ids", negative_ids)
        both_or_none(log_q_name, as_given(log_q), "negative_log_q", as_given(negative_log_q))
        check_shared("in-batch candidates", negative)
    leading = query.shape[:-1]
    more = () if negative is None else negative.shape[:1]
    example = row_options["example_weights"]
    if ignore_index is not None:
        row_options["example_weights"] = padded_by_id(ids_name, ids, query, ignore_index, example)
    both = flat_ids(query, **{ids_name: (ids, leading), "negative_ids": (negative_ids, more)})
    (of_query,) = flat_ids(query, query_ids=(query_ids, leading))
    rows = row_arguments(query, **row_options)
    ignored = None if ignore_index is None or both[1] is None else both[1].long() == ignore_index
    if ignored is not None:
        negative_log_q = leave_out(ignored, negative_log_q)
    if not remove_accidental_hits:
        both = [None, None]
    positive_log_q = flat_log_q(log_q_name, log_q, leading, query, rows.example_weights)
    more_log_q = flat_log_q("negative_log_q", negative_log_q, more, query)
    positives = flat_rows(positive)
    if negative is not None:
        negative = zero_where_taken_out(negative, more_log_q, ignored is not None)
    of_batch = positive_log_q
    if of_batch is None and more_log_q is not None:  # which only takes negatives out
        of_batch = more_log_q.new_zeros(len(positives))
    of_candidates = of_query
    if of_query is not None and negative is not None:
        of_candidates = torch.cat((of_query, of_query.new_full(more, NO_ITEM)))
    return SharedProblem(
        query=flat_rows(query),
        positive=None,
        candidates=positives if negative is None else torch.cat((positives, negative)),
        positive_log_q=positive_log_q,
        candidate_log_q=joined(of_batch, more_log_q),
        positive_ids=both[0],
        candidate_ids=joined(both[0], both[1]),
        query_ids=of_query,
        candidate_query_ids=of_candidates,
        dual=None if dual is None else effective_dual(dual),
        rows=rows,
    )


def dual_problem(
    query: Tensor,
    positive: Tensor,
    negative: Tensor | None,
    *,
    hardness: float,
    similarity: float,
    slate_size: int,
    competition: float,
    in_batch: bool | None,
    positive_log_q: Tensor | None,
    positive_ids: Tensor | None,
    query_ids: Tensor | None,
    **others: Any,
) -> Problem:
    """The problem of ``dual_scale_softmax_loss``."""
    others["dual"] = DualScale(hardness, similarity, slate_size, competition)
    if takes_batch(in_batch, negative is not None):
        of_batch: dict[str, Any] = {"log_q": positive_log_q, "ids": positive_ids}
        of_batch["query_ids"] = query_ids
        named = {**of_batch, **others, "prefix": "positive_"}
        return in_batch_problem(query, positive, negative=negative, **named)
    check_of_batch(query_ids)
    named = {"positive_log_q": positive_log_q, "positive_ids": positive_ids, **others}
    return sampled_problem(query, positive, cast("Tensor", negative), **named)


def check_of_batch(query_ids: Tensor | None) -> None:
    """ValueError for ids of queries where no positives of other rows are candidates."""
    if query_ids is not None:
        raise ValueError(
            "query_ids tell which positives of a batch are of the same query, and here no positive "
            "is a candidate of another row; leave them out, or pass in_batch=True"
        )


def takes_batch(in_batch: bool | None, negatives: bool) -> bool:
    """Whether the positives of the other rows are candidates; None leaves it to the negatives."""
    if in_batch is not None:
        in_batch = flag("in_batch", in_batch)
    if in_batch is False and not negatives:
        raise ValueError(
            "there are no candidates: in_batch is False, and no negatives are given; pass them, or "
            "leave in_batch out"
        )
    return not negatives if in_batch is None else in_batch


def full_problem(
    query: Tensor,
    table: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    ignore_index: int,
    skip_threshold: float,
    table_ids: Tensor | None = None,
    whole_table: bool = True,
    **row_options: Any,
) -> SharedProblem:
    """The problem of ``full_softmax_loss``: every row of the table is a candidate.

    Of a table that is not here as a whole, the shard that is here may have no rows.
    """
    skip_threshold = checked_skip_threshold(skip_threshold)
    ignore_index = ignored_id(ignore_index)
    query, table = check_embeddings(query, table=table)
    if whole_table and table.shape[0] == 0:
        raise ValueError("table has no rows; wanted at least one item to score")
    leading = query.shape[:-1]
    target = integers("target", target, query.device)
    (target,) = cast("list[Tensor]", flat_ids(query, target=(target, leading)))
    if bias is not None:
        check_shape("bias", bias, table.shape[:1], query)
        bias = -floating("bias", bias, query, differentiable=True)
    rows = row_arguments(query, correction="standard", **row_options)
    rows = rows._replace(ignore_index=ignore_index)
    target, table_ids = target.long(), checked_table_ids(table_ids, table, query)
    if table_ids is not None:
        if bias is None:
            bias = table.new_zeros(len(table), dtype=DTYPES[query.dtype].accumulate)
        bias = bias.masked_fill(table_ids == NO_ITEM, torch.inf)
    return SharedProblem(
        query=flat_rows(query),
        positive=None,
        candidates=zero_where_taken_out(table, bias),
        target=target,
        candidate_log_q=bias,
        positive_ids=item_ids(target, table_ids) if table_ids is not None and whole_table else None,
        candidate_ids=table_ids,
        skip_threshold=skip_threshold,
        rows=rows,
    )


def checked_skip_threshold(skip_threshold: float) -> float:
    skip_threshold = number("skip_threshold", skip_threshold)
    if not 0 <= skip_threshold < float("inf"):
        raise ValueError(
            f"skip_threshold is {skip_threshold}; wanted a finite number that is not negative, 0 "
            "to leave nothing out"
        )
    return skip_threshold


def joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Both, one after the other; the first alone where one of them is None."""
    return first if first is None or second is None else torch.cat((first, second))
