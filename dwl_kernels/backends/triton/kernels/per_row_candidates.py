"""The loss of candidates drawn by row from a table, and its gradients, in one launch.

Phase 0  as in `triton_kernels`
Phase 1  owns BM rows: q[BM, D]      gathers their K candidates     writes l, dq, dtau and, for the
                                                                    table, dL/d<q, p>, dL/d<q, c>
Sums and finish as in `triton_kernels`

The table is read once, and memory is what the time goes to: K D elements a row, from places that
nothing predicts. BN candidates of each row pass at a time, ``[BN, BM, D]``. A thread holds 16 bytes
of each: as many neighbours as D needs share a row of the batch, so that the candidates of a row lie
in one thread one after the other, and nothing but the products ``<q, c>`` is summed across threads.
``sum_j e_ij c_j`` is one row per query, so a running maximum costs little to keep. The logits
wait in the output ``dL/d<q, c>`` until the row's total is known.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dwl_kernels.backends.triton.kernels.common import (
    ALIGN,
    CHUNK,
    Call,
    Outputs,
    Sizes,
    Work,
    embeddings,
    finite,
    grid_barrier,
    power,
    row_at,
    scale_of,
    scaled,
    slice_of,
    temperatures_of,
    unit_of,
)
from dwl_kernels.backends.triton.kernels.row_pass import (
    Results,
    Sums,
    row_results,
    store_losses,
    store_query,
)
from dwl_kernels.backends.triton.kernels.shared_candidates import (
    finish_sums,
    sum_rows,
    weigh_rows,
    workspace,
)


@triton.jit
def checked(id, call, work):
    """Ids as the kernel keeps them: -1 where the table has no such row."""
    id = tl.where((id >= 0) & (id < work.sizes.candidates), id, -1)
    return id.to(tl.int32) if call.form.NARROW else id


@triton.jit
def draws(row, positive_id, start, call, work):
    """The ids of candidates ``start : start + BN`` of each row; past the end, of the positive."""
    j = start + tl.arange(0, call.form.BN)[:, None]
    at = row.to(tl.int64)[None, :] * work.sizes.places + j
    id = tl.load(call.inputs.candidate_ids + at, mask=j < work.sizes.places, other=0)
    return tl.where(j < work.sizes.places, checked(id, call, work), positive_id[None, :])


@triton.jit
def draw_tile(tile, call, work):
    """Phase 1 of BM rows."""
    sizes = work.sizes
    dtype: tl.constexpr = call.form.DTYPE
    place = tile * call.form.BM + tl.arange(0, call.form.BM)
    inside = place < sizes.count
    row = row_at(tl.minimum(place, sizes.count - 1), call, work)
    q = embeddings(call.inputs.query, row, call, work).to(dtype)
    positive_id = checked(tl.load(call.inputs.positive_ids + row), call, work)
    least = positive_id  # of the ids of the row
    p = embeddings(call.inputs.candidates, tl.maximum(positive_id, 0), call, work)
    scale = scale_of(temperatures_of(row, call, work), call, work)
    z_positive = scaled(tl.sum(q * p.to(dtype), 1), scale, call, work)
    reference = finite(tl.full([call.form.BM], float("-inf"), dtype), call, work)
    if not call.form.REFINED:
        if call.inputs.positive_log_q is not None:
            z_positive -= tl.load(call.inputs.positive_log_q + row) * unit_of(call, work)
        reference = finite(z_positive, call, work)
    total = tl.zeros([call.form.BM], dtype)
    compete = tl.zeros([call.form.BM], dtype)
    weighted = tl.zeros([call.form.BM, call.form.BLOCK_D], dtype)
    column = tl.arange(0, call.form.BLOCK_D)[None, None, :]
    id = draws(row, positive_id, 0, call, work)
    for start in range(0, sizes.places, call.form.BN):
        # The ids of the next step are under way while the candidates of this one are.
        next_id = draws(row, positive_id, start + call.form.BN, call, work)
        least = tl.minimum(least, tl.min(id, 0))
        lies = tl.maximum(id, 0).to(tl.int64)[:, :, None] * call.form.D + column
        if call.form.D == call.form.BLOCK_D:
            c = tl.load(call.inputs.candidates + lies)
        else:
            c = tl.load(call.inputs.candidates + lies, mask=column < call.form.D, other=0.0)
        c = c.to(dtype)
        z = scaled(tl.sum(q[None, :, :] * c, 2), scale[None, :], call, work)
        j = start + tl.arange(0, call.form.BN)[:, None]
        at = row.to(tl.int64)[None, :] * sizes.places + j
        here = (j < sizes.places) & inside[None, :]
        if call.inputs.candidate_log_q is not None:
            log_q = tl.load(call.inputs.candidate_log_q + at, mask=here, other=0.0)
            z -= log_q * unit_of(call, work)
        hit = id == positive_id[None, :]
        z = tl.where(hit, float("-inf"), z)
        if call.outputs.candidates is not None:
            tl.store(call.outputs.candidates + at, z, mask=here)
        if call.form.REFINED:
            gone = hit
            if call.inputs.candidate_log_q is not None:
                gone = gone | (log_q == float("inf"))
            compete += tl.sum(tl.where(gone, 0.0, 1.0).to(dtype), 0)
        higher = finite(tl.maximum(reference, tl.max(z, 0)), call, work)
        factor = power(reference - higher, call, work)
        reference = higher
        e = power(z - reference[None, :], call, work)
        total = total * factor + tl.sum(e, 0)
        if (call.outputs.query is not None) or (call.outputs.temperature is not None):
            weighted = weighted * factor[:, None] + tl.sum(e[:, :, None] * c, 0)
        id = next_id

    results = row_results(row, Sums(z_positive, reference, total, compete), call, work)
    results = mark_lost(results, least < 0, call, work)
    store_losses(place, row, inside, results, call, work)
    if (call.outputs.query is not None) or (call.outputs.temperature is not None):
        store_query(place, row, inside, p, weighted, results, call, work)
    if call.outputs.positive is not None:
        tl.store(call.outputs.positive + row, results.d_positive, mask=inside)
    if call.outputs.candidates is not None:
        store_draws(row, inside, reference, results, call, work)


@triton.jit
def mark_lost(results, lost, call, work):
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
def store_draws(row, inside, reference, results, call, work):
    """``dL/d<q_i, c_ij>`` in the place of the logits that wait there."""
    tl.debug_barrier()  # other threads wrote them
    nothing = (results.coefficient == 0) | (results.all_terms == 0)
    coefficient = tl.where(nothing, 0.0, results.coefficient / results.all_terms)[:, None]
    for start in range(0, work.sizes.places, call.form.CN):
        j = start + tl.arange(0, call.form.CN)[None, :]
        pointer = call.outputs.candidates + row.to(tl.int64)[:, None] * work.sizes.places + j
        here = inside[:, None] & (j < work.sizes.places)
        z = tl.load(pointer, mask=here, other=float("-inf"))
        p = power(z - reference[:, None], call, work)
        tl.store(pointer, tl.where(coefficient == 0, 0.0, coefficient * p), mask=here)


@triton.jit
def clear_padding(worker, call, work):
    """Zeros for the products of the padded rows of a slice."""
    first, stop = slice_of(worker, work.sizes.rows, work.sizes.workers)
    for start in range(first, stop, CHUNK):
        row = start + tl.arange(0, CHUNK)
        weight = tl.load(call.inputs.example_weights + row, mask=row < stop, other=1.0)
        padded = weight == 0
        if call.outputs.positive is not None:
            tl.store(call.outputs.positive + row, tl.zeros_like(weight), mask=padded)
        if call.outputs.candidates is not None:
            for k in range(0, work.sizes.places, call.form.CN):
                j = k + tl.arange(0, call.form.CN)[None, :]
                at = row.to(tl.int64)[:, None] * work.sizes.places + j
                zero = tl.zeros([CHUNK, call.form.CN], call.form.DTYPE)
                keep = padded[:, None] & (j < work.sizes.places)
                tl.store(call.outputs.candidates + at, zero, mask=keep)


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
    common = Outputs(o.loss, o.query, None, None, o.temperature, o.domain_weights, None)
    work = Work(sizes, space, None)
    sizes, until = weigh_rows(program, programs, Call(call.inputs, common, call.form), work)
    work = Work(sizes, space, None)
    if call.inputs.example_weights is not None:
        for worker in range(program, until, programs):
            clear_padding(worker, call, work)

    tiles = tl.cdiv(work.sizes.count, call.form.BM)
    for worker in range(program, until, programs):
        for tile in range(worker, tiles, workers):
            draw_tile(tile, call, work)

    if (
        (call.form.REDUCTION != "none")
        or (call.outputs.domain_weights is not None)
        or ((call.outputs.temperature is not None) and (call.form.TEMPERATURE == "scalar"))
    ):
        until = grid_barrier(barrier, until, call)
        for worker in range(program, until, programs):
            sum_rows(worker, call, work)
        until = grid_barrier(barrier, until, call)
        for worker in range(program, until, programs):
            finish_sums(worker, call, work)
