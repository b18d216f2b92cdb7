"""Ranks of targets among all rows of a table, on the device and from the host.

A program of `count_kernel` owns BLOCK_M rows and streams a part of the items past them, BLOCK_N at
a time: one product, one comparison with the target's score, and a count. The target's own score is
made by `pair_kernel`, of the same product of two tiles, whose diagonal it keeps: an entry of a
product does not depend on its place in the tile, so that items with the embedding of the target
have its score to the last bit, and the target counts itself, the 1 of its rank. What the rows have
seen goes through `pair_kernel` as well and is taken off on the host.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwl_kernels.backends.triton import specialize
from dwl_kernels.backends.triton.kernels.common import product
from dwl_kernels.backends.triton.kernels.memory import embeddings
from dwl_kernels.backends.triton.launch import entry_of, launch
from dwl_kernels.core.problem import RankProblem, accumulate_dtype
from dwl_kernels.core.ranking import own_items, seen_pairs

# Of an embedding, what a tile keeps at a time: longer ones take several products. Those of float32
# that is not rounded run on no tensor cores, and a lane has registers for few of its dimensions.
ROW_BYTES, EXACT_BYTES = 256, 128


class Form(NamedTuple):
    """What the kernels are compiled for; every field a `tl.constexpr`."""

    D: Any
    BLOCK_D: Any  # dimensions of a product, a power of two
    CHUNKS: Any  # products of a score
    BLOCK_M: Any  # rows of a tile
    BLOCK_N: Any  # items that pass at a time, no less
    STAGES: Any
    DTYPE: Any  # of scores
    PRECISION: Any  # of a float32 product
    FENCED: Any  # see `common.fence`
    UPCAST: Any  # in the interpreter, whose products depend on the place: sums in float64


class Context(NamedTuple):
    """What device functions look for."""

    query: Any  # [B, D]
    table: Any  # [V, D]
    bias: Any  # [V], or None
    form: Any


@triton.jit
def chunk_of(base, index, k, ctx):
    """Dimensions ``k : k + BLOCK_D`` of rows `index` of a matrix."""
    column = k + tl.arange(0, ctx.form.BLOCK_D)
    pointer = base + index.to(tl.int64)[:, None] * ctx.form.D + column[None, :]
    return tl.load(pointer, mask=column[None, :] < ctx.form.D, other=0.0)


@triton.jit
def part_of_scores(q, c, total, ctx):
    """`total` plus ``q c^T``."""
    if ctx.form.UPCAST:
        wide = q.to(tl.float64)[:, None, :] * c.to(tl.float64)[None, :, :]
        return total + tl.sum(wide, 2)
    else:
        return product(q, tl.trans(c), total, ctx)


@triton.jit
def scores_of(q, row, item, ctx):
    """Scores ``[BLOCK_M, BLOCK_N]``; `q` holds the rows where one product does."""
    wide: tl.constexpr = tl.float64 if ctx.form.UPCAST else ctx.form.DTYPE
    total = tl.zeros([ctx.form.BLOCK_M, ctx.form.BLOCK_N], wide)
    if ctx.form.CHUNKS == 1:
        total = part_of_scores(q, embeddings(ctx.table, item, ctx), total, ctx)
    else:
        for k in tl.range(
            0, ctx.form.CHUNKS * ctx.form.BLOCK_D, ctx.form.BLOCK_D, num_stages=ctx.form.STAGES
        ):
            more = chunk_of(ctx.query, row, k, ctx)
            c = chunk_of(ctx.table, item, k, ctx)
            total = part_of_scores(more, c, total, ctx)
    s = total.to(ctx.form.DTYPE)
    if ctx.bias is not None:
        s += tl.load(ctx.bias + item)[None, :]
    return s


@triton.jit
def rows_of(row, ctx):
    """The queries that `scores_of` takes; anything where it loads them itself."""
    if ctx.form.CHUNKS == 1:
        return embeddings(ctx.query, row, ctx)
    else:
        return row


@triton.jit(do_not_specialize=["num"])
def pair_kernel(
    scores,  # [num]
    rows,  # [num]
    items,  # [num] rows of the table
    num,
    ctx,
):
    first = tl.cast(tl.program_id(0), tl.int64) * ctx.form.BLOCK_M
    m = first + tl.arange(0, ctx.form.BLOCK_M)
    n = first + tl.arange(0, ctx.form.BLOCK_N)
    row = tl.load(rows + tl.minimum(m, num - 1))
    item = tl.load(items + tl.minimum(n, num - 1))
    s = scores_of(rows_of(row, ctx), row, item, ctx)
    own = tl.where(m[:, None] == n[None, :], s, 0.0)
    tl.store(scores + m, tl.sum(own, 1), mask=m < num)


@triton.jit
def count_block(q, row, score, start, stop, count, MASKED: tl.constexpr, ctx):
    """`count` plus the items of a block that are not below the score of the target."""
    item = start + tl.arange(0, ctx.form.BLOCK_N)
    if MASKED:
        s = scores_of(q, row, tl.minimum(item, stop - 1), ctx)
        below = (s < score[:, None]) | (item >= stop)[None, :]
    else:
        below = scores_of(q, row, item, ctx) < score[:, None]
    return count + tl.sum(tl.where(below, 0, 1), 1)


@triton.jit(do_not_specialize=["num_rows", "num_items", "parts", "part_items"])
def count_kernel(
    counts,  # [parts, B] int32
    scores,  # [B] of the targets
    nowhere,  # [B] bool, rows that need no count
    num_rows,
    num_items,
    parts,
    part_items,  # of a part, a multiple of BLOCK_N
    ctx,
):
    tile = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    m = tl.cast(tile, tl.int64) * ctx.form.BLOCK_M + tl.arange(0, ctx.form.BLOCK_M)
    row = tl.minimum(m, num_rows - 1)
    count = tl.zeros([ctx.form.BLOCK_M], tl.int32)
    if tl.min(tl.load(nowhere + row).to(tl.int32), 0) == 0:
        q = rows_of(row, ctx)
        score = tl.load(scores + row)
        first = part * part_items
        stop = tl.minimum(first + part_items, num_items)
        whole = first + (tl.maximum(stop - first, 0) // ctx.form.BLOCK_N) * ctx.form.BLOCK_N
        for start in tl.range(first, whole, ctx.form.BLOCK_N, num_stages=ctx.form.STAGES):
            count = count_block(q, row, score, start, stop, count, False, ctx)
        if whole < stop:
            count = count_block(q, row, score, whole, stop, count, True, ctx)
    tl.store(counts + tl.cast(part, tl.int64) * num_rows + m, count, mask=m < num_rows)


def rank_targets(problem: RankProblem) -> Tensor:  # [B] int64
    """As :func:`dwl_kernels.backends.ranks.rank_targets`."""
    own, padded, outside = own_items(problem)
    num_rows, num_items = len(own), len(problem.item_table)
    query, table = problem.query.contiguous(), problem.item_table.contiguous()
    bias = None if problem.bias is None else problem.bias.contiguous()
    form = form_of(query)
    block_m, block_n = form.BLOCK_M.value, form.BLOCK_N.value

    def run(kernel: Any, programs: int, tensors: tuple[Tensor, ...], *numbers: int) -> None:
        given = (*tensors, query, table, bias)

        def arguments(t: Any) -> tuple[Any, ...]:
            return *t[:-3], *numbers, Context(*t[-3:], form)

        entry = entry_of(kernel, (id(form), *(n >= 2**31 for n in numbers)), given)
        launch(kernel, programs, entry, given, arguments, {"num_warps": 8})

    def pair_scores(rows: Tensor, items: Tensor) -> Tensor:
        scores = query.new_empty(len(rows), dtype=accumulate_dtype(query.dtype))
        if len(rows):
            run(pair_kernel, triton.cdiv(len(rows), block_m), (scores, rows, items), len(rows))
        return scores

    score = pair_scores(torch.arange(num_rows, device=own.device), own)
    score.masked_fill_(outside, torch.nan)
    tiles, blocks = triton.cdiv(num_rows, block_m), triton.cdiv(num_items, block_n)
    parts = min(max(1, programs_at_once(query) // tiles), blocks)
    part_items = triton.cdiv(blocks, parts) * block_n
    counts = torch.empty((parts, num_rows), dtype=torch.int32, device=own.device)
    sizes = (num_rows, num_items, parts, part_items)
    run(count_kernel, tiles * parts, (counts, score, padded), *sizes)
    rank = counts.sum(0) + outside  # no item counts itself where the target is none
    if problem.seen_ids is not None:
        row, item = seen_pairs(problem)
        leaves = (item >= 0) & ~padded[row] & (outside[row] | (item != own[row]))
        pairs = (row * num_items + item)[leaves].unique()
        row, item = pairs // num_items, pairs % num_items
        ahead = ~(pair_scores(row, item) < score[row])
        rank.index_add_(0, row, ahead.to(rank.dtype), alpha=-1)
    return rank.masked_fill_(padded, 0)


def programs_at_once(query: Tensor) -> int:
    """Two for every multiprocessor; in the interpreter a few, so that there are parts."""
    if query.device.type != "cuda":
        return 5
    return 2 * torch.cuda.get_device_properties(query.device).multi_processor_count


def form_of(query: Tensor, capability: int | None = None) -> Form:
    """The form for such embeddings on their device, or on one of a major `capability`."""
    if capability is None and query.device.type == "cuda":
        capability = torch.cuda.get_device_capability(query.device)[0]
    exact = torch.get_float32_matmul_precision() == "highest"
    return _form(query.shape[1], query.dtype, exact, capability)


@functools.cache
def _form(d: int, dtype: torch.dtype, exact: bool, capability: int | None) -> Form:
    interpreting = capability is None
    plain = dtype == torch.float32 and exact
    most = (EXACT_BYTES if plain else ROW_BYTES) // dtype.itemsize
    block_d = min(specialize.power_of_two(d, 16), most)
    block_m, block_n = (64, 128) if capability == 8 or plain else (128, 128)
    if interpreting:
        block_m = block_n = 16
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    fenced = capability is not None and specialize.fenced(capability)
    stages = 1 if fenced and capability == 10 else 3
    values = (
        *(d, block_d, triton.cdiv(d, block_d), block_m, block_n, stages),
        *(wide, "ieee" if exact else "tf32", fenced, interpreting),
    )
    return Form(*(tl.constexpr(value) for value in values))
