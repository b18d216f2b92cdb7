"""Reading rows of a table by id, and the gradient of the table.

The gradient of a table row is the sum, over the places where its id was drawn, of a coefficient
times a row of the source. It is made by one registered op, ``dwl_kernels::table_gradient``, which
sorts the places by id: deterministic, and each touched row is written once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dwl_kernels import backends
from dwl_kernels.core.batching import backward_by_slices, is_batched, register_by_slices
from dwl_kernels.core.double_backward import ReverseOnly, once, refuse_tangents, transforms_active
from dwl_kernels.core.values import no_autocast
from dwl_kernels.op_checks import check_table

_library = torch.library.Library("dwl_kernels", "FRAGMENT")
_library.define(
    "table_gradient(Tensor source, Tensor[] ids, Tensor[] coefficients, int table_rows, "
    "ScalarType dtype, bool compact, str backend) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def gather_rows(table: Tensor, ids: Tensor, sparse_grad: bool, backend: str) -> Tensor:  # [M, D]
    """``table[ids]`` for ids ``[M]``; a row of NaN for an id outside the table."""
    if transforms_active():
        return _TransformedRows.apply(table, ids, sparse_grad, backend)
    refuse_tangents((table,))
    return _GatherRows.apply(table, ids, sparse_grad, backend)


def shared_rows(
    table: Tensor,  # [V, D]
    positive_ids: Tensor,  # [...]
    negative_ids: Tensor,  # [N]
    sparse_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # [..., D], [N, D]
    """Positives and negatives that all rows share, gathered at once: one gradient of the table."""
    ids = torch.cat((positive_ids.reshape(-1), negative_ids))
    rows = gather_rows(table, ids, sparse_grad, backend)
    positive, negative = rows.split((positive_ids.numel(), negative_ids.numel()))
    return positive.reshape(*positive_ids.shape, table.shape[1]), negative


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _TransformedRows.setup_context(ctx, inputs, None)
        return _TransformedRows.forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = upstream
        if is_batched(grad):
            return backward_by_slices(_GatherRows.backward, ctx, grad)
        refuse_tangents((grad,))
        (ids,) = ctx.saved_tensors
        gradient = table_gradient(grad.detach(), [ids[:, None]], [], *ctx.call)
        return once(gradient, grad), None, None, None


class _TransformedRows(ReverseOnly):
    """`_GatherRows` for the transforms of ``torch.func``."""

    @staticmethod
    def forward(table: Tensor, ids: Tensor, sparse: bool, backend: str) -> Tensor:
        rows = table[ids.clamp(0, table.shape[0] - 1)]
        outside = ((ids < 0) | (ids >= table.shape[0]))[:, None]
        # In place, a step compiled by PyTorch 2.11 loses this function from its graph.
        fill = rows.masked_fill if torch.compiler.is_compiling() else rows.masked_fill_
        return fill(outside, torch.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        table, ids, sparse, backend = inputs
        ctx.save_for_backward(ids)
        ctx.call = (table.shape[0], table.dtype, sparse, backend)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _GatherRows.backward(ctx, *upstream)


def table_gradient(
    source: Tensor,  # [R, D]
    ids: list[Tensor],  # each [R, J]
    coefficients: list[Tensor],  # each [R, J], or none at all for 1
    table_rows: int,
    dtype: torch.dtype,
    sparse: bool,
    backend: str,
) -> Tensor:  # [V, D], dense or a coalesced COO tensor
    """The sum over all places of an id of ``coefficient * source``, for every row of a table."""
    values, distinct = torch.ops.dwl_kernels.table_gradient(
        source, ids, coefficients, table_rows, dtype, sparse, backend
    )
    if not sparse:
        return values
    return torch.sparse_coo_tensor(
        distinct[None],
        values,
        (table_rows, values.shape[1]),
        is_coalesced=True,
        check_invariants=False,
    )


def _solve(
    source: Tensor,
    ids: list[Tensor],
    coefficients: list[Tensor],
    table_rows: int,
    dtype: torch.dtype,
    compact: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_table(source, ids, coefficients, table_rows, dtype, backend)
    solve = backends.pick_table_gradient(backend, source, dtype)
    with no_autocast(source.device.type):
        values, distinct = solve(source, ids, coefficients, table_rows, dtype, compact)
    if compact:
        # An optimiser would move the rows of padding, whose gradient is 0, on their old momentum.
        used = values.any(1)
        if not used.all():
            values, distinct = values[used], distinct[used]
    return values, distinct


def _fake(
    source: Tensor,
    ids: list[Tensor],
    coefficients: list[Tensor],
    table_rows: int,
    dtype: torch.dtype,
    compact: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size() if compact else table_rows
    values = source.new_empty((rows, source.shape[1]), dtype=dtype)
    return values, ids[0].new_empty(rows if compact else 0)


_library.impl("table_gradient", _solve, "CompositeExplicitAutograd")
torch.library.register_fake("dwl_kernels::table_gradient", _fake)
register_by_slices(_library, "table_gradient", sparse=lambda *args: args[5])  # compact
