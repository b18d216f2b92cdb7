"""Compiles `csrc/cuda/` on first use, one library for each type and width, into the cache.

The sources are free of PyTorch's headers, so a library depends on nothing but the capability of the
device, and a compilation takes 10 to 20 s. It is called through ctypes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from dwl_kernels import _build
from dwl_kernels._build import BuildError
from dwl_kernels.backends.cuda_tiles import Variant

_PLACES = ("/usr/local/cuda/bin/nvcc",)
FLAGS = "-std=c++17 -O3 -lineinfo -shared -Xcompiler -fPIC"
_EMULATE = "-std=c++20 -O2 -fPIC -shared -DDWL_EMULATE -Wall -Wextra -Wno-unknown-pragmas"


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
                f"no CUDA compiler at CUDA_HOME={home}: it must hold bin/nvcc; {_build.MEND}"
            )
        return found
    for place in ("nvcc", *_PLACES):
        found = shutil.which(place)
        if found is not None:
            return found
    raise BuildError(
        "no CUDA compiler found: install the CUDA toolkit, or name its folder in CUDA_HOME; "
        + _build.MEND
    )


def nvcc_version() -> str:
    """The release that the CUDA compiler names.

    Raises:
        BuildError: see `nvcc`.
    """
    done = subprocess.run([nvcc(), "--version"], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if "release" in line]
    return (lines or [nvcc()])[0]


def build(
    variant: Variant,
    capability: tuple[int, int] | None,  # None: to run on the CPU, emulated
    verbose: bool = False,
) -> Path:
    """Compile a library unless the cache has it, and return its path.

    Raises:
        BuildError: no compiler, a compiler that fails, or a cache that cannot be written.
    """
    source = _build.source_dir() / "cuda" / "sampled_softmax.cu"
    flags = [*shlex.split(_EMULATE if capability is None else FLAGS), *variant.definitions()]
    name = "cuda-emulated"
    if capability is not None:
        name = f"cuda-{capability[0]}{capability[1]}"
        flags += [f"-arch=sm_{capability[0]}{capability[1]}"]
    library = _build.cache_dir() / f"{name}-{_key(source.parent, flags)}.so"

    def compile_to(work: Path) -> Path:
        target = work / library.name
        if capability is None:
            # A fiber jumps to another stack, which the checks of longjmp take for an error.
            plain = ["-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=0", "-x", "c++"]
            command = [*_build.compiler(), *flags, *plain, str(source), "-o", str(target)]
        else:
            host = shlex.split(os.environ.get("CXX", ""))
            named = ["-ccbin", host[0]] if host else []
            command = [nvcc(), *named, *flags, str(source), "-o", str(target)]
        what = f"the CUDA kernel for {variant}"
        print(f"dwl_kernels: compiling {what} (about 20 s, once) ...", file=sys.stderr, flush=True)
        _build.run_compiler(command, verbose, what, "CXX" if capability is None else "CUDA_HOME")
        return target

    return _build.cached(library, compile_to)


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
        raise BuildError(
            f"{path} does not load: {error}; delete it, and it is compiled anew"
        ) from error
    library.dwl_space.restype = library.dwl_shared_bytes.restype = ctypes.c_int64
    library.dwl_unit.restype = ctypes.c_int64
    return library


def _key(folder: Path, flags: list[str]) -> str:
    """A hash of all that the library depends on; see `_build._key`."""
    parts = [platform.machine(), os.environ.get("CXX", ""), *flags]
    digest = hashlib.sha256("\0".join(parts).encode())
    for file in sorted(folder.iterdir()):
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]
