"""The phase of the dual scale: how every row's candidates compete, before any loss is known.

Owns q[BLOCK_M1, D] and p[BLOCK_M1, D], past which the candidates stream; writes, of each row,
``g_i`` and the shift that makes the mean of ``kappa_ij`` one. `reference` has the formulas.

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
    Context,
    Dual,
    finite,
    logarithm,
    power,
    product,
    scale_of,
    scaled,
    unit_of,
)
from dwl_kernels.backends.triton.kernels.hits import without_hits
from dwl_kernels.backends.triton.kernels.memory import (
    block,
    candidate_log_q,
    embeddings,
    is_active,
    positive_log_q,
    positives,
    row_array,
    row_at,
    temperatures_of,
)

# What the other phases ask ------------------------------------------------------------------------


@triton.jit
def dual_factor(place, ctx):
    """What the competition of each row multiplies its temperature by."""
    if ctx.form.COMPETITION:
        g = tl.load(row_array(INTENSITY, place, ctx))
        return raw_factor(g, ctx) / ctx.dual.mean_factor
    else:
        return 1.0


@triton.jit
def raw_factor(g, ctx):
    f = 1 + ctx.dual.competition * (g - ctx.dual.mean_intensity)
    return tl.minimum(tl.maximum(f, 0.5), 2.0)


@triton.jit
def dual_shift(place, ctx):
    """What log kappa adds to all logits of the row, in their unit."""
    if ctx.form.HARDNESS or ctx.form.SIMILARITY:
        return tl.load(row_array(SHIFT, place, ctx))
    else:
        return 0.0


@triton.jit
def dual_ratio(place, ctx):
    """``<q, c> + ratio <p, c>`` is what `row_scale` turns into logits."""
    factor = dual_factor(place, ctx)
    weight = 1 + factor * ctx.dual.hardness
    return tl.zeros(place.shape, ctx.form.DTYPE) + factor * ctx.dual.similarity / weight


@triton.jit
def row_scale(place, row, ctx):
    tau = temperatures_of(row, ctx)
    if ctx.form.HARDNESS or ctx.form.COMPETITION:
        factor = dual_factor(place, ctx)
        tau *= factor / (1 + factor * ctx.dual.hardness)
    return scale_of(tau, ctx)


# The phase ---------------------------------------------------------------------------------------


@triton.jit
def group_start(group, ctx):
    """The first candidate of a group of the slate; past the last group, where no block ends."""
    many = tl.cast(group, tl.int64) * ctx.sizes.candidates
    first = tl.cdiv(many, tl.cast(ctx.dual.slate_size, tl.int64))
    return tl.minimum(first, ctx.sizes.candidates + 1).to(tl.int32)


@triton.jit
def competing_tile(tile, ctx):
    """``g_i`` and the shift of BLOCK_M1 rows. A block ends where a group of the slate does."""
    sizes = ctx.sizes
    dual = ctx.dual
    dtype: tl.constexpr = ctx.form.DTYPE
    place = tile * ctx.form.BLOCK_M1 + tl.arange(0, ctx.form.BLOCK_M1)
    row = row_at(tl.minimum(place, sizes.count - 1), ctx)
    q = embeddings(ctx.inputs.query, row, ctx)
    p = positives(row, ctx)
    scale = scale_of(temperatures_of(row, ctx), ctx)
    z_positive = scaled(tl.sum(q.to(dtype) * p.to(dtype), 1), scale, ctx)
    z_positive -= positive_log_q(row, ctx) * unit_of(ctx)
    if ctx.inputs.candidate_ids is not None:
        row_id = tl.load(ctx.inputs.positive_ids + row)
    if ctx.inputs.other_candidate_ids is not None:
        other_id = tl.load(ctx.inputs.other_row_ids + row)
    top = finite(tl.full([ctx.form.BLOCK_M1], float("-inf"), dtype), ctx)
    total = tl.zeros([ctx.form.BLOCK_M1], dtype)
    valid = tl.zeros([ctx.form.BLOCK_M1], dtype)
    best = tl.full([ctx.form.BLOCK_M1], float("-inf"), dtype)
    wins = tl.zeros([ctx.form.BLOCK_M1], dtype)
    slate = tl.zeros([ctx.form.BLOCK_M1], dtype)
    # Half as many as pass at a time later: their logits are two blocks of registers.
    SIZE: tl.constexpr = max(ctx.form.BLOCK_N1 // 2, 16)
    blocks = tl.cdiv(sizes.candidates, SIZE)
    if ctx.form.COMPETITION:
        blocks += dual.slate_size
    start = 0
    group = 1
    close = group_start(group, ctx)  # where the group ends
    for _ in tl.range(0, blocks, num_stages=ctx.form.STAGES_1):
        stop = tl.minimum(start + SIZE, sizes.candidates)
        if ctx.form.COMPETITION:
            stop = tl.minimum(stop, close)
        if ctx.form.FEW_CANDIDATES:
            at = start + tl.arange(0, SIZE)
            j = tl.minimum(at, sizes.candidates - 1)
            c = embeddings(ctx.inputs.candidates, j, ctx)
        else:
            # With groups a block starts where one of them ends, which may be anywhere.
            EVEN: tl.constexpr = ctx.form.EVEN and not ctx.form.COMPETITION
            at, c = block(ctx.inputs.candidates, start, sizes.candidates, SIZE, EVEN, ctx)
            j = at
        nothing = tl.zeros([ctx.form.BLOCK_M1, SIZE], dtype)
        z = product(q, tl.trans(c), nothing, ctx)
        x = z * dual.hardness
        if ctx.form.SIMILARITY:
            x += product(p, tl.trans(c), nothing, ctx) * dual.similarity
        x = scaled(x, scale[:, None], ctx)
        z = scaled(z, scale[:, None], ctx)
        if ctx.inputs.candidate_log_q is not None:
            log_q = candidate_log_q(j, ctx)
            z -= (log_q * unit_of(ctx))[None, :]
            x = tl.where((log_q != float("inf"))[None, :], x, float("-inf"))
        if ctx.inputs.candidate_ids is not None:
            id = tl.load(ctx.inputs.candidate_ids + j)[None, :]
            x = without_hits(x, row_id[:, None], id, float("-inf"), ctx)
            z = without_hits(z, row_id[:, None], id, float("-inf"), ctx)
        if ctx.inputs.other_candidate_ids is not None:
            id = tl.load(ctx.inputs.other_candidate_ids + j)[None, :]
            x = without_hits(x, other_id[:, None], id, float("-inf"), ctx)
            z = without_hits(z, other_id[:, None], id, float("-inf"), ctx)
        edge = stop < start + SIZE
        if ctx.form.IN_BATCH:
            edge = edge | (start < sizes.rows)
        if edge:
            counts = ((at >= start) & (at < stop))[None, :]
            if ctx.form.IN_BATCH:
                counts = counts & (at[None, :] != row[:, None])
                if ctx.form.PACKED:
                    positive = at < sizes.rows
                    counts = counts & (~positive | is_active(j, positive, ctx))[None, :]
            x = tl.where(counts, x, float("-inf"))
            z = tl.where(counts, z, float("-inf"))
        if ctx.form.HARDNESS or ctx.form.SIMILARITY:
            higher = finite(tl.maximum(top, tl.max(x, 1)), ctx)
            factor = power(top - higher, ctx)
            total = total * factor + tl.sum(power(x - higher[:, None], ctx), 1)
            top = higher
            if (
                ctx.form.IN_BATCH
                or (ctx.inputs.candidate_ids is not None)
                or (ctx.inputs.candidate_log_q is not None)
            ):
                valid += tl.sum(tl.where(x > float("-inf"), 1.0, 0.0).to(dtype), 1)
            else:
                valid += stop - start
        if ctx.form.COMPETITION:
            best = tl.maximum(best, tl.max(z, 1))
            if stop == close:
                there = best > float("-inf")
                win = 1 / (1 + power(z_positive - best, ctx))
                wins += tl.where(there, win, 0.0)
                slate += tl.where(there, 1.0, 0.0)
                best = tl.full([ctx.form.BLOCK_M1], float("-inf"), dtype)
                group += 1
                close = group_start(group, ctx)
        start = stop
    inside = place < sizes.count
    if ctx.form.HARDNESS or ctx.form.SIMILARITY:
        shift = logarithm(tl.maximum(valid, 1), ctx) - top - logarithm(total, ctx)
        shift = tl.where(valid > 0, shift, 0.0)
        tl.store(row_array(SHIFT, place, ctx), shift, mask=inside)
    if ctx.form.COMPETITION:
        # A row that is NaN has no intensity: maxima may leave NaN out.
        intensity = tl.where(z_positive == z_positive, wins / tl.maximum(slate, 1), float("nan"))
        tl.store(row_array(INTENSITY, place, ctx), intensity, mask=inside)


@triton.jit
def mean_over_rows(FACTORS: tl.constexpr, ctx):
    """The mean of ``g``, or of the factors that follow from it, over the rows that are not NaN.

    Every program sums all rows.
    """
    total = tl.zeros([MANY], ctx.form.DTYPE)
    known = tl.zeros([MANY], tl.int32)
    for start in range(0, ctx.sizes.count, MANY):
        place = start + tl.arange(0, MANY)
        value = tl.load(row_array(INTENSITY, place, ctx))
        counts = (place < ctx.sizes.count) & (value == value)
        if FACTORS:
            value = raw_factor(value, ctx)
        total += tl.where(counts, value, 0.0)
        known += counts.to(tl.int32)
    return tl.sum(total, 0) / tl.maximum(tl.sum(known, 0), 1)


@triton.jit
def dual_with_means(ctx):
    """The dual scale with the means that the factor of a row's temperature needs."""
    mean = mean_over_rows(False, ctx)
    dual = with_mean(ctx.dual, mean, 1.0)
    factor = mean_over_rows(
        True, Context(ctx.inputs, ctx.outputs, ctx.form, ctx.sizes, ctx.space, dual)
    )
    return with_mean(dual, mean, factor)


@triton.jit
def with_mean(dual, intensity, factor):
    return Dual(
        dual.hardness, dual.similarity, dual.competition, dual.slate_size, intensity, factor
    )
