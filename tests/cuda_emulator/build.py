"""Compiles the CUDA kernel of `csrc/cuda/` together with the emulator, into the package's cache.

`launch.cpp` takes in the kernel's source, a library for each variant; `emulate.cpp` and
`checks.cpp` are the same in all of them. `cuda_emulator` loads what comes out.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

from dwl_kernels.backends import compilers
from dwl_kernels.backends.cache import cached
from dwl_kernels.backends.cuda.build import key_of, opened
from dwl_kernels.backends.cuda.variants import Variant

FOLDER = Path(__file__).resolve().parent
EMULATOR = [FOLDER / name for name in ("emulate.cpp", "checks.cpp")]
HEADERS = [FOLDER / name for name in ("emulate.h", "emulation.h")]
LAUNCH = FOLDER / "launch.cpp"

# `checks.cpp` stands in for the libraries behind -fsanitize, so the kernel is compiled with it and
# linked without. _FORTIFY_SOURCE takes a jump to another stack for an error.
FLAGS = (
    "-std=c++20 -fPIC -DDWL_EMULATE -Wall -Wextra -Wno-unknown-pragmas "
    "-U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=0"
)
CHECKED = "-O1 -g1 -fsanitize=thread,undefined -fno-sanitize=vptr"


def build(variant: Variant) -> Path:
    """Compile a library unless the cache has it, and return its path.

    Raises:
        BuildError: no compiler, a compiler that fails, or a cache that cannot be used or trusted.
    """
    kernel = compilers.source_dir() / "cuda"
    flags = FLAGS.split()
    checked = [*flags, *CHECKED.split(), *variant.definitions()]
    what = f"the emulated CUDA kernel for {variant}"

    def compiled(target: Path, *arguments: str) -> Path:
        command = [*compilers.compiler(), *arguments, "-o", str(target)]
        compilers.run_compiler(command, False, what)
        return target

    def emulator(work: Path) -> Path:  # the same for every variant
        files = map(str, EMULATOR)
        return compiled(work / "emulator.o", *flags, "-O2", "-r", "-nostdlib", *files)

    def library(work: Path) -> Path:
        print(f"cuda_emulator: compiling {variant} ...", file=sys.stderr, flush=True)
        includes = [f"-I{kernel}", f"-I{FOLDER}"]
        parts = [str(compiled(work / "kernel.o", *checked, *includes, "-c", str(LAUNCH)))]
        return compiled(work / "library.so", "-shared", *parts, str(common))

    identity = compilers.compiler_identity
    key = f"cuda-emulator-{key_of(EMULATOR + HEADERS, flags)}"
    common = cached(key, ".o", identity, emulator, "the emulator of CUDA")
    files = [*kernel.iterdir(), *EMULATOR, *HEADERS, LAUNCH]
    return cached(f"cuda-emulated-{key_of(files, checked)}", ".so", identity, library, what)


@functools.cache
def load(variant: Variant) -> ctypes.CDLL:
    """The library, compiled where the cache has none.

    Raises:
        BuildError: see `build`, or it does not load.
    """
    library = opened(build(variant))
    library.dwl_longest.restype = ctypes.c_int64
    return library
