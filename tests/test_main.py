"""`python -m dwl_kernels` tells what works here, and builds ahead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dwl_kernels
from dwl_kernels import _build, _build_cuda, _cache, backends
from dwl_kernels.__main__ import main
from dwl_kernels.backends.cuda_tiles import Variant


def lines_by_name(text: str) -> dict[str, str]:
    rows = (line.partition(" ") for line in text.splitlines() if line[:1].strip())
    return {name: value.strip() for name, _, value in rows}


def test_versions_and_devices_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    rows = lines_by_name(capsys.readouterr().out)
    assert rows["dwl_kernels"] == dwl_kernels.__version__
    assert rows["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert rows["torch"] == torch.__version__
    assert rows["cache"] == str(_cache.cache_dir())
    assert rows["cpu"]  # the device, or the backend below it
    assert "triton" in rows
    assert "compiler" in rows
    assert "nvcc" in rows


def test_every_backend_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    table = capsys.readouterr().out.split("\n\n")[-1]
    rows = lines_by_name(table)
    assert list(rows) == list(backends.NAMES)
    assert rows["eager"].startswith("yes")
    assert rows["chunked"].startswith("yes")
    assert all(text.startswith(("yes", "no: ")) for text in rows.values())


def test_backend_that_cannot_run_gives_reason_and_mend(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "no compiler\ninstall one"
    monkeypatch.setattr(backends, "why_not", lambda name, device: reason if name == "cpu" else None)
    assert main([]) == 0
    table = capsys.readouterr().out.split("\n\n")[-1]
    assert "cpu       no: no compiler\n          install one\n" in table


def test_missing_compiler_is_a_line_and_no_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main([]) == 0
    assert lines_by_name(capsys.readouterr().out)["compiler"] == "none found"


def test_unknown_command_prints_usage_and_exits_with_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dwl_kernels", "bild"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "usage: python -m dwl_kernels" in done.stderr
    assert "bild" in done.stderr


def test_build_prints_where_the_library_lies(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "cpu.so"
    monkeypatch.setattr(_build, "build", lambda verbose: library)
    assert main(["build"]) == 0
    assert capsys.readouterr().out.strip() == str(library)


def test_build_compiles_the_cuda_kernels_of_a_capability(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_build, "build", lambda verbose: tmp_path / "cpu.so")
    built = []

    def build(variant: Variant, capability: tuple[int, int], verbose: bool) -> Path:
        built.append((variant.math.name, variant.block_d, capability))
        return tmp_path / "cuda.so"

    monkeypatch.setattr(_build_cuda, "build", build)
    assert main(["build", "--cuda", "9.0", "--dim", "64", "100"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 8
    assert ("BrainFloat", 128, (9, 0)) in built
    assert {name for name, *_ in built} == {"BrainFloat", "Half", "Float32", "Float64"}


def test_build_that_fails_exits_with_1_and_the_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DWL_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["build"]) == 1
    assert "no C++ compiler found (CXX=no-such-compiler)" in capsys.readouterr().err
