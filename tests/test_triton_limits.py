"""The Triton kernel at sizes that no test could run: its own functions, interpreted alone."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import cases
import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from dwl_kernels import backends
from dwl_kernels.backends import triton as host
from dwl_kernels.backends.triton_call import MAX_WORKERS
from dwl_kernels.backends.triton_common import shares, unit
from dwl_kernels.backends.triton_dual import group_start
from dwl_kernels.backends.triton_kernels import workspace
from dwl_kernels.backends.triton_tiles import Tiles

REASON = backends.why_not("triton", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
BY_NAME = {case.name: case for case in cases.CASES}


@triton.jit(do_not_specialize=["tiles", "steps", "workers"])
def units_kernel(found, tiles, steps, workers, LENGTH: tl.constexpr):
    """The first LENGTH units: tile, first and last step, part."""
    number = tl.arange(0, LENGTH)
    whole, splits = shares(tiles, steps, workers)
    count = whole + (tiles - whole) * splits
    tile, first, stop, part = unit(number, whole, splits, steps)
    inside = number < count
    tl.store(found + number, tile, mask=inside)
    tl.store(found + LENGTH + number, first, mask=inside)
    tl.store(found + 2 * LENGTH + number, stop, mask=inside)
    tl.store(found + 3 * LENGTH + number, part, mask=inside)


LONGEST = (1 << 30) // 16  # steps of the documented limit of candidates, with the smallest blocks


@pytest.mark.parametrize("workers", [132, 264, 1024])
@pytest.mark.parametrize("steps", [LONGEST // 4, LONGEST - 5, LONGEST])
@pytest.mark.parametrize("tiles", [1, 3, 100])
def test_parts_of_a_tile_follow_each_other_to_its_end(tiles: int, steps: int, workers: int) -> None:
    found = torch.full((4, 1024), -7, dtype=torch.int64)
    units_kernel[(1,)](found, tiles, steps, workers, 1024)
    units = sorted(unit[:3] for unit in found.T.tolist() if unit[0] >= 0)
    for tile in range(tiles):
        mine = [unit[1:] for unit in units if unit[0] == tile]
        assert [first for first, _ in mine] == [0, *(stop for _, stop in mine[:-1])]
        assert mine[-1][1] == steps
    assert len(units) > workers / 2


class SizesOfCandidates(NamedTuple):
    candidates: Any


class DualOfSlate(NamedTuple):
    slate_size: Any


class WorkOfGroups(NamedTuple):
    sizes: Any
    dual: Any


@triton.jit(do_not_specialize=["group", "candidates", "slate_size"])
def group_kernel(found, group, candidates, slate_size):
    work = WorkOfGroups(SizesOfCandidates(candidates), DualOfSlate(slate_size))
    tl.store(found, group_start(group, None, work))


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
    log_q = sums + 3 * workers + 2 * workers * domains
    numbers = [sums + 3 * workers, log_q, log_q + candidates]
    assert [offset // found.element_size() for offset in found.tolist()] == numbers


@pytest.fixture
def hints(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers that a kernel calls multiples of 16: a GPU loads vectors where it does."""
    from triton.runtime import interpreter

    found: list[int] = []
    kept = interpreter.TensorHandle.set_attr

    def checked(self: Any, key: str, value: Any) -> None:
        if key == "tt.divisibility":
            found.extend(np.atleast_1d(self.data).reshape(-1).tolist())
        kept(self, key, value)

    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", checked)
    return found


@pytest.mark.parametrize(("slate", "competition"), [(16, 1.0), (5, 1.0), (4, 1.0), (5, 0.0)])
def test_blocks_that_are_called_aligned_are(
    hints: list[int], monkeypatch: pytest.MonkeyPatch, slate: int, competition: float
) -> None:
    """Groups of a slate end anywhere, and with competition a block of candidates ends with one."""
    monkeypatch.setattr(host, "INTERPRETER", host.Interpreter(Tiles(16, 32, 16, 32, 1, 1, 4, 1), 3))
    case = dataclasses.replace(BY_NAME["dual scale"], rows=32, candidates=96)
    options = {**case.options, "slate_size": slate, "competition": competition}
    cases.check(dataclasses.replace(case, options=options), "triton", torch.float32)
    assert hints
    assert [number for number in hints if number % 16] == []
