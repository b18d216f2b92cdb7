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
LOST = tl.constexpr(3)  # how many of its rows `is_lost`, and of those that it merged
LOST_MERGED = tl.constexpr(4)
NUM_WORKER_ARRAYS = tl.constexpr(5)
ALIGN = tl.constexpr(64)

# Integers of the rows, in packed order, and ROOM places more, so that the last block of a phase
# reads them without a look at their number; what it makes of them is masked.
ORDER = tl.constexpr(0)  # the row
OWN_CANDIDATE = tl.constexpr(1)  # of the full softmax
ID = tl.constexpr(2)  # and 3: 64 bits
OTHER_ID = tl.constexpr(4)  # and 5
ROOM = tl.constexpr(128)


class Inputs(NamedTuple):
    """Pointers to the tensors of `Problem`; None where absent, and no code is made for it."""

    query: Any  # [B, D]
    positive: Any  # [B, D], None = in-batch or full softmax
    candidates: Any  # [N, D]
    positive_log_q: Any  # [B]
    candidate_log_q: Any  # [N]
    positive_ids: Any  # [B] of items, or of queries where there are no others
    candidate_ids: Any  # [N]
    other_row_ids: Any  # [B] of queries, where there are ids of items too
    other_candidate_ids: Any  # [N]
    domain_ids: Any  # [B, SLOTS]
    domain_weights: Any  # [num_domains]
    example_weights: Any  # [B]
    temperature: Any  # [] or [B]
    competition_factor: Any  # [B], which the wide form alone takes
    row_grad: Any  # [B]
    target: Any  # [B] int64, the candidate that is the positive (full softmax)


class Outputs(NamedTuple):
    """Pointers to the results, as `problem.Output` has them; None where not wanted.

    What only they need is left out.
    """

    loss: Any  # [] or [B]
    query: Any  # [B, D]
    positive: Any  # [B, D]
    candidates: Any  # [N, D]
    candidate_log_q: Any  # [N]
    temperature: Any  # [] or [B]
    domain_weights: Any  # [num_domains]


class Space(NamedTuple):
    """The workspace."""

    rows: Any  # [NUM_ROW_ARRAYS, stride] accumulation dtype, as the three that follow
    sums: Any  # [NUM_WORKER_ARRAYS, workers]
    domains: Any  # [2, workers, num_domains]
    log_q: Any  # [candidates], where positives that are never drawn may have to be left out
    parts: Any  # [2 * workers, max(BLOCK_M1, BLOCK_N2) * (BLOCK_D + 3)]
    counts: Any  # [workers] int32
    integers: Any  # [4, stride + ROOM] int32, of the active rows
    barrier: Any  # [1] int32


class Form(NamedTuple):
    """What a kernel is compiled for; every field a `tl.constexpr`."""

    D: Any
    BLOCK_D: Any  # the power of two that holds D
    BLOCK_M1: Any  # rows of a row tile
    BLOCK_N1: Any  # candidates that pass at a time
    BLOCK_N2: Any  # candidates of a candidate tile
    BLOCK_M2: Any  # rows that pass at a time
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
    FEW_CANDIDATES: Any  # less than BLOCK_N1
    FEW_ROWS: Any  # less than BLOCK_M2
    NARROW: Any  # ids of a table's rows fit into 32 bits
    EVEN: Any  # B and N, per row K, are multiples of 16, see `is_even`
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


class Context(NamedTuple):
    """What device functions look for: the call, its sizes, and where the workspace lies."""

    inputs: Any
    outputs: Any
    form: Any
    sizes: Any
    space: Any
    dual: Any


@triton.jit
def grid_barrier(until, ctx):
    """Wait until every program is here, and see what all of them wrote.

    Arrivals add up to 2^31: the last one flips the sign bit and leaves the other bits zero, so the
    counter needs no reset, whatever grid comes next.

    Returns `until`, the end of the workers that the program plays. A form with POLLS returns 0
    where not all came in time, and then no program that arrives later waits, nor plays a worker.
    Such a counter is of no use to another launch.
    """
    counter = ctx.space.barrier
    tl.debug_barrier()
    others = tl.num_programs(0) - 1
    arrival = tl.where(tl.program_id(0) == 0, SIGN - others, 1)
    before = tl.atomic_add(counter, arrival, sem="release")
    if ctx.form.POLLS == 0:
        while (tl.atomic_add(counter, 0, sem="acquire") ^ before) >= 0:
            pass
    else:
        polls = 0
        now = before
        while ((now ^ before) >= 0) & (polls < ctx.form.POLLS) & ~is_given_up(now):
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
def product(a, b, total, ctx):
    """``total + a b``, accumulated in the dtype of `total`."""
    if ctx.form.FENCED:
        fence()
    if ctx.form.UPCAST:
        wide = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
        return total + wide.to(total.dtype)
    else:
        return tl.dot(a, b, total, input_precision=ctx.form.PRECISION, out_dtype=total.dtype)


@triton.jit
def narrow(x, dtype: tl.constexpr, ctx):
    """`x` rounded to the nearest of an embedding dtype."""
    if ctx.form.UPCAST and (dtype == tl.bfloat16):  # the interpreter cuts bits off instead
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def finite(z, ctx):
    """A reference must not be infinite: inf - inf is NaN."""
    return tl.minimum(tl.maximum(z, -ctx.form.LARGEST), ctx.form.LARGEST)


@triton.jit
def unit_of(ctx):
    """Logits are in units of ``1 / log2 e``, so that `exp2` is one instruction, or plain."""
    if ctx.form.EXACT:
        return 1.0
    else:
        return LOG2E


@triton.jit
def scale_of(tau, ctx):
    """What `scaled` takes for a temperature."""
    if ctx.form.EXACT:
        return tau
    else:
        return 1 / tau * LOG2E


@triton.jit
def scaled(products, scale, ctx):
    """``<q, c> / tau`` in the unit of logits."""
    if ctx.form.EXACT:
        return products / scale
    else:
        return products * scale


@triton.jit
def power(z, ctx):
    if ctx.form.EXACT:
        return tl.exp(z)
    else:
        return tl.exp2(z)


@triton.jit
def logarithm(x, ctx):
    if ctx.form.EXACT:
        return tl.log(x)
    else:
        return tl.log2(x)
