"""Where rows and candidates lie, and what is known of each: embeddings, ids, log-Q, weights.

A row tile, a slice or a block holds *places*: positions in the order in which rows or candidates
stream, padding left out. `row_at` and `candidate_at` say what stands there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dwl_kernels.backends.triton.kernels.common import (
    ID,
    MANY,
    ORDER,
    OTHER_ID,
    ROOM,
    narrow,
)


@triton.jit
def embeddings(base, index, ctx):
    """Rows `index` of a ``[*, D]`` matrix, ``[len(index), BLOCK_D]``."""
    column = tl.arange(0, ctx.form.BLOCK_D)
    pointer = base + tl.cast(index, tl.int64)[:, None] * ctx.form.D + column[None, :]
    if ctx.form.D == ctx.form.BLOCK_D:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=column[None, :] < ctx.form.D, other=0.0)


@triton.jit
def block(base, start, length, SIZE: tl.constexpr, EVEN: tl.constexpr, ctx):
    """The indices and embeddings of a block of a matrix with at least SIZE rows.

    The last block begins early enough to end with the matrix, so its first rows came before. With
    one address for the whole block, a load costs no arithmetic. EVEN promises the compiler that
    `start` and `length` are multiples of 16, so that it may load vectors.
    """
    first = tl.minimum(start, length - SIZE)
    if EVEN:
        first = tl.multiple_of(first, 16)
    row = tl.arange(0, SIZE)
    return first + row, embeddings(base + tl.cast(first, tl.int64) * ctx.form.D, row, ctx)


@triton.jit
def store_embeddings(base, index, value, mask, ctx):
    column = tl.arange(0, ctx.form.BLOCK_D)
    pointer = base + index.to(tl.int64)[:, None] * ctx.form.D + column[None, :]
    keep = mask[:, None]
    if ctx.form.D != ctx.form.BLOCK_D:
        keep = keep & (column[None, :] < ctx.form.D)
    tl.store(pointer, narrow(value, base.dtype.element_ty, ctx), mask=keep)


@triton.jit
def row_integers(which: tl.constexpr, ctx):
    """The integers of the rows in their packed order."""
    return ctx.space.integers + which * (ctx.sizes.stride + ROOM)


@triton.jit
def row_ids(ctx):
    """Where the ids of the rows lie in the packed order."""
    pointer = row_integers(ID, ctx)
    return tl.cast(pointer, tl.pointer_type(ctx.inputs.positive_ids.dtype.element_ty))


@triton.jit
def other_row_ids(ctx):
    pointer = row_integers(OTHER_ID, ctx)
    return tl.cast(pointer, tl.pointer_type(ctx.inputs.other_row_ids.dtype.element_ty))


@triton.jit
def row_at(place, ctx):
    """The row at `place` of the rows that are not padding."""
    if ctx.form.PACKED:
        return tl.load(row_integers(ORDER, ctx) + place)
    else:
        return place


@triton.jit
def candidate_at(place, ctx):
    """The candidate at `place` of the stream; in a batch those of padded rows are left out."""
    sizes = ctx.sizes
    if ctx.form.IN_BATCH and ctx.form.PACKED:
        packed = place < sizes.count
        row = tl.load(row_integers(ORDER, ctx) + place, mask=packed, other=0)
        return tl.where(packed, row, place - sizes.count + sizes.rows)
    else:
        return place


@triton.jit
def own_candidate(row, ctx):
    """The candidate that is the positive of each row, where there is no `positive`."""
    if ctx.inputs.target is not None:
        own = tl.load(ctx.inputs.target + row)
        return tl.minimum(tl.maximum(own, 0), ctx.sizes.candidates - 1).to(tl.int32)
    else:
        return row


@triton.jit
def positives(row, ctx):
    if ctx.inputs.positive is None:
        return embeddings(ctx.inputs.candidates, own_candidate(row, ctx), ctx)
    else:
        return embeddings(ctx.inputs.positive, row, ctx)


@triton.jit
def is_active(row, inside, ctx):
    """Which rows are not padding."""
    active = inside
    if ctx.inputs.example_weights is not None:
        weight = tl.load(ctx.inputs.example_weights + row, mask=inside, other=0.0)
        active = active & (weight != 0)
    if ctx.inputs.target is not None:
        target = tl.load(ctx.inputs.target + row, mask=inside, other=ctx.form.IGNORE)
        active = active & (target != ctx.form.IGNORE)
    return active


@triton.jit
def temperature_of(row, ctx):
    """``tau_i``, a scalar or one per row."""
    if ctx.form.TEMPERATURE == "row":
        return tl.load(ctx.inputs.temperature + row)
    elif ctx.form.TEMPERATURE == "scalar":
        return tl.load(ctx.inputs.temperature)
    else:
        return ctx.sizes.tau


@triton.jit
def temperatures_of(row, ctx):
    return tl.zeros(row.shape, ctx.form.DTYPE) + temperature_of(row, ctx)


@triton.jit
def row_array(which, place, ctx):
    """Where the workspace has something of the rows; past the last row stands the last."""
    return ctx.space.rows + which * ctx.sizes.stride + tl.minimum(place, ctx.sizes.count - 1)


@triton.jit
def positive_log_q(row, ctx):
    """``log Q+_i``; that of the candidate where the positive is one."""
    if ctx.inputs.target is not None:
        if ctx.inputs.candidate_log_q is not None:
            return tl.load(ctx.inputs.candidate_log_q + own_candidate(row, ctx))
        else:
            return 0.0
    elif ctx.inputs.positive_log_q is not None:
        return tl.load(ctx.inputs.positive_log_q + row)
    else:
        return 0.0


@triton.jit
def candidate_log_q(j, ctx):
    """``log Q_j``; +inf for a positive of the batch that is never drawn (-inf): it is nobody's."""
    log_q = tl.load(ctx.inputs.candidate_log_q + j)
    if ctx.form.DRAWN:
        log_q = tl.where((log_q == float("-inf")) & (j < ctx.sizes.rows), float("inf"), log_q)
    return log_q


