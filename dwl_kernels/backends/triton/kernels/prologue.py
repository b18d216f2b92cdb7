"""Phase 0: which rows are no padding, in what order, and the norm of the reduction.

`shared_candidates` and `per_row_candidates` begin with it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dwl_kernels.backends.triton.kernels.common import (
    ALIGN,
    BLOCK,
    CHUNK,
    NUM_ROW_ARRAYS,
    NUM_WORKER_ARRAYS,
    ORDER,
    ROOM,
    WEIGHT_SUM,
    Sizes,
    Space,
    grid_barrier,
)
from dwl_kernels.backends.triton.kernels.epilogue import worker_sum
from dwl_kernels.backends.triton.kernels.memory import (
    is_active,
    row_integers,
    row_weight,
    store_embeddings,
)
from dwl_kernels.backends.triton.kernels.schedule import slice_of


@triton.jit
def count_rows(worker, ctx):
    """How many rows of the slice are not padding, and the sum of their weights."""
    sizes = ctx.sizes
    first, stop = slice_of(worker, sizes.rows, sizes.workers)
    count = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], ctx.form.DTYPE)
    for start in range(first, stop, BLOCK):
        row = start + tl.arange(0, BLOCK)
        active = is_active(row, row < stop, ctx)
        count += active.to(tl.int32)
        if ctx.form.REDUCTION == "weighted_mean":
            weight = row_weight(tl.minimum(row, stop - 1), ctx)
            total += tl.where(active, weight, 0.0)
    if ctx.form.PACKED:
        tl.store(ctx.space.counts + worker, tl.sum(count, 0))
    if ctx.form.REDUCTION == "weighted_mean":
        tl.store(ctx.space.sums + WEIGHT_SUM * sizes.workers + worker, tl.sum(total, 0))


@triton.jit
def pack_rows(worker, count, ctx):
    """Write the active rows of the slice after those of earlier slices; zeros for others."""
    first, stop = slice_of(worker, ctx.sizes.rows, ctx.sizes.workers)
    other = tl.arange(0, ctx.form.WORKERS)
    place = tl.sum(tl.load(ctx.space.counts + other, mask=other < worker, other=0), 0)
    last = -1
    for start in range(first, stop, BLOCK):
        row = start + tl.arange(0, BLOCK)
        active = is_active(row, row < stop, ctx)
        rank = tl.cumsum(active.to(tl.int32), 0)
        tl.store(row_integers(ORDER, ctx) + place + rank - 1, row, mask=active)
        place += tl.sum(active.to(tl.int32), 0)
        last = tl.maximum(last, tl.max(tl.where(active, row, -1), 0))
        padded = (row < stop) & ~active
        nothing = tl.zeros([BLOCK], ctx.form.DTYPE)
        if (ctx.form.REDUCTION == "none") and (ctx.outputs.loss is not None):
            tl.store(ctx.outputs.loss + row, nothing, mask=padded)
        if (ctx.form.TEMPERATURE == "row") and (ctx.outputs.temperature is not None):
            tl.store(ctx.outputs.temperature + row, nothing, mask=padded)
        if ctx.form.IN_BATCH and (ctx.outputs.candidate_log_q is not None):
            tl.store(ctx.outputs.candidate_log_q + row, nothing, mask=padded)
    if (place == count) & (last >= 0):  # it stands in the places past the end, too
        room = count + tl.arange(0, ROOM)
        tl.store(row_integers(ORDER, ctx) + room, tl.zeros_like(room) + last)
    for start in range(first, stop, CHUNK):
        row = start + tl.arange(0, CHUNK)
        inside = row < stop
        padded = inside & ~is_active(row, inside, ctx)
        zero = tl.zeros([CHUNK, ctx.form.BLOCK_D], ctx.form.DTYPE)
        if ctx.outputs.query is not None:
            store_embeddings(ctx.outputs.query, row, zero, padded, ctx)
        if ctx.outputs.positive is not None:
            store_embeddings(ctx.outputs.positive, row, zero, padded, ctx)
        if ctx.form.IN_BATCH and (ctx.outputs.candidates is not None):
            store_embeddings(ctx.outputs.candidates, row, zero, padded, ctx)


@triton.jit
def weigh_rows(program, programs, ctx):
    """All of phase 0: the sizes, now with what counts of rows and candidates, and the norm.

    And up to which worker the program goes on, see `grid_barrier`.
    """
    sizes = ctx.sizes
    until = sizes.workers
    count = sizes.count
    places = sizes.places
    norm = sizes.norm
    if ctx.form.PACKED or (ctx.form.REDUCTION == "weighted_mean"):
        for worker in range(program, sizes.workers, programs):
            count_rows(worker, ctx)
        until = grid_barrier(until, ctx)
        if ctx.form.PACKED:
            other = tl.arange(0, ctx.form.WORKERS)
            left = tl.load(ctx.space.counts + other, mask=other < until, other=0)
            count = tl.sum(left, 0)
            if ctx.form.IN_BATCH:
                places = sizes.candidates - sizes.rows + count
            norm = count.to(norm.dtype)
        if ctx.form.REDUCTION == "weighted_mean":
            norm = worker_sum(WEIGHT_SUM, ctx)
        if ctx.form.PACKED:
            for worker in range(program, until, programs):
                pack_rows(worker, count, ctx)
            until = grid_barrier(until, ctx)
    sizes = Sizes(
        sizes.rows,
        sizes.stride,
        sizes.candidates,
        sizes.domains,
        sizes.workers,
        sizes.tau,
        sizes.skip_threshold,
        count,
        places,
        norm,
    )
    return sizes, until


@triton.jit
def workspace(floats, integers, barrier, stride, num_candidates, num_domains, workers, call):
    """The tensors in two flat buffers; `workspace_floats` on the host has their lengths."""
    sums = tl.cast(stride, tl.int64) * NUM_ROW_ARRAYS  # what follows may lie past 2^31
    domains = sums + NUM_WORKER_ARRAYS * workers
    log_q = domains
    if call.outputs.domain_weights is not None:
        log_q += 2 * workers * num_domains
    log_q = tl.cdiv(log_q, ALIGN) * ALIGN
    parts = log_q
    if call.form.DRAWN:  # with the most rows and candidates past 2^31
        parts = tl.cast(log_q, tl.int64) + tl.cdiv(num_candidates, ALIGN) * ALIGN
    return Space(
        floats,
        floats + sums,
        floats + domains,
        floats + log_q,
        floats + parts,
        integers,
        integers + tl.cdiv(workers, ALIGN) * ALIGN,
        barrier,
    )
