"""Phase 1 of the Triton kernel: a tile of rows, past which the candidates stream.

`shared_candidates` runs it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dwl_kernels.backends.triton.kernels.common import (
    CHUNK,
    EXACTLY,
    HEADROOM,
    LIMIT,
    MANY,
    NO_ITEM,
    NOWHERE,
    RAISE,
    finite,
    narrow,
    power,
    product,
    scale_of,
    scaled,
    unit_of,
)
from dwl_kernels.backends.triton.kernels.dual_scale import (
    dual_factor,
    dual_ratio,
    dual_shift,
    row_scale,
)
from dwl_kernels.backends.triton.kernels.hits import without_hits
from dwl_kernels.backends.triton.kernels.memory import (
    block,
    candidate_at,
    candidate_log_q,
    embeddings,
    list_drawn,
    own_candidate,
    positive_log_q,
    positives,
    row_at,
    skippable_below,
    stays,
    temperatures_of,
)
from dwl_kernels.backends.triton.kernels.row_results import Sums, finish_rows
from dwl_kernels.backends.triton.kernels.schedule import part_at, part_of, parts_of


class Rows(NamedTuple):
    """What phase 1 keeps of a row tile."""

    q: Any  # [BLOCK_M1, D]
    p: Any  # [BLOCK_M1, D], where the dual scale looks at the positive
    ratio: Any  # [BLOCK_M1], what p weighs beside q
    scale: Any  # [BLOCK_M1], for `scaled`
    id: Any  # [BLOCK_M1], for hits
    known: Any  # [BLOCK_M1], whether that is an id
    other_id: Any  # [BLOCK_M1], likewise
    own: Any  # [BLOCK_M1], the candidate that is the positive and that no id excludes
    below: Any  # [BLOCK_M1], the probability under which a pair may be left out


@triton.jit
def row_tile(tile, first, stop, part, ctx):
    """Phase 1 of BLOCK_M1 rows with the candidates of the blocks ``first : stop``.

    Returns how many rows phase 2 must hold apart, as far as all their candidates have passed.
    """
    lost = 0
    place = tile * ctx.form.BLOCK_M1 + tl.arange(0, ctx.form.BLOCK_M1)
    row = row_at(tl.minimum(place, ctx.sizes.count - 1), ctx)
    rows = load_rows(place, row, ctx)
    dtype: tl.constexpr = ctx.form.DTYPE
    z_positive = positive_logits(rows.q.to(dtype), place, row, ctx)
    reference = finite(z_positive, ctx)
    total = tl.zeros([ctx.form.BLOCK_M1], dtype)
    compete = tl.zeros([ctx.form.BLOCK_M1], dtype)
    weighted = tl.zeros([ctx.form.BLOCK_M1, ctx.form.BLOCK_D], dtype)
    attempt = 0
    again = True
    while again:
        log_q = ctx.inputs.candidate_log_q
        if ctx.form.DRAWN:
            if attempt > 0:
                list_drawn(ctx)
            log_q = tl.where(attempt > 0, ctx.space.log_q, log_q)
        until = stop
        if not ctx.form.MAXIMA:
            until = tl.where(attempt > 0, stop, tl.minimum(first + 1, stop))
        largest = row_maxima(rows, log_q, first, until, ctx)
        # float32 products keep more digits than logits 64 below their reference have.
        most: tl.constexpr = 0.0 if rows.q.dtype == tl.float32 else RAISE
        lift = tl.where(attempt > 0, 0.0, most)
        moved = reference_of(z_positive, largest, lift, ctx)
        if ctx.form.DRAWN or (not ctx.form.MAXIMA):
            # A row whose total was in range keeps its bits, whatever the others of the tile hold.
            reference = tl.where((attempt == 0) | (total > LIMIT), moved, reference)
        else:
            reference = moved
        total, compete, weighted = stream_candidates(
            rows, log_q, z_positive, reference, first, stop, ctx
        )
        again = False
        if ctx.form.DRAWN or (not ctx.form.MAXIMA):
            again = (attempt == 0) & any_above(total)
        attempt += 1
    if (
        ctx.form.REFINED
        and (ctx.inputs.candidate_log_q is not None)
        and (ctx.inputs.candidate_ids is None)
    ):
        compete += count_staying(first, stop, ctx)
    if part < 0:
        sums = Sums(z_positive, reference, total, compete)
        lost = finish_rows(place, sums, weighted, ctx)
    else:
        base = part_of(part, ctx)
        r = tl.arange(0, ctx.form.BLOCK_M1)
        tl.store(base + r, reference)
        tl.store(base + ctx.form.BLOCK_M1 + r, total)
        tl.store(base + 2 * ctx.form.BLOCK_M1 + r, compete)
        if (ctx.outputs.query is not None) or (ctx.outputs.temperature is not None):
            d = tl.arange(0, ctx.form.BLOCK_D)
            tl.store(
                base + 3 * ctx.form.BLOCK_M1 + r[:, None] * ctx.form.BLOCK_D + d[None, :], weighted
            )
    return lost


@triton.jit
def reference_of(z_positive, largest, lift, ctx):
    """What is subtracted from the logits of each row, so that no exponential leaves its dtype.

    Where no maxima are searched, `largest` are those of the first block, and the reference stands
    RAISE above the larger of it and the positive. Terms down to 2^-126 then still have 2^62 of
    range below that, more than any result shows, and a candidate may be 2^(RAISE + 100), e^113,
    times as likely before the tile starts again with the maxima of all blocks.
    """
    reference = largest
    if ctx.form.HALF:
        reference = tl.maximum(largest - HEADROOM, finite(z_positive, ctx) - 100)
    elif ctx.form.MAXIMA or (not ctx.form.REFINED):  # there the positive is no term
        reference = tl.maximum(largest, finite(z_positive, ctx))
    if not ctx.form.MAXIMA:
        if not ctx.form.REFINED:
            # By whole powers of two, so that no term is rounded as it would not have been.
            near = finite(z_positive, ctx)
            ahead = tl.ceil(tl.maximum(largest - near, 0.0))
            reference = tl.where(ahead < EXACTLY, near + ahead, reference)
        reference += lift
    return reference


@triton.jit
def any_above(total):
    """Whether a reference was too low."""
    return tl.max((total > LIMIT).to(tl.int32), 0) > 0


@triton.jit
def load_rows(place, row, ctx):
    q = embeddings(ctx.inputs.query, row, ctx)
    scale = row_scale(place, row, ctx)
    # Triton 3.6 returns no None: what is not needed is something that is there.
    p = q
    ratio = scale
    id = row
    known = row >= 0
    other_id = row
    own = place
    below = scale
    if ctx.form.SIMILARITY:
        p = positives(row, ctx)
        ratio = dual_ratio(place, ctx)
    if ctx.inputs.candidate_ids is not None:
        id = tl.load(ctx.inputs.positive_ids + row)
        known = id != NO_ITEM
        hit = known
        if ctx.inputs.other_candidate_ids is not None:
            other_id = tl.load(ctx.inputs.other_row_ids + row)
            hit = hit | (other_id != NO_ITEM)
        if ctx.form.OWN:
            own = tl.where(hit, NOWHERE, place)  # its own column is a hit
    if ctx.inputs.target is not None:
        own = own_candidate(row, ctx)
    if ctx.form.SKIP:
        below = skippable_below(row, ctx)
    return Rows(q, p, ratio, scale, id, known, other_id, own, below)


@triton.jit
def next_own(rows, start, ctx):
    """The first place from `start` on where the positive of a row stands among the candidates.

    Known ahead, it costs a block nothing to find that it holds none.
    """
    if ctx.form.OWN:
        return tl.min(tl.where(rows.own >= start, rows.own, NOWHERE), 0)
    else:
        return start


@triton.jit
def row_logits(rows, log_q, reference, start, coming, ctx):
    """``z_ij - reference`` of a row tile, its candidates ``c_j``, and how many compete."""
    sizes = ctx.sizes
    if (ctx.form.IN_BATCH and ctx.form.PACKED) or ctx.form.FEW_CANDIDATES:
        at = start + tl.arange(0, ctx.form.BLOCK_N1)
        j = candidate_at(tl.minimum(at, sizes.places - 1), ctx)
        c = embeddings(ctx.inputs.candidates, j, ctx)
    else:
        matrix = ctx.inputs.candidates
        at, c = block(matrix, start, sizes.candidates, ctx.form.BLOCK_N1, ctx.form.EVEN, ctx)
        j = at
    dtype: tl.constexpr = ctx.form.DTYPE
    z = tl.zeros([ctx.form.BLOCK_M1, ctx.form.BLOCK_N1], dtype)
    if ctx.form.SIMILARITY:
        z = product(rows.p, tl.trans(c), z, ctx) * rows.ratio[:, None]
    z = product(rows.q, tl.trans(c), z, ctx)
    z = scaled(z, rows.scale[:, None], ctx)
    compete = tl.zeros([ctx.form.BLOCK_M1], dtype)
    if ctx.inputs.candidate_log_q is not None:
        z -= (tl.load(log_q + j) * unit_of(ctx))[None, :]
    z -= reference
    if ctx.inputs.candidate_ids is not None:
        # The own column in the batch of a row that has an id is a hit as well.
        id = tl.load(ctx.inputs.candidate_ids + j)[None, :]
        z = without_hits(z, rows.id[:, None], id, float("-inf"), ctx)
        if ctx.inputs.other_candidate_ids is not None:
            other = tl.load(ctx.inputs.other_candidate_ids + j)[None, :]
            z = without_hits(z, rows.other_id[:, None], other, float("-inf"), ctx)
        if ctx.form.REFINED:
            hit = (rows.id[:, None] == id) & rows.known[:, None]
            if ctx.inputs.other_candidate_ids is not None:
                hit = hit | ((rows.other_id[:, None] == other) & (other != NO_ITEM))
            there = (at >= start) & (at < sizes.places)
            if ctx.inputs.candidate_log_q is not None:
                there = there & stays(tl.load(log_q + j), ctx)
            counts = there[None, :] & ~hit
            compete = tl.sum(tl.where(counts, 1.0, 0.0).to(dtype), 1)
    edge = start + ctx.form.BLOCK_N1 > sizes.places
    if ctx.form.OWN:
        edge = edge | (coming < start + ctx.form.BLOCK_N1)
    if edge:
        z = tl.where(((at >= start) & (at < sizes.places))[None, :], z, float("-inf"))
        if ctx.form.OWN:
            z = tl.where(at[None, :] == rows.own[:, None], float("-inf"), z)
            coming = next_own(rows, start + ctx.form.BLOCK_N1, ctx)
    return z, c, compete, coming


@triton.jit
def count_staying(first, stop, ctx):
    """How many candidates of the blocks ``first : stop`` their log-Q does not take out."""
    count = tl.zeros([MANY], ctx.form.DTYPE)
    end = tl.minimum(stop * ctx.form.BLOCK_N1, ctx.sizes.places)
    for start in range(first * ctx.form.BLOCK_N1, end, MANY):
        at = start + tl.arange(0, MANY)
        j = candidate_at(tl.minimum(at, end - 1), ctx)
        staying = candidate_log_q(j, ctx) != float("inf")
        count += tl.where((at < end) & staying, 1.0, 0.0)
    return tl.sum(count, 0)


@triton.jit
def row_maxima(rows, log_q, first, stop, ctx):
    """The largest ``z_ij`` of each row."""
    largest = tl.full([ctx.form.BLOCK_M1], float("-inf"), ctx.form.DTYPE)
    coming = next_own(rows, first * ctx.form.BLOCK_N1, ctx)
    for start in tl.range(
        first * ctx.form.BLOCK_N1,
        stop * ctx.form.BLOCK_N1,
        ctx.form.BLOCK_N1,
        num_stages=ctx.form.STAGES_1,
    ):
        z, _, _, coming = row_logits(rows, log_q, 0.0, start, coming, ctx)
        largest = tl.maximum(largest, tl.max(z, 1))
    return finite(largest, ctx)


@triton.jit
def stream_candidates(rows, log_q, z_positive, reference, first, stop, ctx):
    """``sum_j e_ij``, ``sum_j e_ij c_j`` and the number of j, for ``e = exp(z - reference)``."""
    dtype: tl.constexpr = ctx.form.DTYPE
    total = tl.zeros([ctx.form.BLOCK_M1], dtype)
    compete = tl.zeros([ctx.form.BLOCK_M1], dtype)
    weighted = tl.zeros([ctx.form.BLOCK_M1, ctx.form.BLOCK_D], dtype)
    coming = next_own(rows, first * ctx.form.BLOCK_N1, ctx)
    for start in tl.range(
        first * ctx.form.BLOCK_N1,
        stop * ctx.form.BLOCK_N1,
        ctx.form.BLOCK_N1,
        num_stages=ctx.form.STAGES_1,
    ):
        z, c, more, coming = row_logits(rows, log_q, reference[:, None], start, coming, ctx)
        e = power(z, ctx)
        total += tl.sum(e, 1)
        compete += more
        if (ctx.outputs.query is not None) or (ctx.outputs.temperature is not None):
            counts = True
            if ctx.form.SKIP:
                least = rows.below * (total + power(z_positive - reference, ctx))
                counts = tl.max((~(e < least[:, None])).to(tl.int32)) > 0  # NaN counts
            if counts:
                weighted = product(narrow(e, c.dtype, ctx), c, weighted, ctx)
    return total, compete, weighted


@triton.jit
def merge_rows(chunk, dealt, steps, ctx):
    """Join the parts of `CHUNK` rows of a split tile, and return what `row_tile` does."""
    chunk = tl.cast(chunk, tl.int32)  # a plain number in the interpreter
    of_tile = chunk // (ctx.form.BLOCK_M1 // CHUNK)
    r = (chunk % (ctx.form.BLOCK_M1 // CHUNK)) * CHUNK + tl.arange(0, CHUNK)
    d = tl.arange(0, ctx.form.BLOCK_D)
    dtype: tl.constexpr = ctx.form.DTYPE
    first, part, last = parts_of(of_tile, dealt, steps)
    reference = finite(tl.full([CHUNK], float("-inf"), dtype), ctx)
    for worker in range(first, last + 1):
        base = part_of(part_at(worker, first, part), ctx)
        reference = tl.maximum(reference, tl.load(base + r))
    total = tl.zeros([CHUNK], dtype)
    compete = tl.zeros([CHUNK], dtype)
    weighted = tl.zeros([CHUNK, ctx.form.BLOCK_D], dtype)
    for worker in range(first, last + 1):
        base = part_of(part_at(worker, first, part), ctx)
        factor = power(tl.load(base + r) - reference, ctx)
        total += tl.load(base + ctx.form.BLOCK_M1 + r) * factor
        compete += tl.load(base + 2 * ctx.form.BLOCK_M1 + r)
        if (ctx.outputs.query is not None) or (ctx.outputs.temperature is not None):
            more = tl.load(
                base + 3 * ctx.form.BLOCK_M1 + r[:, None] * ctx.form.BLOCK_D + d[None, :]
            )
            weighted += more * factor[:, None]
    place = (dealt.whole + of_tile) * ctx.form.BLOCK_M1 + r
    row = row_at(tl.minimum(place, ctx.sizes.count - 1), ctx)
    q = embeddings(ctx.inputs.query, row, ctx).to(dtype)
    z_positive = positive_logits(q, place, row, ctx)
    sums = Sums(z_positive, reference, total, compete)
    return finish_rows(place, sums, weighted, ctx)


@triton.jit
def positive_logits(q, place, row, ctx):
    """``z_i+``; the refined correction leaves log-Q out of it.

    All logits are less the shift of the dual scale, which probabilities and losses do not see.
    """
    tau = temperatures_of(row, ctx) * dual_factor(place, ctx)
    products = tl.sum(q * positives(row, ctx).to(q.dtype), 1)
    z = scaled(products, scale_of(tau, ctx), ctx)
    if not ctx.form.REFINED:
        z -= positive_log_q(row, ctx) * unit_of(ctx)
    return z - dual_shift(place, ctx)
