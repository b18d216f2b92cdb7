"""The loss and its gradients in one launch; `eager` has the formulas and the names.

A program is one of as many as the chip runs at once, and stays for the whole call.

Phase 0  owns a slice of the rows    streams their weights     writes `order`, the rows that count
Compete  owns q[BM, D], p[BM, D]     streams the candidates    writes g, shift; dual scale only
Phase 1  owns q[BM, D]               streams the candidates    writes l, dq, dp, dtau, statistics
Phase 2  owns c[CM, D]               streams the rows          writes dc, d log-Q
Sums     owns a slice of the rows    streams their losses      writes one partial sum per worker
Finish   owns some domains           streams the partial sums  writes L, dL/dtau, dL/dW

Between two phases every program waits for all others (`grid_barrier`). What a phase leaves to the
next lies in the workspace. Every output has one owner, and sums have a fixed order: no atomics on
results, and the same call gives the same bits.

Follow a tile. Phase 1 loads BM rows of the queries and keeps them. Candidates pass BN at a time:
one product gives ``z log2 e``, ``exp2(z - reference)`` goes into the row's total and, through a
second product, into ``sum_j e_ij c_j``. The reference of a row stands 44 nats above the larger of
two logits, that of its positive and the largest of the first block: nothing is rescaled on the way.
Only where a total leaves the range of the dtype, a candidate being e^113 times as likely as those
two, the tile looks for its maxima and starts again. Then the row has all it needs: its loss, ``dq``
and ``dp``. For phase 2 it leaves one number, ``lse - log2(a / tau)``: with it ``exp2(z -
statistic)`` *is* ``a p / tau``, so domain weights, reduction and temperature cost phase 2 nothing
per element; ``a = 0`` gives an infinite statistic and exact zeros. Phase 2 keeps CM candidates,
recomputes the transposed logits with the rows that pass, and its second product sums ``dc`` to the
end.

Where the positive is one of the candidates, phase 1 leaves its column out and adds it at the end,
in full precision, as it does with a positive of its own: the tile knows which block will be the
next to hold one, so the others pay nothing. In a batch the columns are the diagonal, and phase 2
does the same. In the full softmax they are the targets: a block of phase 2 that holds the target
of a row has ``p - 1`` in its place.

With a `skip_threshold` (SKIP), a block whose probabilities are all too small for it costs no second
product. Phase 2 compares the logits with a number that phase 1 leaves for every row. Phase 1 does
not know the probabilities yet: it divides by the total so far, which makes them larger. The total
itself, and so the loss, leaves nothing out.

The dual scale comes first: with the phase `triton_dual` every row knows how its candidates
compete. The mean over the batch, summed by every program for itself, then moves the temperatures,
and phases 1 and 2 take the positives as a second query.

Where the tiles do not fill the last round of workers, the streamed side of the tiles that are left
is split, evenly whatever their number (`Shares`): each part goes to the workspace, and after a
barrier the parts of a tile are merged in their order.
`worker` is the program, except in the interpreter, where one program plays all workers in turn.

With ``DWL_KERNELS_DEBUG=1`` no program waits for ever: where some do not come, the others go
through the rest of the kernel as no worker at all, and what was not written stays NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dwl_kernels.backends.triton.kernels.candidate_pass import (
    candidate_tile,
    half_shift,
    merge_candidates,
)
from dwl_kernels.backends.triton.kernels.common import (
    ALIGN,
    BLOCK,
    CHUNK,
    D_TAU,
    LOSS_SUM,
    NUM_ROW_ARRAYS,
    NUM_WORKER_ARRAYS,
    ORDER,
    ROOM,
    ROW_LOSS,
    TAU_SUM,
    TERM,
    WEIGHT_SUM,
    Dual,
    Sizes,
    Space,
    Work,
    anew,
    grid_barrier,
    is_active,
    row_at,
    row_integers,
    row_weight,
    shares,
    slice_of,
    store_embeddings,
    unit,
    units_of,
)
from dwl_kernels.backends.triton.kernels.dual_scale import competing_tile, with_means
from dwl_kernels.backends.triton.kernels.row_pass import merge_rows, row_tile

# Phase 0 -----------------------------------------------------------------------------------------


@triton.jit
def count_rows(worker, call, work):
    """How many rows of the slice are not padding, and the sum of their weights."""
    sizes = work.sizes
    first, stop = slice_of(worker, sizes.rows, sizes.workers)
    count = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], call.form.DTYPE)
    for start in range(first, stop, BLOCK):
        row = start + tl.arange(0, BLOCK)
        active = is_active(row, row < stop, call, work)
        count += active.to(tl.int32)
        if call.form.REDUCTION == "weighted_mean":
            weight = row_weight(tl.minimum(row, stop - 1), call, work)
            total += tl.where(active, weight, 0.0)
    if call.form.PACKED:
        tl.store(work.space.counts + worker, tl.sum(count, 0))
    if call.form.REDUCTION == "weighted_mean":
        tl.store(work.space.sums + WEIGHT_SUM * sizes.workers + worker, tl.sum(total, 0))


@triton.jit
def pack_rows(worker, count, call, work):
    """Write the active rows of the slice after those of earlier slices; zeros for others."""
    first, stop = slice_of(worker, work.sizes.rows, work.sizes.workers)
    other = tl.arange(0, call.form.WORKERS)
    place = tl.sum(tl.load(work.space.counts + other, mask=other < worker, other=0), 0)
    last = -1
    for start in range(first, stop, BLOCK):
        row = start + tl.arange(0, BLOCK)
        active = is_active(row, row < stop, call, work)
        rank = tl.cumsum(active.to(tl.int32), 0)
        tl.store(row_integers(ORDER, work) + place + rank - 1, row, mask=active)
        place += tl.sum(active.to(tl.int32), 0)
        last = tl.maximum(last, tl.max(tl.where(active, row, -1), 0))
        padded = (row < stop) & ~active
        nothing = tl.zeros([BLOCK], call.form.DTYPE)
        if (call.form.REDUCTION == "none") and (call.outputs.loss is not None):
            tl.store(call.outputs.loss + row, nothing, mask=padded)
        if (call.form.TEMPERATURE == "row") and (call.outputs.temperature is not None):
            tl.store(call.outputs.temperature + row, nothing, mask=padded)
        if call.form.IN_BATCH and (call.outputs.candidate_log_q is not None):
            tl.store(call.outputs.candidate_log_q + row, nothing, mask=padded)
    if (place == count) & (last >= 0):  # it stands in the places past the end, too
        room = count + tl.arange(0, ROOM)
        tl.store(row_integers(ORDER, work) + room, tl.zeros_like(room) + last)
    for start in range(first, stop, CHUNK):
        row = start + tl.arange(0, CHUNK)
        inside = row < stop
        padded = inside & ~is_active(row, inside, call, work)
        zero = tl.zeros([CHUNK, call.form.BLOCK_D], call.form.DTYPE)
        if call.outputs.query is not None:
            store_embeddings(call.outputs.query, row, zero, padded, call, work)
        if call.outputs.positive is not None:
            store_embeddings(call.outputs.positive, row, zero, padded, call, work)
        if call.form.IN_BATCH and (call.outputs.candidates is not None):
            store_embeddings(call.outputs.candidates, row, zero, padded, call, work)


@triton.jit
def weigh_rows(program, programs, call, work):
    """All of phase 0: the sizes, now with what counts of rows and candidates, and the norm.

    And up to which worker the program goes on, see `grid_barrier`.
    """
    sizes = work.sizes
    until = sizes.workers
    count = sizes.count
    places = sizes.places
    norm = sizes.norm
    if call.form.PACKED or (call.form.REDUCTION == "weighted_mean"):
        for worker in range(program, sizes.workers, programs):
            count_rows(worker, call, work)
        until = grid_barrier(work.space.barrier, until, call)
        if call.form.PACKED:
            other = tl.arange(0, call.form.WORKERS)
            left = tl.load(work.space.counts + other, mask=other < until, other=0)
            count = tl.sum(left, 0)
            if call.form.IN_BATCH:
                places = sizes.candidates - sizes.rows + count
            norm = count.to(norm.dtype)
        if call.form.REDUCTION == "weighted_mean":
            norm = worker_sum(WEIGHT_SUM, call, work)
        if call.form.PACKED:
            for worker in range(program, until, programs):
                pack_rows(worker, count, call, work)
            until = grid_barrier(work.space.barrier, until, call)
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


# Sums over rows ----------------------------------------------------------------------------------


@triton.jit
def worker_sum(which, call, work):
    """The sum over all workers of what each left, in a fixed order."""
    worker = tl.arange(0, call.form.WORKERS)
    left = tl.load(
        work.space.sums + which * work.sizes.workers + worker,
        mask=worker < work.sizes.workers,
        other=0.0,
    )
    return tl.sum(left, 0)


@triton.jit
def sum_rows(worker, call, work):
    """The sums over the worker's slice: loss, dL/dtau, and for every domain."""
    sizes = work.sizes
    space = work.space
    first, stop = slice_of(worker, sizes.count, sizes.workers)
    dtype: tl.constexpr = call.form.DTYPE
    loss = tl.zeros([BLOCK], dtype)
    d_tau = tl.zeros([BLOCK], dtype)
    for start in range(first, stop, BLOCK):
        place = start + tl.arange(0, BLOCK)
        arrays = space.rows + place
        if call.form.REDUCTION != "none":
            loss += tl.load(arrays + TERM * sizes.stride, mask=place < stop, other=0.0)
        if (call.outputs.temperature is not None) and (call.form.TEMPERATURE == "scalar"):
            d_tau += tl.load(arrays + D_TAU * sizes.stride, mask=place < stop, other=0.0)
    tl.store(space.sums + LOSS_SUM * sizes.workers + worker, tl.sum(loss, 0))
    tl.store(space.sums + TAU_SUM * sizes.workers + worker, tl.sum(d_tau, 0))
    if call.outputs.domain_weights is not None:
        for start in range(0, sizes.domains, call.form.DOMAINS):
            domain = start + tl.arange(0, call.form.DOMAINS)
            losses, rows = sum_domains(domain, first, stop, call, work)
            pointer = space.domains + worker * sizes.domains + domain
            tl.store(pointer, losses, mask=domain < sizes.domains)
            pointer += sizes.workers * sizes.domains
            tl.store(pointer, rows, mask=domain < sizes.domains)


