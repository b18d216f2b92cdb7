"""Tile shapes of the Triton kernel, and the search for better ones.

What decides, per multiprocessor of capability 9.0 (the arithmetic is in `benchmarks/results`):

- Two programs at once: one computes exponentials while the tensor cores work for the other. That
  leaves 255 registers for each of 4 warps, or 128 for each of 8.
- A row tile keeps ``[BLOCK_M1, D]`` sums and a ``[BLOCK_M1, BLOCK_N1]`` block of logits in
  registers; where those do not fit, the main loop spills or its tensor instructions wait for one
  another.
- The streamed side is read from L2 once per tile: ``2135 / BLOCK_M1`` bytes per clock and
  multiprocessor at the full rate of the tensor cores, of about 28 that L2 gives. BLOCK_M1 = 128
  where registers allow.
- Wider blocks (BLOCK_N1) share the fixed cost of a step, about 100 instructions, among more
  elements.

None of the rows is measured yet; they were chosen by these rules and by the instructions, registers
and spills that `make tables` counts in the machine code.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch


class Tiles(NamedTuple):
    """Tile shapes; `Form` in the kernels says what each is."""

    BLOCK_M1: int
    BLOCK_N1: int
    BLOCK_N2: int
    BLOCK_M2: int
    stages_1: int
    stages_2: int
    warps: int
    ctas_per_sm: int  # programs at once; fewer where a device has less room

    @property
    def registers(self) -> int | None:
        """The limit per thread that lets so many programs run at once; None where there is none."""
        limit = 65536 // (self.ctas_per_sm * self.warps * 32) // 8 * 8
        return None if limit >= 255 else limit


# What a form keeps and streams: nothing but embeddings; something beside; a second query. "skip" is
# the full softmax with a `skip_threshold`, which looks at a block before it takes it.
Load = Literal["plain", "options", "skip", "dual"]

ANY: tuple[Load, ...] = ("plain", "options", "skip", "dual")
MORE: tuple[Load, ...] = ("options", "skip", "dual")
SKIP: tuple[Load, ...] = ("skip",)
DUAL: tuple[Load, ...] = ("dual",)


class Rule(NamedTuple):
    """Tiles, and what they are for."""

    capability: int  # the major one
    itemsize: int  # bytes per element of an embedding
    block_d: int  # D rounded up to a power of two
    loads: tuple[Load, ...]
    tiles: Tiles
    before: tuple[int, int] | None = None  # the version of Triton that needs them no more
    tf32: bool = False  # for products rounded to tf32 alone


# The first that applies is taken; where none is for a capability, those of an older one are looked
# at. What a row or a candidate brings along (MORE) needs registers: log-Q, ids, a temperature, a
# gradient or a place of its own. SKIP looks at its logits before it takes a block: 64 rows of them
# spill, small blocks are left out more often, and where registers allow, 128 candidates share what
# the look costs a row. With DUAL the positives stream past as a second query. Triton allocates
# registers differently before 3.7 and before 3.8: with the tiles of later versions its phase 2
# reloads 1 to 39 spilled registers a step, with these none.
RULES = [
    # 10.0: as 9.0; the operands of D = 256 take 128 KB, so one program at a time.
    Rule(10, 2, 64, DUAL, Tiles(64, 64, 64, 64, 2, 2, 4, 2)),
    Rule(10, 2, 64, SKIP, Tiles(64, 64, 64, 32, 2, 2, 4, 2), before=(3, 7)),
    Rule(10, 2, 64, SKIP, Tiles(64, 128, 64, 32, 2, 2, 4, 2)),
    Rule(10, 2, 64, MORE, Tiles(64, 128, 64, 64, 2, 2, 4, 2)),
    Rule(10, 2, 128, DUAL, Tiles(64, 32, 32, 64, 2, 2, 4, 2), before=(3, 7)),
    Rule(10, 2, 128, DUAL, Tiles(64, 32, 64, 64, 2, 2, 4, 2)),
    Rule(10, 2, 128, SKIP, Tiles(64, 64, 32, 32, 2, 2, 4, 2), before=(3, 7)),
    Rule(10, 2, 128, MORE, Tiles(64, 64, 64, 64, 2, 2, 4, 2)),
    Rule(10, 2, 256, DUAL, Tiles(64, 32, 64, 64, 1, 2, 8, 1)),
    Rule(10, 2, 256, SKIP, Tiles(64, 32, 64, 32, 2, 2, 8, 1), before=(3, 7)),
    Rule(10, 2, 256, MORE, Tiles(64, 64, 64, 64, 2, 2, 8, 1)),
    Rule(10, 2, 256, ANY, Tiles(64, 64, 64, 64, 2, 2, 4, 1)),
    # 9.0: wgmma needs 64 rows; 228 KB. At D = 128 rows of 128 would serialise wgmma for want of
    # registers. Three stages where they fit: with two the loop asks for a block last and waits for
    # it at once. At D = 64 phase 2 with 128 candidates and blocks of 64 rows reloads a register.
    Rule(9, 2, 16, DUAL, Tiles(64, 128, 64, 64, 2, 2, 4, 2)),
    Rule(9, 2, 16, MORE, Tiles(64, 128, 64, 128, 2, 2, 4, 2)),
    Rule(9, 2, 16, ANY, Tiles(64, 128, 64, 128, 2, 2, 4, 2), before=(3, 7)),
    Rule(9, 2, 16, ANY, Tiles(128, 64, 128, 64, 3, 3, 8, 2)),
    Rule(9, 2, 32, DUAL, Tiles(64, 128, 64, 64, 2, 2, 4, 2)),
    Rule(9, 2, 32, MORE, Tiles(64, 128, 64, 128, 2, 2, 4, 2)),
    Rule(9, 2, 32, ANY, Tiles(64, 128, 64, 128, 2, 2, 4, 2), before=(3, 7)),
    Rule(9, 2, 32, ANY, Tiles(128, 64, 128, 64, 3, 3, 8, 2)),
    Rule(9, 2, 64, DUAL, Tiles(64, 128, 64, 64, 2, 2, 4, 2)),
    Rule(9, 2, 64, SKIP, Tiles(64, 128, 128, 32, 2, 2, 4, 2)),
    Rule(9, 2, 64, MORE, Tiles(64, 128, 64, 128, 2, 2, 4, 2)),
    Rule(9, 2, 64, ANY, Tiles(64, 128, 64, 128, 2, 2, 4, 2), before=(3, 7)),
    Rule(9, 2, 64, ANY, Tiles(128, 64, 64, 128, 3, 3, 8, 2)),
    Rule(9, 2, 128, DUAL, Tiles(64, 32, 64, 64, 2, 2, 4, 2), before=(3, 7)),
    Rule(9, 2, 128, DUAL, Tiles(64, 64, 64, 64, 2, 2, 4, 2)),
    Rule(9, 2, 128, SKIP, Tiles(64, 128, 64, 32, 2, 2, 4, 2), before=(3, 7)),
    Rule(9, 2, 128, SKIP, Tiles(64, 128, 128, 16, 2, 2, 4, 2)),
    Rule(9, 2, 128, MORE, Tiles(64, 128, 64, 128, 2, 2, 4, 2), before=(3, 8)),
    Rule(9, 2, 128, MORE, Tiles(64, 128, 64, 64, 2, 2, 4, 2)),
    Rule(9, 2, 128, ANY, Tiles(64, 128, 64, 128, 3, 2, 4, 2), before=(3, 7)),
    Rule(9, 2, 128, ANY, Tiles(64, 128, 64, 128, 3, 3, 4, 2)),
    Rule(9, 2, 256, DUAL, Tiles(64, 32, 64, 64, 2, 2, 8, 1)),
    Rule(9, 2, 256, SKIP, Tiles(64, 64, 64, 32, 2, 2, 8, 1), before=(3, 7)),
    Rule(9, 2, 256, SKIP, Tiles(64, 64, 32, 32, 2, 2, 8, 1)),
    Rule(9, 2, 256, MORE, Tiles(64, 64, 64, 64, 2, 2, 8, 1)),
    Rule(9, 2, 256, ANY, Tiles(64, 64, 64, 32, 2, 2, 4, 2), before=(3, 7)),
    Rule(9, 2, 256, ANY, Tiles(64, 64, 64, 64, 2, 2, 4, 2)),
    # float32: tf32 products, or plain FMA at the `highest` precision, where a block of 32 by 32
    # keeps both operands of the product in registers.
    Rule(9, 4, 64, ANY, Tiles(64, 64, 64, 64, 2, 2, 4, 2), tf32=True),
    Rule(9, 4, 128, DUAL, Tiles(64, 32, 64, 32, 1, 1, 4, 2), tf32=True),
    Rule(9, 4, 128, SKIP, Tiles(64, 32, 64, 32, 2, 1, 4, 2), before=(3, 7)),
    Rule(9, 4, 128, ANY, Tiles(64, 32, 64, 32, 2, 2, 4, 2), tf32=True),
    # 8.0: mma.sync with both operands in registers, 164 KB; 8.6 and 8.9 have 100.
    Rule(8, 2, 16, ANY, Tiles(64, 64, 64, 64, 2, 2, 4, 2)),
    Rule(8, 2, 32, ANY, Tiles(64, 64, 64, 64, 2, 2, 4, 2)),
    Rule(8, 2, 64, SKIP, Tiles(64, 64, 64, 32, 2, 2, 4, 2), before=(3, 7)),
    Rule(8, 2, 64, SKIP, Tiles(64, 64, 128, 32, 2, 2, 4, 2)),
    Rule(8, 2, 64, ANY, Tiles(64, 64, 64, 64, 2, 2, 4, 2)),
    Rule(8, 2, 128, DUAL, Tiles(64, 64, 64, 32, 2, 2, 4, 2)),
    Rule(8, 2, 128, SKIP, Tiles(64, 32, 64, 32, 2, 2, 4, 2), before=(3, 7)),
    Rule(8, 2, 128, ANY, Tiles(64, 64, 64, 64, 2, 2, 4, 2)),
    Rule(8, 2, 256, DUAL, Tiles(64, 32, 32, 16, 2, 2, 4, 1), before=(3, 7)),
    Rule(8, 2, 256, DUAL, Tiles(64, 32, 32, 32, 2, 2, 4, 1)),
    Rule(8, 2, 256, SKIP, Tiles(64, 32, 32, 32, 2, 2, 4, 1)),
    Rule(8, 2, 256, ANY, Tiles(64, 32, 64, 32, 2, 2, 4, 2)),
    Rule(8, 4, 16, ANY, Tiles(32, 32, 32, 32, 2, 2, 4, 2)),
    Rule(8, 4, 32, ANY, Tiles(32, 32, 32, 32, 2, 2, 4, 2)),
    Rule(8, 4, 64, ANY, Tiles(32, 32, 32, 32, 2, 2, 4, 2)),
    Rule(8, 4, 128, ANY, Tiles(32, 32, 32, 32, 2, 2, 4, 2)),
    Rule(8, 4, 256, ANY, Tiles(32, 32, 32, 32, 2, 2, 4, 1)),
]
SKIP_ROWS = 32  # at most, of a block that is looked at


@functools.cache
def installed() -> tuple[int, ...]:
    """The version of Triton; where there is none, later than any."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return (sys.maxsize,)
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def before_3_7() -> bool:
    return installed() < (3, 7)