@triton.jit
def stays(log_q, ctx):
    """Which candidates their log-Q, as given or listed, does not take out.

    In a batch a positive of -inf is taken out as well; a negative of -inf makes losses infinite,
    whatever the number of candidates.
    """
    if ctx.form.DRAWN:
        return tl.abs(log_q) != float("inf")
    else:
        return log_q != float("inf")


@triton.jit
def list_drawn(ctx):
    """Leave `candidate_log_q` of all candidates in the workspace.

    Where candidates stream past a row tile, a look at each would cost too much. A positive that is
    never drawn makes totals infinite, so the tile starts again with what is listed here. Programs
    that do so at the same time write the same values.
    """
    for start in range(0, ctx.sizes.candidates, MANY):
        j = start + tl.arange(0, MANY)
        inside = j < ctx.sizes.candidates
        log_q = candidate_log_q(tl.where(inside, j, 0), ctx)
        tl.store(ctx.space.log_q + j, log_q, mask=inside)
    tl.debug_barrier()


@triton.jit
def row_weight(row, ctx):
    """``w_i``; NaN for a negative weight, or a temperature, domain id or target out of range."""
    weight = tl.full(row.shape, 1.0, ctx.form.DTYPE)
    if ctx.inputs.example_weights is not None:
        weight = tl.load(ctx.inputs.example_weights + row)
    if ctx.inputs.domain_ids is not None:
        total = tl.zeros_like(weight)
        present = tl.zeros_like(weight)
        for slot in range(ctx.form.SLOTS):
            domain = tl.load(ctx.inputs.domain_ids + row.to(tl.int64) * ctx.form.SLOTS + slot)
            inside = (domain >= 0) & (domain < ctx.sizes.domains)
            value = tl.load(ctx.inputs.domain_weights + domain, mask=inside, other=float("nan"))
            given = domain != -1
            total += tl.where(given, value, 0.0)
            present += tl.where(given, 1.0, 0.0)
        weight *= tl.where(present > 0, total / tl.maximum(present, 1.0), 1.0)
    if ctx.inputs.target is not None:
        target = tl.load(ctx.inputs.target + row)
        outside = (target < 0) | (target >= ctx.sizes.candidates)
        weight = tl.where(outside, float("nan"), weight)
    wrong = weight < 0
    if ctx.form.TEMPERATURE != "float":
        tau = temperatures_of(row, ctx)
        wrong = wrong | ~((tau > 0) & (tau < float("inf")))
    return tl.where(wrong, float("nan"), weight)


@triton.jit
def skippable_below(row, ctx):
    """The probability under which a pair may be left out of the gradients."""
    return ctx.sizes.skip_threshold / row_weight(row, ctx)
