"""Rows of a table whose rows are spread over a process group, by id.

Every rank asks the owners for the different rows that it needs, each once; in the backward their
gradients go back and are summed in the order of the ranks. A rank holds its shard and what it asked
for, and never the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwl_kernels.core.double_backward import once
from dwl_kernels.core.problem import NO_ITEM, accumulate_dtype
from dwl_kernels.distributed.exchange import exchanged, gathered
from dwl_kernels.distributed.group import Group
from dwl_kernels.gather import table_gradient


class Route(NamedTuple):
    """Who sends what: rows of this rank's shard to others, rows of theirs to this rank."""

    group: Group
    asked: tuple[int, ...]  # rows that this rank wants of every rank
    sent: tuple[int, ...]  # rows that every rank wants of this one
    places: Tensor  # [sum of sent] rows of the shard


def routed(
    wanted: Tensor,  # [U] rows of the whole table, sorted, each once
    items: Sequence[int],  # rows of the table, on every rank
    group: Group,
) -> Route:
    """Ask the owners: one exchange of counts, 8 bytes for each pair of ranks, and one of ids."""
    ends = torch.tensor(items, device=wanted.device).cumsum(0)
    places = torch.searchsorted(wanted, ends)
    counts = places.diff(prepend=places.new_zeros(1))
    (every,) = gathered([counts], [group.size] * group.size, group)
    table = every.view(group.size, group.size).tolist()
    asked, sent = table[group.rank], [of_rank[group.rank] for of_rank in table]
    ids = exchanged(wanted, asked, sent, group)
    return Route(group, tuple(asked), tuple(sent), ids - sum(items[: group.rank]))


def compact(*ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The different ids of all, sorted, and each in their places; -1 stays what it is."""
    flat = torch.cat([one.reshape(-1) for one in ids])
    wanted, inverse = flat.unique(return_inverse=True)
    none = int(wanted.numel() > 0 and wanted[0] == NO_ITEM)  # comes first, as ids are not negative
    parts = (inverse - none).split([one.numel() for one in ids])
    return wanted[none:], [part.view(one.shape) for part, one in zip(parts, ids, strict=True)]


def fetched(shard: Tensor, route: Route, sparse_grad: bool, backend: str) -> Tensor:  # [U, D]
    """The rows that were asked for. The gradient of the shard is that of the mean of the ranks."""
    return _Fetch.apply(shard, route, sparse_grad, backend)


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, route: Route, sparse_grad: bool, backend: str) -> Tensor:
        ctx.call = route, sparse_grad, backend, shard.shape[0], shard.dtype
        return exchanged(shard[route.places], route.sent, route.asked, route.group)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = upstream
        route, sparse_grad, backend, rows, dtype = ctx.call
        wide = accumulate_dtype(dtype)
        received = exchanged(grad.detach(), route.asked, route.sent, route.group).to(wide)
        ids = [route.places[:, None]]
        gradient = table_gradient(
            received / route.group.size, ids, [], rows, dtype, sparse_grad, backend
        )
        return once(gradient, grad), None, None, None
