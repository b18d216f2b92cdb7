"""Phase 2 of the Triton kernel: a tile of candidates, past which the rows stream."""

from __future__ import annotations

import triton
import triton.language as tl

from dwl_kernels.backends.triton_common import (
    CHUNK,
    COEFFICIENT,
    HEADROOM,
    MANY,
    POSITIVE,
    SCALE,
    STATISTIC,
    block,
    candidate_at,
    embeddings,
    narrow,
    part_of,
    power,
    product,
    row_at,
    scale_of,
    scaled,
    store_embeddings,
    temperature_of,
    unit_of,
)


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
    """``dc`` of CM candidates from the rows of the blocks ``first : stop``."""
    sizes = work.sizes
    dtype: tl.constexpr = call.form.DTYPE
    at = tile * call.form.CM + tl.arange(0, call.form.CM)
    j = candidate_at(tl.minimum(at, sizes.places - 1), call, work)
    c = embeddings(call.inputs.candidates, j, call, work)
    if call.inputs.candidate_log_q is not None:
        bias = tl.load(call.inputs.candidate_log_q + j) * unit_of(call, work)
    if call.inputs.candidate_ids is not None:
        candidate_id = tl.load(call.inputs.candidate_ids + j)
    if call.form.TEMPERATURE != "row":
        scale = scale_of(temperature_of(j, call, work), call, work)
    diagonal: tl.constexpr = (call.inputs.positive is None) and (call.inputs.candidate_ids is None)
    gradient = tl.zeros([call.form.CM, call.form.BLOCK_D], dtype)
    for start in tl.range(
        first * call.form.CN, stop * call.form.CN, call.form.CN, num_stages=call.form.STAGES_2
    ):
        if (call.inputs.example_weights is not None) or call.form.FEW_ROWS:
            place = start + tl.arange(0, call.form.CN)
            row = row_at(tl.minimum(place, sizes.count - 1), call, work)
            q = embeddings(call.inputs.query, row, call, work)
        else:
            place, q = block(call.inputs.query, start, sizes.rows, call.form.CN, call, work)
            row = place
        arrays = work.space.rows + place
        statistic = tl.load(arrays + STATISTIC * sizes.stride)
        z = product(c, tl.trans(q), tl.zeros([call.form.CM, call.form.CN], dtype), call, work)
        if call.form.HALF:
            statistic -= shift
        if call.form.TEMPERATURE == "row":
            scale = tl.load(arrays + SCALE * sizes.stride)[None, :]
        z = scaled(z, scale, call, work)
        if call.inputs.candidate_log_q is not None:
            z -= bias[:, None]
        z -= statistic[None, :]
        p = power(z, call, work)
        if not call.form.FOLD:
            inside = place < sizes.count
            p *= tl.load(arrays + COEFFICIENT * sizes.stride, mask=inside, other=0.0)[None, :]
        if call.inputs.candidate_ids is not None:
            row_id = tl.load(call.inputs.positive_ids + row)
            p = tl.where(candidate_id[:, None] == row_id[None, :], 0.0, p)
        edge = start + call.form.CN > sizes.count
        if diagonal:
            own = tile * call.form.CM
            edge = edge | ((start < own + call.form.CM) & (start + call.form.CN > own))
        if edge:
            p = tl.where(((place >= start) & (place < sizes.count))[None, :], p, 0.0)
            if diagonal:
                p = tl.where(at[:, None] == place[None, :], 0.0, p)
        gradient = product(narrow(p, q.dtype, call, work), q, gradient, call, work)
    if call.form.HALF:
        gradient *= tl.exp2(-shift)
    if part < 0:
        finish_candidates(at, gradient, call, work)
    else:
        r = tl.arange(0, call.form.CM)
        d = tl.arange(0, call.form.BLOCK_D)
        base = part_of(part, call, work)
        tl.store(base + r[:, None] * call.form.BLOCK_D + d[None, :], gradient)


@triton.jit
def merge_candidates(chunk, whole, splits, call, work):
    """Join the parts of `CHUNK` candidates of a split tile."""
    chunk = tl.cast(chunk, tl.int32)
    of_tile = chunk // (call.form.CM // CHUNK)
    r = (chunk % (call.form.CM // CHUNK)) * CHUNK + tl.arange(0, CHUNK)
    d = tl.arange(0, call.form.BLOCK_D)
    gradient = tl.zeros([CHUNK, call.form.BLOCK_D], call.form.DTYPE)
    for s in range(splits):
        base = part_of(of_tile * splits + s, call, work)
        gradient += tl.load(base + r[:, None] * call.form.BLOCK_D + d[None, :])
    at = (whole + of_tile) * call.form.CM + r
    finish_candidates(at, gradient, call, work)


@triton.jit
def finish_candidates(at, gradient, call, work):
    """Write the gradients of some candidates; in a batch, with what they get as positives."""
    sizes = work.sizes
    j = candidate_at(tl.minimum(at, sizes.places - 1), call, work)
    if call.inputs.positive is None:
        own = at < sizes.count
        row = row_at(tl.minimum(at, sizes.count - 1), call, work)
        q = embeddings(call.inputs.query, row, call, work).to(gradient.dtype)
        d_positive = tl.load(work.space.rows + POSITIVE * sizes.stride + at, mask=own, other=0.0)
        gradient += tl.where(own[:, None], d_positive[:, None] * q, 0.0)
    store_embeddings(call.outputs.candidates, j, gradient, at < sizes.places, call, work)
