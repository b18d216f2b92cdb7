"""The loss and its gradients in one launch; `eager` has the formulas and the names.

A program is one of as many as the chip runs at once, and stays for the whole call.

Phase 0  owns a slice of the rows    streams their weights     writes `order`, the rows that count
Phase 1  owns q[BM, D]               streams the candidates    writes l, dq, dp, dtau, statistics
Phase 2  owns c[CM, D]               streams the rows          writes dc
Sums     owns a slice of the rows    streams their losses      writes one partial sum per worker
Finish   owns some domains           streams the partial sums  writes L, dL/dtau, dL/dW

Between two phases every program waits for all others (`grid_barrier`). What a phase leaves to the
next lies in the workspace. Every output has one owner, and sums have a fixed order: no atomics on
results, and the same call gives the same bits.

Follow a tile. Phase 1 loads BM rows of the queries and keeps them. Candidates pass BN at a time:
one product gives ``z log2 e``, ``exp2(z - reference)`` goes into the row's total and, through a
second product, into ``sum_j e_ij c_j``. The reference of a row is the logit of its positive, which
is a term of the total anyway: nothing is rescaled on the way. Only where a total leaves the range
of the dtype, a candidate being e^69 times as likely as the positive, the tile looks for its maxima
and starts again. Then the row has all it needs: its loss, ``dq`` and ``dp``. For phase 2 it leaves
one number, ``lse - log2(a / tau)``: with it ``exp2(z - statistic)`` *is* ``a p / tau``, so domain
weights, reduction and temperature cost phase 2 nothing per element; ``a = 0`` gives an infinite
statistic and exact zeros. Phase 2 keeps CM candidates, recomputes the transposed logits with the
rows that pass, and its second product sums ``dc`` to the end. The positive of an in-batch row is
left out of the products and added at the end in full precision.

Where the tiles do not fill the last round of workers, the streamed side of the tiles that are left
is split: each part goes to the workspace, and after a barrier the parts are merged in their order.
`worker` is the program, except in the interpreter, where one program plays all workers in turn.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SIGN = tl.constexpr(-(2**31))
LIMIT = tl.constexpr(2.0**100)  # of a row's total: above, its reference was too low
FINITE = tl.constexpr(1e30)  # a reference must not be infinite: inf - inf is NaN
HEADROOM = tl.constexpr(14)  # float16 ends at 2^16: terms start at 2^14 there
BLOCK = tl.constexpr(256)  # rows at a time where a row is a few numbers
CHUNK = tl.constexpr(16)  # rows or candidates of a split tile that one worker merges
MIN_STEPS = tl.constexpr(1)  # a part of a split tile streams at least so many blocks

# Row arrays of the workspace, in packed order.
STATISTIC = tl.constexpr(0)
COEFFICIENT = tl.constexpr(1)  # a / tau
SCALE = tl.constexpr(2)  # log2 e / tau
POSITIVE = tl.constexpr(3)  # what q is multiplied by in the gradient of its positive
ROW_LOSS = tl.constexpr(4)  # r l
TERM = tl.constexpr(5)  # w r l
D_TAU = tl.constexpr(6)
NUM_ROW_ARRAYS = tl.constexpr(7)
# Then what the workers leave, [workers] each, the domains, and the parts of split tiles.
WEIGHT_SUM = tl.constexpr(0)
LOSS_SUM = tl.constexpr(1)
TAU_SUM = tl.constexpr(2)
NUM_WORKER_ARRAYS = tl.constexpr(3)
ALIGN = tl.constexpr(64)


class Inputs(NamedTuple):
    """Pointers to the tensors of `Problem`; None where absent, and no code is made for it."""

    query: Any  # [B, D]
    positive: Any  # [B, D], None = in-batch
    candidates: Any  # [N, D]
    positive_log_q: Any  # [B]
    candidate_log_q: Any  # [N]
    positive_ids: Any  # [B]
    candidate_ids: Any  # [N]
    domain_ids: Any  # [B, SLOTS]
    domain_weights: Any  # [num_domains]
    example_weights: Any  # [B]
    temperature: Any  # [] or [B]
    row_grad: Any  # [B]


class Outputs(NamedTuple):
    """Pointers to the results; None where not wanted, and what only they need is left out."""

    loss: Any  # [] or [B]
    query: Any  # [B, D]
    positive: Any  # [B, D]
    candidates: Any  # [N, D]
    temperature: Any  # [] or [B]
    domain_weights: Any  # [num_domains]


class Space(NamedTuple):
    """The workspace."""

    rows: Any  # [NUM_ROW_ARRAYS, stride] accumulation dtype, as the three that follow
    sums: Any  # [NUM_WORKER_ARRAYS, workers]
    domains: Any  # [2, workers, num_domains]
    parts: Any  # [workers, max(BM, CM) * (BLOCK_D + 3)]
    counts: Any  # [workers] int32
    order: Any  # [B] int32, the active rows
    barrier: Any  # [1] int32


class Form(NamedTuple):
    """What a kernel is compiled for; every field a `tl.constexpr`."""

    D: Any
    BLOCK_D: Any  # the power of two that holds D
    BM: Any  # rows of a row tile
    BN: Any  # candidates that pass at a time
    CM: Any  # candidates of a candidate tile
    CN: Any  # rows that pass at a time
    STAGES_1: Any  # loads in flight in phase 1
    STAGES_2: Any
    SLOTS: Any  # domains per row
    WORKERS: Any  # the power of two that holds the workers
    DOMAINS: Any  # domains summed at a time
    REDUCTION: Any
    REFINED: Any
    TEMPERATURE: Any  # "float", "scalar" or "row"
    PRECISION: Any  # of a float32 product
    FOLD: Any  # the coefficient goes into the statistic, at the price of its low digits
    HALF: Any  # float16 embeddings: 5 bits of exponent
    FEW_CANDIDATES: Any  # less than BN
    FEW_ROWS: Any  # less than CN
    UPCAST: Any  # bfloat16 in the interpreter, which cannot multiply it


class Sizes(NamedTuple):
    """Run-time numbers; `count` and `norm` are known after phase 0."""

    rows: Any  # B
    stride: Any  # B rounded up to whole tiles: the length of a row array in the workspace
    candidates: Any  # N
    domains: Any
    workers: Any
    tau: Any  # temperature as a float
    count: Any  # rows that are not padding
    places: Any  # candidates that stream: N, less the positives of padded rows
    norm: Any  # divisor of the reduction


@triton.jit
def grid_barrier(counter):
    """Wait until every program is here, and see what all of them wrote.

    Arrivals add up to 2^31: the last one flips the sign bit and leaves the other bits zero, so the
    counter needs no reset, whatever grid comes next.
    """
    tl.debug_barrier()
    others = tl.num_programs(0) - 1
    arrival = tl.where(tl.program_id(0) == 0, SIGN - others, 1)
    before = tl.atomic_add(counter, arrival, sem="release")
    while (tl.atomic_add(counter, 0, sem="acquire") ^ before) >= 0:
        pass
    tl.debug_barrier()


@triton.jit
def product(a, b, total, form):
    """``total + a b``, accumulated in the dtype of `total`."""
    if form.UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=form.PRECISION, out_dtype=total.dtype)


@triton.jit
def narrow(x, dtype: tl.constexpr, form):
    """`x` rounded to the nearest of an embedding dtype."""
    if form.UPCAST and dtype == tl.bfloat16:  # the interpreter cuts bits off instead
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def embeddings(base, index, form):
    """Rows `index` of a ``[*, D]`` matrix, ``[len(index), BLOCK_D]``."""
    column = tl.arange(0, form.BLOCK_D)
    pointer = base + tl.cast(index, tl.int64)[:, None] * form.D + column[None, :]
    if form.D == form.BLOCK_D:
        return tl.load(pointer)
    return tl.load(pointer, mask=column[None, :] < form.D, other=0.0)


@triton.jit
def block(base, start, length, SIZE: tl.constexpr, form):
    """The indices and embeddings of a block of a matrix with at least SIZE rows.

    The last block begins early enough to end with the matrix, so its first rows came before. With
    one address for the whole block, a load costs no arithmetic.
    """
    first = tl.minimum(start, length - SIZE)
    row = tl.arange(0, SIZE)
    return first + row, embeddings(base + tl.cast(first, tl.int64) * form.D, row, form)


@triton.jit
def store_embeddings(base, index, value, mask, form):
    column = tl.arange(0, form.BLOCK_D)
    pointer = base + index.to(tl.int64)[:, None] * form.D + column[None, :]
    keep = mask[:, None]
    if form.D != form.BLOCK_D:
        keep = keep & (column[None, :] < form.D)
    tl.store(pointer, narrow(value, base.dtype.element_ty, form), mask=keep)


@triton.jit
def row_at(place, inputs, space):
    """The row at `place` of the rows that are not padding."""
    if inputs.example_weights is not None:
        return tl.load(space.order + place)
    return place


@triton.jit
def candidate_at(place, inputs, space, sizes):
    """The candidate at `place` of the stream; in a batch those of padded rows are left out."""
    if inputs.positive is None:
        if inputs.example_weights is not None:
            packed = place < sizes.count
            row = tl.load(space.order + place, mask=packed, other=0)
            return tl.where(packed, row, place - sizes.count + sizes.rows)
    return place


@triton.jit
def temperature_of(row, inputs, sizes, form):
    """``tau_i``, a scalar or one per row."""
    if form.TEMPERATURE == "row":
        return tl.load(inputs.temperature + row)
    if form.TEMPERATURE == "scalar":
        return tl.load(inputs.temperature)
    return sizes.tau


@triton.jit
def row_weight(row, inputs, sizes, space, form):
    """``w_i``; NaN for a negative weight or a domain id out of range."""
    weight = tl.full(row.shape, 1.0, space.rows.dtype.element_ty)
    if inputs.example_weights is not None:
        weight = tl.load(inputs.example_weights + row)
    if inputs.domain_ids is not None:
        total = tl.zeros_like(weight)
        present = tl.zeros_like(weight)
        for slot in range(form.SLOTS):
            domain = tl.load(inputs.domain_ids + row.to(tl.int64) * form.SLOTS + slot)
            inside = (domain >= 0) & (domain < sizes.domains)
            value = tl.load(inputs.domain_weights + domain, mask=inside, other=float("nan"))
            given = domain != -1
            total += tl.where(given, value, 0.0)
            present += tl.where(given, 1.0, 0.0)
        weight *= tl.where(present > 0, total / tl.maximum(present, 1.0), 1.0)
    return tl.where(weight < 0, float("nan"), weight)


# Phase 0 -----------------------------------------------------------------------------------------


@triton.jit
def slice_of(worker, length, workers):
    """The part of `length` rows that a worker owns."""
    size = tl.cdiv(length, workers)
    first = tl.minimum(worker * size, length)
    return first, tl.minimum(first + size, length)


@triton.jit
def count_rows(worker, inputs, sizes, space, form):
    """How many rows of the slice are not padding, and the sum of their weights."""
    first, stop = slice_of(worker, sizes.rows, sizes.workers)
    count = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], space.rows.dtype.element_ty)
    for start in range(first, stop, BLOCK):
        row = start + tl.arange(0, BLOCK)
        active = row < stop
        row = tl.minimum(row, stop - 1)
        if inputs.example_weights is not None:
            active = active & (tl.load(inputs.example_weights + row) != 0)
            count += active.to(tl.int32)
        if form.REDUCTION == "weighted_mean":
            total += tl.where(active, row_weight(row, inputs, sizes, space, form), 0.0)
    if inputs.example_weights is not None:
        tl.store(space.counts + worker, tl.sum(count, 0))
    if form.REDUCTION == "weighted_mean":
        tl.store(space.sums + WEIGHT_SUM * sizes.workers + worker, tl.sum(total, 0))


@triton.jit
def pack_rows(worker, inputs, outputs, sizes, space, form):
    """Write the active rows of the slice behind those of the slices before, and zeros for others."""
    first, stop = slice_of(worker, sizes.rows, sizes.workers)
    other = tl.arange(0, form.WORKERS)
    place = tl.sum(tl.load(space.counts + other, mask=other < worker, other=0), 0)
    for start in range(first, stop, BLOCK):
        row = start + tl.arange(0, BLOCK)
        weight = tl.load(inputs.example_weights + row, mask=row < stop, other=0.0)
        active = weight != 0
        rank = tl.cumsum(active.to(tl.int32), 0)
        tl.store(space.order + place + rank - 1, row, mask=active)
        place += tl.sum(active.to(tl.int32), 0)
        padded = (row < stop) & (weight == 0)
        if form.REDUCTION == "none":
            if outputs.loss is not None:
                tl.store(outputs.loss + row, tl.zeros_like(weight), mask=padded)
        if form.TEMPERATURE == "row":
            if outputs.temperature is not None:
                tl.store(outputs.temperature + row, tl.zeros_like(weight), mask=padded)
    for start in range(first, stop, CHUNK):
        row = start + tl.arange(0, CHUNK)
        inside = row < stop
        weight = tl.load(inputs.example_weights + row, mask=inside, other=0.0)
        padded = inside & (weight == 0)
        zero = tl.zeros([CHUNK, form.BLOCK_D], space.rows.dtype.element_ty)
        if outputs.query is not None:
            store_embeddings(outputs.query, row, zero, padded, form)
        if outputs.positive is not None:
            store_embeddings(outputs.positive, row, zero, padded, form)
        if inputs.positive is None:
            if outputs.candidates is not None:
                store_embeddings(outputs.candidates, row, zero, padded, form)


@triton.jit
def worker_sum(which, sizes, space, form):
    """The sum over all workers of what each left, in a fixed order."""
    worker = tl.arange(0, form.WORKERS)
    left = tl.load(
        space.sums + which * sizes.workers + worker, mask=worker < sizes.workers, other=0.0
    )
    return tl.sum(left, 0)


# How tiles are shared out ------------------------------------------------------------------------


@triton.jit
def shares(tiles, steps, workers):
    """Tiles that are taken whole, and into how many parts each of the others is split."""
    rest = tiles % workers
    splits = tl.minimum(workers // tl.maximum(rest, 1), tl.maximum(steps // MIN_STEPS, 1))
    return tiles - rest, splits


@triton.jit
def unit(number, whole, splits, steps):
    """The tile, its first and last step, and its part (-1: all of it) of work unit `number`."""
    split = (number >= whole) & (splits > 1)
    part = number - whole
    tile = tl.where(split, whole + part // splits, number)
    turn = tl.where(split, part % splits, 0)
    of = tl.where(split, splits, 1)
    return tile, steps * turn // of, steps * (turn + 1) // of, tl.where(split, part, -1)


# Phase 1 -----------------------------------------------------------------------------------------


@triton.jit
def row_logits(q, scale, reference, row_id, place, start, inputs, sizes, space, form):
    """``z_ij log2 e - reference`` of a row tile, its candidates ``c_j``, and how many compete."""
    packed: tl.constexpr = (inputs.positive is None) and (inputs.example_weights is not None)
    if packed or form.FEW_CANDIDATES:
        at = start + tl.arange(0, form.BN)
        j = candidate_at(tl.minimum(at, sizes.places - 1), inputs, space, sizes)
        c = embeddings(inputs.candidates, j, form)
    else:
        at, c = block(inputs.candidates, start, sizes.candidates, form.BN, form)
        j = at
    dtype = space.rows.dtype.element_ty
    z = product(q, tl.trans(c), tl.zeros([form.BM, form.BN], dtype), form)
    z = z * scale[:, None] - reference
    compete = tl.zeros([form.BM], dtype)
    if inputs.candidate_log_q is not None:
        z -= (tl.load(inputs.candidate_log_q + j) * LOG2E)[None, :]
    if inputs.candidate_ids is not None:
        # A row's own column is a hit as well.
        hit = row_id[:, None] == tl.load(inputs.candidate_ids + j)[None, :]
        z = tl.where(hit, float("-inf"), z)
        if form.REFINED:
            counts = ((at >= start) & (at < sizes.places))[None, :] & ~hit
            compete = tl.sum(tl.where(counts, 1.0, 0.0).to(dtype), 1)
    edge = start + form.BN > sizes.places
    if (inputs.positive is None) and (inputs.candidate_ids is None):
        first = tl.min(place, 0)
        edge = edge | ((start < first + form.BM) & (start + form.BN > first))
    if edge:
        z = tl.where(((at >= start) & (at < sizes.places))[None, :], z, float("-inf"))
        if (inputs.positive is None) and (inputs.candidate_ids is None):
            z = tl.where(at[None, :] == place[:, None], float("-inf"), z)
    return z, c, compete


@triton.jit
def row_maxima(q, scale, row_id, place, first, stop, inputs, sizes, space, form):
    """The largest ``z_ij log2 e`` of each row."""
    largest = tl.full([form.BM], -FINITE, space.rows.dtype.element_ty)
    for start in tl.range(first * form.BN, stop * form.BN, form.BN, num_stages=form.STAGES_1):
        z, _, _ = row_logits(q, scale, 0.0, row_id, place, start, inputs, sizes, space, form)
        largest = tl.maximum(largest, tl.max(z, 1))
    return tl.minimum(largest, FINITE)


@triton.jit
def stream_candidates(
    q, scale, reference, row_id, place, first, stop, inputs, outputs, sizes, space, form
):
    """``sum_j e_ij``, ``sum_j e_ij c_j`` and the number of j, for ``e = exp2(z - reference)``."""
    dtype = space.rows.dtype.element_ty
    total = tl.zeros([form.BM], dtype)
    compete = tl.zeros([form.BM], dtype)
    weighted = tl.zeros([form.BM, form.BLOCK_D], dtype)
    for start in tl.range(first * form.BN, stop * form.BN, form.BN, num_stages=form.STAGES_1):
        z, c, more = row_logits(
            q, scale, reference[:, None], row_id, place, start, inputs, sizes, space, form
        )
        e = tl.exp2(z)
        total += tl.sum(e, 1)
        compete += more
        if (outputs.query is not None) or (outputs.temperature is not None):
            weighted = product(narrow(e, c.dtype, form), c, weighted, form)
    return total, compete, weighted


@triton.jit
def row_tile(tile, first, stop, part, inputs, outputs, sizes, space, form):
    place = tile * form.BM + tl.arange(0, form.BM)
    row = row_at(tl.minimum(place, sizes.count - 1), inputs, space)
    q = embeddings(inputs.query, row, form)
    scale = tl.zeros([form.BM], space.rows.dtype.element_ty)
    scale += LOG2E / temperature_of(row, inputs, sizes, form)
    row_id = row
    if inputs.candidate_ids is not None:
        row_id = tl.load(inputs.positive_ids + row)
    dtype = space.rows.dtype.element_ty
    z_positive = positive_logits(q.to(dtype), row, scale, inputs, form)
    reference = tl.minimum(tl.maximum(z_positive, -FINITE), FINITE)
    if form.HALF:
        largest = row_maxima(q, scale, row_id, place, first, stop, inputs, sizes, space, form)
        reference = tl.maximum(largest - HEADROOM, reference - 100)
    total = tl.zeros([form.BM], dtype)
    compete = tl.zeros([form.BM], dtype)
    weighted = tl.zeros([form.BM, form.BLOCK_D], dtype)
    attempt = 0
    again = True
    while again:
        total, compete, weighted = stream_candidates(
            q, scale, reference, row_id, place, first, stop, inputs, outputs, sizes, space, form
        )
        again = False
        if not form.HALF:
            again = (attempt == 0) & (tl.max((total > LIMIT).to(tl.int32), 0) > 0)
            if again:
                largest = row_maxima(
                    q, scale, row_id, place, first, stop, inputs, sizes, space, form
                )
                reference = tl.maximum(reference, largest)
        attempt += 1
    if part < 0:
        sums = Sums(z_positive, reference, total, compete)
        finish_rows(place, sums, weighted, inputs, outputs, sizes, space, form)
    else:
        base = part_of(part, space, form)
        r = tl.arange(0, form.BM)
        tl.store(base + r, reference)
        tl.store(base + form.BM + r, total)
        tl.store(base + 2 * form.BM + r, compete)
        if (outputs.query is not None) or (outputs.temperature is not None):
            d = tl.arange(0, form.BLOCK_D)
            tl.store(base + 3 * form.BM + r[:, None] * form.BLOCK_D + d[None, :], weighted)


@triton.jit
def part_of(part, space, form):
    size: tl.constexpr = max(form.BM, form.CM) * (form.BLOCK_D + 3)
    return space.parts + part * size


@triton.jit
def merge_rows(chunk, whole, splits, inputs, outputs, sizes, space, form):
    """Join the parts of `CHUNK` rows of a split tile."""
    chunk = tl.cast(chunk, tl.int32)  # a plain number in the interpreter
    of_tile = chunk // (form.BM // CHUNK)
    r = (chunk % (form.BM // CHUNK)) * CHUNK + tl.arange(0, CHUNK)
    d = tl.arange(0, form.BLOCK_D)
    dtype = space.rows.dtype.element_ty
    reference = tl.full([CHUNK], -FINITE, dtype)
    for s in range(splits):
        base = part_of(of_tile * splits + s, space, form)
        reference = tl.maximum(reference, tl.load(base + r))
    total = tl.zeros([CHUNK], dtype)
    compete = tl.zeros([CHUNK], dtype)
    weighted = tl.zeros([CHUNK, form.BLOCK_D], dtype)
    for s in range(splits):
        base = part_of(of_tile * splits + s, space, form)
        factor = tl.exp2(tl.load(base + r) - reference)
        total += tl.load(base + form.BM + r) * factor
        compete += tl.load(base + 2 * form.BM + r)
        if (outputs.query is not None) or (outputs.temperature is not None):
            part = tl.load(base + 3 * form.BM + r[:, None] * form.BLOCK_D + d[None, :])
            weighted += part * factor[:, None]
    place = (whole + of_tile) * form.BM + r
    row = row_at(tl.minimum(place, sizes.count - 1), inputs, space)
    q = embeddings(inputs.query, row, form).to(dtype)
    scale = LOG2E / (tl.zeros_like(total) + temperature_of(row, inputs, sizes, form))
    z_positive = positive_logits(q, row, scale, inputs, form)
    sums = Sums(z_positive, reference, total, compete)
    finish_rows(place, sums, weighted, inputs, outputs, sizes, space, form)


@triton.jit
def positives(row, inputs, form):
    if inputs.positive is None:
        return embeddings(inputs.candidates, row, form)
    return embeddings(inputs.positive, row, form)


@triton.jit
def positive_logits(q, row, scale, inputs, form):
    """``z_i+ log2 e``; the refined correction leaves log-Q out of it."""
    z = tl.sum(q * positives(row, inputs, form).to(q.dtype), 1) * scale
    if (inputs.positive_log_q is not None) and (not form.REFINED):
        z -= tl.load(inputs.positive_log_q + row) * LOG2E
    return z


class Sums(NamedTuple):
    """What phase 1 knows of each row when all candidates have passed, ``[BM]`` each."""

    z_positive: Any  # z_i+ log2 e
    reference: Any
    total: Any  # sum_j exp2(z_ij log2 e - reference)
    compete: Any  # n_i, where it is counted


@triton.jit
def finish_rows(place, sums, weighted, inputs, outputs, sizes, space, form):
    """From the sums over all candidates to the losses, gradients and statistics of some rows."""
    dtype = space.rows.dtype.element_ty
    z_positive, reference, total, compete = sums
    inside = place < sizes.count
    row = row_at(tl.minimum(place, sizes.count - 1), inputs, space)
    tau = tl.zeros_like(total) + temperature_of(row, inputs, sizes, form)
    weight = row_weight(row, inputs, sizes, space, form)

    if form.REFINED:
        all_terms = total
        lse_2 = reference + tl.log2(total)
        lse = lse_2 * LN2
        if inputs.positive_log_q is not None:
            probability = tl.exp(tl.load(inputs.positive_log_q + row))
            # log(1 - Q), also where 1 - Q would round Q away
            series = -probability * (1 + probability * (0.5 + probability / 3))
            lse += tl.where(probability < 1e-4, series, tl.log(1 - probability))
        if inputs.candidate_ids is None:
            compete = tl.zeros_like(total) + sizes.places
            if inputs.positive is None:
                compete -= 1
        r = 1 / (1 + tl.exp(z_positive * LN2 + tl.log(compete) - lse))
        r = tl.where(lse == float("-inf"), 0.0, r)
        row_loss = tl.where(r == 0, 0.0, r * (lse - z_positive * LN2))
        p_positive_minus_1 = tl.full(total.shape, -1.0, dtype)
    else:
        r = tl.full(total.shape, 1.0, dtype)
        all_terms = total + tl.exp2(z_positive - reference)
        lse_2 = reference + tl.log2(all_terms)
        # Where the positive leads, log(1 + odds) keeps the digits that lse - z+ would round away.
        odds = total * tl.exp2(reference - z_positive)
        one_and_odds = 1 + odds
        small = tl.log(one_and_odds) * (odds / tl.where(odds == 0, 1.0, one_and_odds - 1))
        small = tl.where(one_and_odds == 1, odds, small)
        large = ((reference - z_positive) + tl.log2(all_terms)) * LN2
        row_loss = tl.where(odds < 1, small, large)
        p_positive_minus_1 = tl.where(total == float("inf"), -1.0, -total / all_terms)

    a = weight * r
    if inputs.row_grad is not None:
        a *= tl.load(inputs.row_grad + row)
    elif (form.REDUCTION == "mean") or (form.REDUCTION == "weighted_mean"):
        a = tl.where(sizes.norm == 0, 0.0, a / sizes.norm)
    coefficient = a / tau
    nothing = a == 0
    d_positive = tl.where(nothing, 0.0, coefficient * p_positive_minus_1)

    term = tl.where(weight == 0, 0.0, weight * row_loss)
    arrays = space.rows + place
    if form.REDUCTION != "none":
        tl.store(arrays + TERM * sizes.stride, term, mask=inside)
    elif outputs.loss is not None:
        tl.store(outputs.loss + row, term, mask=inside)
    if outputs.domain_weights is not None:
        tl.store(arrays + ROW_LOSS * sizes.stride, row_loss, mask=inside)
    if outputs.candidates is not None:
        statistic = lse_2
        if form.FOLD:
            statistic = lse_2 - tl.log2(coefficient)
        # Places after the last row are written too: phase 2 reads whole blocks, without a mask.
        statistic = tl.where(nothing | ~inside, float("inf"), statistic)
        tl.store(arrays + STATISTIC * sizes.stride, statistic)
        if form.HALF or not form.FOLD:
            tl.store(arrays + COEFFICIENT * sizes.stride, tl.where(inside, coefficient, 0.0))
        if form.TEMPERATURE == "row":
            tl.store(arrays + SCALE * sizes.stride, 1 / tau * LOG2E)
        if inputs.positive is None:
            tl.store(arrays + POSITIVE * sizes.stride, d_positive, mask=inside)
    if (outputs.query is not None) or (outputs.temperature is not None):
        mean = weighted * (1 / all_terms)[:, None]  # sum_j p_ij c_j
        p = positives(row, inputs, form).to(dtype)
        d_query = coefficient[:, None] * mean + d_positive[:, None] * p
        d_query = tl.where(nothing[:, None], 0.0, d_query)
        if outputs.query is not None:
            store_embeddings(outputs.query, row, d_query, inside, form)
        if outputs.temperature is not None:
            q = embeddings(inputs.query, row, form).to(dtype)
            d_tau = -tl.sum(q * d_query, 1) / tau
            if form.TEMPERATURE == "row":
                tl.store(outputs.temperature + row, d_tau, mask=inside)
            else:
                tl.store(arrays + D_TAU * sizes.stride, d_tau, mask=inside)
    if outputs.positive is not None:
        q = embeddings(inputs.query, row, form).to(dtype)
        store_embeddings(outputs.positive, row, d_positive[:, None] * q, inside, form)


# Phase 2 -----------------------------------------------------------------------------------------


@triton.jit
def half_shift(sizes, space):
    """The power of two that brings the largest ``a p / tau`` to the top of float16."""
    largest = tl.zeros([BLOCK], space.rows.dtype.element_ty)
    for start in range(0, sizes.count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        value = tl.load(
            space.rows + COEFFICIENT * sizes.stride + place, mask=place < sizes.count, other=0.0
        )
        largest = tl.maximum(largest, tl.abs(value))
    top = tl.maximum(tl.max(largest, 0), 1e-30)
    return HEADROOM - tl.ceil(tl.log2(top))


@triton.jit
def candidate_tile(tile, first, stop, part, shift, inputs, outputs, sizes, space, form):
    dtype = space.rows.dtype.element_ty
    at = tile * form.CM + tl.arange(0, form.CM)
    j = candidate_at(tl.minimum(at, sizes.places - 1), inputs, space, sizes)
    c = embeddings(inputs.candidates, j, form)
    if inputs.candidate_log_q is not None:
        bias = tl.load(inputs.candidate_log_q + j) * LOG2E
    if inputs.candidate_ids is not None:
        candidate_id = tl.load(inputs.candidate_ids + j)
    if form.TEMPERATURE != "row":
        scale = LOG2E / temperature_of(j, inputs, sizes, form)
    gradient = tl.zeros([form.CM, form.BLOCK_D], dtype)
    for start in tl.range(first * form.CN, stop * form.CN, form.CN, num_stages=form.STAGES_2):
        if (inputs.example_weights is not None) or form.FEW_ROWS:
            place = start + tl.arange(0, form.CN)
            row = row_at(tl.minimum(place, sizes.count - 1), inputs, space)
            q = embeddings(inputs.query, row, form)
        else:
            place, q = block(inputs.query, start, sizes.rows, form.CN, form)
            row = place
        arrays = space.rows + place
        statistic = tl.load(arrays + STATISTIC * sizes.stride)
        z = product(c, tl.trans(q), tl.zeros([form.CM, form.CN], dtype), form)
        if form.HALF:
            statistic -= shift
        if form.TEMPERATURE == "row":
            z = z * tl.load(arrays + SCALE * sizes.stride)[None, :] - statistic[None, :]
        else:
            z = z * scale - statistic[None, :]
        if inputs.candidate_log_q is not None:
            z -= bias[:, None]
        if inputs.candidate_ids is not None:
            row_id = tl.load(inputs.positive_ids + row)
            z = tl.where(candidate_id[:, None] == row_id[None, :], float("-inf"), z)
        elif inputs.positive is None:
            if (start < tile * form.CM + form.CM) & (start + form.CN > tile * form.CM):
                z = tl.where(at[:, None] == place[None, :], float("-inf"), z)
        if start + form.CN > sizes.count:
            z = tl.where((place >= start)[None, :], z, float("-inf"))
        p = tl.exp2(z)
        if not form.FOLD:
            p *= tl.load(arrays + COEFFICIENT * sizes.stride)[None, :]
        gradient = product(narrow(p, q.dtype, form), q, gradient, form)
    if form.HALF:
        gradient *= tl.exp2(-shift)
    if part < 0:
        finish_candidates(at, gradient, inputs, outputs, sizes, space, form)
    else:
        r = tl.arange(0, form.CM)
        d = tl.arange(0, form.BLOCK_D)
        base = part_of(part, space, form)
        tl.store(base + r[:, None] * form.BLOCK_D + d[None, :], gradient)


@triton.jit
def merge_candidates(chunk, whole, splits, inputs, outputs, sizes, space, form):
    """Join the parts of `CHUNK` candidates of a split tile."""
    chunk = tl.cast(chunk, tl.int32)
    of_tile = chunk // (form.CM // CHUNK)
    r = (chunk % (form.CM // CHUNK)) * CHUNK + tl.arange(0, CHUNK)
    d = tl.arange(0, form.BLOCK_D)
    gradient = tl.zeros([CHUNK, form.BLOCK_D], space.rows.dtype.element_ty)
    for s in range(splits):
        base = part_of(of_tile * splits + s, space, form)
        gradient += tl.load(base + r[:, None] * form.BLOCK_D + d[None, :])
    at = (whole + of_tile) * form.CM + r
    finish_candidates(at, gradient, inputs, outputs, sizes, space, form)


@triton.jit
def finish_candidates(at, gradient, inputs, outputs, sizes, space, form):
    """Write the gradients of some candidates; in a batch, with what they get as positives."""
    j = candidate_at(tl.minimum(at, sizes.places - 1), inputs, space, sizes)
    if inputs.positive is None:
        own = at < sizes.count
        row = row_at(tl.minimum(at, sizes.count - 1), inputs, space)
        q = embeddings(inputs.query, row, form).to(gradient.dtype)
        d_positive = tl.load(space.rows + POSITIVE * sizes.stride + at, mask=own, other=0.0)
        gradient += tl.where(own[:, None], d_positive[:, None] * q, 0.0)
    store_embeddings(outputs.candidates, j, gradient, at < sizes.places, form)


# Sums over rows ----------------------------------------------------------------------------------


@triton.jit
def sum_rows(worker, inputs, outputs, sizes, space, form):
    """The sums over the worker's slice: loss, dL/dtau, and for every domain."""
    first, stop = slice_of(worker, sizes.count, sizes.workers)
    dtype = space.rows.dtype.element_ty
    loss = tl.zeros([BLOCK], dtype)
    d_tau = tl.zeros([BLOCK], dtype)
    for start in range(first, stop, BLOCK):
        place = start + tl.arange(0, BLOCK)
        arrays = space.rows + place
        if form.REDUCTION != "none":
            loss += tl.load(arrays + TERM * sizes.stride, mask=place < stop, other=0.0)
        if (outputs.temperature is not None) and (form.TEMPERATURE == "scalar"):
            d_tau += tl.load(arrays + D_TAU * sizes.stride, mask=place < stop, other=0.0)
    tl.store(space.sums + LOSS_SUM * sizes.workers + worker, tl.sum(loss, 0))
    tl.store(space.sums + TAU_SUM * sizes.workers + worker, tl.sum(d_tau, 0))
    if outputs.domain_weights is not None:
        for start in range(0, sizes.domains, form.DOMAINS):
            domain = start + tl.arange(0, form.DOMAINS)
            losses, rows = sum_domains(domain, first, stop, inputs, sizes, space, form)
            pointer = space.domains + worker * sizes.domains + domain
            tl.store(pointer, losses, mask=domain < sizes.domains)
            pointer += sizes.workers * sizes.domains
            tl.store(pointer, rows, mask=domain < sizes.domains)


