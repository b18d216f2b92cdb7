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


def build(variant: Variant, capability: tuple[int, int], verbose: bool = False) -> Path:
    """Compile a library unless the cache has it, and return its path.

    Raises:
        BuildError: no compiler, a compiler that fails, or a cache that cannot be used or trusted.
    """
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

    key = f"cuda-{arch}-{key_of(source.parent.iterdir(), flags)}"
    return cached(key, ".so", lambda: _identity(nvcc()), compile_to, what)


@functools.cache
def load(variant: Variant, capability: tuple[int, int]) -> ctypes.CDLL:
    """The library, compiled where the cache has none.

    Raises:
        BuildError: see `build`.
    """
    return opened(build(variant, capability))


def opened(path: Path) -> ctypes.CDLL:
    """A compiled library, with the types of what its functions return.

    Raises:
        BuildError: the system's loader refuses it.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise does_not_load(path, error) from error
    library.dwl_space.restype = library.dwl_shared_bytes.restype = ctypes.c_int64
    return library


def key_of(files: Iterable[Path], flags: list[str]) -> str:
    """A digest of all that the library depends on, but for the compiler."""
    contents = [part for file in sorted(files) for part in (file.name, file.read_bytes())]
    return digest(platform.machine(), *flags, *contents)
