"""`python -m benchmarks.speed.memory VERSION ROWS CANDIDATES DIM`: one process's peak, in bytes.

A step on small inputs comes first and loads what the version needs once: libraries, compiled code,
the pool of threads. The peak is what the resident size then rises by, less the gradients that the
step has to return.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

from benchmarks.speed.baselines import LOSSES, step
from benchmarks.speed.shapes import Shape, random_inputs

STATUS = Path("/proc/self/status")


def main(version: str, rows: int, candidates: int, dim: int) -> float:
    run = step(LOSSES[version])
    for small in (96, 160):  # two sizes, so that torch.compile settles on dynamic shapes
        run(random_inputs(Shape("small", small, small + 32, dim), "domain weights"))
    shape = Shape("memory", rows, candidates, dim)
    inputs = random_inputs(shape, "domain weights")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    run(inputs)
    return resident("VmHWM") - before - shape.gradient_bytes


def resident(field: str) -> float:
    """A line of /proc/self/status, in bytes."""
    lines = STATUS.read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    name, *sizes = sys.argv[1:]
    rows, candidates, dim = map(int, sizes)
    print(main(name, rows, candidates, dim))
