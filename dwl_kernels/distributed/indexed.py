"""The sampled softmax over rows of a table that is spread over a process group.

Every rank fetches the different rows that its ids name, once each, and solves its own rows with
them as with a small table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dwl_kernels import backends
from dwl_kernels.autograd import softmax_loss
from dwl_kernels.core.arguments import flag
from dwl_kernels.core.build import sampled_problem
from dwl_kernels.core.checks import padded_by_id
from dwl_kernels.core.drawn import (
    checked_table_ids,
    item_ids,
    leave_out_no_items,
    left_out,
    per_row_problem,
    table_rows,
)
from dwl_kernels.core.problem import NO_ITEM, Problem
from dwl_kernels.core.rows import Prepared, prepare
from dwl_kernels.core.untraced import untraced
from dwl_kernels.core.values import checks_values
from dwl_kernels.distributed.exchange import agree, exchanged
from dwl_kernels.distributed.group import Group
from dwl_kernels.distributed.lookup import compact, fetched, routed
from dwl_kernels.distributed.reduction import same_of_rows, whole_loss
from dwl_kernels.gather import shared_rows


class _Draws:
    """The ids of this rank's rows as places among the different ones, and its problem."""

    def __init__(
        self,
        query: Tensor,
        shard: Tensor,
        positive_ids: Tensor,
        negative_ids: Tensor,
        *,
        table_ids: Tensor | None,
        remove_accidental_hits: bool,
        ignore_index: int | None,
        row_arguments: dict[str, Any],
    ) -> None:
        weights = row_arguments["example_weights"]
        weights = padded_by_id("positive_ids", positive_ids, query, ignore_index, weights)
        row_arguments = {**row_arguments, "example_weights": weights}
        positive, negative = table_rows(
            query, shard, positive_ids, negative_ids, weights, ignore_index, whole_table=False
        )
        self.table_ids, self.hits = (
            checked_table_ids(table_ids, shard, query),
            remove_accidental_hits,
        )
        self.shared = negative.dim() == 1
        if weights is not None and weights.shape == positive.shape:
            padded = weights == 0
            _check_not_negative(positive[~padded])
            positive = positive.masked_fill(padded, NO_ITEM)
            if not self.shared:
                negative = negative.masked_fill(padded[..., None], NO_ITEM)
        else:
            _check_not_negative(positive)
        self.query, self.shard, self.row_arguments = query, shard, row_arguments
        self.wanted, (self.positive, self.negative) = compact(positive, negative)

    def most(self) -> int:
        """How many rows the table has at least, where values are looked at."""
        if not self.wanted.numel() or not checks_values(self.wanted):
            return 0
        low, high = (int(extreme) for extreme in self.wanted.aminmax())
        if low < 0:
            raise IndexError(
                f"positive_ids or negative_ids holds {low}: ids are rows of the whole table, or "
                "-1, no item, among the negatives"
            )
        return high + 1

    def problem(self, table: Tensor, table_ids: Tensor | None, backend: str) -> Problem:
        """The problem of this rank's rows with the rows that were fetched."""
        given = dict(self.row_arguments)
        drawn = left_out(self.positive, self.negative, table_ids, self.hits)
        if not self.shared:
            return per_row_problem(self.query, table, self.positive, drawn, **given)
        log_q = given["positive_log_q"], given["negative_log_q"]
        drawn, given["negative_log_q"] = leave_out_no_items(drawn, *log_q)
        positive, negative = shared_rows(table, self.positive, drawn, False, backend)
        for name, rows in (("positive_ids", self.positive), ("negative_ids", drawn)):
            given[name] = item_ids(rows, table_ids) if self.hits else None
        return sampled_problem(self.query, positive, negative, **given)


def _check_not_negative(positive_ids: Tensor) -> None:
    """IndexError for a positive that is no item, where values are looked at."""
    if checks_values(positive_ids) and positive_ids.numel() and int(positive_ids.min()) < 0:
        raise IndexError(
            f"positive_ids holds {int(positive_ids.min())}: ids are rows of the whole table"
        )


@untraced
def indexed_loss(
    query: Tensor,
    shard: Tensor,  # [V_r, D]
    positive_ids: Tensor,
    negative_ids: Tensor,
    group: Group,
    *,
    replicated_rows: bool,
    sparse_grad: bool,
    of_dtensor: bool,
    backend: str,
    table_ids: Tensor | None,
    remove_accidental_hits: bool,
    ignore_index: int | None,
    **row_arguments: Any,
) -> Tensor:
    """The loss of `indexed_sampled_softmax_loss` with the shard of this rank for a table."""

    def local() -> tuple[tuple[_Draws, Problem, Prepared], dict[str, Any], list[int]]:
        if flag("sparse_grad", sparse_grad) and of_dtensor:
            raise ValueError(
                "sparse_grad=True does not go with a DTensor, whose gradient is a DTensor too; "
                "pass table.to_local() and process_group, or sparse_grad=False"
            )
        backends.check_name(backend)
        draws = _Draws(
            *(query, shard, positive_ids, negative_ids),
            table_ids=table_ids,
            remove_accidental_hits=flag("remove_accidental_hits", remove_accidental_hits),
            ignore_index=ignore_index,
            row_arguments=row_arguments,
        )
        # The rows come later: with zeros in their place all that can be wrong here raises here.
        nothing = shard.new_zeros(1, 1).expand(max(len(draws.wanted), 1), shard.shape[-1])
        problem = draws.problem(nothing, None, backend)
        same = same_of_rows("indexed_sampled_softmax_loss", problem)
        same["negatives"] = "shared, [N]" if draws.shared else "per row, [B, K]"
        same["table_ids"] = None if table_ids is None else "[V]"
        same["remove_accidental_hits"] = remove_accidental_hits
        same["whether table requires a gradient"] = shard.requires_grad
        backends.pick(backend, problem)  # raises if it cannot run
        same["replicated_rows"] = flag("replicated_rows", replicated_rows)
        same["sparse_grad"] = sparse_grad
        sizes = [len(problem.query), len(shard), draws.most()]
        return (draws, problem, prepare(problem, None)), same, sizes

    (draws, problem, prepared), sizes = agree(group, query, local)
    items = [one[1] for one in sizes]
    for rank, (_, _, least) in enumerate(sizes):
        if least > sum(items):
            raise IndexError(
                f"positive_ids or negative_ids holds {least - 1} on rank {rank} of the process "
                f"group, but the shards of the table have {sum(items)} rows together"
            )
    route = routed(draws.wanted, items, group)
    table, of_rows = fetched(shard, route, sparse_grad, backend), draws.table_ids
    if of_rows is not None:
        of_rows = exchanged(of_rows[route.places], route.sent, route.asked, group)
    if not len(table):
        table = torch.cat((table, table.new_zeros(1, shard.shape[-1])))
        of_rows = None
    reduction = problem.rows.reduction
    problem = draws.problem(table, of_rows, backend)
    if reduction != "none" and not replicated_rows:
        problem = problem._replace(rows=problem.rows._replace(reduction="sum"))
    own = softmax_loss(problem, backend)
    if not replicated_rows:
        own = whole_loss(own, prepared.norm, reduction, group)
    return own.reshape(query.shape[:-1]) if reduction == "none" else own
