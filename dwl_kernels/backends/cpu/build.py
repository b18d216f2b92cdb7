"""Compiles `csrc/` on first use, into the cache.

The compiler is called directly, one process per source file. `torch.utils.cpp_extension.load` does
not fit: its lock hangs for ever after a killed build, and its headers take 40 s instead of 10.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch

from dwl_kernels.backends.cache import BuildError, cached, digest, does_not_load
from dwl_kernels.backends.compilers import (
    MEND,
    compiler,
    compiler_identity,
    in_parallel,
    run_compiler,
    source_dir,
)

# The vector units that PyTorch's own kernels would use here. They depend on the capability alone,
# so machines that share a home directory can share the cache, which `-march=native` would not
# allow. Compilers prefer 256 bits by default, which costs the exponentials a third of their speed.
_VECTOR_FLAGS = {
    "AVX512": "-mprefer-vector-width=512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma",
    "AVX2": "-mavx2 -mfma -mf16c",
}
_OPTIMISE = "-std=c++20 -O3 -fPIC -fno-math-errno -fno-trapping-math"


_loaded = False


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
        "dwl_kernels: compiling the CPU kernel (10 to 30 s, once) ...", file=sys.stderr, flush=True
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
