"""What the phases of the Triton kernel share: the call, the workspace, memory, numbers.

A row tile, a slice or a block holds *places*: positions in the order in which rows or candidates
stream, padding left out. `row_at` and `candidate_at` say what stands there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
SIGN = tl.constexpr(-(2**31))
LIMIT = tl.constexpr(2.0**100)  # of a row's total: above, its reference was too low
RAISE = tl.constexpr(64.0)  # of a reference, in powers of two: 44 nats
EXACTLY = tl.constexpr(2.0**16)  # a reference moves by less in whole powers of two
NO_ITEM = tl.constexpr(-1)  # the id of what is no item: it is nobody's hit
NOWHERE = tl.constexpr(0x7FFFFFFF)  # a place past all candidates
HEADROOM = tl.constexpr(14)  # float16 ends at 2^16: terms start at 2^14 there
BLOCK = tl.constexpr(256)  # rows at a time where a row is a few numbers
MANY = tl.constexpr(4096)  # and where it is one
CHUNK = tl.constexpr(16)  # rows or candidates of a split tile that one worker merges
MIN_STEPS = tl.constexpr(1)  # a part of a split tile streams at least so many blocks
GIVEN_UP = tl.constexpr(2**30)  # what a counter of `grid_barrier` holds near of when nobody waits

# Row arrays of the workspace, in packed order.
STATISTIC = tl.constexpr(0)
COEFFICIENT = tl.constexpr(1)  # a / tau
SCALE = tl.constexpr(2)  # log2 e / tau
POSITIVE = tl.constexpr(3)  # what q is multiplied by in the gradient of its positive
ROW_LOSS = tl.constexpr(4)  # r l
TERM = tl.constexpr(5)  # w r l
D_TAU = tl.constexpr(6)
TAU = tl.constexpr(7)  # tau_i
# Of the dual scale:
INTENSITY = tl.constexpr(8)  # g_i
SHIFT = tl.constexpr(9)  # what log kappa_ij adds to all logits of the row
RATIO = tl.constexpr(10)  # what <p, c> weighs beside <q, c>
NUM_ROW_ARRAYS = tl.constexpr(11)
# Of the full softmax, which has no dual scale:
BELOW = tl.constexpr(8)  # the logit under which a pair may be left out of the gradients
# Then what the workers leave, [workers] each, the domains, and the parts of split tiles.
WEIGHT_SUM = tl.constexpr(0)
LOSS_SUM = tl.constexpr(1)
TAU_SUM = tl.constexpr(2)
NUM_WORKER_ARRAYS = tl.constexpr(3)
ALIGN = tl.constexpr(64)

# Integers of the rows, in packed order, and ROOM places more, so that the last block of a phase
# reads them without a look at their number; what it makes of them is masked.
ORDER = tl.constexpr(0)  # the row
OWN_CANDIDATE = tl.constexpr(1)  # of the full softmax
ID = tl.constexpr(2)  # and 3: 64 bits
ROOM = tl.constexpr(128)


class Inputs(NamedTuple):
    """Pointers to the tensors of `Problem`; None where absent, and no code is made for it."""

    query: Any  # [B, D]
    positive: Any  # [B, D], None = in-batch or full softmax
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
    target: Any  # [B] int64, the candidate that is the positive (full softmax)


class Outputs(NamedTuple):
    """Pointers to the results; None where not wanted, and what only they need is left out."""

    loss: Any  # [] or [B]
    query: Any  # [B, D]
    positive: Any  # [B, D]
    candidates: Any  # [N, D]
    temperature: Any  # [] or [B]
    domain_weights: Any  # [num_domains]
    candidate_log_q: Any  # [N]


class Space(NamedTuple):
    """The workspace."""

    rows: Any  # [NUM_ROW_ARRAYS, stride] accumulation dtype, as the three that follow
    sums: Any  # [NUM_WORKER_ARRAYS, workers]
    domains: Any  # [2, workers, num_domains]
    log_q: Any  # [candidates], where positives that are never drawn may have to be left out
    parts: Any  # [2 * workers, max(BM, CM) * (BLOCK_D + 3)]
    counts: Any  # [workers] int32
    integers: Any  # [4, stride + ROOM] int32, of the active rows
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
    OWN: Any  # the positive is among the candidates
    IN_BATCH: Any  # candidate i is the positive of row i
    DRAWN: Any  # a candidate is left out where its log-Q says that it is never drawn
    PACKED: Any  # rows may be padding
    IGNORE: Any  # the target of a padded row
    REDUCTION: Any
    REFINED: Any
    SKIP: Any  # blocks of small probabilities are left out of the gradients
    HARDNESS: Any  # whether this strength of the dual scale is not 0, as the two that follow
    SIMILARITY: Any
    COMPETITION: Any
    TEMPERATURE: Any  # "float", "scalar" or "row"
    ROW_SCALE: Any  # phase 2 reads the scale of every row
    DTYPE: Any  # of logits, sums and the workspace
    LARGEST: Any  # the largest finite number of that dtype
    PRECISION: Any  # of a float32 product
    EXACT: Any  # float32 or float64 with nothing rounded: logits as eager computes them, base e
    FOLD: Any  # the coefficient goes into the statistic, at the price of its low digits
    HALF: Any  # float16 embeddings: 5 bits of exponent
    MAXIMA: Any  # the reference is the largest logit, at the price of a pass for it
    FEW_CANDIDATES: Any  # less than BN
    FEW_ROWS: Any  # less than CN
    NARROW: Any  # ids of a table's rows fit into 32 bits
    EVEN: Any  # B and N, by row K, are multiples of 16, see `is_even`
    FENCED: Any  # products need a fence of ours, see `fence`
    UPCAST: Any  # products are made in float64: bfloat16 and float32 in the interpreter
    COMPILED: Any  # for a device, and not interpreted
    POLLS: Any  # after which a program waits no longer for the others; 0: it waits for ever


class Call(NamedTuple):
    """What the host passes."""

    inputs: Any
    outputs: Any
    form: Any


class Sizes(NamedTuple):
    """Run-time numbers; `count` and `norm` are known after phase 0."""

    rows: Any  # B
    stride: Any  # B rounded up: the length of a row array in the workspace
    candidates: Any  # N
    domains: Any
    workers: Any
    tau: Any  # temperature as a float
    skip_threshold: Any  # see skippable_below
    count: Any  # rows that are not padding
    places: Any  # candidates that stream: N, less the positives of padded rows
    norm: Any  # divisor of the reduction


class Dual(NamedTuple):
    """The dual scale; the means are known after its phase."""

    hardness: Any
    similarity: Any
    competition: Any
    slate_size: Any
    mean_intensity: Any  # mean g
    mean_factor: Any  # mean f


class Work(NamedTuple):
    """What a program knows beside: sizes and where the workspace lies."""

    sizes: Any
    space: Any
    dual: Any


@triton.jit
def grid_barrier(counter, until, call):
    """Wait until every program is here, and see what all of them wrote.

    Arrivals add up to 2^31: the last one flips the sign bit and leaves the other bits zero, so the
    counter needs no reset, whatever grid comes next.

    Returns `until`, the end of the workers that the program plays. A form with POLLS returns 0
    where not all came in time, and then no program that arrives later waits, nor plays a worker.
    Such a counter is of no use to another launch.
    """
    tl.debug_barrier()
    others = tl.num_programs(0) - 1
    arrival = tl.where(tl.program_id(0) == 0, SIGN - others, 1)
    before = tl.atomic_add(counter, arrival, sem="release")
    if call.form.POLLS == 0:
        while (tl.atomic_add(counter, 0, sem="acquire") ^ before) >= 0:
            pass
    else:
        polls = 0
        now = before
        while ((now ^ before) >= 0) & (polls < call.form.POLLS) & ~is_given_up(now):
            now = tl.atomic_add(counter, 0, sem="acquire")
            polls += 1
        if ((now ^ before) >= 0) | is_given_up(now):
            tl.atomic_xchg(counter, GIVEN_UP)
            until = 0
    tl.debug_barrier()
    return until


@triton.jit
def is_given_up(counter):
    """Arrivals leave a counter within a few thousand of 0 or of 2^31, but for the sign."""
    return ((counter >> 29) & 3) % 3 != 0


@triton.jit
def fence():
    """What was copied to shared memory is there for tensor cores, which read it on a path of their
    own. Triton before 3.7.1 leaves this out between asynchronous copies and `wgmma`."""
    tl.inline_asm_elementwise(
        "fence.proxy.async.shared::cta; mov.b32 $0, $1;",
        "=r,r",
        [tl.program_id(0)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def product(a, b, total, call, work):
    """``total + a b``, accumulated in the dtype of `total`."""
    if call.form.FENCED:
        fence()
    if call.form.UPCAST:
        wide = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
        return total + wide.to(total.dtype)
    else:
        return tl.dot(a, b, total, input_precision=call.form.PRECISION, out_dtype=total.dtype)


@triton.jit
def narrow(x, dtype: tl.constexpr, call, work):
    """`x` rounded to the nearest of an embedding dtype."""
    if call.form.UPCAST and (dtype == tl.bfloat16):  # the interpreter cuts bits off instead
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def embeddings(base, index, call, work):
    """Rows `index` of a ``[*, D]`` matrix, ``[len(index), BLOCK_D]``."""
    column = tl.arange(0, call.form.BLOCK_D)
    pointer = base + tl.cast(index, tl.int64)[:, None] * call.form.D + column[None, :]
    if call.form.D == call.form.BLOCK_D:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=column[None, :] < call.form.D, other=0.0)


@triton.jit
def block(base, start, length, SIZE: tl.constexpr, EVEN: tl.constexpr, call, work):
    """The indices and embeddings of a block of a matrix with at least SIZE rows.

    The last block begins early enough to end with the matrix, so its first rows came before. With
    one address for the whole block, a load costs no arithmetic. EVEN promises the compiler that
    `start` and `length` are multiples of 16, so that it may load vectors.
    """
    first = tl.minimum(start, length - SIZE)
    if EVEN:
        first = tl.multiple_of(first, 16)
    row = tl.arange(0, SIZE)
    return first + row, embeddings(base + tl.cast(first, tl.int64) * call.form.D, row, call, work)


@triton.jit
def store_embeddings(base, index, value, mask, call, work):
    column = tl.arange(0, call.form.BLOCK_D)
    pointer = base + index.to(tl.int64)[:, None] * call.form.D + column[None, :]
    keep = mask[:, None]
    if call.form.D != call.form.BLOCK_D:
        keep = keep & (column[None, :] < call.form.D)
    tl.store(pointer, narrow(value, base.dtype.element_ty, call, work), mask=keep)


@triton.jit
def row_integers(which: tl.constexpr, work):
    """The integers of the rows in their packed order."""
    return work.space.integers + which * (work.sizes.stride + ROOM)


@triton.jit
def row_ids(call, work):
    """Where the ids of the positives lie in the packed order."""
    pointer = row_integers(ID, work)
    return tl.cast(pointer, tl.pointer_type(call.inputs.positive_ids.dtype.element_ty))


@triton.jit
def row_at(place, call, work):
    """The row at `place` of the rows that are not padding."""
    if call.form.PACKED:
        return tl.load(row_integers(ORDER, work) + place)
    else:
        return place


@triton.jit
def candidate_at(place, call, work):
    """The candidate at `place` of the stream; in a batch those of padded rows are left out."""
    sizes = work.sizes
    if call.form.IN_BATCH and call.form.PACKED:
        packed = place < sizes.count
        row = tl.load(row_integers(ORDER, work) + place, mask=packed, other=0)
        return tl.where(packed, row, place - sizes.count + sizes.rows)
    else:
        return place


@triton.jit
def own_candidate(row, call, work):
    """The candidate that is the positive of each row, where there is no `positive`."""
    if call.inputs.target is not None:
        own = tl.load(call.inputs.target + row)
        return tl.minimum(tl.maximum(own, 0), work.sizes.candidates - 1).to(tl.int32)
    else:
        return row


@triton.jit
def positives(row, call, work):
    if call.inputs.positive is None:
        return embeddings(call.inputs.candidates, own_candidate(row, call, work), call, work)
    else:
        return embeddings(call.inputs.positive, row, call, work)


@triton.jit
def is_active(row, inside, call, work):
    """Which rows are not padding."""
    active = inside
    if call.inputs.example_weights is not None:
        weight = tl.load(call.inputs.example_weights + row, mask=inside, other=0.0)
        active = active & (weight != 0)
    if call.inputs.target is not None:
        target = tl.load(call.inputs.target + row, mask=inside, other=call.form.IGNORE)
        active = active & (target != call.form.IGNORE)
    return active


@triton.jit
def temperature_of(row, call, work):
    """``tau_i``, a scalar or one per row."""
    if call.form.TEMPERATURE == "row":
        return tl.load(call.inputs.temperature + row)
    elif call.form.TEMPERATURE == "scalar":
        return tl.load(call.inputs.temperature)
    else:
        return work.sizes.tau


@triton.jit
def temperatures_of(row, call, work):
    return tl.zeros(row.shape, call.form.DTYPE) + temperature_of(row, call, work)


@triton.jit
def row_array(which, place, call, work):
    """Where the workspace has something of the rows; past the last row stands the last."""
    return work.space.rows + which * work.sizes.stride + tl.minimum(place, work.sizes.count - 1)


@triton.jit
def finite(z, call, work):
    """A reference must not be infinite: inf - inf is NaN."""
    return tl.minimum(tl.maximum(z, -call.form.LARGEST), call.form.LARGEST)


@triton.jit
def unit_of(call, work):
    """Logits are in units of ``1 / log2 e``, so that `exp2` is one instruction, or plain."""
    if call.form.EXACT:
        return 1.0
    else:
        return LOG2E


@triton.jit
def scale_of(tau, call, work):
    """What `scaled` takes for a temperature."""
    if call.form.EXACT:
        return tau
    else:
        return 1 / tau * LOG2E


@triton.jit
def scaled(products, scale, call, work):
    """``<q, c> / tau`` in the unit of logits."""
    if call.form.EXACT:
        return products / scale
    else:
        return products * scale


@triton.jit
def power(z, call, work):
    if call.form.EXACT:
        return tl.exp(z)
    else:
        return tl.exp2(z)


@triton.jit
def logarithm(x, call, work):
    if call.form.EXACT:
        return tl.log(x)
    else:
        return tl.log2(x)


@triton.jit
def positive_log_q(row, call, work):
    """``log Q+_i``; that of the candidate where the positive is one."""
    if call.inputs.target is not None:
        if call.inputs.candidate_log_q is not None:
            return tl.load(call.inputs.candidate_log_q + own_candidate(row, call, work))
        else:
            return 0.0
    elif call.inputs.positive_log_q is not None:
        return tl.load(call.inputs.positive_log_q + row)
    else:
        return 0.0


@triton.jit
def candidate_log_q(j, call, work):
    """``log Q_j``; +inf for a positive of the batch that is never drawn (-inf): it is nobody's."""
    log_q = tl.load(call.inputs.candidate_log_q + j)
    if call.form.DRAWN:
        log_q = tl.where((log_q == float("-inf")) & (j < work.sizes.rows), float("inf"), log_q)
    return log_q


