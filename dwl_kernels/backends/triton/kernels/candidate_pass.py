"""Phase 2 of the Triton kernel: a tile of candidates, past which the rows stream."""

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
    block,
    candidate_at,
    candidate_log_q,
    embeddings,
    narrow,
    part_at,
    part_of,
    parts_of,
    positives,
    power,
    product,
    row_at,
    row_ids,
    row_integers,
    scale_of,
    scaled,
    store_embeddings,
    temperature_of,
    unit_of,
)
from dwl_kernels.backends.triton.kernels.hits import without_hits


@triton.jit
def half_shift(call, work):
    """The power of two that brings the largest ``a p / tau`` to the top of float16."""
    sizes = work.sizes
    largest = tl.zeros([MANY], call.form.DTYPE)
    for start in range(0, sizes.count, MANY):
        place = start + tl.arange(0, MANY)
        value = tl.load(
            work.space.rows + COEFFICIENT * sizes.stride + place,
            mask=place < sizes.count,
            other=0.0,
        )
        largest = tl.maximum(largest, tl.abs(value))
    top = tl.maximum(tl.max(largest, 0), 1e-30)
    return HEADROOM - tl.ceil(tl.log2(top))


@triton.jit
def candidate_tile(tile, first, stop, part, shift, call, work):
    """``dc`` of CM candidates from the rows of the blocks ``first : stop``, and ``d log-Q``."""
    sizes = work.sizes
    dtype: tl.constexpr = call.form.DTYPE
    at = tile * call.form.CM + tl.arange(0, call.form.CM)
    j = candidate_at(tl.minimum(at, sizes.places - 1), call, work)
    c = embeddings(call.inputs.candidates, j, call, work)
    if call.inputs.candidate_log_q is not None:
        bias = candidate_log_q(j, call, work) * unit_of(call, work)
    if call.inputs.candidate_ids is not None:
        candidate_id = tl.load(call.inputs.candidate_ids + j)
    if not call.form.ROW_SCALE:
        scale = scale_of(temperature_of(j, call, work), call, work)
    gradient = tl.zeros([call.form.CM, call.form.BLOCK_D], dtype)
    d_log_q = tl.zeros([call.form.CM], dtype)
    for start in tl.range(
        first * call.form.CN, stop * call.form.CN, call.form.CN, num_stages=call.form.STAGES_2
    ):
        if call.form.PACKED:
            place = start + tl.arange(0, call.form.CN)
            row = row_at(place, call, work)
            q = embeddings(call.inputs.query, row, call, work)
        elif call.form.FEW_ROWS:
            place = start + tl.arange(0, call.form.CN)
            row = tl.minimum(place, sizes.count - 1)
            q = embeddings(call.inputs.query, row, call, work)
        else:
            place, q = block(
                call.inputs.query, start, sizes.rows, call.form.CN, call.form.EVEN, call, work
            )
            row = place
        arrays = work.space.rows + place
        statistic = tl.load(arrays + STATISTIC * sizes.stride)
        z = tl.zeros([call.form.CM, call.form.CN], dtype)
        if call.form.SIMILARITY:
            positive = positives(row, call, work)
            ratio = tl.load(arrays + RATIO * sizes.stride)
            z = product(c, tl.trans(positive), z, call, work) * ratio[None, :]
        z = product(c, tl.trans(q), z, call, work)
        if call.form.HALF:
            statistic -= shift
        if call.form.ROW_SCALE:
            scale = tl.load(arrays + SCALE * sizes.stride)[None, :]
        z = scaled(z, scale, call, work)
        if call.inputs.candidate_log_q is not None:
            z -= bias[:, None]
        counts = True
        if call.form.SKIP:
            counts = any_counts(z, tile, place, call, work)
        if counts:
            z -= statistic[None, :]
            p = power(z, call, work)
            if not call.form.FOLD:
                p *= tl.load(arrays + COEFFICIENT * sizes.stride)[None, :]
            if call.inputs.candidate_ids is not None:
                if call.form.PACKED:
                    row_id = tl.load(row_ids(call, work) + place)
                else:
                    row_id = tl.load(call.inputs.positive_ids + row)
                p = without_hits(p, candidate_id[:, None], row_id[None, :], 0.0, call, work)
            edge = start + call.form.CN > sizes.count
            if call.inputs.target is not None:
                own = tl.load(row_integers(OWN_CANDIDATE, work) + place)
                mine = (own >= tile * call.form.CM) & (own < (tile + 1) * call.form.CM)
                edge = edge | (tl.max(mine.to(tl.int32), 0) > 0)
            elif call.form.OWN:
                own = place
                begin = tile * call.form.CM
                edge = edge | ((start < begin + call.form.CM) & (start + call.form.CN > begin))
            if edge:
                inside = (place >= start) & (place < sizes.count)
                if call.form.OWN:
                    d_positive = 0.0
                    if call.inputs.target is not None:
                        d_positive = tl.load(arrays + POSITIVE * sizes.stride)
                        if call.form.HALF:
                            d_positive *= tl.exp2(shift)
                        d_positive = d_positive[None, :]
                    p = tl.where(at[:, None] == own[None, :], d_positive, p)
                p = tl.where(inside[None, :], p, 0.0)
            if call.outputs.candidate_log_q is not None:
                tau = tl.load(arrays + TAU * sizes.stride, mask=place < sizes.count, other=0.0)
                d_log_q -= tl.sum(p * tau[None, :], 1)
            if call.outputs.candidates is not None:
                gradient = product(narrow(p, q.dtype, call, work), q, gradient, call, work)
    if call.form.HALF:
        gradient *= tl.exp2(-shift)
        d_log_q *= tl.exp2(-shift)
    if part < 0:
        finish_candidates(at, gradient, d_log_q, call, work)
    else:
        r = tl.arange(0, call.form.CM)
        d = tl.arange(0, call.form.BLOCK_D)
        base = part_of(part, call, work)
        tl.store(base + r, d_log_q)
        base += call.form.CM
        tl.store(base + r[:, None] * call.form.BLOCK_D + d[None, :], gradient)


