"""The machine code of the Triton kernel, compiled without a GPU."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import aot, aot_indexed, aot_table, arithmetic
from dwl_kernels.backends import triton_call as host
from dwl_kernels.backends import triton_tiles

ROOT = Path(__file__).parent.parent
TABLES = ["aot-3.9", "aot-3.7", "aot-3.6"]
INDEXED = ["aot-indexed-3.9", "aot-indexed-3.7", "aot-indexed-3.6"]
SHARED = {
    80: (167936, 166912),
    90: (233472, 232448),
    100: (233472, 232448),
    120: (None, 101376),  # has the tiles of 8.0, and fewer programs where it has less room
}


def committed(table: str) -> dict:
    return json.loads((aot_table.RESULTS / f"{table}.json").read_text())


@pytest.mark.parametrize("table", [*TABLES, *INDEXED])
def test_committed_table_is_of_these_sources(monkeypatch: pytest.MonkeyPatch, table: str) -> None:
    """Its stamp is, whatever Triton is installed; what the stamp stands for is compiled below."""
    module = aot_indexed if table in INDEXED else aot
    found = committed(table)
    version = found["compiler"].removeprefix("Triton ")
    major, minor = map(int, version.split(".")[:2])
    monkeypatch.setattr(triton_tiles, "installed", lambda: (major, minor))
    monkeypatch.setattr(host, "interpreting", lambda: False)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(module.TABLE.precision)
    try:
        stamp = module.stamp_of(module.rows())
    finally:
        torch.set_float32_matmul_precision(precision)
    assert found["source"] == stamp, (
        f"{table} was compiled from other sources; with triton=={version}, run"
        f" `python -m {module.__name__} benchmarks/results/aot`, or `make tables` for all"
    )
    assert len(found["kernels"]) == len(module.rows())


def check(row: dict) -> None:
    """Programs fit side by side; nothing spills where the time is spent."""
    tiles, capability = row["tiles"], row["capability"]
    every, one = SHARED[capability]
    assert row["shared"] <= one
    assert every is None or tiles["programs"] * (row["shared"] + 1024) <= every
    registers = -(-row["registers"] // 8) * 8 * tiles["warps"] * 32
    assert tiles["programs"] * registers <= 65536
    assert all(loop["spills"] == 0 for loop in row["loops"])
    if capability == 90 and tiles["BM"] >= 64:  # fewer rows go to mma.sync
        assert row["wgmma"] > 0


def compile_few(module: str, out: Path) -> list[dict]:
    """In a process of its own: this one may have Triton's interpreter on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, str(out), "--quick", "--compare"]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    (table,) = out.glob("*.json")
    return json.loads(table.read_text())["kernels"]


def test_kernel_compiles_without_spills_to_the_committed_counts(tmp_path: Path) -> None:
    """A change that makes a kernel heavier, or lighter, shows in the committed table."""
    for row in compile_few("benchmarks.aot", tmp_path):
        check(row)
        assert row["loops"], "no main loop found"


def test_sample_that_is_compiled_changes_with_the_sources() -> None:
    table = aot.TABLE
    samples = {}
    for stamp in ("one", "one", "other"):
        changed = table._replace(stamp_of=lambda rows, stamp=stamp: stamp)
        sample = aot_table.quick_rows(changed)
        assert samples.setdefault(stamp, sample) == sample
        assert sample[: len(table.fixed)] == table.fixed
        assert set(sample) <= set(table.rows())
    assert samples["one"] != samples["other"]


def check_gathers(row: dict) -> None:
    """Nothing spills where the time is spent, and embeddings are read 16 bytes at a time."""
    assert row["loops"]
    assert all(loop["spills"] == 0 for loop in row["loops"])
    assert max(loop["loads_128"] for loop in row["loops"]) >= 4  # of Triton 3.6; 8 of later ones


def test_kernels_of_candidates_by_row_gather_16_bytes_at_a_time(tmp_path: Path) -> None:
    for row in compile_few("benchmarks.aot_indexed", tmp_path):
        check_gathers(row)


@pytest.mark.parametrize("table", INDEXED)
def test_committed_table_of_gathers_has_every_capability(table: str) -> None:
    rows = committed(table)["kernels"]
    assert {r["capability"] for r in rows} == {80, 90, 100}
    for row in rows:
        check_gathers(row)
        if table != "aot-indexed-3.6":
            one = (row["capability"], row["D"], row["dtype"]) == (80, 256, "float32")
            assert row["stack"] <= (8 if one and table == "aot-indexed-3.7" else 0)
        assert row["predicted_us"] == arithmetic.predicted_by_row_us(row)


@pytest.mark.parametrize("table", TABLES)
def test_committed_table_fits_every_capability(table: str) -> None:
    rows = committed(table)["kernels"]
    plain = {(r["capability"], r["D"]) for r in rows if r["problem"].endswith("plain")}
    assert plain >= {(c, d) for c in (80, 90, 100) for d in (16, 32, 64, 128, 256)}
    for row in rows:
        check(row)


@pytest.mark.parametrize("table", TABLES)
def test_committed_table_has_every_form_on_every_capability(table: str) -> None:
    rows = committed(table)["kernels"]
    for kind in ("in-batch", "full", "skip", "dual"):
        forms = {(r["capability"], r["D"]) for r in rows if r["problem"] == f"{kind}, everything"}
        assert forms >= {(c, d) for c in (80, 90, 100) for d in (64, 128, 256)}


def test_kernel_that_became_heavier_is_named() -> None:
    before = committed("aot-3.9")["kernels"]
    table = copy.deepcopy(before)
    assert aot_table.changes(table, before, aot.TABLE.key) == []
    table[3]["loops"][0]["per_element"] += 0.25
    table[5]["registers"] += 8
    heavier, registers = aot_table.changes(table, before, aot.TABLE.key)
    assert f"{table[3]['D']}, 'bfloat16'): loops was" in heavier
    assert "registers was" in registers


def test_prediction_is_the_arithmetic_of_the_design() -> None:
    """At D = 256 tensor cores bind, or L2; the others add a quarter of their time."""
    rows = committed("aot-3.9")["kernels"]
    found = [r for r in rows if (r["capability"], r["D"], r["dtype"]) == (90, 256, "bfloat16")]
    row = next(r for r in found if r["problem"] == "sampled, plain")
    clocks = arithmetic.clocks(row)
    assert clocks["tensor"] == 8 * 256 / 4270
    assert clocks["exponentials"] == 2 / 16
    alone = 8 * 8192 * 8192 * 256 / (4270 * 132 * 1.755e9) * 1e6
    assert alone < row["predicted_us"] < 2 * alone
    assert all((r["predicted_us"] is None) == (r["capability"] != 90) for r in rows)
