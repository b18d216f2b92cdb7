"""The loss of shared candidates and its gradients in one launch; `reference` has the formulas.

A program is one of as many as the chip runs at once, and stays for the whole call.

Phase 0  owns a slice of the rows    streams their weights     writes `order`, the rows that count
Compete  owns q, p[BLOCK_M1, D]      streams the candidates    writes g, shift; dual scale only
Phase 1  owns q[BLOCK_M1, D]         streams the candidates    writes l, dq, dp, dtau, statistics
Phase 2  owns c[BLOCK_N2, D]         streams the rows          writes dc, d log-Q
Sums     owns a slice of the rows    streams their losses      writes one partial sum per worker
Finish   owns some domains           streams the partial sums  writes L, dL/dtau, dL/dW

Between two phases every program waits for all others (`grid_barrier`). What a phase leaves to the
next lies in the workspace. Every output has one owner, and sums have a fixed order: no atomics on
results, and the same call gives the same bits.

Follow a tile. Phase 1 loads BLOCK_M1 rows of the queries and keeps them. Candidates pass BLOCK_N1
at a time: one product gives ``z log2 e``, ``exp2(z - reference)`` goes into the row's total and,
through a second product, into ``sum_j e_ij c_j``. The reference of a row stands 44 nats above the
larger of two logits, that of its positive and the largest of the first block: nothing is rescaled
on the way. Only where a total leaves the range of the dtype, a candidate being e^113 times as
likely as those two, the tile looks for its maxima and starts again. Then the row has all it needs:
its loss, ``dq`` and ``dp``. For phase 2 it leaves one number, ``lse - log2(a / tau)``: with it
``exp2(z - statistic)`` *is* ``a p / tau``, so domain weights, reduction and temperature cost phase
2 nothing per element; ``a = 0`` gives an infinite statistic and exact zeros. Phase 2 keeps BLOCK_N2
candidates, recomputes the transposed logits with the rows that pass, and its second product sums
``dc`` to the end.

Where the positive is one of the candidates, phase 1 leaves its column out and adds it at the end,
in full precision, as it does with a positive of its own: the tile knows which block will be the
next to hold one, so the others pay nothing. In a batch the columns are the diagonal, and phase 2
does the same. In the full softmax they are the targets: a block of phase 2 that holds the target
of a row has ``p - 1`` in its place.

With a `skip_threshold` (SKIP), a block whose probabilities are all too small for it costs no second
product. Phase 2 compares the logits with a number that phase 1 leaves for every row. Phase 1 does
not know the probabilities yet: it divides by the total so far, which makes them larger. The total
itself, and so the loss, leaves nothing out.

The dual scale comes first: with the phase `dual_scale` every row knows how its candidates
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
    CHUNK,
    LOST,
    LOST_MERGED,
    Context,
    Dual,
    Sizes,
    grid_barrier,
)
from dwl_kernels.backends.triton.kernels.dual_scale import competing_tile, dual_with_means
from dwl_kernels.backends.triton.kernels.epilogue import finish_sums, sum_rows, worker_sum
from dwl_kernels.backends.triton.kernels.prologue import weigh_rows, workspace
from dwl_kernels.backends.triton.kernels.row_pass import merge_rows, row_tile
from dwl_kernels.backends.triton.kernels.schedule import anew, shares, unit, units_of


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
    # A context is passed on and has no name here: one that is assigned loses its constants.
    sizes, until = weigh_rows(
        program,
        programs,
        Context(call.inputs, call.outputs, call.form, sizes, space, dual),
    )
    if call.form.HARDNESS or call.form.SIMILARITY or call.form.COMPETITION:
        until = compete(
            program,
            programs,
            until,
            Context(call.inputs, call.outputs, call.form, sizes, space, dual),
        )
    if call.form.COMPETITION:
        dual = dual_with_means(Context(call.inputs, call.outputs, call.form, sizes, space, dual))
    row_and_candidate_phases(
        program,
        programs,
        until,
        Context(call.inputs, call.outputs, call.form, sizes, space, dual),
    )


@triton.jit
def compete(program, programs, until, ctx):
    """The phase of the dual scale."""
    workers = ctx.sizes.workers
    for worker in range(program, until, programs):
        for tile in range(worker, tl.cdiv(ctx.sizes.count, ctx.form.BLOCK_M1), workers):
            competing_tile(tile, ctx)
    return grid_barrier(until, ctx)


@triton.jit
def row_and_candidate_phases(program, programs, until, ctx):
    """Phase 1, the sums over the rows, phase 2, and what is left to add up."""
    workers = ctx.sizes.workers
    count = ctx.sizes.count
    places = ctx.sizes.places
    tiles = tl.cdiv(count, ctx.form.BLOCK_M1)
    steps = tl.cdiv(places, ctx.form.BLOCK_N1)
    dealt = shares(tiles, steps, workers)
    by_candidate: tl.constexpr = (ctx.outputs.candidates is not None) or (
        ctx.outputs.candidate_log_q is not None
    )
    # Rows that weigh nothing and are no padding; without these there are none.
    APART: tl.constexpr = by_candidate and (
        (ctx.inputs.domain_weights is not None)
        or (ctx.inputs.row_grad is not None)
        or ctx.form.REFINED
    )
    for worker in range(program, until, programs):
        lost = 0
        for turn in range(0, units_of(worker, dealt, workers)):
            mine = shares(anew(tiles, ctx), steps, workers)
            tile, first, stop, part = unit(turn, worker, mine, steps, workers)
            lost += row_tile(tile, first, stop, part, ctx)
        if APART:
            tl.store(ctx.space.sums + LOST * workers + worker, lost)
    if dealt.split > 0:
        until = grid_barrier(until, ctx)
        for worker in range(program, until, programs):
            lost = 0
            for chunk in range(worker, dealt.split * (ctx.form.BLOCK_M1 // CHUNK), workers):
                lost += merge_rows(chunk, dealt, steps, ctx)
            if APART:
                tl.store(ctx.space.sums + LOST_MERGED * workers + worker, lost)

    sum_needed: tl.constexpr = (
        (ctx.form.REDUCTION != "none")
        or (ctx.outputs.domain_weights is not None)
        or ((ctx.outputs.temperature is not None) and (ctx.form.TEMPERATURE == "scalar"))
    )
    if sum_needed or by_candidate:
        until = grid_barrier(until, ctx)
    if sum_needed:
        for worker in range(program, until, programs):
            sum_rows(worker, ctx)

    split = False
    if by_candidate:
        if APART:
            lost = worker_sum(LOST, ctx)
            if dealt.split > 0:
                lost += worker_sum(LOST_MERGED, ctx)
        tiles = tl.cdiv(places, ctx.form.BLOCK_N2)
        steps = tl.cdiv(count, ctx.form.BLOCK_M2)
        dealt = shares(tiles, steps, workers)
        split = dealt.split > 0
        shift = 0.0
        if ctx.form.HALF:
            shift = half_shift(ctx)
        if APART:
            if lost > 0:
                candidate_tiles(program, programs, until, tiles, steps, shift, True, ctx)
            else:
                candidate_tiles(program, programs, until, tiles, steps, shift, False, ctx)
        else:
            candidate_tiles(program, programs, until, tiles, steps, shift, False, ctx)
    if sum_needed or split:
        until = grid_barrier(until, ctx)
    if by_candidate and split:
        for worker in range(program, until, programs):
            for chunk in range(worker, dealt.split * (ctx.form.BLOCK_N2 // CHUNK), workers):
                merge_candidates(chunk, dealt, steps, ctx)
    if sum_needed:
        for worker in range(program, until, programs):
            finish_sums(worker, ctx)


@triton.jit
def candidate_tiles(program, programs, until, tiles, steps, shift, APART: tl.constexpr, ctx):
    """Phase 2 of the workers that the program plays."""
    workers = ctx.sizes.workers
    dealt = shares(tiles, steps, workers)
    for worker in range(program, until, programs):
        for turn in range(0, units_of(worker, dealt, workers)):
            mine = shares(anew(tiles, ctx), steps, workers)
            tile, first, stop, part = unit(turn, worker, mine, steps, workers)
            candidate_tile(tile, first, stop, part, shift, APART, ctx)
