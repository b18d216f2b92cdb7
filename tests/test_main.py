"""`python -m dwl_kernels` tells what works here, and builds ahead."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import dwl_kernels
from dwl_kernels import backends
from dwl_kernels.__main__ import auto_takes, main, print_rows
from dwl_kernels.backends import cache as _cache
from dwl_kernels.backends import compilers
from dwl_kernels.backends.cpu import build as cpu_build
from dwl_kernels.backends.cuda import build as cuda_build
from dwl_kernels.backends.cuda.variants import Variant


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
    monkeypatch.setattr(
        backends, "unavailable_reason", lambda name, device: reason if name == "cpu" else None
    )
    assert main([]) == 0
    table = capsys.readouterr().out.split("\n\n")[-1]
    assert "cpu       no: no compiler\n          install one\n" in table


def test_missing_compiler_is_a_line_and_no_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main([]) == 0
    assert lines_by_name(capsys.readouterr().out)["compiler"] == "none found"


def test_lines_fit_60_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "the reason " * 20
    monkeypatch.setattr(
        backends, "unavailable_reason", lambda name, _: reason if name == "cpu" else None
    )
    main([])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if not line.startswith("cache")]
    assert max(map(len, lines)) <= 60
    assert sum(line.startswith(" " * 10) for line in lines) >= 4
    assert f"cpu no: {reason}" in " ".join(out.split()) + " "


def test_words_that_do_not_fit_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/home/" + "long-name/" * 6
    print_rows([("cache", f"in {path} here")])
    assert capsys.readouterr().out.splitlines() == [
        "cache     in",
        f"          {path}",
        "          here",
    ]


def choice(capsys: pytest.CaptureFixture[str]) -> str:
    """What the report says about `auto`."""
    assert main([]) == 0
    return " ".join(capsys.readouterr().out.split("\n\n")[2].split())


def test_what_auto_takes_is_said_with_the_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DWL_KERNELS_BACKEND", raising=False)
    works = {"cpu", "chunked"}
    monkeypatch.setattr(
        backends, "unavailable_reason", lambda name, _: None if name in works else "broken"
    )
    assert choice(capsys) == "auto on cpu: cpu, the fastest here"
    works.remove("cpu")
    assert choice(capsys) == "auto on cpu: chunked, because cpu cannot run"
    monkeypatch.setenv("DWL_KERNELS_BACKEND", "eager")
    assert choice(capsys) == "auto on cpu: eager, as DWL_KERNELS_BACKEND says, but broken"
    works.add("eager")
    assert choice(capsys) == "auto on cpu: eager, as DWL_KERNELS_BACKEND says"


def test_what_auto_takes_is_said_for_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    broken = {("triton", "cuda"), ("cuda", "cuda")}
    monkeypatch.setattr(
        backends, "unavailable_reason", lambda *one: "broken" if one in broken else None
    )
    assert list(auto_takes("auto")) == [
        "on cpu: cpu, the fastest here",
        "on cuda:0: chunked, because triton and cuda cannot run",
        "on cuda:1: chunked, because triton and cuda cannot run",
    ]


@pytest.mark.parametrize("arguments", [[], ["build"]])
def test_unknown_backend_in_the_environment_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("DWL_KERNELS_BACKEND", "gpu")
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("dwl_kernels: backend is 'gpu', as DWL_KERNELS_BACKEND says; wanted")


def test_user_without_a_home_gets_a_line_and_no_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise _cache.BuildError("there is no home folder")

    monkeypatch.setattr(_cache, "cache_dir", no_home)
    assert main([]) == 0
    assert lines_by_name(capsys.readouterr().out)["cache"] == "none: there is no home folder"


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"dwl_kernels {dwl_kernels.__version__}\n"


def test_ctrl_c_ends_a_build_and_its_compilers_in_one_line(tmp_path: Path) -> None:
    started, real = tmp_path / "started", " ".join(compilers.compiler())
    script = tmp_path / "c++"
    script.write_text(
        f'#!/bin/sh\ncase " $* " in *" -c "*) echo $$ >> "{started}"; exec sleep 100;; esac\n'
        f'exec {real} "$@"\n'
    )
    script.chmod(0o755)
    # A job of a shell in the background ignores it, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "dwl_kernels", "build"],
        env=os.environ | {"CXX": str(script), "DWL_KERNELS_CACHE": str(tmp_path / "cache")},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines() == [
        "dwl_kernels: compiling the CPU kernel (10 to 30 s, once) ...",
        "interrupted",
    ]
    for compiler in started.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(compiler), 0)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


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
    monkeypatch.setattr(cpu_build, "build", lambda verbose: library)
    assert main(["build"]) == 0
    assert capsys.readouterr().out.strip() == str(library)


def test_build_compiles_the_cuda_kernels_of_a_capability(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cpu_build, "build", lambda verbose: tmp_path / "cpu.so")
    built = []

    def build(variant: Variant, capability: tuple[int, int], verbose: bool) -> Path:
        built.append((variant.math.name, variant.block_d, capability))
        return tmp_path / "cuda.so"

    monkeypatch.setattr(cuda_build, "build", build)
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


def test_ctrl_c_ends_a_compiler_that_was_just_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    submit = ThreadPoolExecutor.submit

    def interrupted(pool: ThreadPoolExecutor, *call: Any) -> Any:
        submit(pool, *call)
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        compilers.in_parallel(lambda name: compilers.run_compiler([name, "100"], False), ["sleep"])
    assert time.monotonic() - start < 60
    assert compilers.run_compiler(["echo", "next"], False) == "next\n"
