"""The compiled kernel's cache: compiled once, shared by processes, never half-written.

The sources here are a few lines of C++ without PyTorch's headers, so that a build takes a second.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from dwl_kernels.backends import compilers
from dwl_kernels.backends.cache import BuildError, digest
from dwl_kernels.backends.cpu import build as cpu_build

SOURCE = 'extern "C" int answer() { return helper(); }\n'
HELPER = "int helper() { return 42; }\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # A folder with a space, as home directories have.
    folder = tmp_path / "the cache"
    monkeypatch.setenv("DWL_KERNELS_CACHE", str(folder))
    return folder


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    """The layout of csrc/: bindings that include a header and call a file below cpu/."""
    folder = tmp_path / "the sources"
    (folder / "cpu").mkdir(parents=True)
    (folder / "helper.h").write_text("int helper();\n")
    (folder / "bindings.cpp").write_text('#include "helper.h"\n' + SOURCE)
    (folder / "cpu" / "helper.cpp").write_text('#include "helper.h"\n' + HELPER)
    return folder


def answer(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


@pytest.fixture
def compiler_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CXX is a script that writes down each call, and then calls the real compiler."""
    real = " ".join(compilers.compiler())
    calls = tmp_path / "calls"
    script = tmp_path / "counting-c++"
    script.write_text(f'#!/bin/sh\necho "$*" >> "{calls}"\nexec {real} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return calls


def compilations(calls: Path) -> int:
    return sum(" -c " in line for line in calls.read_text().splitlines())


def test_sources_and_headers_compile_into_one_library(cache: Path, csrc: Path) -> None:
    library = cpu_build.build(csrc=csrc)
    assert answer(library) == 42
    assert library.parent == cache


def test_compiling_is_said_in_one_line(
    cache: Path, csrc: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cpu_build.build(csrc=csrc)
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == ["dwl_kernels: compiling the CPU kernel (10 to 30 s, once) ..."]


def test_second_build_is_silent_and_compiles_nothing(
    cache: Path,
    csrc: Path,
    compiler_that_counts: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    first = cpu_build.build(csrc=csrc)
    capfd.readouterr()
    assert cpu_build.build(csrc=csrc) == first
    assert compilations(compiler_that_counts) == 2  # the two files, once each
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("file", ["bindings.cpp", "cpu/helper.cpp", "helper.h"])
def test_changed_file_gets_a_library_of_its_own(cache: Path, csrc: Path, file: str) -> None:
    first = cpu_build.build(csrc=csrc)
    with (csrc / file).open("a") as stream:
        stream.write("// changed\n")
    second = cpu_build.build(csrc=csrc)
    assert second != first
    assert answer(first) == answer(second) == 42


def test_lower_cpu_capability_gets_a_library_of_its_own(
    cache: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = cpu_build.build(csrc=csrc)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    assert cpu_build.build(csrc=csrc) != here


def test_library_of_another_pytorch_machine_or_layout_is_another(
    csrc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its key says so; nothing is compiled for it."""
    files = sorted(csrc.rglob("*.cpp"))
    keys = [cpu_build._key(csrc, files)]
    for name, value in (("torch.__version__", "9.9.9"), ("platform.machine", lambda: "another")):
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            keys.append(cpu_build._key(csrc, files))
    files[0] = files[0].rename(files[0].with_name("moved.cpp"))  # of the same content
    keys.append(cpu_build._key(csrc, files))
    assert len({*keys}) == 4


def test_parts_that_only_join_to_the_same_text_have_digests_of_their_own() -> None:
    parts = [("ab", "c"), ("a", "bc"), ("abc",), ("c", "ab"), ("ab", "c", "")]
    assert len({digest(*some) for some in parts}) == len(parts)
    assert digest("ab", b"c") == digest(b"ab", "c")


def test_processes_that_start_together_compile_once(
    cache: Path, csrc: Path, compiler_that_counts: Path
) -> None:
    # Each process waits for the other before it builds, so that both find an empty cache.
    program = textwrap.dedent(
        """
        import sys, pathlib
        from dwl_kernels.backends.cpu import build as cpu_build
        print("ready", flush=True)
        sys.stdin.readline()
        print(cpu_build.build(csrc=pathlib.Path(sys.argv[1])))
        """
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(csrc)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    paths = {out.strip() for out, _ in results}
    assert len(paths) == 1
    assert answer(Path(paths.pop())) == 42
    assert compilations(compiler_that_counts) == 2
    assert sum("compiling" in err for _, err in results) == 1


def test_killed_build_does_not_block_the_next(
    cache: Path, csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first build runs a compiler that never ends, and is killed while it holds the lock.
    real, started, mended = (
        " ".join(compilers.compiler()),
        tmp_path / "started",
        tmp_path / "mended",
    )
    hang = f'test -e "{mended}" || {{ echo $$ >> "{started}"; exec sleep 60; }}'
    script = tmp_path / "c++"
    script.write_text(f'#!/bin/sh\ncase " $* " in *" -c "*) {hang};; esac\nexec {real} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib; from dwl_kernels.backends.cpu import build as cpu_build;"
            "cpu_build.build(csrc=pathlib.Path(sys.argv[1]))",
            str(csrc),
        ],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, 9)
    process.wait()
    left = list(cache.glob("*.tmp"))
    assert len(left) == 1  # the kill came in the middle
    # The same cache entry again, now that the compiler works.
    mended.touch()
    assert answer(cpu_build.build(csrc=csrc)) == 42
    assert list(cache.glob("*.tmp")) == []
    for compiler in started.read_text().split():
        os.kill(int(compiler), signal.SIGKILL)


def test_failed_build_names_the_error_and_leaves_nothing(cache: Path, csrc: Path) -> None:
    (csrc / "cpu" / "helper.cpp").write_text("int helper() { return forty_two; }\n")
    with pytest.raises(BuildError, match="forty_two") as caught:
        cpu_build.build(csrc=csrc)
    assert "helper.cpp:1" in str(caught.value)
    assert "backend='chunked'" in str(caught.value)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_failed_build_can_be_mended(cache: Path, csrc: Path) -> None:
    good = (csrc / "cpu" / "helper.cpp").read_text()
    (csrc / "cpu" / "helper.cpp").write_text("no C++\n")
    with pytest.raises(BuildError):
        cpu_build.build(csrc=csrc)
    (csrc / "cpu" / "helper.cpp").write_text(good)
    assert answer(cpu_build.build(csrc=csrc)) == 42


def test_broken_compiler_is_reported_with_its_own_words(
    cache: Path, csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "c++"
    script.write_text("#!/bin/sh\necho 'licence expired' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(BuildError, match="licence expired"):
        cpu_build.build(csrc=csrc)


def test_missing_compiler_says_what_to_install(
    cache: Path, csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler found.*apt-get install g\+\+"):
        cpu_build.build(csrc=csrc)


def test_compiler_named_in_cxx_but_missing_is_named(
    cache: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -flag")
    with pytest.raises(BuildError, match="CXX=no-such-compiler"):
        cpu_build.build(csrc=csrc)


def test_library_built_ahead_needs_no_compiler(
    cache: Path, csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = cpu_build.build(csrc=csrc)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cpu_build.build(csrc=csrc) == library


def test_cache_that_cannot_be_written_names_the_variable(
    csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a file"
    file.touch()
    monkeypatch.setenv("DWL_KERNELS_CACHE", str(file))
    with pytest.raises(BuildError, match="set DWL_KERNELS_CACHE"):
        cpu_build.build(csrc=csrc)


def test_library_that_does_not_load_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    monkeypatch.setattr(cpu_build, "_loaded", False)
    monkeypatch.setattr(cpu_build, "build", lambda: broken)
    with pytest.raises(OSError, match="broken") as reason:
        ctypes.CDLL(str(broken))
    with pytest.raises(BuildError, match=r"broken\.so does not load.*delete it") as caught:
        cpu_build.load_cpu()
    assert str(reason.value) in str(caught.value)


def test_damaged_library_is_compiled_anew_before_it_is_loaded(
    cache: Path, csrc: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    library = cpu_build.build(csrc=csrc)
    os.truncate(library, 5000)  # to load it ends the process
    capfd.readouterr()
    assert answer(cpu_build.build(csrc=csrc)) == 42
    said = capfd.readouterr().err.splitlines()
    assert said == ["dwl_kernels: compiling the CPU kernel (10 to 30 s, once) ..."]


def test_compiler_with_other_flags_gets_a_library_of_its_own(
    cache: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cpu_build.build(csrc=csrc)
    monkeypatch.setenv("CXX", f"{' '.join(compilers.compiler())} -O1")
    assert cpu_build.build(csrc=csrc) != first
    assert first.exists()


def test_compiler_that_was_updated_is_another(tmp_path: Path) -> None:
    script = tmp_path / "c++"
    identities = set()
    for version in ("12.2.0", "12.3.0"):
        script.write_text(f"#!/bin/sh\ncat >/dev/null\necho '{version}'\n")
        script.chmod(0o755)
        identities.add(compilers._identity.__wrapped__((str(script),)))
    assert len(identities) == 2


def test_compiler_is_asked_for_its_version_and_that_of_its_library() -> None:
    command = [*compilers.compiler(), "-std=c++20", "-E", "-x", "c++", "-"]
    said = compilers.run_compiler(command, False, text=compilers._PROBE).splitlines()[-1]
    assert "__VERSION__" not in said
    assert ("__GLIBCXX__" in said) != ("_LIBCPP_VERSION" in said)  # one of them is in use


def test_compiler_that_finds_no_headers_is_as_good_as_none(
    cache: Path, csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = cpu_build.build(csrc=csrc)
    script = tmp_path / "c++"
    script.write_text("#!/bin/sh\necho 'version: No such file' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert cpu_build.build(csrc=csrc) == library
    library.unlink()
    with pytest.raises(BuildError, match="version: No such file"):
        cpu_build.build(csrc=csrc)


def test_sources_of_the_package_are_found() -> None:
    assert (compilers.source_dir() / "bindings.cpp").is_file()
