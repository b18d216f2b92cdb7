"""Races, bounds and unwritten memory of the CUDA kernel, found without a GPU.

The emulator checks every load and store of the kernel (`cuda_emulator/checks.cpp`), so each test
that runs backend "cuda" on a CPU is a test of these as well. Here the telling cases run in every
type, with whole and split tiles and threads in a random order; and mistakes planted into a copy of
the source have to be reported.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import cases
import cuda_emulator
import pytest
import torch
from cuda_emulator import TILES, Emulation

from dwl_kernels import backends
from dwl_kernels.backends import compilers
from dwl_kernels.backends.cuda.variants import Tiles

pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("cuda", "cpu") is not None, reason="the emulator is off"
)
TEAMS = Tiles(32, 1, 4, 1, TEAM=2)
ALONE = (
    *("one of everything", "three rows", "many candidates", "many rows"),
    *("past the tile", "refined, everything", "everything, none", "mixed, everything"),
    *("in-batch, one row", "in-batch, NaN in the padding", "full softmax, past the tile"),
    *("full softmax, NaN in the padding", "indexed, everything"),
)
BY_NAME = {case.name: case for case in cases.CASES}


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, "tf32", torch.float64], ids=str
)
@pytest.mark.parametrize(
    ("name", "tiles"),
    [
        *((name, TILES) for name in ALONE),
        *((name, TEAMS) for name in ("refined, everything", "mixed, everything")),
    ],
)
def test_no_thread_races_or_leaves_its_memory(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype | str, tiles: Tiles
) -> None:
    monkeypatch.setattr(cuda_emulator, "EMULATION", Emulation(2, 2, tiles))
    before = torch.get_float32_matmul_precision()
    try:
        if isinstance(dtype, str):
            torch.set_float32_matmul_precision("high")
            dtype = torch.float32
        cases.loss_and_gradients(BY_NAME[name], "cuda", dtype)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


ROW_LOSS = "static_cast<Number*>(call.row_loss)[row] = row_loss;"


@pytest.mark.parametrize(
    ("right", "wrong", "reported"),
    [
        # Barriers of the block, of the warp, of the grid; a copy that nobody waits for.
        (
            "sync_block();\n    }\n    if (step + 1",
            "}\n    if (step + 1",
            "a race with .* of shared memory",
        ),
        ("sync_block();\n}\n", "}\n", "a race with .* of shared memory"),
        ("wait_copies();", "", "a race with a copy in the background .* of shared memory"),
        ("  p.sync_team();\n}", "}", "a race with a write .* of shared memory"),
        ("p.sync_team();\n  const Unit", "const Unit", "nobody has written it: .* of space"),
        ("sync_grid();\n  for (int turn", "for (int turn", "(race|nobody) .* of space"),
        (
            "sync_grid();\n    const int pieces = (row_sh",
            "const int pieces = (row_sh",
            "a race .* of space",
        ),
        (
            "sync_grid();\n    const int pieces = (by_c",
            "const int pieces = (by_c",
            "a race .* of space",
        ),
        (
            "p.sync_team();\n}",
            "if (p.lane.index > 0) p.sync_team();\n}",
            "deadlock|a part of the threads",
        ),
        # All lanes write the same number to the same place.
        ("if (p.lane.index == 0) {", "{", "a race with a write by .* writes 4 bytes"),
        # Bounds, inputs, outputs.
        (ROW_LOSS, ROW_LOSS.replace("row]", "row + 1]"), "out of bounds: .* of row_loss of 260 "),
        (ROW_LOSS, ROW_LOSS.replace("] =", "] +="), "nobody has written it: .* of row_loss"),
        (ROW_LOSS, "if (row > 0) " + ROW_LOSS, "256 bytes of row_loss are written, not 260"),
        (
            ROW_LOSS,
            ROW_LOSS.replace("call.row_loss", "const_cast<void*>(call.tau)"),
            "an input is changed: .* of tau",
        ),
        ("totals.hits[mt][1] = 0", "totals.hits[mt][2] = 0", "undefined behaviour: out_of_bounds"),
        (">(from)[0]", ">(from + 1)[0]", "undefined behaviour: type_mismatch"),
    ],
)
def test_planted_mistake_is_reported(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cache: Path,
    right: str,
    wrong: str,
    reported: str,
) -> None:
    """In one run, with threads in the order of their numbers: it does not take luck."""
    check_report(monkeypatch, tmp_path, cache, TILES, (right, wrong, reported))


@pytest.mark.parametrize(
    "behind",
    ["  }\n#pragma unroll\n  for (int k = 0; k < S::BN", "      each([&](Number& mine, int row) {"],
)
def test_missing_barrier_of_warps_that_share_rows_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path, behind: str
) -> None:
    planted = f"sync_block();\n{behind}", behind, "(race|nobody) .* of shared memory"
    check_report(monkeypatch, tmp_path, cache, TEAMS, planted)


def check_report(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cache: Path,
    tiles: Tiles,
    planted: tuple[str, str, str],
) -> None:
    right, wrong, reported = planted
    shutil.copytree(compilers.source_dir() / "cuda", tmp_path / "cuda")
    found = 0
    for path in (tmp_path / "cuda").iterdir():
        text = re.sub(r"^ *//.*\n| *//.*", "", path.read_text(), flags=re.M)  # code alone
        if path.name in ("sampled_softmax.cu",) or path.suffix == ".cuh":
            found += text.count(right)
            path.write_text(text.replace(right, wrong))
    assert found > 0
    monkeypatch.setattr(compilers, "source_dir", lambda: tmp_path)
    monkeypatch.setenv("DWL_KERNELS_CACHE", str(cache))
    monkeypatch.setattr(cuda_emulator, "load", cuda_emulator.load.__wrapped__)
    monkeypatch.setattr(cuda_emulator, "does_not_build", lambda: None)
    monkeypatch.setattr(cuda_emulator, "EMULATION", Emulation(2, 0, tiles))
    case = cases.Case("planted", rows=65, candidates=70, dim=12 * tiles.TEAM, log_q=True, ids=True)
    with pytest.raises(RuntimeError, match=reported):
        cases.loss_and_gradients(case, "cuda", torch.float32)
