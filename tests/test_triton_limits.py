"""The Triton kernel at sizes that no test could run: its own functions, interpreted alone."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import cases
import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
import triton_access

from dwl_kernels import backends
from dwl_kernels.backends.triton import solve as host
from dwl_kernels.backends.triton.kernels.dual_scale import group_start
from dwl_kernels.backends.triton.kernels.prologue import workspace
from dwl_kernels.backends.triton.kernels.schedule import (
    part_at,
    parts_of,
    shares,
    unit,
    units_of,
)
from dwl_kernels.backends.triton.specialize import MAX_WORKERS
from dwl_kernels.backends.triton.tiles import Tiles

REASON = backends.unavailable_reason("triton", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
BY_NAME = {case.name: case for case in cases.CASES}


triton_access.KERNELS |= {
    "unit_kernel": triton_access.Written((), kept=("found",)),
    "parts_kernel": triton_access.Written((), kept=("found",)),
    "busy_kernel": triton_access.Written((), kept=("found",)),
    "group_kernel": triton_access.Written((), kept=("found",)),
    "workspace_kernel": triton_access.Written((), kept=("found",)),
}


@triton.jit(do_not_specialize=["tiles", "steps", "workers", "turn"])
def unit_kernel(found, tiles, steps, workers, turn, LENGTH: tl.constexpr):
    """Of every worker: how many units it has, and tile, first and last step and part of one."""
    worker = tl.arange(0, LENGTH)
    dealt = shares(tiles, steps, workers)
    tile, first, stop, part = unit(turn, worker, dealt, steps, workers)
    tl.store(found + worker, units_of(worker, dealt, workers), mask=worker < workers)
    tl.store(found + LENGTH + worker, tile)
    tl.store(found + 2 * LENGTH + worker, first)
    tl.store(found + 3 * LENGTH + worker, stop)
    tl.store(found + 4 * LENGTH + worker, part)


@triton.jit(do_not_specialize=["tiles", "steps", "workers", "split"])
def parts_kernel(found, tiles, steps, workers, split):
    """The places of the parts of a split tile, in the order in which they are merged."""
    dealt = shares(tiles, steps, workers)
    first, part, last = parts_of(split, dealt, steps)
    for worker in range(first, last + 1):
        tl.store(found + (worker - first), part_at(worker, first, part))


LONGEST = (1 << 30) // 16  # steps of the documented limit of candidates, with the smallest blocks


@pytest.mark.parametrize("workers", [1, 7, 100, 264])
@pytest.mark.parametrize("steps", [0, 1, 2, 9, 64, LONGEST - 5, LONGEST])
def test_every_step_of_every_tile_is_taken_once_and_merged_in_order(
    steps: int, workers: int
) -> None:
    for tiles in (1, 3, workers - 1, workers, workers + workers // 2 + 1):
        units = []  # tile, first, stop, part
        turn, most = 0, 1
        while turn < most:
            found = torch.zeros(5, 512, dtype=torch.int64)
            unit_kernel[(1,)](found, tiles, steps, workers, turn, 512)
            most = int(found[0].max())
            units += [unit[1:] for unit in found.T.tolist() if turn < unit[0]]
            turn += 1
        units.sort()
        parts = [unit[3] for unit in units if unit[3] >= 0]
        assert len(set(parts)) == len(parts)
        assert all(part < 2 * workers for part in parts)
        by_tile: dict[int, list[list[int]]] = {tile: [] for tile in range(tiles)}
        for tile, *rest in units:
            by_tile[tile].append(rest)
        whole = sum(mine[0][2] == -1 for mine in by_tile.values())
        for tile, mine in by_tile.items():
            assert [first for first, *_ in mine] == [0, *(stop for _, stop, _ in mine[:-1])]
            assert mine[-1][1] == steps
            if mine[0][2] == -1:
                assert len(mine) == 1
            elif tile in (whole, tiles - 1) and len(mine) < 40:
                found = torch.full((1024,), -1, dtype=torch.int64)
                parts_kernel[(1,)](found, tiles, steps, workers, tile - whole)
                assert [part for part in found.tolist() if part >= 0] == [m[2] for m in mine]


@triton.jit
def busy_kernel(found, tiles, steps, WORKERS: tl.constexpr, TURNS: tl.constexpr, N: tl.constexpr):
    """The steps of every worker, and whether anything is merged: sizes by workers, flat."""
    at = tl.arange(0, N)
    all_tiles, all_steps = tl.load(tiles + at // WORKERS), tl.load(steps + at // WORKERS)
    dealt = shares(all_tiles, all_steps, WORKERS)
    mine = units_of(at % WORKERS, dealt, WORKERS)
    taken = tl.zeros([N], tl.int32)
    for turn in range(TURNS):
        _, first, stop, _ = unit(turn, at % WORKERS, dealt, all_steps, WORKERS)
        taken += tl.where(turn < mine, stop - first, 0)
    tl.store(found + at, tl.where(mine <= TURNS, taken, 0x7FFFFFFF))


def busy(sizes: list[tuple[int, int]], rows: int, columns: int) -> torch.Tensor:
    """For tiles of `rows` of the first size and steps of `columns` of the second."""
    tiles, steps = torch.tensor([(-(-a // rows), -(-b // columns)) for a, b in sizes]).int().T
    longest, block = [], 1 << 18  # sizes by workers that the interpreter takes at a time
    for first in range(0, len(sizes), block // 264):
        part = slice(first, first + block // 264)
        padded = torch.ones(2, block // 264 + 1, dtype=torch.int32)
        padded[0, : len(tiles[part])], padded[1, : len(tiles[part])] = tiles[part], steps[part]
        found = torch.zeros(block, dtype=torch.int32)
        turns = int(tiles[part].max()) // 264 + 2
        busy_kernel[(1,)](found, *padded, 264, turns, block)
        found = found[: len(tiles[part]) * 264].view(-1, 264)
        assert (found.sum(1) == tiles[part] * steps[part]).all()
        longest.append(found.amax(1))
    return tiles * steps / (264 * torch.cat(longest))


@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (128, 64)])
def test_no_size_leaves_the_chip_idle(rows: int, columns: int) -> None:
    """264 programs: either side from 4,096 to 65,536, the other 8,192; the same in both phases."""
    lengths = range(4096, 65537, 100)
    for sizes in ([(n, 8192) for n in lengths], [(8192, n) for n in lengths]):
        assert busy(sizes, rows, columns).min() > 0.85
    assert busy([(10_000, 10_000), (8512, 8512), (12_288, 12_288)], rows, columns).min() > 0.97


class SizesOfCandidates(NamedTuple):
    candidates: Any


class DualOfSlate(NamedTuple):
    slate_size: Any


class ContextOfGroups(NamedTuple):
    sizes: Any
    dual: Any


@triton.jit(do_not_specialize=["group", "candidates", "slate_size"])
def group_kernel(found, group, candidates, slate_size):
    ctx = ContextOfGroups(SizesOfCandidates(candidates), DualOfSlate(slate_size))
    tl.store(found, group_start(group, ctx))


@pytest.mark.parametrize("candidates", [1000, host.MAX_CANDIDATES - 1, host.MAX_CANDIDATES])
@pytest.mark.parametrize("slate", [1, 2, 7, 1000])
def test_groups_of_a_slate_start_among_the_candidates(candidates: int, slate: int) -> None:
    found = torch.zeros(1, dtype=torch.int64)
    for group in (1, slate // 2, slate - 1, slate):
        group_kernel[(1,)](found, group, candidates, slate)
        assert found.item() == -(-group * candidates // slate)
    # After the last one no block ends: the loop has turns to spare.
    group_kernel[(1,)](found, slate + 1, candidates, slate)
    assert found.item() > candidates


class OutputsOfDomains(NamedTuple):
    domain_weights: Any


class FormOfDrawn(NamedTuple):
    DRAWN: Any


class CallOfSpace(NamedTuple):
    outputs: Any
    form: Any


@triton.jit(do_not_specialize=["rows", "candidates", "domains", "workers"])
def workspace_kernel(found, rows, candidates, domains, workers, DRAWN: tl.constexpr):
    call = CallOfSpace(OutputsOfDomains(found), FormOfDrawn(DRAWN))
    space = workspace(found, found, found, rows, candidates, domains, workers, call)
    base = found.to(tl.int64)
    tl.store(found, space.domains.to(tl.int64) - base)
    tl.store(found + 1, space.log_q.to(tl.int64) - base)
    tl.store(found + 2, space.parts.to(tl.int64) - base)


def test_workspace_of_the_largest_problem_has_its_parts_in_order() -> None:
    """2^27 rows, 2^30 candidates, 65,536 domains, 1,024 workers: 2.7e9 numbers before the parts."""
    found = torch.zeros(3, dtype=torch.int64)
    sizes = (host.MAX_ROWS, host.MAX_CANDIDATES, host.MAX_DOMAINS, MAX_WORKERS)
    workspace_kernel[(1,)](found, *sizes, True)
    rows, candidates, domains, workers = sizes
    sums = 11 * rows
    log_q = sums + 5 * workers + 2 * workers * domains
    numbers = [sums + 5 * workers, log_q, log_q + candidates]
    assert [offset // found.element_size() for offset in found.tolist()] == numbers


@pytest.mark.parametrize(("slate", "competition"), [(16, 1.0), (5, 1.0), (4, 1.0), (5, 0.0)])
def test_blocks_that_are_called_aligned_are(
    monkeypatch: pytest.MonkeyPatch, slate: int, competition: float
) -> None:
    """Groups of a slate end anywhere, and with competition a block of candidates ends with one.

    `triton_access` raises at a hint that is false: a GPU loads vectors where it is told so.
    """
    monkeypatch.setattr(host, "INTERPRETER", host.Interpreter(Tiles(16, 32, 16, 32, 1, 1, 4, 1), 3))
    case = dataclasses.replace(BY_NAME["dual scale"], rows=32, candidates=96)
    options = {**case.options, "slate_size": slate, "competition": competition}
    cases.check(dataclasses.replace(case, options=options), "triton", torch.float32)