@triton.jit
def sum_domains(domain, first, stop, call, work):
    """For some domains: the sum of ``share l`` and of ``share`` over the rows of a slice."""
    dtype: tl.constexpr = call.form.DTYPE
    losses = tl.zeros([call.form.DOMAINS], dtype)
    rows = tl.zeros([call.form.DOMAINS], dtype)
    for start in range(first, stop, CHUNK):
        place = start + tl.arange(0, CHUNK)
        inside = place < stop
        row = row_at(tl.minimum(place, stop - 1), call, work)
        share = tl.where(inside, 1.0, 0.0).to(dtype)
        if call.inputs.example_weights is not None:
            share *= tl.load(call.inputs.example_weights + row)
        if call.inputs.row_grad is not None:
            share *= tl.load(call.inputs.row_grad + row)
        present = tl.zeros([CHUNK], dtype)
        slots = call.inputs.domain_ids + row.to(tl.int64) * call.form.SLOTS
        for slot in range(call.form.SLOTS):
            given = tl.load(slots + slot)
            present += tl.where((given >= 0) & (given < work.sizes.domains), 1.0, 0.0)
        share /= tl.maximum(present, 1.0)
        loss = share * tl.load(
            work.space.rows + ROW_LOSS * work.sizes.stride + place, mask=inside, other=0.0
        )
        for slot in range(call.form.SLOTS):
            here = (tl.load(slots + slot)[:, None] == domain[None, :]) & inside[:, None]
            losses += tl.sum(tl.where(here, loss[:, None], 0.0), 0)
            rows += tl.sum(tl.where(here, share[:, None], 0.0), 0)
    return losses, rows


