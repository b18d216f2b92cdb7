"""The machine code of the Triton kernel, compiled without a GPU."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks import aot, arithmetic

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "aot"
SHARED = {80: (167936, 166912), 90: (233472, 232448), 100: (233472, 232448)}


def check(row: dict) -> None:
    """Programs fit side by side; nothing spills where the time is spent."""
    tiles, capability = row["tiles"], row["capability"]
    every, one = SHARED[capability]
    assert row["shared"] <= one
    assert tiles["programs"] * (row["shared"] + 1024) <= every
    registers = -(-row["registers"] // 8) * 8 * tiles["warps"] * 32
    assert tiles["programs"] * registers <= 65536
    assert all(loop["spills"] == 0 for loop in row["loops"])
    if capability == 90 and tiles["BM"] >= 64:  # fewer rows go to mma.sync
        assert row["wgmma"] > 0


def compile_few(module: str, out: Path, *options: str) -> None:
    """In a process of its own: this one may have Triton's interpreter on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, str(out), "--quick", *options]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)


def test_kernel_compiles_for_hopper_without_spills_to_the_committed_counts(tmp_path: Path) -> None:
    """A change that makes a kernel heavier, or lighter, shows in the committed table."""
    compile_few("benchmarks.aot", tmp_path, "--compare")
    for row in json.loads((tmp_path / "aot.json").read_text()):
        check(row)
        assert row["loops"], "no main loop found"


def check_gathers(row: dict) -> None:
    """Nothing spills where the time is spent, and embeddings are read 16 bytes at a time."""
    assert row["loops"]
    assert all(loop["spills"] == 0 for loop in row["loops"])
    assert max(loop["loads_128"] for loop in row["loops"]) >= 4  # of Triton 3.6; 8 of later ones


def test_kernels_of_candidates_by_row_gather_16_bytes_at_a_time(tmp_path: Path) -> None:
    compile_few("benchmarks.aot_indexed", tmp_path)
    for row in json.loads((tmp_path / "aot-indexed.json").read_text()):
        check_gathers(row)


def test_committed_table_of_gathers_has_every_capability() -> None:
    rows = json.loads((RESULTS / "aot-indexed.json").read_text())
    assert {r["capability"] for r in rows} == {80, 90, 100}
    for row in rows:
        check_gathers(row)
        assert row["stack"] == 0


@pytest.mark.parametrize("table", ["aot-3.9.json", "aot-3.7.json", "aot-3.6.json"])
def test_committed_table_fits_every_capability(table: str) -> None:
    rows = json.loads((RESULTS / table).read_text())
    plain = {(r["capability"], r["D"]) for r in rows if r["problem"].endswith("plain")}
    assert plain >= {(c, d) for c in (80, 90, 100) for d in (16, 32, 64, 128, 256)}
    for row in rows:
        check(row)


@pytest.mark.parametrize("table", ["aot-3.9.json", "aot-3.7.json", "aot-3.6.json"])
def test_committed_table_has_every_form_on_every_capability(table: str) -> None:
    rows = json.loads((RESULTS / table).read_text())
    for kind in ("in-batch", "full", "dual"):
        forms = {(r["capability"], r["D"]) for r in rows if r["problem"] == f"{kind}, everything"}
        assert forms >= {(c, d) for c in (80, 90, 100) for d in (64, 128, 256)}


def test_kernel_that_became_heavier_is_named() -> None:
    before = json.loads((RESULTS / "aot-3.9.json").read_text())
    table = copy.deepcopy(before)
    assert aot.changes(table, before) == []
    table[3]["loops"][0]["per_element"] += 0.25
    table[5]["registers"] += 8
    heavier, registers = aot.changes(table, before)
    assert f"{table[3]['D']}, 'bfloat16'): loops was" in heavier
    assert "registers was" in registers


def test_prediction_is_the_arithmetic_of_the_design() -> None:
    """At D = 256 tensor cores bind, or L2; the others add a quarter of their time."""
    rows = json.loads((RESULTS / "aot-3.9.json").read_text())
    found = [r for r in rows if (r["capability"], r["D"], r["dtype"]) == (90, 256, "bfloat16")]
    row = next(r for r in found if r["problem"] == "sampled, plain")
    clocks = arithmetic.clocks(row)
    assert clocks["tensor"] == 8 * 256 / 4270
    assert clocks["exponentials"] == 2 / 16
    alone = 8 * 8192 * 8192 * 256 / (4270 * 132 * 1.755e9) * 1e6
    assert alone < row["predicted_us"] < 2 * alone
    assert all((r["predicted_us"] is None) == (r["capability"] != 90) for r in rows)
