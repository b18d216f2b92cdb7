"""Compiles `csrc/cuda/` on first use, one library for each type and width, into the cache.

The sources are free of PyTorch's headers, so a library depends on nothing but the capability of the
device, and a compilation takes 10 to 20 s. It is called through ctypes.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from dwl_kernels.backends import compilers
from dwl_kernels.backends.cache import BuildError, cached, digest, does_not_load
from dwl_kernels.backends.cuda.variants import Variant

_PLACES = ("/usr/local/cuda/bin/nvcc",)
FLAGS = "-std=c++17 -O3 -lineinfo -shared -Xcompiler -fPIC"
# Emulated: `checks.cpp` stands in for the libraries behind -fsanitize, so the kernel is compiled
# with it and linked without. _FORTIFY_SOURCE takes a jump to another stack for an error.
_EMULATE = (
    "-std=c++20 -fPIC -DDWL_EMULATE -Wall -Wextra -Wno-unknown-pragmas "
    "-U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=0"
)
_CHECKED = "-O1 -g1 -fsanitize=thread,undefined -fno-sanitize=vptr"


def nvcc() -> str:
    """The CUDA compiler: that of `CUDA_HOME`, else the one on PATH, else a usual place.

    Raises:
        BuildError: there is none.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        found = shutil.which(str(Path(home) / "bin" / "nvcc"))
        if found is None:
            raise BuildError(
                f"no CUDA compiler at CUDA_HOME={home}: it must hold bin/nvcc; {compilers.MEND}"
            )
        return found
    for place in ("nvcc", *_PLACES):
        found = shutil.which(place)
        if found is not None:
            return found
    raise BuildError(
        "no CUDA compiler found: install the CUDA toolkit, or name its folder in CUDA_HOME; "
        + compilers.MEND
    )


def nvcc_version() -> str:
    """The release that the CUDA compiler names.

    Raises:
        BuildError: see `nvcc`.
    """
    done = subprocess.run([nvcc(), "--version"], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if "release" in line]
    return (lines or [nvcc()])[0]


@functools.cache
def _identity(nvcc: str) -> str:
    """A digest of the compilers for the device and for the host."""
    said = compilers.run_compiler([nvcc, "--version"], False, "the CUDA kernel", "CUDA_HOME")
    return digest(nvcc, said, compilers.compiler_identity())


def build(
    variant: Variant,
    capability: tuple[int, int] | None,  # None: to run on the CPU, emulated
    verbose: bool = False,
) -> Path:
    """Compile a library unless the cache has it, and return its path.

    Raises:
        BuildError: no compiler, a compiler that fails, or a cache that cannot be used or trusted.
    """
    if capability is None:
        return _build_emulated(variant, verbose)
    source = compilers.source_dir() / "cuda" / "sampled_softmax.cu"
    arch = f"{capability[0]}{capability[1]}"
    flags = [*FLAGS.split(), *variant.definitions(), f"-arch=sm_{arch}"]
    what = f"the CUDA kernel for {variant}"

    def compile_to(work: Path) -> Path:
        target = work / "library.so"
        host = shlex.split(os.environ.get("CXX", ""))
        named = ["-ccbin", host[0]] if host else []
        command = [nvcc(), *named, *flags, str(source), "-o", str(target)]
        print(f"dwl_kernels: compiling {what} (about 20 s, once) ...", file=sys.stderr, flush=True)
        compilers.run_compiler(command, verbose, what, "CUDA_HOME")
        return target

    key = f"cuda-{arch}-{_key(source.parent.iterdir(), flags)}"
    return cached(key, ".so", lambda: _identity(nvcc()), compile_to, what)


def _build_emulated(variant: Variant, verbose: bool) -> Path:
    folder = compilers.source_dir() / "cuda"
    sources = [folder / "emulate.cpp", folder / "checks.cpp"]
    headers = [folder / "emulate.h", folder / "emulation.h"]
    flags = _EMULATE.split()
    checked = [*flags, *_CHECKED.split(), *variant.definitions()]
    what = f"the emulated CUDA kernel for {variant}"

    def compiled(target: Path, *arguments: str) -> Path:
        command = [*compilers.compiler(), *arguments, "-o", str(target)]
        compilers.run_compiler(command, verbose, what)
        return target

    def emulator(work: Path) -> Path:  # the same for every variant
        files = map(str, sources)
        return compiled(work / "emulator.o", *flags, "-O2", "-r", "-nostdlib", *files)

    def kernel(work: Path) -> Path:
        print(f"dwl_kernels: compiling {variant} to run emulated ...", file=sys.stderr, flush=True)
        source = ["-x", "c++", str(folder / "sampled_softmax.cu"), "-c"]
        parts = [str(compiled(work / "kernel.o", *checked, *source)), str(common)]
        return compiled(work / "library.so", "-shared", *parts)

    identity = compilers.compiler_identity
    key = f"cuda-emulator-{_key(sources + headers, flags)}"
    common = cached(key, ".o", identity, emulator, "the emulator of CUDA")
    key = f"cuda-emulated-{_key(folder.iterdir(), checked)}"
    return cached(key, ".so", identity, kernel, what)


@functools.cache
def load(variant: Variant, capability: tuple[int, int] | None) -> ctypes.CDLL:
    """The library, compiled where the cache has none.

    Raises:
        BuildError: see `build`.
    """
    path = build(variant, capability)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise does_not_load(path, error) from error
    library.dwl_space.restype = library.dwl_shared_bytes.restype = ctypes.c_int64
    library.dwl_unit.restype = ctypes.c_int64
    return library


def _key(files: Iterable[Path], flags: list[str]) -> str:
    """A digest of all that the library depends on, but for the compiler."""
    contents = [part for file in sorted(files) for part in (file.name, file.read_bytes())]
    return digest(platform.machine(), *flags, *contents)
