"""Phase 2 of the Triton kernel: a tile of candidates, past which the rows stream.

`shared_candidates` runs it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dwl_kernels.backends.triton.kernels.common import (
    BELOW,
    CHUNK,
    COEFFICIENT,
    HEADROOM,
    MANY,
    OWN_CANDIDATE,
    POSITIVE,
    RATIO,
    SCALE,
    STATISTIC,
    TAU,
    narrow,
    power,
    product,
    scale_of,
    scaled,
    unit_of,
)
from dwl_kernels.backends.triton.kernels.hits import without_hits
from dwl_kernels.backends.triton.kernels.memory import (
    block,
    candidate_at,
    candidate_log_q,
    embeddings,
    other_row_ids,
    positives,
    row_at,
    row_ids,
    row_integers,
    store_embeddings,
    temperature_of,
)
from dwl_kernels.backends.triton.kernels.schedule import part_at, part_of, parts_of


@triton.jit
def half_shift(ctx):
    """The power of two that brings the largest ``a p / tau`` to the top of float16."""
    sizes = ctx.sizes
    largest = tl.zeros([MANY], ctx.form.DTYPE)
    for start in range(0, sizes.count, MANY):
        place = start + tl.arange(0, MANY)
        value = tl.load(
            ctx.space.rows + COEFFICIENT * sizes.stride + place,
            mask=place < sizes.count,
            other=0.0,
        )
        largest = tl.maximum(largest, tl.abs(value))
    top = tl.maximum(tl.max(largest, 0), 1e-30)
    return HEADROOM - tl.ceil(tl.log2(top))


@triton.jit
def candidate_tile(tile, first, stop, part, shift, APART: tl.constexpr, ctx):
    """``dc`` of BLOCK_N2 candidates from rows of the blocks ``first : stop``, and ``d log-Q``.

    APART takes zeros for rows that weigh nothing, of which some `is_lost`.
    """
    sizes = ctx.sizes
    dtype: tl.constexpr = ctx.form.DTYPE
    at = tile * ctx.form.BLOCK_N2 + tl.arange(0, ctx.form.BLOCK_N2)
    j = candidate_at(tl.minimum(at, sizes.places - 1), ctx)
    c = embeddings(ctx.inputs.candidates, j, ctx)
    if ctx.inputs.candidate_log_q is not None:
        bias = candidate_log_q(j, ctx) * unit_of(ctx)
    if ctx.inputs.candidate_ids is not None:
        candidate_id = tl.load(ctx.inputs.candidate_ids + j)
    if ctx.inputs.other_candidate_ids is not None:
        other_id = tl.load(ctx.inputs.other_candidate_ids + j)
    if not ctx.form.ROW_SCALE:
        scale = scale_of(temperature_of(j, ctx), ctx)
    gradient = tl.zeros([ctx.form.BLOCK_N2, ctx.form.BLOCK_D], dtype)
    d_log_q = tl.zeros([ctx.form.BLOCK_N2], dtype)
    for start in tl.range(
        first * ctx.form.BLOCK_M2,
        stop * ctx.form.BLOCK_M2,
        ctx.form.BLOCK_M2,
        num_stages=ctx.form.STAGES_2,
    ):
        if ctx.form.PACKED:
            place = start + tl.arange(0, ctx.form.BLOCK_M2)
            row = row_at(place, ctx)
            q = embeddings(ctx.inputs.query, row, ctx)
        elif ctx.form.FEW_ROWS:
            place = start + tl.arange(0, ctx.form.BLOCK_M2)
            row = tl.minimum(place, sizes.count - 1)
            q = embeddings(ctx.inputs.query, row, ctx)
        else:
            place, q = block(
                ctx.inputs.query, start, sizes.rows, ctx.form.BLOCK_M2, ctx.form.EVEN, ctx
            )
            row = place
        arrays = ctx.space.rows + place
        statistic = tl.load(arrays + STATISTIC * sizes.stride)
        if APART:
            q = tl.where((statistic == float("inf"))[:, None], 0.0, q)
        z = tl.zeros([ctx.form.BLOCK_N2, ctx.form.BLOCK_M2], dtype)
        if ctx.form.SIMILARITY:
            positive = positives(row, ctx)
            if APART:
                positive = tl.where((statistic == float("inf"))[:, None], 0.0, positive)
            ratio = tl.load(arrays + RATIO * sizes.stride)
            z = product(c, tl.trans(positive), z, ctx) * ratio[None, :]
        z = product(c, tl.trans(q), z, ctx)
        if ctx.form.HALF:
            statistic -= shift
        if ctx.form.ROW_SCALE:
            scale = tl.load(arrays + SCALE * sizes.stride)[None, :]
        z = scaled(z, scale, ctx)
        if ctx.inputs.candidate_log_q is not None:
            z -= bias[:, None]
        counts = True
        if ctx.form.SKIP:
            counts = any_counts(z, tile, place, ctx)
        if counts:
            z -= statistic[None, :]
            p = power(z, ctx)
            if not ctx.form.FOLD:
                p *= tl.load(arrays + COEFFICIENT * sizes.stride)[None, :]
            if ctx.inputs.candidate_ids is not None:
                if ctx.form.PACKED:
                    row_id = tl.load(row_ids(ctx) + place)
                else:
                    row_id = tl.load(ctx.inputs.positive_ids + row)
                p = without_hits(p, candidate_id[:, None], row_id[None, :], 0.0, ctx)
            if ctx.inputs.other_candidate_ids is not None:
                if ctx.form.PACKED:
                    row_id = tl.load(other_row_ids(ctx) + place)
                else:
                    row_id = tl.load(ctx.inputs.other_row_ids + row)
                p = without_hits(p, other_id[:, None], row_id[None, :], 0.0, ctx)
            edge = start + ctx.form.BLOCK_M2 > sizes.count
            if ctx.inputs.target is not None:
                own = tl.load(row_integers(OWN_CANDIDATE, ctx) + place)
                mine = (own >= tile * ctx.form.BLOCK_N2) & (own < (tile + 1) * ctx.form.BLOCK_N2)
                edge = edge | (tl.max(mine.to(tl.int32), 0) > 0)
            elif ctx.form.OWN:
                own = place
                begin = tile * ctx.form.BLOCK_N2
                edge = edge | (
                    (start < begin + ctx.form.BLOCK_N2) & (start + ctx.form.BLOCK_M2 > begin)
                )
            if edge:
                inside = (place >= start) & (place < sizes.count)
                if ctx.form.OWN:
                    d_positive = 0.0
                    if ctx.inputs.target is not None:
                        d_positive = tl.load(arrays + POSITIVE * sizes.stride)
                        if ctx.form.HALF:
                            d_positive *= tl.exp2(shift)
                        d_positive = d_positive[None, :]
                    p = tl.where(at[:, None] == own[None, :], d_positive, p)
                p = tl.where(inside[None, :], p, 0.0)
            if ctx.outputs.candidate_log_q is not None:
                tau = tl.load(arrays + TAU * sizes.stride, mask=place < sizes.count, other=0.0)
                d_log_q -= tl.sum(p * tau[None, :], 1)
            if ctx.outputs.candidates is not None:
                gradient = product(narrow(p, q.dtype, ctx), q, gradient, ctx)
    if ctx.form.HALF:
        gradient *= tl.exp2(-shift)
        d_log_q *= tl.exp2(-shift)
    if part < 0:
        finish_candidates(at, gradient, d_log_q, ctx)
    else:
        r = tl.arange(0, ctx.form.BLOCK_N2)
        d = tl.arange(0, ctx.form.BLOCK_D)
        base = part_of(part, ctx)
        tl.store(base + r, d_log_q)
        base += ctx.form.BLOCK_N2
        tl.store(base + r[:, None] * ctx.form.BLOCK_D + d[None, :], gradient)


@triton.jit
def any_counts(z, tile, place, ctx):
    """Whether the block has a pair that is likely enough, or the target of a row."""
    arrays = ctx.space.rows + place
    inside = place < ctx.sizes.count
    below = tl.load(arrays + BELOW * ctx.sizes.stride, mask=inside, other=float("inf"))
    own = tl.load(row_integers(OWN_CANDIDATE, ctx) + place)
    mine = inside & (own >= tile * ctx.form.BLOCK_N2) & (own < (tile + 1) * ctx.form.BLOCK_N2)
    below = tl.where(mine, float("-inf"), below)
    return tl.max((~(z < below[None, :])).to(tl.int32)) > 0  # NaN counts


@triton.jit
def merge_candidates(chunk, dealt, steps, ctx):
    """Join the parts of `CHUNK` candidates of a split tile."""
    chunk = tl.cast(chunk, tl.int32)
    of_tile = chunk // (ctx.form.BLOCK_N2 // CHUNK)
    r = (chunk % (ctx.form.BLOCK_N2 // CHUNK)) * CHUNK + tl.arange(0, CHUNK)
    d = tl.arange(0, ctx.form.BLOCK_D)
    gradient = tl.zeros([CHUNK, ctx.form.BLOCK_D], ctx.form.DTYPE)
    d_log_q = tl.zeros([CHUNK], ctx.form.DTYPE)
    first, part, last = parts_of(of_tile, dealt, steps)
    for worker in range(first, last + 1):
        base = part_of(part_at(worker, first, part), ctx)
        d_log_q += tl.load(base + r)
        base += ctx.form.BLOCK_N2
        gradient += tl.load(base + r[:, None] * ctx.form.BLOCK_D + d[None, :])
    at = (dealt.whole + of_tile) * ctx.form.BLOCK_N2 + r
    finish_candidates(at, gradient, d_log_q, ctx)


@triton.jit
def finish_candidates(at, gradient, d_log_q, ctx):
    """Write the gradients of some candidates; in a batch, with what they get as positives."""
    sizes = ctx.sizes
    j = candidate_at(tl.minimum(at, sizes.places - 1), ctx)
    if ctx.form.IN_BATCH:
        own = at < sizes.count
        row = row_at(tl.minimum(at, tl.maximum(sizes.count - 1, 0)), ctx)
        row = tl.where(own, row, 0)  # without an active row nothing stands in the order
        q = embeddings(ctx.inputs.query, row, ctx).to(gradient.dtype)
        d_positive = tl.load(ctx.space.rows + POSITIVE * sizes.stride + at, mask=own, other=0.0)
        own = own & (d_positive != 0)  # else the row may hold anything
        gradient += tl.where(own[:, None], d_positive[:, None] * q, 0.0)
        if ctx.outputs.candidate_log_q is not None:
            tau = tl.load(ctx.space.rows + TAU * sizes.stride + at, mask=own, other=0.0)
            d_log_q -= d_positive * tau
    if ctx.outputs.candidates is not None:
        store_embeddings(ctx.outputs.candidates, j, gradient, at < sizes.places, ctx)
    if ctx.outputs.candidate_log_q is not None:
        tl.store(ctx.outputs.candidate_log_q + j, d_log_q, mask=at < sizes.places)
