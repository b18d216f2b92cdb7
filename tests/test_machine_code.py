"""The machine code of the Triton kernels, compiled without a GPU: nothing spills in a main loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import compiled as kept
from compiled import by_triton

from benchmarks.machine_code import arithmetic

pytestmark = pytest.mark.timeout(900)  # where a kernel has changed
SHARED_OF_9_0 = (233472, 232448)  # bytes of a multiprocessor, and of a program

# Between them they have every loop, with what needs most registers.
COMPILE = """
import json, re, sys, torch
from concurrent.futures import ProcessPoolExecutor
from benchmarks.machine_code import triton_per_row, triton_ranks, triton_shared
from benchmarks.machine_code.sass import machine_code
from dwl_kernels.backends.triton import specialize as host

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
SHARED = [
    ("sampled", 64, bf16, False, 90, "mean"),
    ("sampled", 128, bf16, False, 90, "mean"),
    ("sampled", 128, f16, False, 90, "mean"),
    ("in-batch", 128, bf16, True, 90, "none"),
    ("full", 128, bf16, True, 90, "mean"),
    ("skip", 128, bf16, True, 90, "mean"),
    ("dual", 64, bf16, True, 90, "none"),
]
def guarded(fenced, polls):
    host.fenced, host.polls = lambda capability: fenced, lambda: polls
    _, launch = triton_shared.prepared(("sampled", 128, bf16, False, 90, "mean"))
    found = triton_shared.compiled_for(90, triton_shared.softmax_loss_kernel, launch)
    sass, _ = machine_code(found.asm["cubin"])
    waits = [int(n, 16) for n in re.findall(r"DEPBAR\\.LE SB0, (0x\\w+)", sass)]
    ptx = found.asm["ptx"]
    return [ptx.count("fence.proxy.async.shared::cta; mov.b32"), ptx.count(".exch.b32"), waits]

RANKS = [
    *[("count", 90, d, bf16, True) for d in (64, 128, 768)],
    ("count", 90, 64, f32, False), ("pair", 90, 128, bf16, True),
]

PER_ROW = [("loss, everything, none", 90, 128, f32), (triton_per_row.SUM, 90, 64, bf16)]

