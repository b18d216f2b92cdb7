"""Writes the tables of machine code; `git diff` of them shows what a change to a kernel costs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.machine_code import cuda, triton_per_row, triton_shared, triton_wide
from benchmarks.progress import Progress, in_processes
from dwl_kernels.backends import cache as _cache
from dwl_kernels.backends import compilers
from dwl_kernels.backends.cuda import build as cuda_build

RESULTS = Path(__file__).parent.parent / "results" / "machine-code"
VERSION = ".".join(triton.__version__.split(".")[:2])


Count = Callable[[Any], dict[str, Any]]


def counted(
    precision: str, count: Count, rows: Sequence[Any], progress: Progress
) -> list[dict[str, Any]]:
    """`count` of all rows, with that precision of float32 products.

    A process for each, since within one Triton compiles one kernel after the other.
    """
    progress(f"Triton, 0 of {len(rows)}")
    calls = {number: (row,) for number, row in enumerate(rows)}
    before = partial(torch.set_float32_matmul_precision, precision)
    found = {}
    for number, result in in_processes(count, calls, before=before):
        found[number] = result
        progress(f"Triton, {len(found)} of {len(rows)}")
    return [found[number] for number in calls]


def counted_cuda(rows: Sequence[cuda.Row], progress: Progress) -> list[dict[str, Any]]:
    """The same for the CUDA kernel. `nvcc` is a process anyway, so threads are enough."""
    progress(f"CUDA, 0 of {len(rows)}")
    done = []

    def one(row: cuda.Row) -> dict[str, Any]:
        result = cuda.compiled_and_counted(row)
        done.append(row)
        progress(f"CUDA, {len(done)} of {len(rows)}")
        return result

    return compilers.in_parallel(one, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine_code", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=RESULTS)
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    with Progress() as progress:
        # tf32, the faster choice
        table = counted("high", triton_shared.count, triton_shared.rows(), progress)
        (out / f"triton-{VERSION}.md").write_text(triton_shared.markdown(table))
        table = counted("high", triton_wide.count, triton_wide.rows(), progress)
        (out / f"triton-wide-{VERSION}.md").write_text(triton_wide.markdown(table))
        # That of PyTorch: nothing here goes to tensor cores.
        table = counted("highest", triton_per_row.count, triton_per_row.rows(), progress)
        (out / f"triton-per-row-{VERSION}.md").write_text(triton_per_row.markdown(table))
        try:
            compiler = cuda_build.nvcc_version()
        except _cache.BuildError as error:
            print(f"no table of the CUDA kernel: {error}")
            return
        (out / "cuda.md").write_text(cuda.markdown(counted_cuda(cuda.rows(), progress), compiler))


if __name__ == "__main__":
    main()
