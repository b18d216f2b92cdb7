"""Compile the CUDA kernel ahead of time and count what the machine code does.

``python -m benchmarks.aot_cuda OUT`` needs `nvcc` and no GPU. It compiles every type and width for
capability 9.0, the commonest for 8.0 and 10.0, and writes ``OUT/aot-cuda.json`` and
``OUT/aot-cuda.md``, in the terms of `benchmarks.aot`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.aot import machine_code, main_loops
from dwl_kernels import _build, _build_cuda
from dwl_kernels.backends.cuda_tiles import MATH, TF32, WIDTHS, Math, Variant, tiles

MATHS = (*MATH.values(), TF32)
NARROW = MATH[torch.bfloat16]


def count(math: Math, width: int, capability: int) -> dict[str, Any]:
    """One row of the table."""
    variant = Variant(math, width, tiles(math, width))
    source = _build.source_dir() / "cuda" / "sampled_softmax.cu"
    flags = _build_cuda.FLAGS.replace("-shared -Xcompiler -fPIC", "").split()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        subprocess.run(
            [
                *(_build_cuda.nvcc(), "-cubin", f"-arch=sm_{capability}", *flags),
                *(*variant.definitions(), str(source), "-o", str(cubin)),
            ],
            check=True,
        )
        sass, usage = machine_code(cubin.read_bytes())
    shape = variant.tiles
    elements = shape.BM * shape.BN / (32 * shape.WARPS)  # of the logits that a thread holds
    return {
        "capability": capability,
        "problem": "everything",
        "reduction": "any",
        "D": width,
        "dtype": math.name,
        "tiles": shape._asdict(),
        **usage,
        "shared": variant.shared_bytes,
        "loops": [
            {"per_element": round(loop["instructions"] / elements, 2), **loop}
            # Only the 16-bit types unroll a whole block, so that a turn of the loop is a step.
            for loop in (main_loops(sass) if math.element == 2 else [])
        ],
    }


def rows() -> list[tuple[Math, int, int]]:
    found = [(math, width, 90) for math in MATHS for width in WIDTHS]
    found += [(NARROW, width, arch) for width in (64, 128, 256) for arch in (80, 100)]
    return [*found, *((MATH[torch.float32], 128, arch) for arch in (80, 100))]


def markdown(table: list[dict[str, Any]], compiler: str) -> str:
    lines = [
        f"{compiler}.",
        "One kernel takes every option at run time; what a branch skips is not counted, options",
        "and copies among it. Instructions of one step per element of the logits, 16-bit types: a",
        "search for maxima (float16 always, else rarely run), phase 1, phase 2.",
        "",
        "| capability | type | D up to | BN MT WARPS BLOCKS | registers | stack | shared KB |"
        " instructions per element | spills in loops |",
        "|" + "---|" * 9,
    ]
    for row in table:
        shape = " ".join(str(v) for v in row["tiles"].values())
        counts = ", ".join(f"{loop['per_element']:.2f}" for loop in row["loops"])
        spills = ", ".join(str(loop["spills"]) for loop in row["loops"])
        lines.append(
            f"| {row['capability']} | {row['dtype']} | {row['D']} | {shape} | {row['registers']} |"
            f" {row['stack']} | {row['shared'] / 1024:.0f} | {counts} | {spills} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    table = []
    for math, width, capability in rows():
        table.append(count(math, width, capability))
        print(capability, math.name, width)
    compiler = _build_cuda.nvcc_version()
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"compiler": compiler, "kernels": table}
    (arguments.out / "aot-cuda.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "aot-cuda.md").write_text(markdown(table, compiler))


if __name__ == "__main__":
    main()