if __name__ == "__main__":
    with ProcessPoolExecutor(2) as pool:
        shared = list(pool.map(triton_shared.count, SHARED))
        per_row = list(pool.map(triton_per_row.count, PER_ROW))
        without_and_with = list(pool.map(guarded, (False, True), (0, 9)))
        ranks = list(pool.map(triton_ranks.count, RANKS))
    json.dump([shared, per_row, without_and_with, ranks], open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def compiled() -> list[list[dict[str, Any]]]:
    rows: list[list[dict[str, Any]]] = by_triton("triton", COMPILE)
    return rows


def test_main_loops_do_not_spill_and_multiply_on_tensor_cores(
    compiled: list[list[dict[str, Any]]],
) -> None:
    shared, *_ = compiled
    every, one = SHARED_OF_9_0
    for row in shared:
        tiles = row["tiles"]
        assert len(row["loops"]) == (4 if row["problem"].startswith("dual") else 3)
        assert all(loop["spills"] == 0 for loop in row["loops"]), row["problem"]
        assert row["wgmma"] > 0
        assert row["shared"] <= one
        assert tiles["ctas_per_sm"] * (row["shared"] + 1024) <= every
        registers = -(-row["registers"] // 8) * 8 * tiles["warps"] * 32
        assert tiles["ctas_per_sm"] * registers <= 65536


def test_a_hit_costs_a_pair_that_is_none_one_instruction(
    compiled: list[list[dict[str, Any]]],
) -> None:
    """Not two for the words of the ids and one to choose, as a comparison of whole ids does."""
    shared, *_ = compiled
    row = next(row for row in shared if row["problem"] == "in-batch, everything")
    for loop, size in zip(row["loops"], ("BLOCK_N1", "BLOCK_N1", "BLOCK_M2"), strict=True):
        pairs = row["tiles"][size] * row["tiles"]["BLOCK_M1"] / (32 * row["tiles"]["warps"])
        assert pairs <= loop["kinds"]["ISETP"] < 1.25 * pairs
        assert loop["kinds"].get("FSEL", 0) < pairs / 4


def test_phase_2_waits_for_no_order_of_the_rows(compiled: list[list[dict[str, Any]]]) -> None:
    """What a loop loads without a copy ahead to shared memory, it waits for."""
    shared, *_ = compiled
    for problem in ("in-batch, everything", "full, everything"):
        row = next(row for row in shared if row["problem"] == problem)
        assert row["loops"][-1]["kinds"].get("LDG", 0) == 0


def test_candidates_by_row_are_gathered_16_bytes_at_a_time(
    compiled: list[list[dict[str, Any]]],
) -> None:
    _, per_row, *_ = compiled
    for row in per_row:
        assert all(loop["spills"] == 0 for loop in row["loops"])
        assert max(loop["loads_128"] for loop in row["loops"]) >= 4


def test_ranks_multiply_on_tensor_cores_and_keep_their_counts_in_registers(
    compiled: list[list[dict[str, Any]]],
) -> None:
    _, one = SHARED_OF_9_0
    *_, ranks = compiled
    for row in ranks:
        assert row["spills"] == row["stack"] == 0, row
        assert row["shared"] <= one
        assert row["registers"] * 8 * 32 <= 65536
        assert (row["wgmma"] > 0) == (row["dtype"] == "bfloat16")


def test_an_old_triton_gets_a_fence_before_every_product(
    compiled: list[list[dict[str, Any]]],
) -> None:
    """The search for the maxima has one product, and either phase two."""
    (without, *_), (with_one, *_) = compiled[2]
    assert without == 0
    assert with_one >= 5


def test_a_block_is_waited_for_while_the_next_one_is_under_way(
    compiled: list[list[dict[str, Any]]],
) -> None:
    """Three stages: the loops of phase 1 leave one group of copies pending."""
    (*_, waits), _ = compiled[2]
    assert sum(pending >= 1 for pending in waits) >= 2


def test_only_the_form_for_debugging_gives_up_at_a_barrier(
    compiled: list[list[dict[str, Any]]],
) -> None:
    """A counter that nobody may wait at any more is exchanged for another number."""
    (_, without, _), (_, with_polls, _) = compiled[2]
    assert without == 0
    assert with_polls >= 3


def test_only_old_versions_and_new_devices_need_the_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    from dwl_kernels.backends.triton import specialize

    for version, needed in (
        ((3, 6, 0), True),
        ((3, 7, 0), True),
        ((3, 7, 1), False),
        ((4,), False),
    ):
        monkeypatch.setattr(specialize, "installed", lambda version=version: version)
        assert specialize.fenced(9) == specialize.fenced(10) == needed
        assert not specialize.fenced(8)
        assert not specialize.fenced(12)


def test_an_old_triton_pipelines_no_fence_on_10_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops with an error of its compiler."""
    from benchmarks.machine_code.triton_shared import example
    from dwl_kernels.backends.triton import specialize

    problem, _ = example("sampled", 128, torch.bfloat16, False)
    tiles = specialize.Tiles(64, 128, 64, 128, 3, 3, 4, 2)

    def stages(capability: int) -> tuple[int, int]:
        form = specialize.form_of(problem, specialize.inputs_of(problem, None), tiles, capability)
        return form.STAGES_1.value, form.STAGES_2.value

    assert stages(10) == (3, 3)
    monkeypatch.setattr(specialize, "installed", lambda: (3, 6, 0))
    assert stages(10) == (1, 1)
    assert stages(9) == (3, 3)


def test_what_is_kept_serves_the_same_sources_and_compiler_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kept, "ROOT", tmp_path)
    monkeypatch.setattr(kept, "KEPT", tmp_path / "kept")
    source = tmp_path / "kernel.py"
    source.write_text("1")
    runs = iter(range(9))

    def found(compiler: str = "one") -> int:
        number: int = kept.found("name", ["*.py"], compiler, lambda: next(runs))
        return number

    assert found() == 0
    assert found() == 1  # nothing is kept unless that is asked for
    monkeypatch.setenv("DWL_KERNELS_KEEP", "1")
    assert found() == found() == 2
    assert found("another") == 3
    assert found() == 4
    source.write_text("2")
    assert found() == 5
    monkeypatch.delenv("DWL_KERNELS_KEEP")
    assert found() == 5
    source.write_text("3")
    assert found() == 6
    (tmp_path / "kept" / "name.json").write_text("{")
    assert found() == 7


ROW = {
    "capability": 90,
    "problem": "sampled, plain",
    "D": 256,
    "dtype": "bfloat16",
    "tiles": {"BLOCK_M1": 64, "BLOCK_N2": 64},
    "loops": [{"per_element": 6.0}, {"per_element": 8.0}, {"per_element": 7.5}],
}


def test_prediction_is_the_largest_resource_and_a_quarter_of_the_others() -> None:
    clocks = arithmetic.clocks(ROW)
    assert clocks == {
        "tensor": 8 * 256 / 4270,
        "exponentials": 2 / 16,
        "issue": (8.0 + 7.5) / 128,  # the search for the maxima is rarely run
        "L2": 2 * 256 * (1 / 64 + 1 / 64) / 28,
    }
    *others, largest = sorted(clocks.values())
    expected = (largest + sum(others) / 4) * 8192**2 / (132 * 1.755e9) * 1e6
    assert arithmetic.predicted_us(ROW, clocks) == round(expected)
    assert arithmetic.predicted_us({**ROW, "capability": 100}, clocks) is None


def test_float16_runs_the_search_for_the_maxima() -> None:
    clocks = arithmetic.clocks({**ROW, "dtype": "float16"})
    assert clocks["issue"] == (6.0 + 8.0 + 7.5) / 128
    assert clocks["tensor"] == 10 * 256 / 4270
