"""Writes the tables of machine code; see the package. A change to a kernel is read off them."""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.machine_code import cuda, triton_per_row, triton_shared, triton_wide
from dwl_kernels import _build_cuda, _cache

RESULTS = Path(__file__).parent.parent / "results" / "machine-code"
VERSION = ".".join(triton.__version__.split(".")[:2])


def processes(precision: str) -> Executor:
    """Workers in which float32 products have that precision; Triton compiles in one at a time."""
    return ProcessPoolExecutor(
        os.cpu_count(),
        multiprocessing.get_context("spawn"),
        initializer=torch.set_float32_matmul_precision,
        initargs=(precision,),
    )


def counted(
    pool: Executor, count: Callable[[Any], dict[str, Any]], rows: Sequence[Any]
) -> list[dict[str, Any]]:
    """`count` of all rows; says which are done."""
    found = []
    for number, (row, result) in enumerate(zip(rows, pool.map(count, rows), strict=True), 1):
        print(f"{number} of {len(rows)}:", *row, flush=True)
        found.append(result)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine_code", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=RESULTS)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with processes("high") as pool:  # tf32, the faster choice
        table = counted(pool, triton_shared.count, triton_shared.rows())
        (out / f"triton-{VERSION}.md").write_text(triton_shared.markdown(table))
        table = counted(pool, triton_wide.count, triton_wide.rows())
        (out / f"triton-wide-{VERSION}.md").write_text(triton_wide.markdown(table))
    with processes("highest") as pool:  # that of PyTorch: nothing here goes to tensor cores
        table = counted(pool, triton_per_row.count, triton_per_row.rows())
        (out / f"triton-per-row-{VERSION}.md").write_text(triton_per_row.markdown(table))
    try:
        compiler = _build_cuda.nvcc_version()
    except _cache.BuildError as error:
        print(f"no table of the CUDA kernel: {error}")
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        table = counted(pool, cuda.compiled_and_counted, cuda.rows())
        (out / "cuda.md").write_text(cuda.markdown(table, compiler))


if __name__ == "__main__":
    main()
