"""Tile shapes of the Triton kernel, and the search for better ones.

What decides, per multiprocessor of capability 9.0 (the arithmetic is in `benchmarks/results`):

- Two programs at once: one computes exponentials while the tensor cores work for the other. That
  leaves 255 registers for each of 4 warps, or 128 for each of 8.
- A row tile keeps ``[BM, D]`` sums and a ``[BM, BN]`` block of logits in registers; where those do
  not fit, the main loop spills or its tensor instructions wait for one another.
- The streamed side is read from L2 once per tile: ``2135 / BM`` bytes per clock and multiprocessor
  at the full rate of the tensor cores, of about 28 that L2 gives. BM = 128 where registers allow.
- Wider blocks (BN) share the fixed cost of a step, about 100 instructions, among more elements.

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

    BM: int
    BN: int
    CM: int
    CN: int
    stages_1: int
    stages_2: int
    warps: int
    programs: int  # at once on a multiprocessor; fewer where a device has less room

    @property
    def registers(self) -> int | None:
        """The limit per thread that lets `programs` run at once; None where there is none."""
        limit = 65536 // (self.programs * self.warps * 32) // 8 * 8
        return None if limit >= 255 else limit


# What a form keeps and streams: nothing but embeddings; something beside; a second query. "skip" is
# the full softmax with a `skip_threshold`, which looks at a block before it takes it.
Load = Literal["plain", "options", "skip", "dual"]

# (D rounded up to a power of two, bytes per element, major capability) -> tiles
TABLE: dict[tuple[int, int, int], Tiles] = {
    # 8.0: mma.sync with both operands in registers, 164 KB of shared memory; 8.6 and 8.9 have 100.
    (16, 2, 8): Tiles(64, 64, 64, 64, 2, 2, 4, 2),
    (32, 2, 8): Tiles(64, 64, 64, 64, 2, 2, 4, 2),
    (64, 2, 8): Tiles(64, 64, 64, 64, 2, 2, 4, 2),
    (128, 2, 8): Tiles(64, 64, 64, 64, 2, 2, 4, 2),
    (256, 2, 8): Tiles(64, 32, 64, 32, 2, 2, 4, 2),
    # 9.0: wgmma, 228 KB. At D = 128 rows of 128 would serialise wgmma for want of registers.
    (16, 2, 9): Tiles(128, 64, 128, 64, 3, 3, 8, 2),
    (32, 2, 9): Tiles(128, 64, 128, 64, 3, 3, 8, 2),
    (64, 2, 9): Tiles(128, 64, 64, 128, 3, 3, 8, 2),  # 128 x 64 in phase 2 reloads a register
    # Three stages: with two the loop asks for a block last and waits for it at once.
    (128, 2, 9): Tiles(64, 128, 64, 128, 3, 3, 4, 2),
    (256, 2, 9): Tiles(64, 64, 64, 64, 2, 2, 4, 2),
    # 10.0: as 9.0; the operands of D = 256 take 128 KB, so one program at a time.
    (256, 2, 10): Tiles(64, 64, 64, 64, 2, 2, 4, 1),
    # float32: tf32 products, or plain FMA at the `highest` precision, where a block of 32 by 32
    # keeps both operands of the product in registers.
    (16, 4, 8): Tiles(32, 32, 32, 32, 2, 2, 4, 2),
    (32, 4, 8): Tiles(32, 32, 32, 32, 2, 2, 4, 2),
    (64, 4, 8): Tiles(32, 32, 32, 32, 2, 2, 4, 2),
    (128, 4, 8): Tiles(32, 32, 32, 32, 2, 2, 4, 2),
    (256, 4, 8): Tiles(32, 32, 32, 32, 2, 2, 4, 1),
}
# Capability 9.0 needs 64 rows for wgmma; the rows apply with tf32 products only.
TF32: dict[tuple[int, int, int], Tiles] = {
    (64, 4, 9): Tiles(64, 64, 64, 64, 2, 2, 4, 2),
    (128, 4, 9): Tiles(64, 32, 64, 32, 2, 2, 4, 2),
}


# Triton 3.6 allocates registers differently: with the rows above, phase 2 reloads 4 to 39 spilled
# registers a step on 9.0; with these, none.
BEFORE_3_7: dict[tuple[int, int, int], Tiles] = {
    (128, 2, 9): Tiles(64, 128, 64, 128, 3, 2, 4, 2),
    (16, 2, 9): Tiles(64, 128, 64, 128, 2, 2, 4, 2),
    (32, 2, 9): Tiles(64, 128, 64, 128, 2, 2, 4, 2),
    (64, 2, 9): Tiles(64, 128, 64, 128, 2, 2, 4, 2),
    (256, 2, 9): Tiles(64, 64, 64, 32, 2, 2, 4, 2),
}


# What a row or a candidate brings along needs registers: log-Q, ids, a temperature, a gradient or a
# place of its own. These rows spill none in the main loops, with all of it at once.
OPTIONS: dict[tuple[int, int, int], Tiles] = {
    (16, 2, 9): Tiles(64, 128, 64, 128, 2, 2, 4, 2),
    (32, 2, 9): Tiles(64, 128, 64, 128, 2, 2, 4, 2),
    (64, 2, 9): Tiles(64, 128, 64, 128, 2, 2, 4, 2),
    (128, 2, 9): Tiles(64, 128, 64, 64, 2, 2, 4, 2),
    (256, 2, 9): Tiles(64, 64, 64, 64, 2, 2, 8, 1),
    (64, 2, 10): Tiles(64, 128, 64, 64, 2, 2, 4, 2),
    (128, 2, 10): Tiles(64, 64, 64, 64, 2, 2, 4, 2),
    (256, 2, 10): Tiles(64, 64, 64, 64, 2, 2, 8, 1),
}
# Later versions reload one to six registers with blocks of 128 rows.
OPTIONS_BEFORE_3_8: dict[tuple[int, int, int], Tiles] = {
    (128, 2, 9): Tiles(64, 128, 64, 128, 2, 2, 4, 2),
}
# Phase 2 looks at its logits before it takes a block: 64 rows of them spill, and small blocks are
# left out more often, too. Where registers allow, 128 candidates share what the look costs a row.
SKIP_CN = 32
SKIP: dict[tuple[int, int, int], Tiles] = {
    (64, 2, 8): Tiles(64, 64, 128, 32, 2, 2, 4, 2),
    (256, 2, 8): Tiles(64, 32, 32, 32, 2, 2, 4, 1),
    (64, 2, 9): Tiles(64, 128, 128, 32, 2, 2, 4, 2),
    (128, 2, 9): Tiles(64, 128, 128, 16, 2, 2, 4, 2),
    (256, 2, 9): Tiles(64, 64, 32, 32, 2, 2, 8, 1),
    (64, 2, 10): Tiles(64, 128, 64, 32, 2, 2, 4, 2),
}
SKIP_BEFORE_3_7: dict[tuple[int, int, int], Tiles] = {
    (64, 2, 8): Tiles(64, 64, 64, 32, 2, 2, 4, 2),
    (128, 2, 9): Tiles(64, 128, 64, 32, 2, 2, 4, 2),
    (128, 2, 8): Tiles(64, 32, 64, 32, 2, 2, 4, 2),
    (64, 2, 10): Tiles(64, 64, 64, 32, 2, 2, 4, 2),
    (128, 2, 10): Tiles(64, 64, 32, 32, 2, 2, 4, 2),
    (256, 2, 9): Tiles(64, 64, 64, 32, 2, 2, 8, 1),
    (256, 2, 10): Tiles(64, 32, 64, 32, 2, 2, 8, 1),
    (128, 4, 9): Tiles(64, 32, 64, 32, 2, 1, 4, 2),
}
# The positives stream past as a second query.
DUAL: dict[tuple[int, int, int], Tiles] = {
    (128, 2, 8): Tiles(64, 64, 64, 32, 2, 2, 4, 2),
    (256, 2, 8): Tiles(64, 32, 32, 32, 2, 2, 4, 1),
    (16, 2, 9): Tiles(64, 128, 64, 64, 2, 2, 4, 2),
    (32, 2, 9): Tiles(64, 128, 64, 64, 2, 2, 4, 2),
    (64, 2, 9): Tiles(64, 128, 64, 64, 2, 2, 4, 2),
    (128, 2, 9): Tiles(64, 64, 64, 64, 2, 2, 4, 2),
    (256, 2, 9): Tiles(64, 32, 64, 64, 2, 2, 8, 1),
    (64, 2, 10): Tiles(64, 64, 64, 64, 2, 2, 4, 2),
    (128, 2, 10): Tiles(64, 32, 64, 64, 2, 2, 4, 2),
    (256, 2, 10): Tiles(64, 32, 64, 64, 1, 2, 8, 1),
}
DUAL_TF32: dict[tuple[int, int, int], Tiles] = {
    (128, 4, 9): Tiles(64, 32, 64, 32, 1, 1, 4, 2),
}
DUAL_BEFORE_3_7: dict[tuple[int, int, int], Tiles] = {
    (256, 2, 8): Tiles(64, 32, 32, 16, 2, 2, 4, 1),
    (128, 2, 9): Tiles(64, 32, 64, 64, 2, 2, 4, 2),
    (128, 2, 10): Tiles(64, 32, 32, 64, 2, 2, 4, 2),
}


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


def before_3_8() -> bool:
    return installed() < (3, 8)


def default(
    block_d: int, dtype: torch.dtype, capability: int, exact: bool, load: Load = "plain"
) -> Tiles:
    """The row of the table, or of the nearest older capability.

    Args:
        capability: the major one. 12 has neither the tensor instructions of 9 and 10 nor their
            shared memory, but those of 8.6.
        exact: a float32 product is not rounded to tf32.
    """
    if capability >= 12:
        capability = 8
    table = TABLE if exact else {**TABLE, **TF32}
    if before_3_7():
        table = {**table, **BEFORE_3_7}
    if load != "plain":
        table = {**table, **OPTIONS}
        if before_3_8():
            table = {**table, **OPTIONS_BEFORE_3_8}
    if load == "skip":
        table = {**table, **SKIP}
        if before_3_7():
            table = {**table, **SKIP_BEFORE_3_7}
    if load == "dual":
        table = {**table, **DUAL} if exact else {**table, **DUAL, **DUAL_TF32}
        if before_3_7():
            table = {**table, **DUAL_BEFORE_3_7}
    for major in range(capability, 7, -1):
        if (block_d, dtype.itemsize, major) in table:
            return fitted(table[block_d, dtype.itemsize, major], load)
    raise KeyError((block_d, dtype, capability))


def fitted(tiles: Tiles, load: Load) -> Tiles:
    """The tiles with blocks that are small enough for the form."""
    return tiles._replace(CN=min(tiles.CN, SKIP_CN)) if load == "skip" else tiles


def per_row(block_d: int, dtype: torch.dtype) -> Tiles:
    """For candidates per row: BM rows, BN candidates of each at a time, CN where they are numbers.

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
    **dict.fromkeys(("BM", "BN", "CM", "CN"), _SIZES),
    "stages_1": (1, 2, 3, 4, 5),
    "stages_2": (1, 2, 3, 4, 5),
    "warps": (1, 2, 4, 8, 16),
    "programs": (1, 2, 3, 4),
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
        found[tiles._replace(stages_1=stages, stages_2=stages, programs=programs)] = None
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
