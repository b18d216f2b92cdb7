"""Which worker does what: slices of rows, whole tiles, and parts of the tiles that are left.

All phases of `shared_candidates` and `per_row_candidates` ask it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dwl_kernels.backends.triton.kernels.common import MIN_STEPS


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
def anew(number, ctx):
    """`number`, but the compiler does not know: it works out what follows from it where it is used,
    and keeps none of it in registers over the loops of a tile."""
    if ctx.form.COMPILED:
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
def part_of(part, ctx):
    """Where a worker leaves its part of a split tile."""
    size: tl.constexpr = max(ctx.form.BLOCK_M1, ctx.form.BLOCK_N2) * (ctx.form.BLOCK_D + 3)
    return ctx.space.parts + part * size
