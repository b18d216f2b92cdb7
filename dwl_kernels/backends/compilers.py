"""The C++ compiler: which it is, and running one so that Ctrl-C ends it.

`cpu/build.py` and `cuda/build.py` compile with it, `cache.py` keeps what comes out.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from dwl_kernels.backends.cache import BuildError, digest

_COMPILERS = ("c++", "g++", "clang++")
MEND = "until then backend='chunked' computes the same"

_SHOWN_LINES = 40  # the first errors of a compiler are the ones that help

# What a compiler and its C++ library say of themselves, each where it is the one in use.
_PROBE = "#include <version>\n__VERSION__ __GLIBCXX__ _LIBCPP_VERSION\n"

_running: set[subprocess.Popen[str]] = set()
_stopping = threading.Event()  # from Ctrl-C until the threads that run compilers are done

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def source_dir() -> Path:
    """`csrc/`: inside the package in a wheel, beside it in a checkout.

    Raises:
        BuildError: the sources are in neither place.
    """
    package = Path(__file__).resolve().parents[1]
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
    if _stopping.is_set():  # Ctrl-C came before it was seen among the running
        _kill(process)
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
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                futures = [pool.submit(function, argument) for argument in arguments]
                return [future.result() for future in futures]
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                if isinstance(error, KeyboardInterrupt):
                    _stopping.set()
                    for process in _running.copy():
                        _kill(process)
                raise
    finally:
        _stopping.clear()


def _kill(process: subprocess.Popen[str]) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
