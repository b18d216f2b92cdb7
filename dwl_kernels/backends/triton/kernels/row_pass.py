"""Phase 1 of the Triton kernel: a tile of rows, past which the candidates stream."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dwl_kernels.backends.triton.kernels.common import (
    BELOW,
    CHUNK,
    COEFFICIENT,
    D_TAU,
    EXACTLY,
    HEADROOM,
    LIMIT,
    MANY,
    NO_ITEM,
    NOWHERE,
    OWN_CANDIDATE,
    POSITIVE,
    RAISE,
    RATIO,
    ROW_LOSS,
    SCALE,
    STATISTIC,
    TAU,
    TERM,
    block,
    candidate_at,
    candidate_log_q,
    embeddings,
    finite,
    list_drawn,
    logarithm,
    narrow,
    own_candidate,
    part_at,
    part_of,
    parts_of,
    positive_log_q,
    positives,
    power,
    product,
    row_at,
    row_ids,
    row_integers,
    row_weight,
    scale_of,
    scaled,
    skippable_below,
    stays,
    store_embeddings,
    temperatures_of,
    unit_of,
)
from dwl_kernels.backends.triton.kernels.dual_scale import (
    dual_factor,
    dual_ratio,
    dual_shift,
    row_scale,
)
from dwl_kernels.backends.triton.kernels.hits import without_hits


class Rows(NamedTuple):
    """What phase 1 keeps of a row tile."""

    q: Any  # [BM, D]
    p: Any  # [BM, D], where the dual scale looks at the positive
    ratio: Any  # [BM], what p weighs beside q
    scale: Any  # [BM], for `scaled`
    id: Any  # [BM], for hits
    known: Any  # [BM], whether the positive is an item
    own: Any  # [BM], the candidate that is the positive and that no id excludes
    below: Any  # [BM], the probability under which a pair may be left out


@triton.jit
def row_tile(tile, first, stop, part, call, work):
    """Phase 1 of BM rows with the candidates of the blocks ``first : stop``."""
    place = tile * call.form.BM + tl.arange(0, call.form.BM)
    row = row_at(tl.minimum(place, work.sizes.count - 1), call, work)
    rows = load_rows(place, row, call, work)
    dtype: tl.constexpr = call.form.DTYPE
    z_positive = positive_logits(rows.q.to(dtype), place, row, call, work)
    reference = finite(z_positive, call, work)
    total = tl.zeros([call.form.BM], dtype)
    compete = tl.zeros([call.form.BM], dtype)
    weighted = tl.zeros([call.form.BM, call.form.BLOCK_D], dtype)
    attempt = 0
    again = True
    while again:
        log_q = call.inputs.candidate_log_q
        if call.form.DRAWN:
            if attempt > 0:
                list_drawn(call, work)
            log_q = tl.where(attempt > 0, work.space.log_q, log_q)
        until = stop
        if not call.form.MAXIMA:
            until = tl.where(attempt > 0, stop, tl.minimum(first + 1, stop))
        largest = row_maxima(rows, log_q, first, until, call, work)
        # float32 products keep more digits than logits 64 below their reference have.
        most: tl.constexpr = 0.0 if rows.q.dtype == tl.float32 else RAISE
        lift = tl.where(attempt > 0, 0.0, most)
        reference = reference_of(z_positive, largest, lift, call, work)
        total, compete, weighted = stream_candidates(
            rows, log_q, z_positive, reference, first, stop, call, work
        )
        again = False
        if call.form.DRAWN or (not call.form.MAXIMA):
            again = (attempt == 0) & any_above(total)
        attempt += 1
    if (
        call.form.REFINED
        and (call.inputs.candidate_log_q is not None)
        and (call.inputs.candidate_ids is None)
    ):
        compete += count_staying(first, stop, call, work)
    if part < 0:
        sums = Sums(z_positive, reference, total, compete)
        finish_rows(place, sums, weighted, call, work)
    else:
        base = part_of(part, call, work)
        r = tl.arange(0, call.form.BM)
        tl.store(base + r, reference)
        tl.store(base + call.form.BM + r, total)
        tl.store(base + 2 * call.form.BM + r, compete)
        if (call.outputs.query is not None) or (call.outputs.temperature is not None):
            d = tl.arange(0, call.form.BLOCK_D)
            tl.store(
                base + 3 * call.form.BM + r[:, None] * call.form.BLOCK_D + d[None, :], weighted
            )


@triton.jit
def reference_of(z_positive, largest, lift, call, work):
    """What is subtracted from the logits of each row, so that no exponential leaves its dtype.

    Where no maxima are searched, `largest` are those of the first block, and the reference stands
    RAISE above the larger of it and the positive. Terms down to 2^-126 then still have 2^62 of
    range below that, more than any result shows, and a candidate may be 2^(RAISE + 100), e^113,
    times as likely before the tile starts again with the maxima of all blocks.
    """
    reference = largest
    if call.form.HALF:
        reference = tl.maximum(largest - HEADROOM, finite(z_positive, call, work) - 100)
    elif call.form.MAXIMA or (not call.form.REFINED):  # there the positive is no term
        reference = tl.maximum(largest, finite(z_positive, call, work))
    if not call.form.MAXIMA:
        if not call.form.REFINED:
            # By whole powers of two, so that no term is rounded as it would not have been.
            near = finite(z_positive, call, work)
            ahead = tl.ceil(tl.maximum(largest - near, 0.0))
            reference = tl.where(ahead < EXACTLY, near + ahead, reference)
        reference += lift
    return reference


@triton.jit
def any_above(total):
    """Whether a reference was too low."""
    return tl.max((total > LIMIT).to(tl.int32), 0) > 0


@triton.jit
def load_rows(place, row, call, work):
    q = embeddings(call.inputs.query, row, call, work)
    scale = row_scale(place, row, call, work)
    # Triton 3.6 returns no None: what is not needed is something that is there.
    p = q
    ratio = scale
    id = row
    known = row >= 0
    own = place
    below = scale
    if call.form.SIMILARITY:
        p = positives(row, call, work)
        ratio = dual_ratio(place, call, work)
    if call.inputs.candidate_ids is not None:
        id = tl.load(call.inputs.positive_ids + row)
        known = id != NO_ITEM
        if call.form.OWN:
            own = tl.where(known, NOWHERE, place)  # its own column is a hit
    if call.inputs.target is not None:
        own = own_candidate(row, call, work)
    if call.form.SKIP:
        below = skippable_below(row, call, work)
    return Rows(q, p, ratio, scale, id, known, own, below)


@triton.jit
def next_own(rows, start, call, work):
    """The first place from `start` on where the positive of a row stands among the candidates.

    Known ahead, it costs a block nothing to find that it holds none.
    """
    if call.form.OWN:
        return tl.min(tl.where(rows.own >= start, rows.own, NOWHERE), 0)
    else:
        return start


@triton.jit
def row_logits(rows, log_q, reference, start, coming, call, work):
    """``z_ij - reference`` of a row tile, its candidates ``c_j``, and how many compete."""
    sizes = work.sizes
    if (call.form.IN_BATCH and call.form.PACKED) or call.form.FEW_CANDIDATES:
        at = start + tl.arange(0, call.form.BN)
        j = candidate_at(tl.minimum(at, sizes.places - 1), call, work)
        c = embeddings(call.inputs.candidates, j, call, work)
    else:
        matrix = call.inputs.candidates
        at, c = block(matrix, start, sizes.candidates, call.form.BN, call.form.EVEN, call, work)
        j = at
    dtype: tl.constexpr = call.form.DTYPE
    z = tl.zeros([call.form.BM, call.form.BN], dtype)
    if call.form.SIMILARITY:
        z = product(rows.p, tl.trans(c), z, call, work) * rows.ratio[:, None]
    z = product(rows.q, tl.trans(c), z, call, work)
    z = scaled(z, rows.scale[:, None], call, work)
    compete = tl.zeros([call.form.BM], dtype)
    if call.inputs.candidate_log_q is not None:
        z -= (tl.load(log_q + j) * unit_of(call, work))[None, :]
    z -= reference
    if call.inputs.candidate_ids is not None:
        # The own column in the batch of a row that has an id is a hit as well.
        id = tl.load(call.inputs.candidate_ids + j)[None, :]
        z = without_hits(z, rows.id[:, None], id, float("-inf"), call, work)
        if call.form.REFINED:
            hit = (rows.id[:, None] == id) & rows.known[:, None]
            there = (at >= start) & (at < sizes.places)
            if call.inputs.candidate_log_q is not None:
                there = there & stays(tl.load(log_q + j), call, work)
            counts = there[None, :] & ~hit
            compete = tl.sum(tl.where(counts, 1.0, 0.0).to(dtype), 1)
    edge = start + call.form.BN > sizes.places
    if call.form.OWN:
        edge = edge | (coming < start + call.form.BN)
    if edge:
        z = tl.where(((at >= start) & (at < sizes.places))[None, :], z, float("-inf"))
        if call.form.OWN:
            z = tl.where(at[None, :] == rows.own[:, None], float("-inf"), z)
            coming = next_own(rows, start + call.form.BN, call, work)
    return z, c, compete, coming


@triton.jit
def count_staying(first, stop, call, work):
    """How many candidates of the blocks ``first : stop`` their log-Q does not take out."""
    count = tl.zeros([MANY], call.form.DTYPE)
    end = tl.minimum(stop * call.form.BN, work.sizes.places)
    for start in range(first * call.form.BN, end, MANY):
        at = start + tl.arange(0, MANY)
        j = candidate_at(tl.minimum(at, end - 1), call, work)
        staying = candidate_log_q(j, call, work) != float("inf")
        count += tl.where((at < end) & staying, 1.0, 0.0)
    return tl.sum(count, 0)


@triton.jit
def row_maxima(rows, log_q, first, stop, call, work):
    """The largest ``z_ij`` of each row."""
    largest = tl.full([call.form.BM], float("-inf"), call.form.DTYPE)
    coming = next_own(rows, first * call.form.BN, call, work)
    for start in tl.range(
        first * call.form.BN, stop * call.form.BN, call.form.BN, num_stages=call.form.STAGES_1
    ):
        z, _, _, coming = row_logits(rows, log_q, 0.0, start, coming, call, work)
        largest = tl.maximum(largest, tl.max(z, 1))
    return finite(largest, call, work)


@triton.jit
def stream_candidates(rows, log_q, z_positive, reference, first, stop, call, work):
    """``sum_j e_ij``, ``sum_j e_ij c_j`` and the number of j, for ``e = exp(z - reference)``."""
    dtype: tl.constexpr = call.form.DTYPE
    total = tl.zeros([call.form.BM], dtype)
    compete = tl.zeros([call.form.BM], dtype)
    weighted = tl.zeros([call.form.BM, call.form.BLOCK_D], dtype)
    coming = next_own(rows, first * call.form.BN, call, work)
    for start in tl.range(
        first * call.form.BN, stop * call.form.BN, call.form.BN, num_stages=call.form.STAGES_1
    ):
        z, c, more, coming = row_logits(rows, log_q, reference[:, None], start, coming, call, work)
        e = power(z, call, work)
        total += tl.sum(e, 1)
        compete += more
        if (call.outputs.query is not None) or (call.outputs.temperature is not None):
            counts = True
            if call.form.SKIP:
                least = rows.below * (total + power(z_positive - reference, call, work))
                counts = tl.max((~(e < least[:, None])).to(tl.int32)) > 0  # NaN counts
            if counts:
                weighted = product(narrow(e, c.dtype, call, work), c, weighted, call, work)
    return total, compete, weighted


@triton.jit
def merge_rows(chunk, dealt, steps, call, work):
    """Join the parts of `CHUNK` rows of a split tile."""
    chunk = tl.cast(chunk, tl.int32)  # a plain number in the interpreter
    of_tile = chunk // (call.form.BM // CHUNK)
    r = (chunk % (call.form.BM // CHUNK)) * CHUNK + tl.arange(0, CHUNK)
    d = tl.arange(0, call.form.BLOCK_D)
    dtype: tl.constexpr = call.form.DTYPE
    first, part, last = parts_of(of_tile, dealt, steps)
    reference = finite(tl.full([CHUNK], float("-inf"), dtype), call, work)
    for worker in range(first, last + 1):
        base = part_of(part_at(worker, first, part), call, work)
        reference = tl.maximum(reference, tl.load(base + r))
    total = tl.zeros([CHUNK], dtype)
    compete = tl.zeros([CHUNK], dtype)
    weighted = tl.zeros([CHUNK, call.form.BLOCK_D], dtype)
    for worker in range(first, last + 1):
        base = part_of(part_at(worker, first, part), call, work)
        factor = power(tl.load(base + r) - reference, call, work)
        total += tl.load(base + call.form.BM + r) * factor
        compete += tl.load(base + 2 * call.form.BM + r)
        if (call.outputs.query is not None) or (call.outputs.temperature is not None):
            more = tl.load(base + 3 * call.form.BM + r[:, None] * call.form.BLOCK_D + d[None, :])
            weighted += more * factor[:, None]
    place = (dealt.whole + of_tile) * call.form.BM + r
    row = row_at(tl.minimum(place, work.sizes.count - 1), call, work)
    q = embeddings(call.inputs.query, row, call, work).to(dtype)
    z_positive = positive_logits(q, place, row, call, work)
    sums = Sums(z_positive, reference, total, compete)
    finish_rows(place, sums, weighted, call, work)


@triton.jit
def positive_logits(q, place, row, call, work):
    """``z_i+``; the refined correction leaves log-Q out of it.

    All logits are less the shift of the dual scale, which probabilities and losses do not see.
    """
    tau = temperatures_of(row, call, work) * dual_factor(place, call, work)
    products = tl.sum(q * positives(row, call, work).to(q.dtype), 1)
    z = scaled(products, scale_of(tau, call, work), call, work)
    if not call.form.REFINED:
        z -= positive_log_q(row, call, work) * unit_of(call, work)
    return z - dual_shift(place, call, work)


class Sums(NamedTuple):
    """What phase 1 knows of each row when all candidates have passed, ``[BM]`` each."""

    z_positive: Any  # in the unit of logits, as `reference`
    reference: Any
    total: Any  # sum_j exp(z_ij - reference)
    compete: Any  # n_i, where it is counted


class Results(NamedTuple):
    """What the sums say of each row, ``[BM]`` each."""

    tau: Any
    loss: Any  # r l
    term: Any  # w r l
    all_terms: Any  # what the probabilities are divided by
    statistic: Any  # reference + log all_terms
    coefficient: Any  # a / tau
    d_positive: Any  # dL/d<q_i, p_i>


@triton.jit
def row_results(row, sums, call, work):
    """From the sums over all candidates to losses and coefficients."""
    dtype: tl.constexpr = call.form.DTYPE
    z_positive, reference, total, compete = sums
    tau = temperatures_of(row, call, work)
    unit = unit_of(call, work)
    weight = row_weight(row, call, work)

    if call.form.REFINED:
        all_terms = total
        lse = reference + logarithm(total, call, work)
        statistic = lse
        lse = lse / unit
        if call.inputs.positive_log_q is not None:
            probability = tl.exp(tl.load(call.inputs.positive_log_q + row))
            # log(1 - Q), also where 1 - Q would round Q away
            series = -probability * (1 + probability * (0.5 + probability / 3))
            lse += tl.where(probability < 1e-4, series, tl.log(1 - probability))
        r = 1 / (1 + tl.exp(z_positive / unit + tl.log(compete) - lse))
        r = tl.where(lse == float("-inf"), 0.0, r)
        row_loss = tl.where(r == 0, 0.0, r * (lse - z_positive / unit))
        p_positive_minus_1 = tl.full(total.shape, -1.0, dtype)
    else:
        all_terms = total + power(z_positive - reference, call, work)
        statistic = reference + logarithm(all_terms, call, work)
        # Where the positive leads, log(1 + odds) keeps the digits that lse - z+ would round away.
        odds = total * power(reference - z_positive, call, work)
        one_and_odds = 1 + odds
        small = tl.log(one_and_odds) * (odds / tl.where(odds == 0, 1.0, one_and_odds - 1))
        small = tl.where(one_and_odds == 1, odds, small)
        large = ((reference - z_positive) + logarithm(all_terms, call, work)) / unit
        row_loss = tl.where(odds < 1, small, large)
        p_positive_minus_1 = tl.where(total == float("inf"), -1.0, -total / all_terms)

    a = weight
    if call.inputs.row_grad is not None:
        a *= tl.load(call.inputs.row_grad + row)
    elif (call.form.REDUCTION == "mean") or (call.form.REDUCTION == "weighted_mean"):
        a = tl.where(work.sizes.norm == 0, 0.0, a / work.sizes.norm)
    if call.form.REFINED:
        a = tl.where(a == 0, 0.0, a * r)  # r may be NaN
    coefficient = a / tau
    term = tl.where(weight == 0, 0.0, weight * row_loss)
    d_positive = tl.where(coefficient == 0, 0.0, coefficient * p_positive_minus_1)
    return Results(tau, row_loss, term, all_terms, statistic, coefficient, d_positive)


@triton.jit
def finish_rows(place, sums, weighted, call, work):
    """From the sums over all candidates to the losses, gradients and statistics of some rows."""
    sizes = work.sizes
    dtype: tl.constexpr = call.form.DTYPE
    inside = place < sizes.count
    row = row_at(tl.minimum(place, sizes.count - 1), call, work)
    if call.form.REFINED:
        compete = sums.compete
        if (call.inputs.candidate_ids is None) and (call.inputs.candidate_log_q is None):
            compete = tl.zeros_like(sums.total) + sizes.places
        if call.form.IN_BATCH:
            # The own column was counted, unless it is a hit or its log-Q takes it out.
            counted = row >= 0
            if call.inputs.candidate_ids is not None:
                counted = tl.load(call.inputs.positive_ids + row) == NO_ITEM
            if call.inputs.candidate_log_q is not None:
                counted = counted & (candidate_log_q(row, call, work) != float("inf"))
            compete -= tl.where(counted, 1.0, 0.0)
        sums = Sums(sums.z_positive, sums.reference, sums.total, compete)
    results = row_results(row, sums, call, work)
    if call.form.COMPETITION:
        results = colder(results, dual_factor(place, call, work), call, work)
    store_losses(place, row, inside, results, call, work)
    arrays = work.space.rows + place
    if (call.outputs.candidates is not None) or (call.outputs.candidate_log_q is not None):
        nothing = results.coefficient == 0
        statistic = results.statistic
        coefficient = results.coefficient
        if call.form.EXACT:
            # What phase 1 subtracted, bit for bit: lse would round the largest p anew.
            statistic = sums.reference
            coefficient = tl.where(nothing, 0.0, coefficient / results.all_terms)
        elif call.form.FOLD:
            statistic -= logarithm(coefficient, call, work)
        statistic = tl.where(nothing, float("inf"), statistic)
        tl.store(arrays + STATISTIC * sizes.stride, statistic, mask=inside)
        if call.form.HALF or not call.form.FOLD:
            tl.store(arrays + COEFFICIENT * sizes.stride, coefficient, mask=inside)
        if call.form.SKIP:
            below = results.statistic + logarithm(skippable_below(row, call, work), call, work)
            tl.store(arrays + BELOW * sizes.stride, below, mask=inside)
        if call.form.ROW_SCALE:
            scale = row_scale(place, row, call, work)
            tl.store(arrays + SCALE * sizes.stride, scale, mask=inside)
        if call.form.SIMILARITY:
            ratio = dual_ratio(place, call, work)
            tl.store(arrays + RATIO * sizes.stride, ratio, mask=inside)
        if call.outputs.candidate_log_q is not None:
            tau = results.tau * dual_factor(place, call, work)
            tl.store(arrays + TAU * sizes.stride, tau, mask=inside)
        if call.inputs.positive is None:
            tl.store(arrays + POSITIVE * sizes.stride, results.d_positive, mask=inside)
        if call.form.PACKED and (call.inputs.candidate_ids is not None):
            id = tl.load(call.inputs.positive_ids + row)
            tl.store(row_ids(call, work) + place, id, mask=inside)
        if call.inputs.target is not None:
            own = own_candidate(row, call, work)
            tl.store(row_integers(OWN_CANDIDATE, work) + place, own, mask=inside)
    if (call.outputs.query is not None) or (call.outputs.temperature is not None):
        p = positives(row, call, work)
        store_query(place, row, inside, p, weighted, results, call, work)
    if call.outputs.positive is not None:
        q = embeddings(call.inputs.query, row, call, work).to(dtype)
        d_positive = results.d_positive[:, None] * q
        store_embeddings(call.outputs.positive, row, d_positive, inside, call, work)


@triton.jit
def colder(results, factor, call, work):
    """The coefficients at ``tau_i = tau factor``."""
    return Results(
        results.tau,
        results.loss,
        results.term,
        results.all_terms,
        results.statistic,
        results.coefficient / factor,
        results.d_positive / factor,
    )


@triton.jit
def store_losses(place, row, inside, results, call, work):
    """Write the row losses, or leave them for the sums."""
    arrays = work.space.rows + place
    if call.form.REDUCTION != "none":
        tl.store(arrays + TERM * work.sizes.stride, results.term, mask=inside)
    elif call.outputs.loss is not None:
        tl.store(call.outputs.loss + row, results.term, mask=inside)
    if call.outputs.domain_weights is not None:
        tl.store(arrays + ROW_LOSS * work.sizes.stride, results.loss, mask=inside)


@triton.jit
def store_query(place, row, inside, p, weighted, results, call, work):
    """Write ``dq`` and ``dL/dtau``; `p` are the positives, `weighted` is ``sum_j e_ij c_j``."""
    mean = weighted * (1 / results.all_terms)[:, None]  # sum_j p_ij c_j
    d_query = results.coefficient[:, None] * mean + results.d_positive[:, None] * p.to(mean.dtype)
    d_query = tl.where((results.coefficient == 0)[:, None], 0.0, d_query)
    if call.outputs.query is not None:
        store_embeddings(call.outputs.query, row, d_query, inside, call, work)
    if call.outputs.temperature is not None:
        q = embeddings(call.inputs.query, row, call, work).to(d_query.dtype)
        d_tau = -tl.sum(q * d_query, 1) / results.tau
        if call.form.TEMPERATURE == "row":
            tl.store(call.outputs.temperature + row, d_tau, mask=inside)
        else:
            arrays = work.space.rows + D_TAU * work.sizes.stride
            tl.store(arrays + place, d_tau, mask=inside)