@triton.jit
def sum_domains(domain, first, stop, inputs, sizes, space, form):
    """For some domains: the sum of ``share l`` and of ``share`` over the rows of a slice."""
    dtype = space.rows.dtype.element_ty
    losses = tl.zeros([form.DOMAINS], dtype)
    rows = tl.zeros([form.DOMAINS], dtype)
    for start in range(first, stop, CHUNK):
        place = start + tl.arange(0, CHUNK)
        inside = place < stop
        row = row_at(tl.minimum(place, stop - 1), inputs, space)
        share = tl.where(inside, 1.0, 0.0).to(dtype)
        if inputs.example_weights is not None:
            share *= tl.load(inputs.example_weights + row)
        if inputs.row_grad is not None:
            share *= tl.load(inputs.row_grad + row)
        present = tl.zeros([CHUNK], dtype)
        slots = inputs.domain_ids + row.to(tl.int64) * form.SLOTS
        for slot in range(form.SLOTS):
            given = tl.load(slots + slot)
            present += tl.where((given >= 0) & (given < sizes.domains), 1.0, 0.0)
        share /= tl.maximum(present, 1.0)
        loss = share * tl.load(space.rows + ROW_LOSS * sizes.stride + place, mask=inside, other=0.0)
        for slot in range(form.SLOTS):
            here = (tl.load(slots + slot)[:, None] == domain[None, :]) & inside[:, None]
            losses += tl.sum(tl.where(here, loss[:, None], 0.0), 0)
            rows += tl.sum(tl.where(here, share[:, None], 0.0), 0)
    return losses, rows