@triton.jit
def any_counts(z, tile, place, call, work):
    """Whether the block has a pair that is likely enough, or the target of a row."""
    arrays = work.space.rows + place
    inside = place < work.sizes.count
    below = tl.load(arrays + BELOW * work.sizes.stride, mask=inside, other=float("inf"))
    own = tl.load(row_integers(OWN_CANDIDATE, work) + place)
    mine = inside & (own >= tile * call.form.CM) & (own < (tile + 1) * call.form.CM)
    below = tl.where(mine, float("-inf"), below)
    return tl.max((~(z < below[None, :])).to(tl.int32)) > 0  # NaN counts


@triton.jit
def merge_candidates(chunk, dealt, steps, call, work):
    """Join the parts of `CHUNK` candidates of a split tile."""
    chunk = tl.cast(chunk, tl.int32)
    of_tile = chunk // (call.form.CM // CHUNK)
    r = (chunk % (call.form.CM // CHUNK)) * CHUNK + tl.arange(0, CHUNK)
    d = tl.arange(0, call.form.BLOCK_D)
    gradient = tl.zeros([CHUNK, call.form.BLOCK_D], call.form.DTYPE)
    d_log_q = tl.zeros([CHUNK], call.form.DTYPE)
    first, part, last = parts_of(of_tile, dealt, steps)
    for worker in range(first, last + 1):
        base = part_of(part_at(worker, first, part), call, work)
        d_log_q += tl.load(base + r)
        base += call.form.CM
        gradient += tl.load(base + r[:, None] * call.form.BLOCK_D + d[None, :])
    at = (dealt.whole + of_tile) * call.form.CM + r
    finish_candidates(at, gradient, d_log_q, call, work)


@triton.jit
def finish_candidates(at, gradient, d_log_q, call, work):
    """Write the gradients of some candidates; in a batch, with what they get as positives."""
    sizes = work.sizes
    j = candidate_at(tl.minimum(at, sizes.places - 1), call, work)
    if call.form.IN_BATCH:
        own = at < sizes.count
        row = row_at(tl.minimum(at, tl.maximum(sizes.count - 1, 0)), call, work)
        row = tl.where(own, row, 0)  # without an active row nothing stands in the order
        q = embeddings(call.inputs.query, row, call, work).to(gradient.dtype)
        d_positive = tl.load(work.space.rows + POSITIVE * sizes.stride + at, mask=own, other=0.0)
        gradient += tl.where(own[:, None], d_positive[:, None] * q, 0.0)
        if call.outputs.candidate_log_q is not None:
            tau = tl.load(work.space.rows + TAU * sizes.stride + at, mask=own, other=0.0)
            d_log_q -= d_positive * tau
    if call.outputs.candidates is not None:
        store_embeddings(call.outputs.candidates, j, gradient, at < sizes.places, call, work)
    if call.outputs.candidate_log_q is not None:
        tl.store(call.outputs.candidate_log_q + j, d_log_q, mask=at < sizes.places)