@triton.jit
def stays(log_q, call, work):
    """Which candidates their log-Q, as given or listed, does not take out.

    In a batch a positive of -inf is taken out as well; a negative of -inf makes losses infinite,
    whatever the number of candidates.
    """
    if call.form.DRAWN:
        return tl.abs(log_q) != float("inf")
    else:
        return log_q != float("inf")


@triton.jit
def list_drawn(call, work):
    """Leave `candidate_log_q` of all candidates in the workspace.

    Where candidates stream past a row tile, a look at each would cost too much. A positive that is
    never drawn makes totals infinite, so the tile starts again with what is listed here. Programs
    that do so at the same time write the same values.
    """
    for start in range(0, work.sizes.candidates, MANY):
        j = start + tl.arange(0, MANY)
        inside = j < work.sizes.candidates
        log_q = candidate_log_q(tl.where(inside, j, 0), call, work)
        tl.store(work.space.log_q + j, log_q, mask=inside)
    tl.debug_barrier()


@triton.jit
def row_weight(row, call, work):
    """``w_i``; NaN for a negative weight, or a temperature, domain id or target out of range."""
    weight = tl.full(row.shape, 1.0, call.form.DTYPE)
    if call.inputs.example_weights is not None:
        weight = tl.load(call.inputs.example_weights + row)
    if call.inputs.domain_ids is not None:
        total = tl.zeros_like(weight)
        present = tl.zeros_like(weight)
        for slot in range(call.form.SLOTS):
            domain = tl.load(call.inputs.domain_ids + row.to(tl.int64) * call.form.SLOTS + slot)
            inside = (domain >= 0) & (domain < work.sizes.domains)
            value = tl.load(call.inputs.domain_weights + domain, mask=inside, other=float("nan"))
            given = domain != -1
            total += tl.where(given, value, 0.0)
            present += tl.where(given, 1.0, 0.0)
        weight *= tl.where(present > 0, total / tl.maximum(present, 1.0), 1.0)
    if call.inputs.target is not None:
        target = tl.load(call.inputs.target + row)
        outside = (target < 0) | (target >= work.sizes.candidates)
        weight = tl.where(outside, float("nan"), weight)
    wrong = weight < 0
    if call.form.TEMPERATURE != "float":
        tau = temperatures_of(row, call, work)
        wrong = wrong | ~((tau > 0) & (tau < float("inf")))
    return tl.where(wrong, float("nan"), weight)


