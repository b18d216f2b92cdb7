"""From the sums over the candidates of a row to its loss and its gradients.

`row_pass`, `per_row_candidates` and `wide` make the sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dwl_kernels.backends.triton.kernels.common import (
    BELOW,
    COEFFICIENT,
    D_TAU,
    NO_ITEM,
    OWN_CANDIDATE,
    POSITIVE,
    RATIO,
    ROW_LOSS,
    SCALE,
    STATISTIC,
    TAU,
    TERM,
    logarithm,
    power,
    unit_of,
)
from dwl_kernels.backends.triton.kernels.dual_scale import dual_factor, dual_ratio, row_scale
from dwl_kernels.backends.triton.kernels.memory import (
    candidate_log_q,
    embeddings,
    other_row_ids,
    own_candidate,
    positives,
    row_at,
    row_ids,
    row_integers,
    row_weight,
    skippable_below,
    store_embeddings,
    temperatures_of,
)


class Sums(NamedTuple):
    """What phase 1 knows of each row when all candidates have passed, ``[BLOCK_M1]`` each."""

    z_positive: Any  # in the unit of logits, as `reference`
    reference: Any
    total: Any  # sum_j exp(z_ij - reference)
    compete: Any  # n_i, where it is counted


class Results(NamedTuple):
    """What the sums say of each row, ``[BLOCK_M1]`` each."""

    tau: Any
    loss: Any  # r l
    term: Any  # w r l
    all_terms: Any  # what the probabilities are divided by
    statistic: Any  # reference + log all_terms
    coefficient: Any  # a / tau
    d_positive: Any  # dL/d<q_i, p_i>


@triton.jit
def row_results(row, sums, ctx):
    """From the sums over all candidates to losses and coefficients."""
    dtype: tl.constexpr = ctx.form.DTYPE
    z_positive, reference, total, compete = sums
    tau = temperatures_of(row, ctx)
    unit = unit_of(ctx)
    weight = row_weight(row, ctx)

    if ctx.form.REFINED:
        all_terms = total
        lse = reference + logarithm(total, ctx)
        statistic = lse
        lse = lse / unit
        if ctx.inputs.positive_log_q is not None:
            probability = tl.exp(tl.load(ctx.inputs.positive_log_q + row))
            # log(1 - Q), also where 1 - Q would round Q away
            series = -probability * (1 + probability * (0.5 + probability / 3))
            lse += tl.where(probability < 1e-4, series, tl.log(1 - probability))
        r = 1 / (1 + tl.exp(z_positive / unit + tl.log(compete) - lse))
        r = tl.where(lse == float("-inf"), 0.0, r)
        row_loss = tl.where(r == 0, 0.0, r * (lse - z_positive / unit))
        p_positive_minus_1 = tl.full(total.shape, -1.0, dtype)
    else:
        all_terms = total + power(z_positive - reference, ctx)
        statistic = reference + logarithm(all_terms, ctx)
        # Where the positive leads, log(1 + odds) keeps the digits that lse - z+ would round away.
        odds = total * power(reference - z_positive, ctx)
        one_and_odds = 1 + odds
        small = tl.log(one_and_odds) * (odds / tl.where(odds == 0, 1.0, one_and_odds - 1))
        small = tl.where(one_and_odds == 1, odds, small)
        large = ((reference - z_positive) + logarithm(all_terms, ctx)) / unit
        row_loss = tl.where(odds < 1, small, large)
        p_positive_minus_1 = tl.where(total == float("inf"), -1.0, -total / all_terms)

    a = weight
    if ctx.inputs.row_grad is not None:
        a *= tl.load(ctx.inputs.row_grad + row)
    elif (ctx.form.REDUCTION == "mean") or (ctx.form.REDUCTION == "weighted_mean"):
        a = tl.where(ctx.sizes.norm == 0, 0.0, a / ctx.sizes.norm)
    if ctx.form.REFINED:
        a = tl.where(a == 0, 0.0, a * r)  # r may be NaN
    coefficient = a / tau
    term = tl.where(weight == 0, 0.0, weight * row_loss)
    d_positive = tl.where(coefficient == 0, 0.0, coefficient * p_positive_minus_1)
    return Results(tau, row_loss, term, all_terms, statistic, coefficient, d_positive)


@triton.jit
def finish_rows(place, sums, weighted, ctx):
    """From the sums over all candidates to the losses, gradients and statistics of some rows.

    Returns how many of them phase 2 must hold apart.
    """
    sizes = ctx.sizes
    lost = 0
    dtype: tl.constexpr = ctx.form.DTYPE
    inside = place < sizes.count
    row = row_at(tl.minimum(place, sizes.count - 1), ctx)
    if ctx.form.REFINED:
        compete = sums.compete
        if (ctx.inputs.candidate_ids is None) and (ctx.inputs.candidate_log_q is None):
            compete = tl.zeros_like(sums.total) + sizes.places
        if ctx.form.IN_BATCH:
            # The own column was counted, unless it is a hit or its log-Q takes it out.
            counted = row >= 0
            if ctx.inputs.candidate_ids is not None:
                counted = tl.load(ctx.inputs.positive_ids + row) == NO_ITEM
            if ctx.inputs.other_candidate_ids is not None:
                counted = counted & (tl.load(ctx.inputs.other_row_ids + row) == NO_ITEM)
            if ctx.inputs.candidate_log_q is not None:
                counted = counted & (candidate_log_q(row, ctx) != float("inf"))
            compete -= tl.where(counted, 1.0, 0.0)
        sums = Sums(sums.z_positive, sums.reference, sums.total, compete)
    results = row_results(row, sums, ctx)
    if ctx.form.COMPETITION:
        results = colder(results, dual_factor(place, ctx), ctx)
    store_losses(place, row, inside, results, ctx)
    arrays = ctx.space.rows + place
    if (ctx.outputs.candidates is not None) or (ctx.outputs.candidate_log_q is not None):
        nothing = results.coefficient == 0
        statistic = results.statistic
        coefficient = results.coefficient
        if ctx.form.EXACT:
            # What phase 1 subtracted, bit for bit: lse would round the largest p anew.
            statistic = sums.reference
            coefficient = tl.where(nothing, 0.0, coefficient / results.all_terms)
        elif ctx.form.FOLD:
            statistic -= logarithm(coefficient, ctx)
        statistic = tl.where(nothing, float("inf"), statistic)
        tl.store(arrays + STATISTIC * sizes.stride, statistic, mask=inside)
        if ctx.form.HALF or not ctx.form.FOLD:
            tl.store(arrays + COEFFICIENT * sizes.stride, coefficient, mask=inside)
        if ctx.form.SKIP:
            below = results.statistic + logarithm(skippable_below(row, ctx), ctx)
            tl.store(arrays + BELOW * sizes.stride, below, mask=inside)
        if ctx.form.ROW_SCALE:
            scale = tl.where(nothing, 1.0, row_scale(place, row, ctx))
            tl.store(arrays + SCALE * sizes.stride, scale, mask=inside)
        if ctx.form.SIMILARITY:
            ratio = tl.where(nothing, 0.0, dual_ratio(place, ctx))
            tl.store(arrays + RATIO * sizes.stride, ratio, mask=inside)
        if ctx.outputs.candidate_log_q is not None:
            tau = tl.where(nothing, 1.0, results.tau * dual_factor(place, ctx))
            tl.store(arrays + TAU * sizes.stride, tau, mask=inside)
        if ctx.inputs.positive is None:
            tl.store(arrays + POSITIVE * sizes.stride, results.d_positive, mask=inside)
        if ctx.form.PACKED and (ctx.inputs.candidate_ids is not None):
            id = tl.load(ctx.inputs.positive_ids + row)
            tl.store(row_ids(ctx) + place, id, mask=inside)
        if ctx.form.PACKED and (ctx.inputs.other_candidate_ids is not None):
            id = tl.load(ctx.inputs.other_row_ids + row)
            tl.store(other_row_ids(ctx) + place, id, mask=inside)
        if ctx.inputs.target is not None:
            own = own_candidate(row, ctx)
            tl.store(row_integers(OWN_CANDIDATE, ctx) + place, own, mask=inside)
        lost = tl.sum((inside & is_lost(sums, results, ctx)).to(tl.int32), 0)
    if (ctx.outputs.query is not None) or (ctx.outputs.temperature is not None):
        p = positives(row, ctx)
        store_query(place, row, inside, p, weighted, results, ctx)
    if ctx.outputs.positive is not None:
        q = embeddings(ctx.inputs.query, row, ctx).to(dtype)
        d_positive = apart(results.d_positive[:, None] * q, results)
        store_embeddings(ctx.outputs.positive, row, d_positive, inside, ctx)
    return lost


@triton.jit
def is_lost(sums, results, ctx):
    """Which rows weigh nothing and have logits that are infinite or NaN.

    Their probabilities are no numbers, and 0 times such a number would reach the candidates.
    """
    inf = float("inf")
    numbers = (tl.abs(sums.z_positive) < inf) & (tl.abs(results.statistic) < inf)
    return (results.coefficient == 0) & ~numbers


@triton.jit
def apart(gradient, results):
    """`gradient` of some rows, zeros for those that weigh nothing, whatever they hold."""
    return tl.where((results.coefficient == 0)[:, None], 0.0, gradient)


@triton.jit
def colder(results, factor, ctx):
    """The coefficients at ``tau_i = tau factor``."""
    return Results(
        results.tau,
        results.loss,
        results.term,
        results.all_terms,
        results.statistic,
        tl.where(results.coefficient == 0, 0.0, results.coefficient / factor),
        tl.where(results.coefficient == 0, 0.0, results.d_positive / factor),
    )


@triton.jit
def store_losses(place, row, inside, results, ctx):
    """Write the row losses, or leave them for the sums."""
    arrays = ctx.space.rows + place
    if ctx.form.REDUCTION != "none":
        tl.store(arrays + TERM * ctx.sizes.stride, results.term, mask=inside)
    elif ctx.outputs.loss is not None:
        tl.store(ctx.outputs.loss + row, results.term, mask=inside)
    if ctx.outputs.domain_weights is not None:
        tl.store(arrays + ROW_LOSS * ctx.sizes.stride, results.loss, mask=inside)


@triton.jit
def store_query(place, row, inside, p, weighted, results, ctx):
    """Write ``dq`` and ``dL/dtau``; `p` are the positives, `weighted` is ``sum_j e_ij c_j``."""
    mean = weighted * (1 / results.all_terms)[:, None]  # sum_j p_ij c_j
    d_query = results.coefficient[:, None] * mean + results.d_positive[:, None] * p.to(mean.dtype)
    d_query = apart(d_query, results)
    if ctx.outputs.query is not None:
        store_embeddings(ctx.outputs.query, row, d_query, inside, ctx)
    if ctx.outputs.temperature is not None:
        q = embeddings(ctx.inputs.query, row, ctx).to(d_query.dtype)
        d_tau = -tl.sum(apart(q * d_query, results), 1) / results.tau
        if ctx.form.TEMPERATURE == "row":
            tl.store(ctx.outputs.temperature + row, d_tau, mask=inside)
        else:
            arrays = ctx.space.rows + D_TAU * ctx.sizes.stride
            tl.store(arrays + place, d_tau, mask=inside)
