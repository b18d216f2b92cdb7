"""Which tile, step and part a worker takes, and where it lies, at the documented limits.

No machine here holds such a problem, so the functions of the kernels that count and place are run
alone in the interpreter, where 32-bit arithmetic that overflows is an error (`triton_access`), and
compared with Python's integers.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
import triton_access
from triton_access import Written

from dwl_kernels import backends
from dwl_kernels.backends import triton as host
from dwl_kernels.backends.triton_call import MAX_WORKERS
from dwl_kernels.backends.triton_common import (
    NUM_ROW_ARRAYS,
    Call,
    Dual,
    Form,
    Inputs,
    Outputs,
    Sizes,
    Work,
    part_of,
    row_integers,
    shares,
    slice_of,
    unit,
)
from dwl_kernels.backends.triton_dual import group_start
from dwl_kernels.backends.triton_kernels import workspace

REASON = backends.why_not("triton", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
WORKERS = (1, 132, 264, MAX_WORKERS)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in (share_kernel, unit_kernel, slice_kernel, group_kernel, place_kernel):
        monkeypatch.setitem(triton_access.KERNELS, kernel.__name__, Written(("out",)))


def results(kernel: Any, number: int, *arguments: Any) -> list[int]:
    out = torch.empty(number, dtype=torch.int64)
    kernel[(1,)](out, *arguments)
    return out.tolist()


@triton.jit
def share_kernel(out, tiles, steps, workers):
    whole, splits = shares(tiles, steps, workers)
    tl.store(out, whole)
    tl.store(out + 1, splits)


@triton.jit
def unit_kernel(out, number, whole, splits, steps):
    tile, first, stop, part = unit(number, whole, splits, steps)
    tl.store(out, tile)
    tl.store(out + 1, first)
    tl.store(out + 2, stop)
    tl.store(out + 3, part)


@triton.jit
def slice_kernel(out, worker, length, workers):
    first, stop = slice_of(worker, length, workers)
    tl.store(out, first)
    tl.store(out + 1, stop)


@triton.jit
def group_kernel(out, group, candidates, slate_size):
    sizes = Sizes(0, 0, candidates, 0, 0, 0.0, 0.0, 0, 0, 0.0)
    work = Work(sizes, None, Dual(0.0, 0.0, 0.0, slate_size, 0.0, 1.0))
    tl.store(out, group_start(group, None, work))


@triton.jit
def place_kernel(out, floats, integers, rows, candidates, domains, workers, call):
    """In bytes from the beginning of the workspace, the last place that each part may reach."""
    stride = tl.cdiv(rows, 64) * 64
    space = workspace(floats, integers, integers, stride, candidates, domains, workers, call)
    sizes = Sizes(rows, stride, candidates, domains, workers, 0.0, 0.0, rows, candidates, 0.0)
    work = Work(sizes, space, None)
    begin = floats.to(tl.int64)
    tl.store(out, (space.rows + (NUM_ROW_ARRAYS - 1) * stride + rows - 1).to(tl.int64) - begin)
    tl.store(out + 1, (space.sums + 3 * workers - 1).to(tl.int64) - begin)
    pointer = space.domains + (workers - 1) * domains + domains - 1 + workers * domains
    tl.store(out + 2, pointer.to(tl.int64) - begin)
    tl.store(out + 3, (space.log_q + candidates - 1).to(tl.int64) - begin)
    tl.store(out + 4, part_of(workers, call, work).to(tl.int64) - begin)
    begin = integers.to(tl.int64)
    tl.store(out + 5, (row_integers(3, work) + stride + 127).to(tl.int64) - begin)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize(
    ("owned", "streamed"),
    [
        *((1, n) for n in (1, 300_000_000, 521_000_000, host.MAX_CANDIDATES)),
        *((n, host.MAX_ROWS) for n in (1, 17, 9000, host.MAX_CANDIDATES)),
        *((n, host.MAX_CANDIDATES) for n in (17 * 64, 9000, host.MAX_ROWS)),
    ],
)
def test_parts_of_a_tile_are_all_of_its_steps(
    request: pytest.FixtureRequest, owned: int, streamed: int, workers: int
) -> None:
    for block in (16, 64, 128):
        tiles, steps = -(-owned // block), -(-streamed // block)
        whole, splits = results(share_kernel, 2, tiles, steps, workers)
        rest = tiles % workers
        assert whole == tiles - rest
        assert splits == min(workers // max(rest, 1), steps)
        if splits * steps >= 2**31:
            mended_elsewhere(request, "steps times parts is a product of 32 bits")
        units = whole + rest * splits
        assert units - whole <= workers
        stop = 0
        for number in [*range(max(whole - 2, 0), min(whole + 2 * splits, units)), units - 1]:
            tile, first, stop, part = results(unit_kernel, 4, number, whole, splits, steps)
            if number < whole or splits == 1:
                assert (tile, first, stop, part) == (number, 0, steps, -1)
                continue
            turn = (number - whole) % splits
            assert (tile, part) == (whole + (number - whole) // splits, number - whole)
            assert (first, stop) == (steps * turn // splits, steps * (turn + 1) // splits)


def mended_elsewhere(request: pytest.FixtureRequest, reason: str) -> None:
    request.applymarker(pytest.mark.xfail(strict=False, reason=reason))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("length", [1, 1000, host.MAX_ROWS - 1, host.MAX_ROWS])
def test_slices_cover_the_rows(length: int, workers: int) -> None:
    ends = [results(slice_kernel, 2, w, length, workers) for w in {0, 1, workers // 2, workers - 1}]
    size = -(-length // workers)
    for worker, got in zip({0, 1, workers // 2, workers - 1}, ends, strict=True):
        first = min(worker * size, length)
        assert got == [first, min(first + size, length)]


@pytest.mark.parametrize("candidates", [33, host.MAX_CANDIDATES - 1, host.MAX_CANDIDATES])
@pytest.mark.parametrize("slate", [1, 32, 33, 1000])
def test_groups_of_a_slate_end_where_they_should(
    request: pytest.FixtureRequest, slate: int, candidates: int
) -> None:
    """Past the last group the kernel asks for the end of one more."""
    if (slate + 1) * candidates // slate >= 2**31:
        mended_elsewhere(request, "the group past the only one of 2^30 candidates ends at 2^31")
    for group in {0, 1, slate - 1, slate, slate + 1}:
        (start,) = results(group_kernel, 1, group, candidates, slate)
        assert start == -(-group * candidates // slate)


@pytest.mark.parametrize(
    ("rows", "candidates", "domains", "drawn"),
    [
        (host.MAX_ROWS, host.MAX_CANDIDATES, host.MAX_DOMAINS, False),
        (host.MAX_ROWS, host.MAX_CANDIDATES, host.MAX_DOMAINS, True),
        (5, host.MAX_CANDIDATES, 1, True),
        (host.MAX_ROWS, 5, host.MAX_DOMAINS, True),
    ],
)
@pytest.mark.parametrize("block_d", [16, 256])
def test_parts_of_the_workspace_lie_one_after_another(
    rows: int, candidates: int, domains: int, drawn: bool, block_d: int
) -> None:
    chosen = {"DRAWN": drawn, "BM": 128, "CM": 128, "BLOCK_D": block_d}
    form = Form(*(tl.constexpr(chosen.get(name, 0)) for name in Form._fields))
    floats, integers = torch.empty(1), torch.empty(1, dtype=torch.int32)
    nothing = dict.fromkeys(Outputs._fields) | {"domain_weights": torch.empty(1)}
    call = Call(Inputs(*[None] * len(Inputs._fields)), Outputs(**nothing), form)
    got = results(place_kernel, 6, floats, integers, rows, candidates, domains, MAX_WORKERS, call)
    stride = -(-rows // 64) * 64
    ends = [11 * stride, 3 * MAX_WORKERS, 2 * MAX_WORKERS * domains]
    ends = list(itertools.accumulate(ends))
    log_q = -(-ends[2] // 64) * 64
    parts = log_q + (-(-candidates // 64) * 64 if drawn else 0)
    part = 128 * (block_d + 3)
    assert got[0] == 4 * (ends[0] - stride + rows - 1)
    assert got[1:3] == [4 * (end - 1) for end in ends[1:]]
    assert got[3:5] == [4 * (log_q + candidates - 1), 4 * (parts + MAX_WORKERS * part)]
    assert got[5] == 4 * (-(-MAX_WORKERS // 64) * 64 + 3 * (stride + 128) + stride + 127)


def test_workspace_of_the_host_is_as_long_as_that_of_the_kernel() -> None:
    """The lengths of the last test, from what the host allocates."""
    from dwl_kernels.backends.triton_call import workspace_floats, workspace_integers
    from dwl_kernels.backends.triton_tiles import Tiles
    from dwl_kernels.problem import Problem, Wanted

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, candidates, domains = host.MAX_ROWS, host.MAX_CANDIDATES, host.MAX_DOMAINS
    problem = Problem(
        query=empty(rows, 256),
        positive=None,
        candidates=empty(candidates, 256),
        candidate_log_q=empty(candidates),
        positive_ids=empty(rows, dtype=torch.int64),
        candidate_ids=empty(candidates, dtype=torch.int64),
        domain_ids=empty(rows, 1, dtype=torch.int64),
        domain_weights=empty(domains),
    )
    wanted = Wanted(True, True, True, True, True, True)
    tiles = Tiles(128, 64, 128, 64, 1, 1, 4, 1)
    floats = workspace_floats(problem, wanted, tiles, MAX_WORKERS)
    before = 11 * rows + 3 * MAX_WORKERS + 2 * MAX_WORKERS * domains
    assert floats >= before + candidates + MAX_WORKERS * 128 * 259
    assert workspace_integers(problem, MAX_WORKERS) >= MAX_WORKERS + 4 * (rows + 128)
    assert host.refuses(problem) is None
