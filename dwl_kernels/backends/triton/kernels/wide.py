"""Device side of the wide form: what happens to a block of logits between its matrix products.

The products themselves are in `backends.triton.wide`, which launches these for each block of rows:

exponentials  owns BM rows       streams their logits  writes e, and what is known of the rows
gradients     owns BM rows       streams the width D   writes dq, dp, dtau and the scaled queries
columns       owns BN columns    streams the rows      writes d log-Q, where it is wanted

Every number has one writer and sums a fixed order: the same call gives the same bits. The reference
of a row is the largest of its positive and of the first BN candidates; rows pass again only where a
total leaves the range of the dtype. A row's share, ``a / (tau sum)``, goes into the queries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dwl_kernels.backends.triton.kernels.common import (
    HEADROOM,
    NO_ITEM,
    Context,
    finite,
    logarithm,
    narrow,
    scale_of,
)
from dwl_kernels.backends.triton.kernels.row_results import Sums, row_results
from dwl_kernels.backends.triton.kernels.wide_block import (
    Rows,
    own_column,
    piece,
    positive_logits,
    positives_at,
    row_maxima,
    rows_of,
    sum_exponentials,
    write_exponentials,
    zero_exponentials,
)

# Of a row's total, by which coefficients are divided: above, its reference was too low.
LIMIT = tl.constexpr(2.0**64)
MANY = tl.constexpr(1024)  # shares of a block looked at together

# Arrays of what is known of the rows, [B] each.
ROW_LOSS = tl.constexpr(0)  # r l
SHARE = tl.constexpr(1)  # a / (tau sum), by which e_ij is multiplied to be dL/d<q_i, c_j>
POSITIVE = tl.constexpr(2)  # dL/d<q_i, p_i>
OWN = tl.constexpr(3)  # POSITIVE / SHARE, which is not above 0; 1 marks a row that gets zeros
D_TAU = tl.constexpr(4)
NUM_ROW_ARRAYS = tl.constexpr(5)


class Columns(NamedTuple):
    """What is known of the candidates, as many as a row of a block has room for."""

    shift: Any  # what is subtracted from their logits; infinite where there is no candidate
    ids: Any
    other_ids: Any
    counts: Any  # 1, or 0 where there is no candidate; for the refined correction


class Block(NamedTuple):
    """What there is of a block of rows alone, and of all rows."""

    logits: Any  # [rows of a block, stride] <q_i, c_j>
    exponentials: Any  # the same, in the dtype of the embeddings
    weighted: Any  # [rows of a block, D] sum_j e_ij c_j
    query: Any  # [rows of a block, D] q_i times its share
    arrays: Any  # [NUM_ROW_ARRAYS, B]
    norm: Any  # [] divisor of the reduction
    own: Any  # [B] the candidate that is the positive, in the full softmax
    unscale: Any  # [1] by what a float16 product of `query` is multiplied


class Shape(NamedTuple):
    """Constants of the kernels beside those of `Form`; every field a `tl.constexpr`."""

    BM: Any  # rows of a program
    BN: Any  # candidates at a time, and of a program of `columns`
    BD: Any  # elements of an embedding at a time
    IN_BATCH: Any  # candidate i is the positive of row i
    KEEP: Any  # gradients are wanted
    UNIT: Any  # what the rows of a block are multiples of, so that they load 16 bytes at a time


class Sizes(NamedTuple):
    norm: Any  # divisor of the reduction


@triton.jit(do_not_specialize=["first", "stop", "num_rows", "num_candidates", "steps"])
def exponentials_kernel(call, columns, block, shape, first, stop, num_rows, num_candidates, steps):
    """Rows ``first : stop``, of whose logits there is a block."""
    norm = 1.0
    if block.norm is not None:
        norm = tl.load(block.norm)
    # A context is passed on and has no name here: one that is assigned loses its constants.
    exponentials(
        Context(call.inputs, call.outputs, call.form, Sizes(norm), None, None),
        columns,
        block,
        shape,
        first,
        stop,
        num_rows,
        steps,
    )


@triton.jit
def exponentials(ctx, columns, block, shape, first, stop, num_rows, steps):
    stride = steps * shape.UNIT
    row, inside = rows_of(first, stop, shape)
    offset = (row - first).to(tl.int64) * stride
    scale = scale_of(tl.load(ctx.inputs.temperature + row), ctx)
    id = row
    known = inside
    other_id = row
    own_is_hit = inside
    if columns.ids is not None:
        id = tl.load(ctx.inputs.positive_ids + row)
        known = id != NO_ITEM
        own_is_hit = known
    if columns.other_ids is not None:
        other_id = tl.load(ctx.inputs.other_row_ids + row)
        own_is_hit = own_is_hit | (other_id != NO_ITEM)
    rows = Rows(block.logits + offset, scale, id, known, other_id)
    if ctx.inputs.positive is None:  # so that nobody has to look for it among the others
        nobody = tl.full([shape.BM], float("-inf"), ctx.form.DTYPE)
        tl.store(rows.logits + own_column(row, block, shape), nobody, mask=inside)
        tl.debug_barrier()
    z_positive = positive_logits(row, inside, scale, ctx, block, shape)

    weight = tl.load(ctx.inputs.example_weights + row)  # of everything, see `wide`
    dead = weight == 0
    if ctx.inputs.row_grad is not None:
        dead = dead | (tl.load(ctx.inputs.row_grad + row) == 0)
    to = block.exponentials + offset
    total = tl.zeros([shape.BM], ctx.form.DTYPE)
    compete = total
    lost = dead
    reference = z_positive
    attempt = 0
    again = True
    while again:
        searched = stride
        if not ctx.form.MAXIMA:
            searched = tl.where(attempt > 0, stride, shape.BN)
        largest = row_maxima(rows, columns, searched, ctx, shape)
        lost = largest == float("inf")
        reference = finite(z_positive, ctx)
        if ctx.form.HALF:
            # All terms together are 2^14, the top of float16, or the positive is far above them.
            top = finite(largest, ctx)
            top += logarithm(sum_exponentials(rows, columns, top, stride, ctx, shape), ctx)
            reference = tl.maximum(finite(top, ctx) - HEADROOM, reference - 100)
        else:
            reference = tl.maximum(finite(largest, ctx), reference)
        # inf - inf is NaN: what is infinite gets no share.
        reference = tl.where(lost, float("inf"), reference)
        total, compete = write_exponentials(
            rows, columns, reference, to, inside & ~dead, stride, ctx, block, shape
        )
        again = False
        if not ctx.form.MAXIMA:
            again = (attempt == 0) & (tl.max((total > LIMIT).to(tl.int32), 0) > 0)
        attempt += 1
    zeros = inside & dead
    if shape.KEEP and (tl.max(zeros.to(tl.int32), 0) > 0):
        zero_exponentials(to, zeros, stride, block, shape)

    total = tl.where(lost, float("inf"), total)
    if ctx.form.REFINED and (ctx.inputs.positive is None):
        own = tl.load(columns.counts + own_column(row, block, shape))
        if columns.ids is not None:
            own = tl.where(own_is_hit, 0.0, own)
        compete -= own
    sums = Sums(z_positive, reference, total, compete)
    results = row_results(row, sums, ctx)
    nothing = (results.coefficient == 0) | dead
    share = results.coefficient / tl.where(lost, 1.0, results.all_terms)
    at = block.arrays + row
    tl.store(at + ROW_LOSS * num_rows, results.loss, mask=inside)
    tl.store(at + SHARE * num_rows, tl.where(nothing, 0.0, share), mask=inside)
    tl.store(at + POSITIVE * num_rows, tl.where(nothing, 0.0, results.d_positive), mask=inside)
    own = tl.where(nothing, 1.0, tl.where(lost, -1.0, -total))
    tl.store(at + OWN * num_rows, own, mask=inside)


@triton.jit
def half_scale(first, stop, num_rows, ctx, block):
    """The power of two that brings the largest share of a block to the top of (1/2, 1]."""
    largest = tl.zeros([MANY], ctx.form.DTYPE)
    for start in range(first, stop, MANY):
        row = start + tl.arange(0, MANY)
        share = tl.load(block.arrays + SHARE * num_rows + row, mask=row < stop, other=0.0)
        largest = tl.maximum(largest, tl.abs(share))
    top = tl.minimum(tl.maximum(tl.max(largest, 0), 1e-37), 1e37)
    return tl.exp2(-tl.ceil(tl.log2(top)))


@triton.jit(do_not_specialize=["first", "stop", "num_rows", "num_candidates", "steps"])
def gradients_kernel(call, columns, block, shape, first, stop, num_rows, num_candidates, steps):
    """The gradients of rows ``first : stop``, and what their ``e`` is multiplied by for ``dc``."""
    gradients(
        Context(call.inputs, call.outputs, call.form, Sizes(1.0), None, None),
        block,
        shape,
        first,
        stop,
        num_rows,
        steps,
    )


@triton.jit
def gradients(ctx, block, shape, first, stop, num_rows, steps):
    stride = steps * shape.UNIT
    row, inside = rows_of(first, stop, shape)
    at = block.arrays + row
    share = tl.load(at + SHARE * num_rows)
    d_positive = tl.load(at + POSITIVE * num_rows)
    own = tl.load(at + OWN * num_rows)
    nothing = (own > 0)[:, None]
    tau = tl.load(ctx.inputs.temperature + row)
    factor = share
    if ctx.form.HALF:
        up = half_scale(first, stop, num_rows, ctx, block)
        factor *= up
        tl.store(block.unscale, 1 / up, mask=tl.program_id(0) == 0)
    offset = row.to(tl.int64) * ctx.form.D
    in_block = (row - first).to(tl.int64) * ctx.form.D
    q_at = ctx.inputs.query + offset
    p_at = positives_at(row, ctx, block, shape)
    outputs = ctx.outputs
    d_tau = tl.zeros([shape.BM], ctx.form.DTYPE)
    for start in range(0, ctx.form.D, shape.BD):
        d = start + tl.arange(0, shape.BD)
        keep = inside[:, None] & (d < ctx.form.D)[None, :]
        q = piece(q_at, start, inside, ctx, shape)
        if outputs.candidates is not None:
            value = tl.where(nothing, 0.0, q * factor[:, None])
            value = narrow(value, block.query.dtype.element_ty, ctx)
            tl.store(block.query + in_block[:, None] + d[None, :], value, mask=keep)
        if (outputs.query is not None) or (outputs.temperature is not None):
            p = piece(p_at, start, inside, ctx, shape)
            weighted = piece(block.weighted + in_block, start, inside, ctx, shape)
            d_query = share[:, None] * weighted + d_positive[:, None] * p
            d_query = tl.where(nothing, 0.0, d_query)
            if outputs.query is not None:
                value = narrow(d_query, outputs.query.dtype.element_ty, ctx)
                tl.store(outputs.query + offset[:, None] + d[None, :], value, mask=keep)
            d_tau -= tl.sum(tl.where(nothing, 0.0, q * d_query), 1)
        d_own = tl.where(nothing, 0.0, d_positive[:, None] * q)
        if outputs.positive is not None:
            value = narrow(d_own, outputs.positive.dtype.element_ty, ctx)
            tl.store(outputs.positive + offset[:, None] + d[None, :], value, mask=keep)
        if shape.IN_BATCH and (outputs.candidates is not None):
            to = outputs.candidates + offset[:, None] + d[None, :]
            tl.store(to, tl.load(to, mask=keep, other=0.0) + d_own, mask=keep)
    if outputs.temperature is not None:
        tl.store(at + D_TAU * num_rows, d_tau / tau, mask=inside)
    if shape.IN_BATCH and (outputs.candidate_log_q is not None):
        to = outputs.candidate_log_q + row
        tl.store(to, tl.load(to) - d_positive * tau, mask=inside)
    if (block.own is not None) and shape.KEEP:
        # Several rows may have one target, so it is the products that add their positives up.
        to = block.exponentials + (row - first).to(tl.int64) * stride + tl.load(block.own + row)
        value = narrow(tl.where(own > 0, 0.0, own), block.exponentials.dtype.element_ty, ctx)
        tl.store(to, value, mask=inside)


@triton.jit(do_not_specialize=["first", "stop", "num_rows", "num_candidates", "steps"])
def columns_kernel(call, columns, block, shape, first, stop, num_rows, num_candidates, steps):
    """``d log-Q_j`` of BN candidates, from the rows ``first : stop``."""
    stride = steps * shape.UNIT
    j = tl.program_id(0) * shape.BN + tl.arange(0, shape.BN)
    total = tl.zeros([shape.BM, shape.BN], call.form.DTYPE)
    for start in range(first, stop, shape.BM):
        row = start + tl.arange(0, shape.BM)
        inside = row < stop
        share = tl.load(block.arrays + SHARE * num_rows + row, mask=inside, other=0.0)
        share *= tl.load(call.inputs.temperature + row, mask=inside, other=0.0)
        at = block.exponentials + (row - first).to(tl.int64) * stride
        e = tl.load(at[:, None] + j[None, :], mask=inside[:, None], other=0.0)
        total += e.to(call.form.DTYPE) * share[:, None]
    to = call.outputs.candidate_log_q + j
    here = j < num_candidates
    tl.store(to, tl.load(to, mask=here, other=0.0) - tl.sum(total, 0), mask=here)