def default(
    block_d: int, dtype: torch.dtype, capability: int, exact: bool, load: Load = "plain"
) -> Tiles:
    """The tiles of the first rule that applies.

    Args:
        capability: the major one. 12 has neither the tensor instructions of 9 and 10 nor their
            shared memory, but those of 8.6.
        exact: a float32 product is not rounded to tf32.
    """
    for major in range(8 if capability >= 12 else capability, 7, -1):
        for rule in RULES:
            if (
                (rule.capability, rule.itemsize) == (major, dtype.itemsize)
                and rule.block_d == block_d
                and load in rule.loads
                and (rule.before is None or installed() < rule.before)
                and not (rule.tf32 and exact)
            ):
                return fitted(rule.tiles, load)
    raise KeyError((block_d, dtype, capability))


def fitted(tiles: Tiles, load: Load) -> Tiles:
    """The tiles with blocks that are small enough for the form."""
    return tiles._replace(BLOCK_M2=min(tiles.BLOCK_M2, SKIP_ROWS)) if load == "skip" else tiles


def per_row(block_d: int, dtype: torch.dtype) -> Tiles:
    """For candidates per row: BLOCK_M1 rows, BLOCK_N1 candidates of each, BLOCK_M2 numbers.

    A thread holds 16 bytes of each of the 8 candidates that are under way, and as many threads as D
    needs share a row. 12 warps of a multiprocessor then wait for 48 KB, 16 for 64; at 4.3 TB/s and
    a latency of 1,200 clocks 22 KB must be under way. With 168 registers, 128 for float32, no form
    of the kernel uses a stack. Triton 3.6 needs more registers for a candidate, so it takes 4 at a
    time, and at D = 128 in 16 bits, where it would still reload 13 in the loop, more registers for
    fewer programs: 16 KB are under way there, 24 elsewhere. Not measured yet.
    """
    warps = 4
    rows = max(warps * 32 * 16 // (block_d * dtype.itemsize), 1)
    if before_3_7():
        few = block_d == 128 and dtype.itemsize == 2
        return Tiles(rows, 4, rows, 64, 1, 1, warps, 2 if few else 3)
    return Tiles(rows, 8, rows, 64, 1, 1, warps, 3 if dtype.itemsize == 2 else 4)


def choose(
    block_d: int,
    dtype: torch.dtype,
    capability: int,
    exact: bool,
    load: Load,
    problem: tuple[object, ...],  # all else that decides: the device, B, N, the dtypes of ids
    seconds: Callable[[list[Tiles]], list[float]],
) -> Tiles:
    """The default; with ``DWL_KERNELS_AUTOTUNE=1`` the fastest of `around` the default.

    The search runs once per problem and process. ``DWL_KERNELS_TILES`` names a JSON file that is
    read first and gets what a search finds.
    """
    named = (block_d, dtype, capability, "exact" if exact else "tf32", load, *problem)
    key = " ".join(str(one).removeprefix("torch.").replace(" ", "_") for one in named)
    known = _file(os.environ.get("DWL_KERNELS_TILES"))
    if key in known:
        return known[key]
    best = default(block_d, dtype, capability, exact, load)
    if os.environ.get("DWL_KERNELS_AUTOTUNE") != "1":
        return best
    tried = around(best, load)
    times = seconds(tried)
    best = tried[times.index(min(times))]
    known[key] = best
    path = os.environ.get("DWL_KERNELS_TILES")
    if path is not None:
        Path(path).write_text(json.dumps({k: list(v) for k, v in known.items()}, indent=1) + "\n")
    return best


_SIZES = (16, 32, 64, 128)  # past 128, integers of the rows would be read that nobody wrote
LIMITS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("BLOCK_M1", "BLOCK_N1", "BLOCK_N2", "BLOCK_M2"), _SIZES),
    "stages_1": (1, 2, 3, 4, 5),
    "stages_2": (1, 2, 3, 4, 5),
    "warps": (1, 2, 4, 8, 16),
    "ctas_per_sm": (1, 2, 3, 4),
}