@triton.jit
def finish_sums(worker, inputs, outputs, sizes, space, form):
    """Worker 0 writes the loss and dL/dtau; the domains are shared out."""
    loss = worker_sum(LOSS_SUM, sizes, space, form)
    if (form.REDUCTION == "mean") or (form.REDUCTION == "weighted_mean"):
        loss = tl.where(sizes.norm == 0, 0.0, loss / sizes.norm)
    if worker == 0:
        if form.REDUCTION != "none":
            tl.store(outputs.loss, loss)
        if (outputs.temperature is not None) and (form.TEMPERATURE == "scalar"):
            tl.store(outputs.temperature, worker_sum(TAU_SUM, sizes, space, form))
    if outputs.domain_weights is not None:
        for block in range(worker, tl.cdiv(sizes.domains, form.DOMAINS), sizes.workers):
            domain = block * form.DOMAINS + tl.arange(0, form.DOMAINS)
            inside = domain < sizes.domains
            losses = tl.zeros([form.DOMAINS], loss.dtype)
            rows = tl.zeros([form.DOMAINS], loss.dtype)
            for other in range(sizes.workers):
                pointer = space.domains + other * sizes.domains + domain
                losses += tl.load(pointer, mask=inside, other=0.0)
                if form.REDUCTION == "weighted_mean":
                    pointer += sizes.workers * sizes.domains
                    rows += tl.load(pointer, mask=inside, other=0.0)
            if form.REDUCTION == "weighted_mean":
                losses -= loss * rows  # the norm moves with the weights
            if (form.REDUCTION == "mean") or (form.REDUCTION == "weighted_mean"):
                losses = tl.where(sizes.norm == 0, 0.0, losses / sizes.norm)
            tl.store(outputs.domain_weights + domain, losses, mask=inside)