@triton.jit
def finish_sums(worker, call, work):
    """Worker 0 writes the loss and dL/dtau; the domains are shared out."""
    sizes = work.sizes
    loss = worker_sum(LOSS_SUM, call, work)
    if (call.form.REDUCTION == "mean") or (call.form.REDUCTION == "weighted_mean"):
        loss = tl.where(sizes.norm == 0, 0.0, loss / sizes.norm)
    if worker == 0:
        if call.form.REDUCTION != "none":
            tl.store(call.outputs.loss, loss)
        if (call.outputs.temperature is not None) and (call.form.TEMPERATURE == "scalar"):
            tl.store(call.outputs.temperature, worker_sum(TAU_SUM, call, work))
    if call.outputs.domain_weights is not None:
        for number in range(worker, tl.cdiv(sizes.domains, call.form.DOMAINS), sizes.workers):
            domain = number * call.form.DOMAINS + tl.arange(0, call.form.DOMAINS)
            inside = domain < sizes.domains
            losses = tl.zeros([call.form.DOMAINS], loss.dtype)
            rows = tl.zeros([call.form.DOMAINS], loss.dtype)
            for start in range(0, sizes.workers, CHUNK):
                other = start + tl.arange(0, CHUNK)
                keep = (other < sizes.workers)[:, None] & inside[None, :]
                pointer = work.space.domains + other[:, None] * sizes.domains + domain[None, :]
                losses += tl.sum(tl.load(pointer, mask=keep, other=0.0), 0)
                if call.form.REDUCTION == "weighted_mean":
                    pointer += sizes.workers * sizes.domains
                    rows += tl.sum(tl.load(pointer, mask=keep, other=0.0), 0)
            if call.form.REDUCTION == "weighted_mean":
                losses -= loss * rows  # the norm moves with the weights
            if (call.form.REDUCTION == "mean") or (call.form.REDUCTION == "weighted_mean"):
                losses = tl.where(sizes.norm == 0, 0.0, losses / sizes.norm)
            tl.store(call.outputs.domain_weights + domain, losses, mask=inside)


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


