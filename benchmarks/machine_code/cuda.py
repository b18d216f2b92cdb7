"""The CUDA kernel, compiled by `nvcc` and counted in the terms of `triton_shared`."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine_code.arithmetic import cuda_clocks, predicted_us
from benchmarks.machine_code.sass import machine_code, step_loops
from dwl_kernels.backends import compilers
from dwl_kernels.backends.cuda import build as cuda_build
from dwl_kernels.backends.cuda.variants import MATH, TF32, Math, Tiles, Variant, tiles

# The instruction that multiplies, and how many of them a logit of a lane takes per column of D. In
# float32 one multiplication of eight is another instruction than FFMA.
PRODUCT = {
    "BrainFloat": ("HMMA", 1 / 64),
    "Half": ("HMMA", 1 / 64),
    "Tf32": ("HMMA", 1 / 32),
    "Float32": ("FFMA", 7 / 8),
    "Float64": ("DMMA", 1 / 8),
}
SOURCES = compilers.source_dir() / "cuda"
MATHS = (*MATH.values(), TF32)
NARROW = MATH[torch.bfloat16]


def variant_of(math: Math, width: int, capability: int) -> Variant:
    return Variant(math, width, tiles(math, width, divmod(capability, 10)))


def compiled(variant: Variant, capability: int) -> bytes:
    """The machine code of a variant."""
    flags = cuda_build.FLAGS.replace("-shared -Xcompiler -fPIC", "").split()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        subprocess.run(
            [
                *(cuda_build.nvcc(), "-cubin", f"-arch=sm_{capability}", *flags),
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


Row = tuple[Math, int, int]  # type, D up to, capability


def rows() -> list[Row]:
    """The usual widths of every type on 9.0, and the commonest on others."""
    found = [(math, width, 90) for math in MATHS for width in (64, 128, 256)]
    return found + [(NARROW, width, arch) for width in (64, 128) for arch in (80, 86, 100, 120)]


def compiled_and_counted(row: Row) -> dict[str, Any]:
    math, width, capability = row
    return count(compiled(variant_of(math, width, capability), capability), math, width, capability)


def markdown(table: list[dict[str, Any]], compiler: str) -> str:
    lines = [
        f"{compiler}.",
        "One kernel takes every option at run time; what a branch skips is not counted, options",
        "and copies among it. Instructions of one step per element of the logits: a search for",
        "maxima (Half, Float32 and Float64 always, else rarely run), phase 1, phase 2. Predicted,",
        "not measured: what `arithmetic` makes of the counts for B = N = 8,192 on an",
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
