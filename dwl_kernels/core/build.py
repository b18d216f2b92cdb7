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

from dwl_kernels.core.arguments import check_dense, flag, integer, integers, number
from dwl_kernels.core.checks import (
    Calibrated,
    as_given,
    autocast_dtype,
    both_or_none,
    check_embeddings,
    check_shape,
    flat_ids,
    flat_log_q,
    flat_rows,
    floating,
    row_arguments,
)
from dwl_kernels.core.problem import (
    NO_ITEM,
    DualScale,
    PerRowProblem,
    SharedProblem,
)
from dwl_kernels.core.values import checks_values, ids_outside, no_autocast


def sampled_problem(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    positive_log_q: Tensor | None,
    negative_log_q: Tensor | None,
    positive_ids: Tensor | None,
    negative_ids: Tensor | None,
    dual: DualScale | None = None,
    **row_options: Any,
) -> SharedProblem:
    """The problem of ``sampled_softmax_loss``: candidates ``[N, D]`` shared by all rows."""
    query, positive, negative = check_embeddings(query, positive=positive, negative=negative)
    leading = query.shape[:-1]
    both_or_none("positive_ids", positive_ids, "negative_ids", negative_ids)
    ids = flat_ids(
        query,
        positive_ids=(positive_ids, leading),
        negative_ids=(negative_ids, negative.shape[:1]),
    )
    rows = row_arguments(query, **row_options)
    given = positive_log_q, negative_log_q
    positive_log_q = flat_log_q(
        "positive_log_q", positive_log_q, leading, query, rows.example_weights
    )
    negative_log_q = flat_log_q("negative_log_q", negative_log_q, negative.shape[:1], query)
    if (positive_log_q is None) != (negative_log_q is None):
        both_or_none("positive_log_q", as_given(given[0]), "negative_log_q", as_given(given[1]))
    return SharedProblem(
        query=flat_rows(query),
        positive=flat_rows(positive),
        candidates=negative,
        positive_log_q=positive_log_q,
        candidate_log_q=negative_log_q,
        positive_ids=ids[0],
        candidate_ids=ids[1],
        dual=None if dual is None else effective_dual(dual),
        rows=rows,
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
    negative_log_q: Tensor | None,
    negative_ids: Tensor | None,
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
        both_or_none(ids_name, ids, "negative_ids", negative_ids)
        both_or_none(log_q_name, as_given(log_q), "negative_log_q", as_given(negative_log_q))
    leading = query.shape[:-1]
    more = () if negative is None else negative.shape[:1]
    both = flat_ids(query, **{ids_name: (ids, leading), "negative_ids": (negative_ids, more)})
    rows = row_arguments(query, **row_options)
    positive_log_q = flat_log_q(log_q_name, log_q, leading, query, rows.example_weights)
    more_log_q = flat_log_q("negative_log_q", negative_log_q, more, query)
    positives = flat_rows(positive)
    of_batch = positive_log_q
    if of_batch is None and more_log_q is not None:  # which only takes negatives out
        of_batch = more_log_q.new_zeros(len(positives))
    return SharedProblem(
        query=flat_rows(query),
        positive=None,
        candidates=positives if negative is None else torch.cat((positives, negative)),
        positive_log_q=positive_log_q,
        candidate_log_q=joined(of_batch, more_log_q),
        positive_ids=both[0],
        candidate_ids=joined(both[0], both[1]),
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
    **others: Any,
) -> SharedProblem:
    """The problem of ``dual_scale_softmax_loss``."""
    others["dual"] = DualScale(hardness, similarity, slate_size, competition)
    if takes_batch(in_batch, negative is not None):
        of_batch: dict[str, Any] = {"log_q": positive_log_q, "ids": positive_ids}
        named = {**of_batch, **others, "prefix": "positive_"}
        return in_batch_problem(query, positive, negative=negative, **named)
    named = {"positive_log_q": positive_log_q, "positive_ids": positive_ids, **others}
    return sampled_problem(query, positive, cast("Tensor", negative), **named)


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
    whole_table: bool = True,
    **row_options: Any,
) -> SharedProblem:
    """The problem of ``full_softmax_loss``: every row of the table is a candidate.

    Of a table that is not here as a whole, the shard that is here may have no rows.
    """
    skip_threshold = checked_skip_threshold(skip_threshold)
    ignore_index = integer("ignore_index", ignore_index)
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
    return SharedProblem(
        query=flat_rows(query),
        positive=None,
        candidates=table,
        target=target.long(),
        candidate_log_q=bias,
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


def per_row_problem(
    query: Tensor,
    table: Tensor,
    positive_ids: Tensor,
    negative_ids: Tensor,
    *,
    positive_log_q: Tensor | None,
    negative_log_q: Tensor | None,
    **row_options: Any,
) -> PerRowProblem:
    """The problem of ``indexed_sampled_softmax_loss`` where every row has negatives of its own.

    The ids have been through :func:`table_ids`.
    """
    query, table = query_and_table(query, table)
    leading, width = query.shape[:-1], negative_ids.shape[-1]
    rows = row_arguments(query, **row_options)
    weights = rows.example_weights
    positive_log_q = flat_log_q("positive_log_q", positive_log_q, leading, query, weights)
    negative_log_q = flat_log_q("negative_log_q", negative_log_q, (*leading, width), query, weights)
    both_or_none("positive_log_q", positive_log_q, "negative_log_q", negative_log_q)
    shape = (math.prod(leading), width)
    return PerRowProblem(
        query=flat_rows(query),
        item_table=table,
        positive_rows=positive_ids.reshape(-1),
        candidate_rows=negative_ids.reshape(shape),
        positive_log_q=positive_log_q,
        candidate_log_q=None if negative_log_q is None else negative_log_q.reshape(shape),
        rows=rows,
    )


def table_ids(
    query: Tensor,
    table: Tensor,
    positive_ids: Tensor,
    negative_ids: Tensor,
    example_weights: Tensor | None,
    whole_table: bool = True,
) -> tuple[Tensor, Tensor]:
    """The ids of ``indexed_sampled_softmax_loss``, checked, as int64 in their shapes.

    Whether they are rows of a table that is not here as a whole, others look at.

    Raises:
        IndexError: shared negatives, or their positives, outside the table, where values are looked
            at. Those of negatives per row are left to `rows.prepare`.
    """
    query_and_table(query, table)
    if whole_table and table.shape[0] == 0:
        raise ValueError("table has no rows; wanted at least one item to draw")
    leading = query.shape[:-1]
    positive_ids = integers("positive_ids", positive_ids, query.device)
    negative_ids = integers("negative_ids", negative_ids, query.device)
    check_shape("positive_ids", positive_ids, leading, query)
    shared = negative_ids.dim() == 1
    if not shared and (negative_ids.dim() == 0 or negative_ids.shape[:-1] != leading):
        raise ValueError(
            f"negative_ids has shape {list(negative_ids.shape)}; wanted [N], the same for all "
            f"rows, or {[*leading, 'K']}, those of each row, for query {list(query.shape)}"
        )
    check_shape("negative_ids", negative_ids, negative_ids.shape, query)
    if example_weights is not None:
        check_dense("example_weights", example_weights)
    if shared and whole_table and checks_values(query):
        active = None
        if example_weights is not None and example_weights.shape == leading:
            active = example_weights.reshape(-1) != 0
        ids_outside("positive_ids", positive_ids.reshape(-1), table.shape[0], active)
        ids_outside("negative_ids", negative_ids, table.shape[0], least=NO_ITEM)
    positive_ids, negative_ids = positive_ids.long(), negative_ids.long()
    if not shared:  # what is no item is left out as a hit is
        absent = negative_ids == NO_ITEM
        negative_ids = torch.where(absent, positive_ids[..., None], negative_ids)
    return positive_ids, negative_ids


def leave_out_no_items(
    negative_ids: Tensor,  # [N]
    positive_log_q: Any,  # [...], perhaps calibrated
    negative_log_q: Any,  # [N]
) -> tuple[Tensor, Any]:
    """Shared negatives without those that are no items.

    Where values are not looked at, and sizes must not depend on them, these get a log-Q of +inf.
    """
    absent = negative_ids == NO_ITEM
    if not checks_values(absent):
        given = as_given(positive_log_q), as_given(negative_log_q)
        both_or_none("positive_log_q", given[0], "negative_log_q", given[1])
        tilt = torch.zeros_like(absent, dtype=torch.float32)
        if isinstance(negative_log_q, Calibrated):
            negative_log_q, tilt = negative_log_q
        tilt = tilt.masked_fill(absent, -torch.inf)
        return negative_ids.masked_fill(absent, 0), Calibrated(negative_log_q, tilt)
    if not bool(absent.any()):
        return negative_ids, negative_log_q
    kept = ~absent
    if isinstance(negative_log_q, Calibrated):
        log_q, tilt = negative_log_q
        return negative_ids[kept], Calibrated(log_q if log_q is None else log_q[kept], tilt[kept])
    if negative_log_q is not None and negative_log_q.shape == kept.shape:  # else the loss raises
        negative_log_q = negative_log_q[kept]
    return negative_ids[kept], negative_log_q


def query_and_table(query: Tensor, table: Tensor) -> list[Tensor]:
    """Both, checked. Autocast leaves a table as it is: a cast would read and write all of it."""
    for name, value in (("query", query), ("table", table)):
        check_dense(name, value)
    if autocast_dtype(query) is None:
        return check_embeddings(query, table=table)
    with no_autocast(query.device.type):
        return check_embeddings(query.to(table.dtype), table=table)


def joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Both, one after the other; the first alone where one of them is None."""
    return first if first is None or second is None else torch.cat((first, second))