@triton.jit
def workspace(floats, integers, barrier, stride, num_domains, workers, outputs):
    """The tensors in two flat buffers; `_workspace` on the host has their lengths."""
    sums = NUM_ROW_ARRAYS * stride
    domains = sums + NUM_WORKER_ARRAYS * workers
    parts = domains
    if outputs.domain_weights is not None:
        parts += 2 * workers * num_domains
    parts = tl.cdiv(parts, ALIGN) * ALIGN
    return Space(
        floats, floats + sums, floats + domains, floats + parts, integers, integers + workers, barrier
    )


@triton.jit(do_not_specialize=["num_rows", "num_candidates", "num_domains", "workers"])
def softmax_loss_kernel(
    inputs,
    outputs,
    floats,  # workspace in the accumulation dtype
    integers,  # workspace, int32
    barrier,  # [1] int32, zero before the first launch
    num_rows,
    num_candidates,
    num_domains,
    workers,
    tau,
    form,
):
    """All phases; see the head of the file."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    stride = tl.cdiv(num_rows, form.BM) * form.BM
    space = workspace(floats, integers, barrier, stride, num_domains, workers, outputs)
    count = num_rows
    places = num_candidates
    norm = num_rows.to(floats.dtype.element_ty)
    sizes = Sizes(num_rows, stride, num_candidates, num_domains, workers, tau, count, places, norm)

    if (inputs.example_weights is not None) or (form.REDUCTION == "weighted_mean"):
        for worker in range(program, workers, programs):
            count_rows(worker, inputs, sizes, space, form)
        grid_barrier(barrier)
        if inputs.example_weights is not None:
            other = tl.arange(0, form.WORKERS)
            count = tl.sum(tl.load(space.counts + other, mask=other < workers, other=0), 0)
            if inputs.positive is None:
                places = num_candidates - num_rows + count
            norm = count.to(norm.dtype)
        if form.REDUCTION == "weighted_mean":
            norm = worker_sum(WEIGHT_SUM, sizes, space, form)
        sizes = Sizes(num_rows, stride, num_candidates, num_domains, workers, tau, count, places, norm)
        if inputs.example_weights is not None:
            for worker in range(program, workers, programs):
                pack_rows(worker, inputs, outputs, sizes, space, form)
            grid_barrier(barrier)

    tiles = tl.cdiv(count, form.BM)
    steps = tl.cdiv(places, form.BN)
    whole, splits = shares(tiles, steps, workers)
    for worker in range(program, workers, programs):
        for number in range(worker, whole + (tiles - whole) * splits, workers):
            tile, first, stop, part = unit(number, whole, splits, steps)
            row_tile(tile, first, stop, part, inputs, outputs, sizes, space, form)
    if splits > 1:
        grid_barrier(barrier)
        for worker in range(program, workers, programs):
            for chunk in range(worker, (tiles - whole) * (form.BM // CHUNK), workers):
                merge_rows(chunk, whole, splits, inputs, outputs, sizes, space, form)

    sum_needed: tl.constexpr = (
        (form.REDUCTION != "none")
        or (outputs.domain_weights is not None)
        or ((outputs.temperature is not None) and (form.TEMPERATURE == "scalar"))
    )
    if sum_needed or (outputs.candidates is not None):
        grid_barrier(barrier)
    if sum_needed:
        for worker in range(program, workers, programs):
            sum_rows(worker, inputs, outputs, sizes, space, form)

    splits = 1
    if outputs.candidates is not None:
        tiles = tl.cdiv(places, form.CM)
        steps = tl.cdiv(count, form.CN)
        whole, splits = shares(tiles, steps, workers)
        shift = 0.0
        if form.HALF:
            shift = half_shift(sizes, space)
        for worker in range(program, workers, programs):
            for number in range(worker, whole + (tiles - whole) * splits, workers):
                tile, first, stop, part = unit(number, whole, splits, steps)
                candidate_tile(
                    tile, first, stop, part, shift, inputs, outputs, sizes, space, form
                )
    if sum_needed or (splits > 1):
        grid_barrier(barrier)
    if outputs.candidates is not None:
        if splits > 1:
            for worker in range(program, workers, programs):
                for chunk in range(worker, (tiles - whole) * (form.CM // CHUNK), workers):
                    merge_candidates(chunk, whole, splits, inputs, outputs, sizes, space, form)
    if sum_needed:
        for worker in range(program, workers, programs):
            finish_sums(worker, inputs, outputs, sizes, space, form)