@triton.jit(
    do_not_specialize=["num_rows", "num_candidates", "num_domains", "workers", "slate_size"]
)
def softmax_loss_kernel(
    call,
    floats,  # workspace in the accumulation dtype
    integers,  # workspace, int32
    barrier,  # [1] int32, zero before the first launch
    num_rows,
    num_candidates,
    num_domains,
    workers,
    tau,
    hardness,  # the strengths of the dual scale
    similarity,
    competition,
    slate_size,
    skip_threshold,
):
    """All phases; see the head of the file."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    stride = tl.cdiv(num_rows, ALIGN) * ALIGN
    space = workspace(floats, integers, barrier, stride, num_candidates, num_domains, workers, call)
    count = num_rows
    places = num_candidates
    norm = tl.cast(num_rows, call.form.DTYPE)
    sizes = Sizes(
        num_rows,
        stride,
        num_candidates,
        num_domains,
        workers,
        tau,
        skip_threshold,
        count,
        places,
        norm,
    )
    dual = Dual(hardness, similarity, competition, slate_size, 0.0, 1.0)
    work = Work(sizes, space, dual)

    sizes, until = weigh_rows(program, programs, call, work)
    work = Work(sizes, space, work.dual)
    count = work.sizes.count
    places = work.sizes.places
    if call.form.HARDNESS or call.form.SIMILARITY or call.form.COMPETITION:
        for worker in range(program, until, programs):
            for tile in range(worker, tl.cdiv(count, call.form.BM), workers):
                competing_tile(tile, call, work)
        until = grid_barrier(barrier, until, call)
    if call.form.COMPETITION:
        work = with_means(call, work)
    tiles = tl.cdiv(count, call.form.BM)
    steps = tl.cdiv(places, call.form.BN)
    dealt = shares(tiles, steps, workers)
    for worker in range(program, until, programs):
        for turn in range(0, units_of(worker, dealt, workers)):
            mine = shares(anew(tiles, call), steps, workers)
            tile, first, stop, part = unit(turn, worker, mine, steps, workers)
            row_tile(tile, first, stop, part, call, work)
    if dealt.split > 0:
        until = grid_barrier(barrier, until, call)
        for worker in range(program, until, programs):
            for chunk in range(worker, dealt.split * (call.form.BM // CHUNK), workers):
                merge_rows(chunk, dealt, steps, call, work)

    by_candidate: tl.constexpr = (call.outputs.candidates is not None) or (
        call.outputs.candidate_log_q is not None
    )
    sum_needed: tl.constexpr = (
        (call.form.REDUCTION != "none")
        or (call.outputs.domain_weights is not None)
        or ((call.outputs.temperature is not None) and (call.form.TEMPERATURE == "scalar"))
    )
    if sum_needed or by_candidate:
        until = grid_barrier(barrier, until, call)
    if sum_needed:
        for worker in range(program, until, programs):
            sum_rows(worker, call, work)

    split = False
    if by_candidate:
        tiles = tl.cdiv(places, call.form.CM)
        steps = tl.cdiv(count, call.form.CN)
        dealt = shares(tiles, steps, workers)
        split = dealt.split > 0
        shift = 0.0
        if call.form.HALF:
            shift = half_shift(call, work)
        for worker in range(program, until, programs):
            for turn in range(0, units_of(worker, dealt, workers)):
                mine = shares(anew(tiles, call), steps, workers)
                tile, first, stop, part = unit(turn, worker, mine, steps, workers)
                candidate_tile(tile, first, stop, part, shift, call, work)
    if sum_needed or split:
        until = grid_barrier(barrier, until, call)
    if by_candidate and split:
        for worker in range(program, until, programs):
            for chunk in range(worker, dealt.split * (call.form.CM // CHUNK), workers):
                merge_candidates(chunk, dealt, steps, call, work)
    if sum_needed:
        for worker in range(program, until, programs):
            finish_sums(worker, call, work)
