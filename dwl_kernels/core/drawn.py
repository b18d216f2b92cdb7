"""Rows of a table that are drawn as positives and negatives, by id.

`functional.table`, `modules` and `distributed.indexed` call this before they read the rows, or make
a problem whose backend reads them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dwl_kernels.core.arguments import check_dense, ignored_id, integers
from dwl_kernels.core.checks import (
    Calibrated,
    as_given,
    both_or_none,
    check_shape,
    flat_log_q,
    leave_out,
    query_and_table,
    row_arguments,
)
from dwl_kernels.core.problem import NO_ITEM, PerRowProblem
from dwl_kernels.core.values import checks_values, ids_outside


def table_rows(
    query: Tensor,
    table: Tensor,
    positive_ids: Tensor,
    negative_ids: Tensor,
    example_weights: Tensor | None,
    ignore_index: int | None = None,
    whole_table: bool = True,
) -> tuple[Tensor, Tensor]:
    """The ids of ``indexed_sampled_softmax_loss``, checked, as int64 in their shapes.

    A negative of `ignore_index` becomes -1. Whether ids are rows of a table that is not here as a
    whole, others look at.

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
    positive_ids, negative_ids = positive_ids.long(), negative_ids.long()
    if ignore_index is not None:
        ignored = negative_ids == ignored_id(ignore_index)
        negative_ids = negative_ids.masked_fill(ignored, NO_ITEM)
    if example_weights is not None:
        check_dense("example_weights", example_weights)
    if shared and whole_table and checks_values(query):
        active = None
        if example_weights is not None and example_weights.shape == leading:
            active = example_weights.reshape(-1) != 0
        ids_outside("positive_ids", positive_ids.reshape(-1), table.shape[0], active)
        ids_outside("negative_ids", negative_ids, table.shape[0], least=NO_ITEM)
    return positive_ids, negative_ids


def checked_table_ids(table_ids: Any, table: Tensor, query: Tensor) -> Tensor | None:  # [V] int64
    """The item ids of the rows of a table."""
    if table_ids is None:
        return None
    table_ids = integers("table_ids", table_ids, query.device)
    check_shape("table_ids", table_ids, table.shape[:1], query)
    return table_ids.long()


def item_ids(rows: Tensor, table_ids: Tensor | None) -> Tensor:
    """The item ids of rows of a table, which are ids themselves where it has none."""
    if table_ids is None:
        return rows
    return table_ids[rows.clamp(0, len(table_ids) - 1)].masked_fill(rows == NO_ITEM, NO_ITEM)


def left_out(
    positive_rows: Tensor,  # [...]
    negative_rows: Tensor,  # [N] or [..., K]
    table_ids: Tensor | None,  # [V]
    hits: bool,
) -> Tensor:
    """The negatives with -1 for rows of the table that are no item, and per row for its `hits`."""
    items = item_ids(negative_rows, table_ids)
    own = item_ids(positive_rows, table_ids)[..., None]
    hits = hits and negative_rows.dim() > 1
    if table_ids is None:
        return torch.where(items == own, NO_ITEM, negative_rows) if hits else negative_rows
    gone = (items == NO_ITEM) | (items == own) if hits else items == NO_ITEM
    inside = (negative_rows >= 0) & (negative_rows < len(table_ids))  # others are an error
    return negative_rows.masked_fill(gone & inside, NO_ITEM)


def per_row_problem(
    query: Tensor,
    table: Tensor,
    positive_rows: Tensor,
    negative_rows: Tensor,
    *,
    positive_log_q: Tensor | None,
    negative_log_q: Tensor | None,
    **row_options: Any,
) -> PerRowProblem:
    """The problem of ``indexed_sampled_softmax_loss`` where every row has negatives of its own.

    The ids have been through :func:`table_rows` and :func:`left_out`.
    """
    query, table = query_and_table(query, table)
    leading, width = query.shape[:-1], negative_rows.shape[-1]
    rows = row_arguments(query, **row_options)
    weights = rows.example_weights
    positive_log_q = flat_log_q("positive_log_q", positive_log_q, leading, query, weights)
    negative_log_q = flat_log_q("negative_log_q", negative_log_q, (*leading, width), query, weights)
    both_or_none("positive_log_q", positive_log_q, "negative_log_q", negative_log_q)
    shape = (math.prod(leading), width)
    if negative_log_q is not None:
        negative_log_q = negative_log_q.reshape(shape)
    return PerRowProblem(
        query=query.reshape(shape[0], query.shape[-1]),
        item_table=table,
        positive_rows=positive_rows.reshape(-1),
        candidate_rows=without_taken_out(negative_rows.reshape(shape), negative_log_q),
        positive_log_q=positive_log_q,
        candidate_log_q=negative_log_q,
        rows=rows,
    )


def without_taken_out(rows: Tensor, log_q: Tensor | None) -> Tensor:  # [B, K]
    """Rows of a table, -1 where a log-Q of +inf takes one out: what it holds is then not read."""
    if log_q is None or (checks_values(log_q) and log_q.numel() and bool(log_q.max() < math.inf)):
        return rows  # most often; a copy of the ids costs more than the look
    return rows.masked_fill(log_q == math.inf, NO_ITEM)


def leave_out_no_items(
    negative_rows: Tensor,  # [N]
    positive_log_q: Any,  # [...], perhaps calibrated
    negative_log_q: Any,  # [N]
) -> tuple[Tensor, Any]:
    """Shared negatives without those that are no items.

    Where values are not looked at, and sizes must not depend on them, these get a log-Q of +inf.
    """
    absent = negative_rows == NO_ITEM
    if not checks_values(absent):
        given = as_given(positive_log_q), as_given(negative_log_q)
        both_or_none("positive_log_q", given[0], "negative_log_q", given[1])
        return negative_rows.masked_fill(absent, 0), leave_out(absent, negative_log_q)
    if not bool(absent.any()):
        return negative_rows, negative_log_q
    kept = ~absent
    if isinstance(negative_log_q, Calibrated):
        log_q, tilt = negative_log_q
        return negative_rows[kept], Calibrated(log_q if log_q is None else log_q[kept], tilt[kept])
    if negative_log_q is not None and negative_log_q.shape == kept.shape:  # else the loss raises
        negative_log_q = negative_log_q[kept]
    return negative_rows[kept], negative_log_q
