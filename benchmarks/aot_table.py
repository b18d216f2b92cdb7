"""Tables of machine code: compiled row by row, written, compared with the committed ones.

A table is a JSON file with the compiler, the stamp of what it compiled, and a row for every kernel;
beside it lies the same in Markdown.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

RESULTS = Path(__file__).parent / "results" / "aot"
VERSION = ".".join(triton.__version__.split(".")[:2])
SAMPLED = 4  # rows of a quick table beside its fixed ones


class Table(NamedTuple):
    name: str
    rows: Callable[[], list[Any]]
    fixed: list[Any]  # rows of a quick table that between them have every loop
    stamp_of: Callable[[Sequence[Any]], str]
    compiled: Callable[[Any], dict[str, Any]]  # a row, and what its machine code does
    markdown: Callable[[list[dict[str, Any]]], str]
    key: tuple[str, ...]  # fields of the result that tell the rows apart
    precision: str  # of float32 products, as `torch.set_float32_matmul_precision` takes it


def quick_rows(table: Table) -> list[Any]:
    """The fixed rows and a few more, others whenever the sources change."""
    rows = table.rows()
    others = [row for row in rows if row not in table.fixed]
    return table.fixed + random.Random(table.stamp_of(rows)).sample(others, SAMPLED)


def changes(
    kernels: list[dict[str, Any]], before: list[dict[str, Any]], key: tuple[str, ...]
) -> list[str]:
    """What is counted otherwise than before, a line each."""
    known = {tuple(row[k] for k in key): row for row in before}
    lines = []
    for row in kernels:
        name = tuple(row[k] for k in key)
        if name not in known:
            lines.append(f"{name}: not in the committed table")
            continue
        for field, value in row.items():
            was, now = known[name].get(field), value
            if field == "loops":
                was, now = (
                    [{k: v for k, v in loop.items() if k != "kinds"} for loop in loops]
                    for loops in (was or [], now)
                )
            if was != now:
                lines.append(f"{name}: {field} was {was}, is {now}")
    return lines


def main(table: Table, description: str | None) -> None:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a few kernels, to try the tool")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="fail where a count differs from the committed table of this version of Triton",
    )
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision(table.precision)
    chosen = quick_rows(table) if arguments.quick else table.rows()
    source = table.stamp_of(chosen)  # before the work, which takes minutes: a later edit shows
    kernels = []
    with ProcessPoolExecutor(
        os.cpu_count(),
        multiprocessing.get_context("spawn"),
        initializer=torch.set_float32_matmul_precision,
        initargs=(table.precision,),
    ) as pool:
        for row in pool.map(table.compiled, chosen):
            kernels.append(row)
            print(*(row[k] for k in table.key), flush=True)
    result = {"compiler": f"Triton {triton.__version__}", "source": source, "kernels": kernels}
    file = f"{table.name}-{VERSION}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{file}.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / f"{file}.md").write_text(table.markdown(kernels))
    committed = RESULTS / f"{file}.json"  # need not exist
    if arguments.compare and committed.exists():
        lines = changes(kernels, json.loads(committed.read_text())["kernels"], table.key)
        if lines:
            raise SystemExit("\n".join([f"{committed} has other counts:", *lines]))
