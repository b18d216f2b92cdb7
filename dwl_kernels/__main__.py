"""`python -m dwl_kernels`: which backends work on this machine, and why the others do not.

`python -m dwl_kernels build` compiles the C++ kernel ahead, and ``--cuda 9.0`` the CUDA kernels for
devices of capability 9.0 too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence

import torch

import dwl_kernels
from dwl_kernels import backends
from dwl_kernels.backends import cache as _cache
from dwl_kernels.backends import compilers
from dwl_kernels.backends.cpu import build as cpu_build
from dwl_kernels.backends.cuda import build as cuda_build
from dwl_kernels.backends.cuda import variants as cuda_tiles

_WIDTH = 60  # characters of a line

_AHEAD = """\
In a container image whose processes run as another user
than the build:

  RUN mkdir -m 755 /opt/dwl_kernels
  ENV DWL_KERNELS_CACHE=/opt/dwl_kernels
  RUN python -m dwl_kernels build

A compiled kernel is used if it and its folder belong to
the user or to root, and nobody else can write them."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dwl_kernels",
        description="Print versions, devices and which backends work here.",
        epilog=_AHEAD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"dwl_kernels {dwl_kernels.__version__}"
    )
    parser.add_argument(
        "command", nargs="?", choices=["build"], help="build: compile the C++ kernel ahead"
    )
    parser.add_argument(
        "--cuda",
        type=capability,
        metavar="CAPABILITY",
        help="with build: the CUDA kernels too, for devices of this capability, such as 9.0",
    )
    parser.add_argument(
        "--dim",
        type=int,
        nargs="+",
        default=[64, 128],
        help="with --cuda: elements of the embeddings (default: 64 128)",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="with build: print commands and warnings"
    )
    options = parser.parse_args(arguments)
    try:
        named = backends.chosen("auto")
    except ValueError as error:
        print(f"dwl_kernels: {error}", file=sys.stderr)
        return 2
    if options.command == "build":
        return build(options.verbose, options.cuda, options.dim)
    print(f"dwl_kernels {dwl_kernels.__version__}\n")
    print_rows([*versions(), *devices()])
    print()
    print_rows(("auto" if k == 0 else "", text) for k, text in enumerate(auto_takes(named)))
    print()
    print_rows(working_backends())
    return 0


def capability(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


def build(verbose: bool, cuda: tuple[int, int] | None = None, dims: Sequence[int] = ()) -> int:
    try:
        print(cpu_build.build(verbose))
        if cuda is not None:
            variants = {
                cuda_tiles.variant(dtype, dim, cuda) for dtype in cuda_tiles.MATH for dim in dims
            }
            paths = compilers.in_parallel(
                lambda one: cuda_build.build(one, cuda, verbose), sorted(variants)
            )
            print(*paths, sep="\n")
    except _cache.BuildError as error:
        print(f"dwl_kernels: {error}", file=sys.stderr)
        return 1
    return 0


def versions() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", torch.__version__
    try:
        yield "triton", importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        yield "triton", "not installed"
    try:
        yield "compiler", compilers.compiler_version()
    except _cache.BuildError:
        yield "compiler", "none found"
    try:
        yield "nvcc", cuda_build.nvcc_version()
    except _cache.BuildError:
        yield "nvcc", "none found"
    try:
        yield "cache", str(_cache.cache_dir())
    except _cache.BuildError as error:
        yield "cache", f"none: {error}"


def devices() -> Iterator[tuple[str, str]]:
    capability = torch.backends.cpu.get_cpu_capability()
    yield "cpu", f"{torch.get_num_threads()} threads, {capability}"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        yield f"cuda:{index}", f"{found.name}, capability {found.major}.{found.minor}, {memory}"


def auto_takes(named: str) -> Iterator[str]:
    """What ``backend="auto"`` means on each device and why; `named` as DWL_KERNELS_BACKEND does."""
    yield f"on cpu: {auto_on('cpu', named)}"
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            yield f"on cuda:{index}: {auto_on('cuda', named)}"


def auto_on(device_type: str, named: str) -> str:
    if named != "auto":
        reason = backends.unavailable_reason(named, device_type)
        text = f"{named}, as DWL_KERNELS_BACKEND says"
        return text if reason is None else f"{text}, but {reason}"
    order = backends.order(device_type)
    working = [name for name in order if backends.unavailable_reason(name, device_type) is None]
    skipped = order[: order.index(working[0])]
    return f"{working[0]}, " + (
        f"because {' and '.join(skipped)} cannot run" if skipped else "the fastest here"
    )


def working_backends() -> Iterator[tuple[str, str]]:
    device_types = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for name in backends.NAMES:
        reasons = {device: backends.unavailable_reason(name, device) for device in device_types}
        fitting = [device for device, reason in reasons.items() if reason is None]
        if fitting:
            yield name, f"yes, for tensors on {' and '.join(fitting)}"
        else:
            yield name, f"no: {reasons[device_types[-1]]}"


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    for name, text in rows:
        first, *rest = (part for line in text.splitlines() for part in wrapped(line))
        print(f"{name:<10}{first}", *rest, sep=f"\n{'':<10}")


def wrapped(line: str) -> list[str]:
    width = _WIDTH - 10
    return textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""]


if __name__ == "__main__":
    sys.exit(main())