@functools.cache
def _file(path: str | None) -> dict[str, Tiles]:
    """The entries of a file of tiles.

    Raises:
        ValueError: it holds an entry that no kernel takes.
    """
    if path is None or not Path(path).exists():
        return {}
    try:
        entries = dict(json.loads(Path(path).read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"DWL_KERNELS_TILES: {path} is no JSON object of tiles: {error}") from None
    return {key: _checked(path, key, row) for key, row in entries.items()}


def _checked(path: str, key: str, row: object) -> Tiles:
    entry = f"DWL_KERNELS_TILES: entry {key!r} of {path}"
    if not isinstance(row, list) or len(row) != len(Tiles._fields):
        raise ValueError(f"{entry} is {row}; wanted {len(Tiles._fields)} integers, {Tiles._fields}")
    for name, value in zip(Tiles._fields, row, strict=True):
        if type(value) is not int or value not in LIMITS[name]:
            raise ValueError(f"{entry} has {name} = {value}; wanted one of {LIMITS[name]}")
    return Tiles(*row)


def around(tiles: Tiles, load: Load = "plain") -> list[Tiles]:
    """What the search tries: the default, then it with one more or fewer stage or program, then
    rows and blocks of other sizes. A short list, because each is compiled."""
    found = {tiles: None}  # in their order, each once
    for stages, programs in ((2, 2), (3, 2), (4, 2), (2, 1), (3, 1), (2, 3)):
        found[tiles._replace(stages_1=stages, stages_2=stages, ctas_per_sm=programs)] = None
    for rows, block, stages, programs in (
        (64, 128, 3, 2),
        (64, 64, 3, 2),
        (64, 64, 2, 3),
        (128, 64, 3, 2),
        (128, 64, 3, 1),
        (128, 128, 2, 1),
    ):
        warps = 8 if rows == 128 else 4
        other = Tiles(rows, block, rows, block, stages, stages, warps, programs)
        found[fitted(other, load)] = None
    return list(found)
