"""The phase of the dual scale: how every row's candidates compete, before any loss is known.

Owns q[BM, D] and p[BM, D], past which the candidates stream; writes, of each row, ``g_i`` and the
shift that makes the mean of ``kappa_ij`` one. `eager` has the formulas.

With ``pull = h q + s p`` and the factor f of a row's temperature, the logits are linear in c::

    z_ij = (<q_i, c_j> + f_i <pull_i, c_j>) / (tau f_i) + shift_i - log Q_j
         = (<q_i, c_j> + ratio_i <p_i, c_j>) * scale_i  + shift_i - log Q_j

so that the phases that follow need one product more where s is not 0, and nothing per element
otherwise. Products with q and with p are made apart: their sum would not fit 16 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dwl_kernels.backends.triton.kernels.common import (
    INTENSITY,
    MANY,
    SHIFT,
    Dual,
    Work,
    block,
    candidate_log_q,
    embeddings,
    finite,
    is_active,
    logarithm,
    positive_log_q,
    positives,
    power,
    product,
    row_array,
    row_at,
    scale_of,
    scaled,
    temperatures_of,
    unit_of,
)
from dwl_kernels.backends.triton.kernels.hits import without_hits

# What the other phases ask ------------------------------------------------------------------------


@triton.jit
def dual_factor(place, call, work):
    """What the competition of each row multiplies its temperature by."""
    if call.form.COMPETITION:
        g = tl.load(row_array(INTENSITY, place, call, work))
        return raw_factor(g, call, work) / work.dual.mean_factor
    else:
        return 1.0


@triton.jit
def raw_factor(g, call, work):
    f = 1 + work.dual.competition * (g - work.dual.mean_intensity)
    return tl.minimum(tl.maximum(f, 0.5), 2.0)


@triton.jit
def dual_shift(place, call, work):
    """What log kappa adds to all logits of the row, in their unit."""
    if call.form.HARDNESS or call.form.SIMILARITY:
        return tl.load(row_array(SHIFT, place, call, work))
    else:
        return 0.0


@triton.jit
def dual_ratio(place, call, work):
    """``<q, c> + ratio <p, c>`` is what `row_scale` turns into logits."""
    factor = dual_factor(place, call, work)
    weight = 1 + factor * work.dual.hardness
    return tl.zeros(place.shape, call.form.DTYPE) + factor * work.dual.similarity / weight


@triton.jit
def row_scale(place, row, call, work):
    tau = temperatures_of(row, call, work)
    if call.form.HARDNESS or call.form.COMPETITION:
        factor = dual_factor(place, call, work)
        tau *= factor / (1 + factor * work.dual.hardness)
    return scale_of(tau, call, work)


# The phase ---------------------------------------------------------------------------------------


@triton.jit
def group_start(group, call, work):
    """The first candidate of a group of the slate; past the last group, where no block ends."""
    many = tl.cast(group, tl.int64) * work.sizes.candidates
    first = tl.cdiv(many, tl.cast(work.dual.slate_size, tl.int64))
    return tl.minimum(first, work.sizes.candidates + 1).to(tl.int32)


@triton.jit
def competing_tile(tile, call, work):
    """``g_i`` and the shift of BM rows. A block ends where a group of the slate does."""
    sizes = work.sizes
    dual = work.dual
    dtype: tl.constexpr = call.form.DTYPE
    place = tile * call.form.BM + tl.arange(0, call.form.BM)
    row = row_at(tl.minimum(place, sizes.count - 1), call, work)
    q = embeddings(call.inputs.query, row, call, work)
    p = positives(row, call, work)
    scale = scale_of(temperatures_of(row, call, work), call, work)
    z_positive = scaled(tl.sum(q.to(dtype) * p.to(dtype), 1), scale, call, work)
    z_positive -= positive_log_q(row, call, work) * unit_of(call, work)
    if call.inputs.candidate_ids is not None:
        row_id = tl.load(call.inputs.positive_ids + row)
    top = finite(tl.full([call.form.BM], float("-inf"), dtype), call, work)
    total = tl.zeros([call.form.BM], dtype)
    valid = tl.zeros([call.form.BM], dtype)
    best = tl.full([call.form.BM], float("-inf"), dtype)
    wins = tl.zeros([call.form.BM], dtype)
    slate = tl.zeros([call.form.BM], dtype)
    # Half as many as pass at a time later: their logits are two blocks of registers.
    SIZE: tl.constexpr = max(call.form.BN // 2, 16)
    blocks = tl.cdiv(sizes.candidates, SIZE)
    if call.form.COMPETITION:
        blocks += dual.slate_size
    start = 0
    group = 1
    close = group_start(group, call, work)  # where the group ends
    for _ in tl.range(0, blocks, num_stages=call.form.STAGES_1):
        stop = tl.minimum(start + SIZE, sizes.candidates)
        if call.form.COMPETITION:
            stop = tl.minimum(stop, close)
        if call.form.FEW_CANDIDATES:
            at = start + tl.arange(0, SIZE)
            j = tl.minimum(at, sizes.candidates - 1)
            c = embeddings(call.inputs.candidates, j, call, work)
        else:
            # With groups a block starts where one of them ends, which may be anywhere.
            EVEN: tl.constexpr = call.form.EVEN and not call.form.COMPETITION
            at, c = block(call.inputs.candidates, start, sizes.candidates, SIZE, EVEN, call, work)
            j = at
        nothing = tl.zeros([call.form.BM, SIZE], dtype)
        z = product(q, tl.trans(c), nothing, call, work)
        x = z * dual.hardness
        if call.form.SIMILARITY:
            x += product(p, tl.trans(c), nothing, call, work) * dual.similarity
        x = scaled(x, scale[:, None], call, work)
        z = scaled(z, scale[:, None], call, work)
        if call.inputs.candidate_log_q is not None:
            log_q = candidate_log_q(j, call, work)
            z -= (log_q * unit_of(call, work))[None, :]
            x = tl.where((log_q != float("inf"))[None, :], x, float("-inf"))
        if call.inputs.candidate_ids is not None:
            id = tl.load(call.inputs.candidate_ids + j)[None, :]
            x = without_hits(x, row_id[:, None], id, float("-inf"), call, work)
            z = without_hits(z, row_id[:, None], id, float("-inf"), call, work)
        edge = stop < start + SIZE
        if call.form.IN_BATCH:
            edge = edge | (start < sizes.rows)
        if edge:
            counts = ((at >= start) & (at < stop))[None, :]
            if call.form.IN_BATCH:
                counts = counts & (at[None, :] != row[:, None])
                if call.form.PACKED:
                    positive = at < sizes.rows
                    counts = counts & (~positive | is_active(j, positive, call, work))[None, :]
            x = tl.where(counts, x, float("-inf"))
            z = tl.where(counts, z, float("-inf"))
        if call.form.HARDNESS or call.form.SIMILARITY:
            higher = finite(tl.maximum(top, tl.max(x, 1)), call, work)
            factor = power(top - higher, call, work)
            total = total * factor + tl.sum(power(x - higher[:, None], call, work), 1)
            top = higher
            if (
                call.form.IN_BATCH
                or (call.inputs.candidate_ids is not None)
                or (call.inputs.candidate_log_q is not None)
            ):
                valid += tl.sum(tl.where(x > float("-inf"), 1.0, 0.0).to(dtype), 1)
            else:
                valid += stop - start
        if call.form.COMPETITION:
            best = tl.maximum(best, tl.max(z, 1))
            if stop == close:
                there = best > float("-inf")
                win = 1 / (1 + power(z_positive - best, call, work))
                wins += tl.where(there, win, 0.0)
                slate += tl.where(there, 1.0, 0.0)
                best = tl.full([call.form.BM], float("-inf"), dtype)
                group += 1
                close = group_start(group, call, work)
        start = stop
    inside = place < sizes.count
    if call.form.HARDNESS or call.form.SIMILARITY:
        shift = logarithm(tl.maximum(valid, 1), call, work) - top - logarithm(total, call, work)
        shift = tl.where(valid > 0, shift, 0.0)
        tl.store(row_array(SHIFT, place, call, work), shift, mask=inside)
    if call.form.COMPETITION:
        # A row that is NaN has no intensity: maxima may leave NaN out.
        intensity = tl.where(z_positive == z_positive, wins / tl.maximum(slate, 1), float("nan"))
        tl.store(row_array(INTENSITY, place, call, work), intensity, mask=inside)


@triton.jit
def mean_over_rows(FACTORS: tl.constexpr, call, work):
    """The mean of ``g``, or of the factors that follow from it, over the rows that are not NaN.

    Every program sums all rows.
    """
    total = tl.zeros([MANY], call.form.DTYPE)
    known = tl.zeros([MANY], tl.int32)
    for start in range(0, work.sizes.count, MANY):
        place = start + tl.arange(0, MANY)
        value = tl.load(row_array(INTENSITY, place, call, work))
        counts = (place < work.sizes.count) & (value == value)
        if FACTORS:
            value = raw_factor(value, call, work)
        total += tl.where(counts, value, 0.0)
        known += counts.to(tl.int32)
    return tl.sum(total, 0) / tl.maximum(tl.sum(known, 0), 1)


@triton.jit
def with_means(call, work):
    """`work` with the means that the factor of a row's temperature needs."""
    mean = mean_over_rows(False, call, work)
    work = Work(work.sizes, work.space, with_mean(work.dual, mean, 1.0, call, work))
    factor = mean_over_rows(True, call, work)
    return Work(work.sizes, work.space, with_mean(work.dual, mean, factor, call, work))


@triton.jit
def with_mean(dual, intensity, factor, call, work):
    return Dual(
        dual.hardness, dual.similarity, dual.competition, dual.slate_size, intensity, factor
    )
