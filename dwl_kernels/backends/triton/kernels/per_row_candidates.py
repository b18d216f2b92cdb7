"""The loss of candidates that each row has of its own in a table, and its gradients, in one launch.

Phase 0  as in `shared_candidates`
Phase 1  owns q[BLOCK_M1, D]   gathers their K candidates   writes l, dq, dtau and, for the table,
                                                            dL/d<q, p>, dL/d<q, c>
Sums and finish as in `shared_candidates`

The table is read once, and memory is what the time goes to: K D elements a row, from places that
nothing predicts. BLOCK_N1 candidates of each row pass at a time, ``[BLOCK_N1, BLOCK_M1, D]``. A
thread holds 16 bytes of each: as many neighbours as D needs share a row of the batch, so that the
candidates of a row lie in one thread one after the other, and nothing but the products ``<q, c>``
is summed across threads.
``sum_j e_ij c_j`` is one row per query, so a running maximum costs little to keep. The logits
wait in the output ``dL/d<q, c>`` until the row's total is known.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dwl_kernels.backends.triton.kernels.common import (
    ALIGN,
    CHUNK,
    NO_ITEM,
    Context,
    Outputs,
    Sizes,
    finite,
    grid_barrier,
    power,
    scale_of,
    scaled,
    unit_of,
)
from dwl_kernels.backends.triton.kernels.epilogue import finish_sums, sum_rows
from dwl_kernels.backends.triton.kernels.memory import embeddings, row_at, temperatures_of
from dwl_kernels.backends.triton.kernels.prologue import weigh_rows, workspace
from dwl_kernels.backends.triton.kernels.row_results import (
    Results,
    Sums,
    row_results,
    store_losses,
    store_query,
)
from dwl_kernels.backends.triton.kernels.schedule import slice_of

NO_ROW = tl.constexpr(-2)  # in the place of an id that is no row of the table


@triton.jit
def checked(id, ctx):
    """Ids as the kernel keeps them: NO_ROW where the table has no such row, but for NO_ITEM."""
    id = tl.where((id >= NO_ITEM) & (id < ctx.sizes.candidates), id, NO_ROW)
    return id.to(tl.int32) if ctx.form.NARROW else id


@triton.jit
def draws(row, start, ctx):
    """The ids of BLOCK_N1 candidates of each row from `start` on; past the end, NO_ITEM."""
    j = start + tl.arange(0, ctx.form.BLOCK_N1)[:, None]
    at = row.to(tl.int64)[None, :] * ctx.sizes.places + j
    id = tl.load(ctx.inputs.candidate_ids + at, mask=j < ctx.sizes.places, other=NO_ITEM)
    return checked(id, ctx)


@triton.jit
def row_positives(row, ctx):
    """The positives of some rows, and whether the table has them."""
    if ctx.inputs.positive_ids is not None:
        id = tl.load(ctx.inputs.positive_ids + row)
        inside = (id >= 0) & (id < ctx.sizes.candidates)
        return embeddings(ctx.inputs.candidates, tl.where(inside, id, 0), ctx), inside
    else:
        return embeddings(ctx.inputs.positive, row, ctx), row >= 0


@triton.jit
def draw_tile(tile, ctx):
    """Phase 1 of BLOCK_M1 rows."""
    sizes = ctx.sizes
    dtype: tl.constexpr = ctx.form.DTYPE
    place = tile * ctx.form.BLOCK_M1 + tl.arange(0, ctx.form.BLOCK_M1)
    inside = place < sizes.count
    row = row_at(tl.minimum(place, sizes.count - 1), ctx)
    q = embeddings(ctx.inputs.query, row, ctx).to(dtype)
    p, found = row_positives(row, ctx)
    scale = scale_of(temperatures_of(row, ctx), ctx)
    z_positive = scaled(tl.sum(q * p.to(dtype), 1), scale, ctx)
    reference = finite(tl.full([ctx.form.BLOCK_M1], float("-inf"), dtype), ctx)
    if not ctx.form.REFINED:
        if ctx.inputs.positive_log_q is not None:
            z_positive -= tl.load(ctx.inputs.positive_log_q + row) * unit_of(ctx)
        reference = finite(z_positive, ctx)
    total = tl.zeros([ctx.form.BLOCK_M1], dtype)
    compete = tl.zeros([ctx.form.BLOCK_M1], dtype)
    weighted = tl.zeros([ctx.form.BLOCK_M1, ctx.form.BLOCK_D], dtype)
    column = tl.arange(0, ctx.form.BLOCK_D)[None, None, :]
    id = draws(row, 0, ctx)
    least = tl.where(found, NO_ITEM, NO_ROW).to(id.dtype)  # of the ids of the row
    for start in range(0, sizes.places, ctx.form.BLOCK_N1):
        # The ids of the next step are under way while the candidates of this one are.
        next_id = draws(row, start + ctx.form.BLOCK_N1, ctx)
        least = tl.minimum(least, tl.min(id, 0))
        gone = id < 0
        lies = tl.maximum(id, 0).to(tl.int64)[:, :, None] * ctx.form.D + column
        there = ~gone[:, :, None]
        if ctx.form.D != ctx.form.BLOCK_D:
            there = there & (column < ctx.form.D)
        c = tl.load(ctx.inputs.candidates + lies, mask=there, other=0.0).to(dtype)
        z = scaled(tl.sum(q[None, :, :] * c, 2), scale[None, :], ctx)
        j = start + tl.arange(0, ctx.form.BLOCK_N1)[:, None]
        at = row.to(tl.int64)[None, :] * sizes.places + j
        here = (j < sizes.places) & inside[None, :]
        if ctx.inputs.candidate_log_q is not None:
            log_q = tl.load(ctx.inputs.candidate_log_q + at, mask=here, other=0.0)
            z -= log_q * unit_of(ctx)
        z = tl.where(gone, float("-inf"), z)
        if ctx.outputs.candidates is not None:
            tl.store(ctx.outputs.candidates + at, z, mask=here)
        if ctx.form.REFINED:
            if ctx.inputs.candidate_log_q is not None:
                gone = gone | (log_q == float("inf"))
            compete += tl.sum(tl.where(gone, 0.0, 1.0).to(dtype), 0)
        higher = finite(tl.maximum(reference, tl.max(z, 0)), ctx)
        factor = power(reference - higher, ctx)
        reference = higher
        e = power(z - reference[None, :], ctx)
        total = total * factor + tl.sum(e, 0)
        if (ctx.outputs.query is not None) or (ctx.outputs.temperature is not None):
            weighted = weighted * factor[:, None] + tl.sum(e[:, :, None] * c, 0)
        id = next_id

    results = row_results(row, Sums(z_positive, reference, total, compete), ctx)
    results = mark_lost(results, least == NO_ROW, ctx)
    store_losses(place, row, inside, results, ctx)
    if (ctx.outputs.query is not None) or (ctx.outputs.temperature is not None):
        store_query(place, row, inside, p, weighted, results, ctx)
    if ctx.outputs.positive is not None:
        tl.store(ctx.outputs.positive + row, results.d_positive, mask=inside)
    if ctx.outputs.candidates is not None:
        store_draws(row, inside, reference, results, ctx)


@triton.jit
def mark_lost(results, lost, ctx):
    """NaN for rows with an id that is no row of the table."""
    nan = float("nan")
    return Results(
        results.tau,
        tl.where(lost, nan, results.loss),
        tl.where(lost, nan, results.term),
        results.all_terms,
        results.statistic,
        tl.where(lost, nan, results.coefficient),
        tl.where(lost, nan, results.d_positive),
    )


@triton.jit
def store_draws(row, inside, reference, results, ctx):
    """``dL/d<q_i, c_ij>`` in the place of the logits that wait there."""
    tl.debug_barrier()  # other threads wrote them
    nothing = (results.coefficient == 0) | (results.all_terms == 0)
    coefficient = tl.where(nothing, 0.0, results.coefficient / results.all_terms)[:, None]
    for start in range(0, ctx.sizes.places, ctx.form.BLOCK_M2):
        j = start + tl.arange(0, ctx.form.BLOCK_M2)[None, :]
        pointer = ctx.outputs.candidates + row.to(tl.int64)[:, None] * ctx.sizes.places + j
        here = inside[:, None] & (j < ctx.sizes.places)
        z = tl.load(pointer, mask=here, other=float("-inf"))
        p = power(z - reference[:, None], ctx)
        tl.store(pointer, tl.where(coefficient == 0, 0.0, coefficient * p), mask=here)


@triton.jit
def clear_padding(worker, ctx):
    """Zeros for the products of the padded rows of a slice."""
    first, stop = slice_of(worker, ctx.sizes.rows, ctx.sizes.workers)
    for start in range(first, stop, CHUNK):
        row = start + tl.arange(0, CHUNK)
        weight = tl.load(ctx.inputs.example_weights + row, mask=row < stop, other=1.0)
        padded = weight == 0
        if ctx.outputs.positive is not None:
            tl.store(ctx.outputs.positive + row, tl.zeros_like(weight), mask=padded)
        if ctx.outputs.candidates is not None:
            for k in range(0, ctx.sizes.places, ctx.form.BLOCK_M2):
                j = k + tl.arange(0, ctx.form.BLOCK_M2)[None, :]
                at = row.to(tl.int64)[:, None] * ctx.sizes.places + j
                zero = tl.zeros([CHUNK, ctx.form.BLOCK_M2], ctx.form.DTYPE)
                keep = padded[:, None] & (j < ctx.sizes.places)
                tl.store(ctx.outputs.candidates + at, zero, mask=keep)


@triton.jit(do_not_specialize=["num_rows", "table_rows", "num_draws", "num_domains", "workers"])
def indexed_softmax_loss_kernel(
    call,
    floats,  # workspace in the accumulation dtype
    integers,  # workspace, int32
    barrier,  # [1] int32, zero before the first launch
    num_rows,
    table_rows,
    num_draws,  # K
    num_domains,
    workers,
    tau,
):
    """All phases; see the head of the file."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    stride = tl.cdiv(num_rows, ALIGN) * ALIGN
    space = workspace(floats, integers, barrier, stride, 0, num_domains, workers, call)
    if call.form.EVEN:
        num_draws = num_draws // 16 * 16  # says so to the compiler
    norm = tl.cast(num_rows, call.form.DTYPE)
    sizes = Sizes(
        num_rows, stride, table_rows, num_domains, workers, tau, 0.0, num_rows, num_draws, norm
    )
    # What phase 0 clears of a padded row; the products of the row have other shapes.
    o = call.outputs
    common = Outputs(o.loss, o.query, None, None, None, o.temperature, o.domain_weights)
    # A context is passed on and has no name here: one that is assigned loses its constants.
    sizes, until = weigh_rows(
        program, programs, Context(call.inputs, common, call.form, sizes, space, None)
    )
    row_phases(
        program, programs, until, Context(call.inputs, call.outputs, call.form, sizes, space, None)
    )


@triton.jit
def row_phases(program, programs, until, ctx):
    """Phase 1 and the sums over the rows."""
    workers = ctx.sizes.workers
    if ctx.inputs.example_weights is not None:
        for worker in range(program, until, programs):
            clear_padding(worker, ctx)

    tiles = tl.cdiv(ctx.sizes.count, ctx.form.BLOCK_M1)
    for worker in range(program, until, programs):
        for tile in range(worker, tiles, workers):
            draw_tile(tile, ctx)

    if (
        (ctx.form.REDUCTION != "none")
        or (ctx.outputs.domain_weights is not None)
        or ((ctx.outputs.temperature is not None) and (ctx.form.TEMPERATURE == "scalar"))
    ):
        until = grid_barrier(until, ctx)
        for worker in range(program, until, programs):
            sum_rows(worker, ctx)
        until = grid_barrier(until, ctx)
        for worker in range(program, until, programs):
            finish_sums(worker, ctx)
