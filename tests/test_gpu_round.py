"""`benchmarks/gpu.sh` on a CPU: it outlives versions that crash, hang or are wrong, and says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import tiles
from benchmarks.record import ROOT
from benchmarks.speed.shapes import GPU

SCRIPT = ROOT / "benchmarks" / "gpu.sh"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs bash and timeout")


def round_of(out: Path, *steps: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "DRY": "1", "PYTHON": sys.executable, **environment}
    command = ["bash", str(SCRIPT), str(out), *steps]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def test_round_goes_on_after_a_crash_a_hang_and_nan_and_reports_them(tmp_path: Path) -> None:
    done = round_of(
        tmp_path,
        "1",
        SHAPES="two-tower sequence wide small",
        FAULTS="two-tower=crash sequence=hang wide=nan",
        VERSIONS="eager",
        LIMIT_sequence="7",
    )
    assert done.returncode == 1
    lines = [json.loads(line) for line in (tmp_path / "1.jsonl").read_text().splitlines()]
    assert all("gpu" in line for line in lines)
    how = {line["part"]: line["how"] for line in lines if "part" in line}
    assert how == {
        "two-tower": "crashed with status 134",
        "sequence": "stopped at its limit of 7 s",
        "wide": "failed",
        "small": "ok",
    }
    before_the_crash = lines[: next(k for k, one in enumerate(lines) if "part" in one)]
    assert before_the_crash[-1]["version"] == "planted crash"
    assert any(line.get("version") == "eager" and "loss" in line for line in before_the_crash)
    figures = [line["figures"] for line in lines if "figures" in line]
    assert [one["shape"]["name"] for one in figures] == ["wide", "small"]
    assert "wrong loss" in figures[0]["refused"]["planted nan"]
    assert [row["version"] for row in figures[1]["versions"]] == ["bound", "eager"]
    assert "1: two-tower: crashed with status 134" in done.stdout
    assert "refused: planted nan" in done.stdout


def test_tiles_that_crash_or_hang_leave_the_others_their_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = tiles.candidates(GPU[1])[:4]
    replies = iter([SimpleNamespace(returncode=-6, stderr="aborted"), None, 0.25, 0.125])

    real = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        if command[0] == "git":
            return real(command, **options)
        reply = next(replies)
        if reply is None:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        if isinstance(reply, float):
            return SimpleNamespace(returncode=0, stdout=f"some words\n{reply}\n")
        return reply

    monkeypatch.setattr(tiles, "candidates", lambda shape: tried)
    monkeypatch.setattr(tiles.os, "cpu_count", lambda: 1)  # one at a time
    monkeypatch.setattr(tiles.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tiles.torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(tiles.subprocess, "run", run)
    monkeypatch.setattr(tiles, "FENCES", (None,))
    assert tiles.main(tmp_path / "2.jsonl", ["two-tower"]) == 1
    lines = [json.loads(line) for line in (tmp_path / "2.jsonl").read_text().splitlines()]
    assert {line["gpu"] for line in lines} == {"a GPU"}
    assert [line.get("ms") for line in lines] == [None, None, 0.25, 0.125]
    assert "ended with -6: aborted" in lines[0]["failed"]
    assert "ended after" in lines[1]["failed"]


def test_unknown_step_is_a_usage_error(tmp_path: Path) -> None:
    done = round_of(tmp_path, "7")
    assert done.returncode == 2
    assert "wanted some of 1 2 3 4 5" in done.stderr
