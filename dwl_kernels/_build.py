"""Compiles `csrc/` on first use, into a cache that all processes of a user share.

The compiler is called directly, one process per source file. `torch.utils.cpp_extension.load` does
not fit: its lock hangs for ever after a killed build, and its headers take 40 s instead of 10.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths, library_paths

# The vector units that PyTorch's own kernels would use here. They depend on the capability alone,
# so machines that share a home directory can share the cache, which `-march=native` would not
# allow. Compilers prefer 256 bits by default, which costs the exponentials a third of their speed.
_VECTOR_FLAGS = {
    "AVX512": "-mprefer-vector-width=512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma",
    "AVX2": "-mavx2 -mfma -mf16c",
}
_OPTIMISE = "-std=c++20 -O3 -fPIC -fno-math-errno -fno-trapping-math"
_COMPILERS = ("c++", "g++", "clang++")
MEND = "until then backend='chunked' computes the same"

_SHOWN_LINES = 40  # the first errors of a compiler are the ones that help

_loaded = False


class BuildError(RuntimeError):
    """The C++ kernel cannot be compiled here; the message says why and the mend."""


def load_cpu() -> None:
    """Register `torch.ops.dwl_kernels_native`, compiling the kernel where the cache has none.

    Raises:
        BuildError: no compiler, a compiler that fails, or a cache that cannot be written.
    """
    global _loaded
    if not _loaded:
        library = build()
        try:
            torch.ops.load_library(library)
        except OSError as error:
            raise BuildError(
                f"{library} does not load: {error}; delete it, and it is compiled anew"
            ) from error
        _loaded = True


def build(verbose: bool = False, csrc: Path | None = None) -> Path:
    """Compile the kernel unless the cache has it, and return the path of the library.

    Args:
        verbose: print the commands and the compiler's warnings.
        csrc: folder of the sources, for the tests; None = those of this package.

    Raises:
        BuildError: see `load_cpu`.
    """
    if sys.platform == "win32":
        raise BuildError(f"the C++ kernel is not available on Windows; {MEND}")
    csrc = csrc or source_dir()
    sources = sorted([*csrc.glob("*.cpp"), *csrc.glob("cpu/*.cpp")])
    headers = sorted([*csrc.glob("*.h"), *csrc.glob("cpu/*.h")])
    library = cache_dir() / f"cpu-{_key(csrc, sources + headers)}.so"
    return cached(library, lambda work: _compile(csrc, sources, work / library.name, verbose))


def cached(library: Path, compile_to: Callable[[Path], Path]) -> Path:
    """`library`, which `compile_to` leaves in a folder of its own where the cache has none.

    Raises:
        BuildError: the cache cannot be written, or what `compile_to` raises.
    """
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        # The system frees this lock when its holder dies, so a killed build blocks nobody.
        with FileLock(library.with_suffix(".lock")):
            if not library.exists():
                work = library.with_suffix(".tmp")
                shutil.rmtree(work, ignore_errors=True)  # a killed build leaves one
                work.mkdir()
                try:
                    compile_to(work).replace(library)  # in one step
                finally:
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise BuildError(
            f"the cache of compiled kernels cannot be written: {error}; "
            f"set DWL_KERNELS_CACHE to a folder that can"
        ) from error
    return library


def source_dir() -> Path:
    """`csrc/`: inside the package in a wheel, beside it in a checkout.

    Raises:
        BuildError: the sources are in neither place.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "bindings.cpp").exists():
            return folder
    raise BuildError(f"the C++ sources are missing from {package}: install the package anew")


def cache_dir() -> Path:
    """`DWL_KERNELS_CACHE`, else `dwl_kernels` in the user's cache folder."""
    named = os.environ.get("DWL_KERNELS_CACHE")
    if named:
        return Path(named).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "dwl_kernels"


def compiler() -> list[str]:
    """The C++ compiler as a command: `CXX`, else the first of c++, g++, clang++.

    Raises:
        BuildError: there is none.
    """
    command = shlex.split(os.environ.get("CXX", ""))
    candidates = [command] if command else [[name] for name in _COMPILERS]
    for candidate in candidates:
        if shutil.which(candidate[0]):
            return candidate
    looked_for = f"CXX={command[0]}" if command else ", ".join(_COMPILERS)
    raise BuildError(
        f"no C++ compiler found ({looked_for}): install one, for example "
        f"`apt-get install g++`, or name one in CXX; {MEND}"
    )


def compiler_version() -> str:
    """The first line of what the compiler says about itself.

    Raises:
        BuildError: see `compiler`.
    """
    command = compiler()
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    return (done.stdout.splitlines() or [shlex.join(command)])[0]


def _flags() -> list[str]:
    flags = f"{_OPTIMISE} {_VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), '')}".split()
    # The compiler of macOS has no OpenMP; `at::parallel_for` is serial without.
    return [*flags, "-fopenmp"] if sys.platform == "linux" else flags


def _key(csrc: Path, files: list[Path]) -> str:
    """A hash of all that the library depends on.

    The version of the compiler is left out: a library built ahead has to be found on a machine,
    or in a container, that has no compiler.
    """
    parts = [torch.__version__, platform.machine(), os.environ.get("CXX", ""), *_flags()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for file in files:
        digest.update(f"\0{file.relative_to(csrc)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _compile(csrc: Path, sources: list[Path], library: Path, verbose: bool) -> Path:
    command = [*compiler(), *_flags()]
    print(
        "dwl_kernels: compiling the CPU kernel (about 10 s, once) ...", file=sys.stderr, flush=True
    )
    includes = [f"-I{folder}" for folder in (csrc, *include_paths())]
    warnings = ["-Wall", "-Wextra"] if verbose else ["-w"]
    objects = [library.parent / f"{k}-{source.stem}.o" for k, source in enumerate(sources)]
    commands = [
        [*command, *warnings, *includes, "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda one: run_compiler(one, verbose), commands))
    folders = [flag for f in library_paths() for flag in (f"-L{f}", f"-Wl,-rpath,{f}")]
    link = [*command, "-shared", *map(str, objects), *folders, *_libraries(), "-o", str(library)]
    run_compiler(link, verbose)
    return library


def _libraries() -> list[str]:
    libraries = ["-ltorch_cpu", "-lc10"]
    if sys.platform == "linux":
        # BLAS is found through libtorch_cpu, so it must stay even where no symbol of it is used.
        return ["-Wl,--no-as-needed", *libraries]
    return [*libraries, "-undefined", "dynamic_lookup"]


def run_compiler(
    command: list[str], verbose: bool, what: str = "the C++ kernel", variable: str = "CXX"
) -> None:
    """Run a compiler that `variable` can name.

    Raises:
        BuildError: it fails, or does not start.
    """
    if verbose:
        print(shlex.join(command), file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(
            f"{command[0]} does not start: {error}; name another in {variable}"
        ) from error
    if verbose and done.stderr:
        print(done.stderr, file=sys.stderr, flush=True)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout or "(it said nothing)").splitlines()
        raise BuildError(
            "\n".join(
                [
                    f"{what} does not compile, {command[0]} says:",
                    *lines[:_SHOWN_LINES],
                    "`python -m dwl_kernels build --verbose` shows the command; "
                    f"another compiler can be named in {variable}; {MEND}",
                ]
            )
        )