@triton.jit
def skippable_below(row, call, work):
    """The probability under which a pair may be left out of the gradients."""
    return work.sizes.skip_threshold / row_weight(row, call, work)


@triton.jit
def slice_of(worker, length, workers):
    """The part of `length` rows that a worker owns."""
    size = tl.cdiv(length, workers)
    first = tl.minimum(worker * size, length)
    return first, tl.minimum(first + size, length)


class Shares(NamedTuple):
    """How the tiles of a phase are dealt out to the workers.

    Tiles that fill complete rounds are taken whole. The steps of those that are left stand in a
    line, `room` places for each tile, of which every worker takes the next `per`: parts of at most
    two tiles. Places of the line may not fit 32 bits.
    """

    whole: Any  # tiles that are taken whole
    split: Any  # those that are left; where there are none no barrier is needed
    per: Any
    room: Any  # a multiple of `per` where no worker takes parts of two tiles, else the steps


@triton.jit
def shares(tiles, steps, workers):
    """See `Shares`. A part of a second tile is taken where that saves more than a step."""
    rest = tiles % workers
    # The parts of a tile are merged one after another, each in about half the time of a step.
    least = tl.maximum(tl.sqrt(tl.cast(steps, tl.float32) / 2).to(tl.int32), MIN_STEPS)
    # ceil(rest steps / workers), whose product may not fit 32 bits
    even = rest * (steps // workers) + tl.cdiv(rest * (steps % workers), workers)
    even = tl.maximum(even, least)
    aligned = tl.maximum(tl.cdiv(steps, workers // tl.maximum(rest, 1)), least)
    per = tl.where(aligned <= even + 1, aligned, even)
    room = tl.where(aligned <= even + 1, tl.cdiv(steps, per) * per, steps)
    room = tl.maximum(room, 1)  # no steps where no row counts
    split = tl.where(per < steps, rest, 0)
    return Shares(tiles - split, split, per, room)


@triton.jit
def line_of(worker, dealt):
    """The places of a worker in the line, from the first up to the last."""
    low = tl.cast(worker, tl.int64) * dealt.per
    return low, tl.minimum(low + dealt.per, tl.cast(dealt.split, tl.int64) * dealt.room)


@triton.jit
def units_of(worker, dealt, workers):
    """How many tiles and parts of tiles a worker takes."""
    whole = tl.cdiv(tl.maximum(dealt.whole - worker, 0), workers)
    low, high = line_of(worker, dealt)
    parts = (high - 1) // dealt.room - low // dealt.room + 1
    return whole + tl.where(low < high, parts, 0).to(tl.int32)


@triton.jit
def anew(number, call):
    """`number`, but the compiler does not know: it works out what follows from it where it is used,
    and keeps none of it in registers over the loops of a tile."""
    if call.form.COMPILED:
        number = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [number], dtype=tl.int32, is_pure=False, pack=1
        )
    return number


@triton.jit
def unit(turn, worker, dealt, steps, workers):
    """Of a worker's unit: the tile, its first and last step, and its part (-1: all of it)."""
    number = worker + turn * workers
    is_whole = number < dealt.whole
    piece = turn - dealt.whole // workers
    low, high = line_of(worker, dealt)
    split = (low // dealt.room).to(tl.int32) + piece
    begin = tl.cast(split, tl.int64) * dealt.room
    # Of a tile that is taken whole these are not looked at, and might not fit 32 bits.
    first = tl.minimum(tl.maximum(low - begin, 0), steps).to(tl.int32)
    stop = tl.minimum(tl.maximum(high - begin, 0), steps).to(tl.int32)
    tile = tl.where(is_whole, number, dealt.whole + split)
    part = tl.where(is_whole, -1, 2 * worker + piece)
    return tile, tl.where(is_whole, 0, first), tl.where(is_whole, steps, stop), part


@triton.jit
def parts_of(split, dealt, steps):
    """Of a split tile: the worker and the place of its first part, and the worker of its last."""
    first = tl.cast(split, tl.int64) * dealt.room
    worker = first // dealt.per
    # Only the first part may be the second one of its worker.
    part = 2 * worker + split - worker * dealt.per // dealt.room
    last = (first + steps - 1) // dealt.per
    return worker.to(tl.int32), part.to(tl.int32), last.to(tl.int32)


@triton.jit
def part_at(worker, first_worker, first_part):
    return tl.where(worker == first_worker, first_part, 2 * worker)


@triton.jit
def part_of(part, call, work):
    """Where a worker leaves its part of a split tile."""
    size: tl.constexpr = max(call.form.BM, call.form.CM) * (call.form.BLOCK_D + 3)
    return work.space.parts + part * size
