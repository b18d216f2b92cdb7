"""The wide form: a block of rows of which the logits are in memory, and the loops over it.

`wide` has the kernels that a program of `exponentials` and of `gradients` runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dwl_kernels.backends.triton.kernels.common import (
    NO_ITEM,
    narrow,
    power,
    scaled,
    unit_of,
)


@triton.jit
def rows_of(first, stop, shape):
    """The rows of a program; past the end stands the last one."""
    row = first + tl.program_id(0) * shape.BM + tl.arange(0, shape.BM)
    return tl.minimum(row, stop - 1), row < stop


@triton.jit
def own_column(row, block, shape):
    """The candidate that is the positive of each row."""
    if block.own is not None:
        return tl.load(block.own + row)
    else:
        return row


@triton.jit
def positives_at(row, ctx, block, shape):
    """Where the positive of each row lies."""
    if ctx.inputs.positive is None:
        at = own_column(row, block, shape)
        return ctx.inputs.candidates + at.to(tl.int64) * ctx.form.D
    else:
        return ctx.inputs.positive + row.to(tl.int64) * ctx.form.D


@triton.jit
def piece(at, start, inside, ctx, shape):
    """BD elements of embeddings, of the width that logits have."""
    d = start + tl.arange(0, shape.BD)
    keep = inside[:, None] & (d < ctx.form.D)[None, :]
    return tl.load(at[:, None] + d[None, :], mask=keep, other=0.0).to(ctx.form.DTYPE)


@triton.jit
def positive_logits(row, inside, scale, ctx, block, shape):
    """``z_i+``; the refined correction leaves log-Q out of it."""
    q = ctx.inputs.query + row.to(tl.int64) * ctx.form.D
    p = positives_at(row, ctx, block, shape)
    products = tl.zeros([shape.BM], ctx.form.DTYPE)
    for start in range(0, ctx.form.D, shape.BD):
        pair = piece(q, start, inside, ctx, shape) * piece(p, start, inside, ctx, shape)
        products += tl.sum(pair, 1)
    z = scaled(products, scale, ctx)
    if (ctx.inputs.positive_log_q is not None) and (not ctx.form.REFINED):
        z -= tl.load(ctx.inputs.positive_log_q + row) * unit_of(ctx)
    return z


class Rows(NamedTuple):
    """What a program of `exponentials` keeps of its rows, ``[BM]`` each."""

    logits: Any  # where they lie
    scale: Any  # for `scaled`
    id: Any  # for hits
    known: Any  # whether that is an id
    other_id: Any  # likewise


@triton.jit
def block_logits(rows, columns, start, ctx, shape):
    """``z_ij`` of BN candidates, and with the refined correction which of them count."""
    j = start + tl.arange(0, shape.BN)
    z = tl.load(rows.logits[:, None] + j[None, :])
    z = scaled(z, rows.scale[:, None], ctx)
    if columns.shift is not None:
        z -= tl.load(columns.shift + j)[None, :]
    counts = 1.0
    if columns.counts is not None:
        counts = tl.load(columns.counts + j)[None, :]
    if columns.ids is not None:
        hit = (rows.id[:, None] == tl.load(columns.ids + j)[None, :]) & rows.known[:, None]
        if columns.other_ids is not None:
            other = tl.load(columns.other_ids + j)[None, :]
            hit = hit | ((rows.other_id[:, None] == other) & (other != NO_ITEM))
        z = tl.where(hit, float("-inf"), z)
        if columns.counts is not None:
            counts = tl.where(hit, 0.0, counts)
    return z, counts


@triton.jit
def row_maxima(rows, columns, stop, ctx, shape):
    """The largest ``z_ij`` of each row. Lanes meet once, after the last candidate."""
    largest = tl.full([shape.BM, shape.BN], float("-inf"), ctx.form.DTYPE)
    for start in tl.range(0, stop, shape.BN):
        z, _ = block_logits(rows, columns, start, ctx, shape)
        largest = tl.maximum(largest, z)
    return tl.max(largest, 1)


@triton.jit
def sum_exponentials(rows, columns, reference, stride, ctx, shape):
    """``sum_j exp(z_ij - reference_i)``."""
    total = tl.zeros([shape.BM, shape.BN], ctx.form.DTYPE)
    for start in tl.range(0, stride, shape.BN):
        z, _ = block_logits(rows, columns, start, ctx, shape)
        total += power(z - reference[:, None], ctx)
    return tl.sum(total, 1)


@triton.jit
def write_exponentials(rows, columns, reference, to, keep, stride, ctx, block, shape):
    """Write ``e_ij = exp(z_ij - reference_i)``: their sums, and how many candidates compete."""
    total = tl.zeros([shape.BM, shape.BN], ctx.form.DTYPE)
    compete = tl.zeros([shape.BM, shape.BN], ctx.form.DTYPE)
    for start in tl.range(0, stride, shape.BN):
        z, counts = block_logits(rows, columns, start, ctx, shape)
        e = power(z - reference[:, None], ctx)
        total += e
        if ctx.form.REFINED:
            compete += counts
        if shape.KEEP:
            pointer = to[:, None] + (start + tl.arange(0, shape.BN))[None, :]
            value = narrow(e, block.exponentials.dtype.element_ty, ctx)
            tl.store(pointer, value, mask=keep[:, None])
    return tl.sum(total, 1), tl.sum(compete, 1)


@triton.jit
def zero_exponentials(to, which, stride, block, shape):
    """Zeros in some rows: what a row of weight zero holds must not reach a product."""
    nothing = tl.zeros([shape.BM, shape.BN], block.exponentials.dtype.element_ty)
    for start in tl.range(0, stride, shape.BN):
        pointer = to[:, None] + (start + tl.arange(0, shape.BN))[None, :]
        tl.store(pointer, nothing, mask=which[:, None])
