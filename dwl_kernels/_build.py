"""Compiles `csrc/` on first use, into the cache.

The compiler is called directly, one process per source file. `torch.utils.cpp_extension.load` does
not fit: its lock hangs for ever after a killed build, and its headers take 40 s instead of 10.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from dwl_kernels._cache import BuildError, cached, digest, does_not_load

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

# What a compiler and its C++ library say of themselves, each where it is the one in use.
_PROBE = "#include <version>\n__VERSION__ __GLIBCXX__ _LIBCPP_VERSION\n"

_loaded = False
_running: set[subprocess.Popen[str]] = set()

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def load_cpu() -> None:
    """Register `torch.ops.dwl_kernels_native`, compiling the kernel where the cache has none.

    Raises:
        BuildError: no compiler, a compiler that fails, or a cache that cannot be used or trusted.
    """
    global _loaded
    if not _loaded:
        library = build()
        try:
            torch.ops.load_library(library)
        except OSError as error:
            # PyTorch wraps what the loader says.
            raise does_not_load(library, error.__cause__ or error) from error
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
    return cached(
        f"cpu-{_key(csrc, sources + headers)}",
        ".so",
        compiler_identity,
        lambda work: _compile(csrc, sources, work / "library.so", verbose),
        "the CPU kernel",
    )


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


def compiler_identity() -> str:
    """A digest of the compiler, as it is called, and of its C++ library.

    Raises:
        BuildError: there is none, or it does not find its library.
    """
    return _identity(tuple(compiler()))


@functools.cache
def _identity(command: tuple[str, ...]) -> str:
    said = run_compiler([*command, "-std=c++20", "-E", "-x", "c++", "-"], False, text=_PROBE)
    return digest(*command, said)


def _flags() -> list[str]:
    flags = f"{_OPTIMISE} {_VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), '')}".split()
    # The compiler of macOS has no OpenMP; `at::parallel_for` is serial without.
    return [*flags, "-fopenmp"] if sys.platform == "linux" else flags


def _key(csrc: Path, files: list[Path]) -> str:
    """A digest of all that the library depends on, but for the compiler."""
    contents = [part for f in files for part in (str(f.relative_to(csrc)), f.read_bytes())]
    return digest(torch.__version__, platform.machine(), *_flags(), *contents)


def _compile(csrc: Path, sources: list[Path], library: Path, verbose: bool) -> Path:
    command = [*compiler(), *_flags()]
    print(
        "dwl_kernels: compiling the CPU kernel (about 10 s, once) ...", file=sys.stderr, flush=True
    )
    # Those of `torch.utils.cpp_extension`, whose import takes 200 ms and changes `distutils`.
    installed = Path(torch.__file__).parent
    headers = (installed / "include", installed / "include/torch/csrc/api/include")
    includes = [f"-I{folder}" for folder in (csrc, *headers)]
    warnings = ["-Wall", "-Wextra"] if verbose else ["-w"]
    objects = [library.parent / f"{k}-{source.stem}.o" for k, source in enumerate(sources)]
    commands = [
        [*command, *warnings, *includes, "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, objects, strict=True)
    ]
    in_parallel(lambda one: run_compiler(one, verbose), commands)
    folder = installed / "lib"
    flags = [f"-L{folder}", f"-Wl,-rpath,{folder}", *_libraries()]
    run_compiler([*command, "-shared", *map(str, objects), *flags, "-o", str(library)], verbose)
    return library


def _libraries() -> list[str]:
    libraries = ["-ltorch_cpu", "-lc10"]
    if sys.platform == "linux":
        # BLAS is found through libtorch_cpu, so it must stay even where no symbol of it is used.
        return ["-Wl,--no-as-needed", *libraries]
    return [*libraries, "-undefined", "dynamic_lookup"]


def run_compiler(
    command: list[str],
    verbose: bool,
    what: str = "the C++ kernel",
    variable: str = "CXX",
    text: str | None = None,
) -> str:
    """Run a compiler that `variable` can name, with `text` as its input; what it prints.

    Raises:
        BuildError: it fails, or does not start.
    """
    if verbose:
        print(shlex.join(command), file=sys.stderr, flush=True)
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            errors="replace",
            start_new_session=True,  # so that `_kill` reaches the processes that it starts
        )
    except OSError as error:
        raise BuildError(
            f"{command[0]} does not start: {error}; name another in {variable}"
        ) from error
    _running.add(process)
    try:
        output, errors = process.communicate(text)
    finally:
        _kill(process)  # nothing, unless Ctrl-C came
        _running.discard(process)
    if verbose and errors:
        print(errors, file=sys.stderr, flush=True)
    if process.returncode != 0:
        lines = list(dict.fromkeys((errors or output or "(it said nothing)").splitlines()))
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
    return output


def in_parallel(
    function: Callable[[Argument], Result], arguments: Iterable[Argument]
) -> list[Result]:
    """`function` of each argument, in threads, of which Ctrl-C ends the compilers too."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures: list[Future[Result]] = []
        try:
            for argument in arguments:
                futures.append(pool.submit(function, argument))
            return [future.result() for future in futures]
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            while isinstance(error, KeyboardInterrupt) and any(one.running() for one in futures):
                for process in _running.copy():
                    _kill(process)
                time.sleep(0.01)
            raise


def _kill(process: subprocess.Popen[str]) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
