"""From the arguments of `rank_targets` to a problem, and what the backends make of one.

An item is *ahead* of the target unless its score is lower: ties are, and so is NaN. Whether one is
lower must not depend on where in a product it was computed, or two items with the same embedding
would be ranked by noise. A product in blocks leaves open only what lies within its rounding of the
target's score (`slack`), and of these few pairs float64 decides, by ``<q, c - t>``, which is 0
where c and t are alike.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from dwl_kernels.core.arguments import check_dense, ignored_id, integers
from dwl_kernels.core.checks import (
    check_device,
    check_shape,
    flat_ids,
    flat_rows,
    floating,
    query_and_table,
)
from dwl_kernels.core.problem import NO_ITEM, RankProblem
from dwl_kernels.core.values import checks_values, ids_outside


def rank_problem(
    query: Tensor,
    table: Tensor,
    target: Tensor,
    *,
    seen: Any,
    bias: Tensor | None,
    ignore_index: int,
) -> RankProblem:
    """The problem of ``rank_targets``.

    Raises:
        IndexError: a target or a seen id that is no row of the table, where values are looked at.
        TypeError, ValueError: an argument of a wrong type, dtype, shape or device.
    """
    ignore_index = ignored_id(ignore_index)
    query, table = query_and_table(query, table)
    items = table.shape[0]
    if items == 0:
        raise ValueError("table has no rows; wanted at least one item to rank")
    leading = query.shape[:-1]
    target = integers("target", target, query.device)
    (target,) = cast("list[Tensor]", flat_ids(query, target=(target, leading)))
    target = target.long()
    ids_outside("target", target, items, target != ignore_index)
    if bias is not None:
        check_shape("bias", bias, table.shape[:1], query)
        bias = floating("bias", bias, query, differentiable=True).detach()
    offsets = ids = None
    if seen is not None:
        offsets, ids = _seen(seen, query, target.shape[0], items)
    return RankProblem(
        query=flat_rows(query).detach(),
        item_table=table.detach(),
        target=target,
        bias=bias,
        seen_offsets=offsets,
        seen_ids=ids,
        ignore_index=ignore_index,
    )


def _seen(seen: Any, query: Tensor, rows: int, items: int) -> tuple[Tensor, Tensor]:
    """Offsets and ids, checked, as int64."""
    if isinstance(seen, Tensor) and seen.layout == torch.sparse_csr:
        if seen.shape != (rows, items):
            raise ValueError(
                f"seen has shape {list(seen.shape)}; wanted {[rows, items]}, a row per target and "
                "a column per item of the table"
            )
        seen = seen.crow_indices(), seen.col_indices()
    if not isinstance(seen, (tuple, list)) or len(seen) != 2:
        kind = f"{len(seen)} parts" if isinstance(seen, (tuple, list)) else type(seen).__name__
        raise TypeError(
            f"seen is {kind}; wanted a pair of integer tensors, offsets [B + 1] and ids [nnz], or "
            "a sparse CSR tensor [B, V]: of a dense mask that is mask.to_sparse_csr()"
        )
    offsets, ids = (
        integers(name, one, query.device)
        for name, one in zip(("seen[0]", "seen[1]"), seen, strict=True)
    )
    check_shape("seen[0]", offsets, (rows + 1,), query)
    check_dense("seen[1]", ids)
    if ids.dim() != 1:
        raise ValueError(f"seen[1] has shape {list(ids.shape)}; wanted [nnz], the ids of all rows")
    check_device("seen[1]", ids, query)
    offsets, ids = offsets.long(), ids.long()
    if checks_values(offsets):
        first, last = int(offsets[0]), int(offsets[-1])
        if first != 0 or last != ids.shape[0] or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"seen[0] goes from {first} to {last} for {ids.shape[0]} ids; wanted offsets that "
                "begin at 0, never fall, and end at the number of ids: row i has seen "
                "seen[1][seen[0][i]:seen[0][i + 1]]"
            )
        ids_outside("seen[1]", ids, items, least=NO_ITEM)
    return offsets, ids


def own_items(problem: RankProblem) -> tuple[Tensor, Tensor, Tensor]:  # each [B]
    """The target of each row within the table, which rows are padding, which have no such item.

    The last are those of ids outside the table, where values are not looked at.
    """
    target, items = problem.target, problem.item_table.shape[0]
    padded = target == problem.ignore_index
    outside = ((target < 0) | (target >= items)) & ~padded
    return target.clamp(0, items - 1), padded, outside


def seen_pairs(problem: RankProblem) -> tuple[Tensor, Tensor]:  # each [nnz]
    """The row of every seen id, and the id; -1 where it is no item."""
    offsets, ids = problem.seen_offsets, problem.seen_ids
    assert offsets is not None
    assert ids is not None
    places = torch.arange(ids.shape[0], device=ids.device)
    rows = torch.searchsorted(offsets, places, right=True) - 1
    wrong = (ids < 0) | (ids >= problem.item_table.shape[0])
    last = problem.query.shape[0] - 1
    wrong |= (rows < 0) | (rows > last)
    return rows.clamp(0, max(last, 0)), ids.masked_fill(wrong, NO_ITEM)
