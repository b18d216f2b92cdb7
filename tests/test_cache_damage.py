"""Compiled libraries that are damaged, of several compilers, or made by many processes at once."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cache_compiler import Compiler, without_compiler

from dwl_kernels.backends import cache as _cache
from dwl_kernels.backends.cache import BuildError


def test_full_disk_is_reported_and_leaves_nothing(cache: Path) -> None:
    def compile_to(work: Path) -> Path:
        (work / "library.so").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(BuildError, match=r"No space left on device.*set DWL_KERNELS_CACHE"):
        _cache.cached("cpu-key", ".so", lambda: "gcc", compile_to, "a kernel")
    assert [path.name for path in cache.iterdir()] == ["cpu-key-gcc.lock"]


# Whole files only ---------------------------------------------------------------------------------

DAMAGES = {
    "emptied": lambda content: b"",
    "cut short": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "zeroed": lambda content: bytes(len(content)),
    "a bit flipped": lambda content: bytes([content[0] ^ 1]) + content[1:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_library_is_compiled_anew_once(
    cache: Path, damage: Callable[[bytes], bytes]
) -> None:
    library = Compiler().get()
    library.write_bytes(damage(library.read_bytes()))
    compiler = Compiler()
    assert compiler.get() == library
    assert library.read_bytes() == b"a library"
    assert compiler.get() == library
    assert compiler.calls == 1


def test_damaged_library_is_replaced_by_one_that_comes_out_different(cache: Path) -> None:
    damaged = Compiler().get()
    damaged.write_bytes(b"cut")
    library = Compiler(content=b"the same, with another time stamp").get()
    assert [*cache.glob("*.so")] == [library]
    assert library != damaged


def test_damaged_library_is_named_where_there_is_no_compiler(cache: Path) -> None:
    library = Compiler().get()
    library.write_bytes(b"cut")
    with pytest.raises(BuildError, match=rf"{library.name} is damaged.*no compiler found"):
        without_compiler()


# Compilers ----------------------------------------------------------------------------------------


def test_each_compiler_has_a_library_of_its_own(cache: Path) -> None:
    gcc, clang = Compiler("gcc", b"by gcc"), Compiler("clang", b"by clang")
    first, second = gcc.get(), clang.get()
    assert first != second
    assert (gcc.get(), clang.get()) == (first, second)
    assert (gcc.calls, clang.calls) == (1, 1)


def test_without_a_compiler_the_newest_library_that_is_whole_serves(cache: Path) -> None:
    gcc, clang = Compiler("gcc", b"by gcc").get(), Compiler("clang", b"by clang").get()
    for newer, older in ((gcc, clang), (clang, gcc)):
        os.utime(older, (1, 1))
        os.utime(newer, (2, 2))
        assert without_compiler() == newer
    clang.write_bytes(b"cut")
    assert without_compiler() == gcc


def test_without_a_compiler_and_a_library_the_reason_is_that_of_the_compiler(cache: Path) -> None:
    with pytest.raises(BuildError, match=r"^no compiler found$"):
        without_compiler()
    assert not cache.exists()


# Processes ----------------------------------------------------------------------------------------

# Loads the module alone, because the package takes seconds to import. What it compiles takes a
# while, and says when it starts.
PROGRAM = """
import importlib.util, sys, time
from pathlib import Path

spec = importlib.util.spec_from_file_location("_cache", sys.argv[1])
_cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_cache)
_cache._PATIENCE = 0.1

def compile_to(work):
    print("compiling", flush=True)
    with open(work / "library.so", "wb") as file:
        for _ in range(20):
            file.write(b"part" * 1000)
            file.flush()
            time.sleep(float(sys.argv[2]) / 20)
    return work / "library.so"

print(_cache.cached("cpu-key", ".so", lambda: "gcc", compile_to, "a kernel"))
"""
WHOLE = b"part" * 20_000


def start(seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, _cache.__file__, str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_eight_processes_of_which_some_are_killed_load_whole_files_only(cache: Path) -> None:
    processes = [start(0.4) for _ in range(8)]
    killed = set()
    deadline = time.monotonic() + 60
    # Kill whoever compiles, in the middle, three times.
    while len(killed) < 3 and time.monotonic() < deadline:
        for work in cache.glob("*.tmp/library.so"):
            for process in processes:
                if process not in killed and _writes(process, work):
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    killed.add(process)
        time.sleep(0.005)
    assert len(killed) == 3
    results = [process.communicate(timeout=60) for process in processes]
    said = [out.splitlines() for out, _ in results]
    lived = [words for words, p in zip(said, processes, strict=True) if p.returncode == 0]
    assert len(lived) == 5, results
    libraries = {words[-1] for words in lived}
    assert len(libraries) == 1
    assert Path(libraries.pop()).read_bytes() == WHOLE
    assert sum(words.count("compiling") for words in said) == 4  # the killed, and one after them
    assert [*cache.glob("*.tmp")] == []


def _writes(process: subprocess.Popen[str], file: Path) -> bool:
    folder = Path(f"/proc/{process.pid}/fd")
    if not folder.parent.exists():
        pytest.skip("needs /proc to find who writes")
    try:
        return any(os.readlink(link) == str(file) for link in folder.iterdir())
    except OSError:
        return False


def test_eight_processes_mend_one_damaged_library_once(cache: Path) -> None:
    process = start(0)
    process.communicate(timeout=60)
    (library,) = cache.glob("*.so")
    library.write_bytes(WHOLE[:100])
    processes = [start(0.1) for _ in range(8)]
    said = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert {words[-1] for words in said} == {str(library)}
    assert sum(words.count("compiling") for words in said) == 1
    assert library.read_bytes() == WHOLE


def test_process_that_waits_for_another_says_so_in_one_line(cache: Path) -> None:
    first = start(1.0)
    assert first.stdout is not None
    assert first.stdout.readline() == "compiling\n"
    second = start(1.0)
    out, err = second.communicate(timeout=60)
    assert err == "dwl_kernels: waiting for another process that compiles a kernel ...\n"
    assert "compiling" not in out
    assert first.communicate(timeout=60)[1] == ""
