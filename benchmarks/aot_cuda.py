"""Compile the CUDA kernel ahead of time and count what the machine code does.

``python -m benchmarks.aot_cuda OUT`` needs `nvcc` and no GPU. It compiles every type and width for
capability 9.0, a few for others, and writes ``OUT/aot-cuda.json`` and
``OUT/aot-cuda.md``, in the terms of `benchmarks.aot`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.arithmetic import cuda_clocks, predicted_us
from benchmarks.machine_code import machine_code, step_loops
from benchmarks.stamp import stamp
from dwl_kernels import _build, _build_cuda
from dwl_kernels.backends.cuda_tiles import (
    MATH,
    TF32,
    WIDTHS,
    Math,
    Tiles,
    Variant,
    shared_limit,
    tiles,
)

# What multiplies, and how many such instructions a lane's logit takes for each column of D. Of
# float32 one in eight multiplications is no FFMA.
PRODUCT = {
    "BrainFloat": ("HMMA", 1 / 64),
    "Half": ("HMMA", 1 / 64),
    "Tf32": ("HMMA", 1 / 32),
    "Float32": ("FFMA", 7 / 8),
    "Float64": ("DMMA", 1 / 8),
}
SOURCES = _build.source_dir() / "cuda"
MATHS = (*MATH.values(), TF32)
NARROW = MATH[torch.bfloat16]


def variant_of(math: Math, width: int, capability: int) -> Variant:
    return Variant(math, width, tiles(math, width, divmod(capability, 10)))


def compiled(variant: Variant, capability: int) -> bytes:
    """The machine code of a variant."""
    flags = _build_cuda.FLAGS.replace("-shared -Xcompiler -fPIC", "").split()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        subprocess.run(
            [
                *(_build_cuda.nvcc(), "-cubin", f"-arch=sm_{capability}", *flags),
                *(*variant.definitions(), str(SOURCES / "sampled_softmax.cu"), "-o", str(cubin)),
            ],
            check=True,
        )
        return cubin.read_bytes()


def count(binary: bytes, math: Math, width: int, capability: int) -> dict[str, Any]:
    """One row of the table."""
    variant = variant_of(math, width, capability)
    sass, usage = machine_code(binary)
    shape = variant.tiles
    elements = shape.BM * shape.BN // (32 * shape.WARPS)  # of the logits that a lane holds
    product, share = PRODUCT[math.name]
    loops = step_loops(sass, product, round(elements * width * share))
    row = {
        "capability": capability,
        "problem": "everything",
        "reduction": "any",
        "D": width,
        "dtype": math.name,
        "tiles": shape._asdict(),
        **usage,
        "shared": variant.shared_bytes,
        "logits": elements,
        "passes": variant.passes,
        "loops": [
            {"per_element": round(loop["instructions"] / elements, 2), **loop} for loop in loops
        ],
    }
    clocks = {name: round(value, 4) for name, value in cuda_clocks(row).items()}
    return {**row, "clocks": clocks, "predicted_us": predicted_us(row, clocks)}


def rows() -> list[tuple[Math, int, int]]:
    """Everything on 9.0, where shared memory of 8.6, 8.9 and 12.0 asks for other tiles, and
    the commonest of 8.0, 10.0 and 12.0."""
    found = [(math, width, 90) for math in MATHS for width in WIDTHS]
    found += [
        (math, width, arch)
        for arch in (86, 89, 120)
        for math in MATHS
        for width in WIDTHS
        if variant_of(math, width, 90).shared_bytes > shared_limit(divmod(arch, 10))
    ]
    found += [(NARROW, width, arch) for width in (64, 128, 256) for arch in (80, 100, 120)]
    found += [(MATH[torch.float32], 128, arch) for arch in (80, 100, 120)]
    return list(dict.fromkeys(found))


def sources_stamp() -> str:
    """Of what `nvcc` reads."""
    kernel = [path for path in SOURCES.iterdir() if path.suffix in (".cu", ".cuh")]
    return stamp([*kernel, SOURCES / "call.h", SOURCES / "shares.h"], _build_cuda.FLAGS)


def markdown(table: list[dict[str, Any]], compiler: str) -> str:
    lines = [
        f"{compiler}.",
        "One kernel takes every option at run time; what a branch skips is not counted, options",
        "and copies among it. Instructions of one step per element of the logits: a search for",
        "maxima (Half, Float32 and Float64 always, else rarely run), phase 1, phase 2. Predicted,",
        "not measured: what `benchmarks/arithmetic.py` makes of the counts for B = N = 8,192 on an",
        "H200, in microseconds, and the resource that takes most of it.",
        "",
        f"| capability | type | D up to | {' '.join(Tiles._fields)} | registers | stack |"
        " shared KB | instructions per element | spills in loops | predicted us | most |",
        "|" + "---|" * 11,
    ]
    for row in table:
        shape = " ".join(str(v) for v in row["tiles"].values())
        counts = ", ".join(f"{loop['per_element']:.2f}" for loop in row["loops"])
        spills = ", ".join(str(loop["spills"]) for loop in row["loops"])
        predicted = row["predicted_us"]
        most = "" if predicted is None else max(row["clocks"], key=row["clocks"].get)
        lines.append(
            f"| {row['capability']} | {row['dtype']} | {row['D']} | {shape} | {row['registers']} |"
            f" {row['stack']} | {row['shared'] / 1024:.0f} | {counts} | {spills} |"
            f" {predicted or ''} | {most} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        table = list(pool.map(lambda row: count(compiled(variant_of(*row), row[2]), *row), rows()))
    compiler = _build_cuda.nvcc_version()
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"compiler": compiler, "stamp": sources_stamp(), "kernels": table}
    (arguments.out / "aot-cuda.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "aot-cuda.md").write_text(markdown(table, compiler))


if __name__ == "__main__":
    main()
