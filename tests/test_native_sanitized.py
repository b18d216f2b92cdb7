"""The CPU kernels under the address and undefined-behaviour sanitizers, on random problems.

`sanitize/cpu_kernels.cpp` draws the problems. It needs no PyTorch, and brings products of its own.
"""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dwl_kernels.backends import compilers
from dwl_kernels.backends.cache import BuildError

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c++20", "-Og", "-fopenmp", *SANITIZERS]
DRIVER = Path(__file__).parent / "sanitize" / "cpu_kernels.cpp"


@pytest.fixture
def compiler(tmp_path: Path) -> list[str]:
    """A compiler whose sanitizers link and run here."""
    try:
        command = compilers.compiler()
    except BuildError as error:
        pytest.skip(str(error))
    source, program = tmp_path / "nothing.cpp", tmp_path / "nothing"
    source.write_text("int main() {}\n")
    done = run([*command, *FLAGS, str(source), "-o", str(program)])
    if done.returncode == 0:
        done = run([str(program)])
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:]
        pytest.skip(f"{command[0]} has no sanitizers that work here: {' '.join(said)}")
    return command


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    # A container may forbid what the search for leaks needs.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **options})


def test_kernels_stay_within_memory_and_the_language(compiler: list[str], tmp_path: Path) -> None:
    csrc = compilers.source_dir()
    sources = [DRIVER, *sorted(csrc.glob("cpu/*.cpp"))]
    objects = [tmp_path / f"{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        command = [*compiler, *FLAGS, f"-I{csrc}", "-c", str(source), "-o", str(target)]
        assert run(command).returncode == 0, source

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    program = tmp_path / "cpu_kernels"
    link = run([*compiler, *FLAGS, *map(str, objects), "-o", str(program)])
    assert link.returncode == 0, link.stderr
    done = run([str(program), "200"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "200 problems of each kind\n"
