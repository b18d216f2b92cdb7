"""`python -m benchmarks.speed.memory VERSION SHAPE`: one process's peak, in bytes.

SHAPE is the JSON of `Shape.as_dict`. A step on small inputs comes first and loads what the version
needs once: libraries, compiled code, the pool of threads. The peak is what the resident size then
rises by, less the gradients that the step has to return.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

from benchmarks.speed.baselines import Loss, compiled_loss, losses, step
from benchmarks.speed.shapes import Shape, random_inputs

STATUS = Path("/proc/self/status")


def main(version: str, shape: Shape) -> float:
    run = step(named(version, shape))
    for rows in (96, 160):
        small = shape.shrunk(rows, rows + 32, 256)
        run(random_inputs(small, shape.compared_at))
    inputs = random_inputs(shape, shape.compared_at)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    run(inputs)
    return resident("VmHWM") - before - shape.gradient_bytes


def named(version: str, shape: Shape) -> Loss:
    if version == "torch.compile":
        return compiled_loss(dynamic=True)  # the code of the small step serves the large one
    found = losses(shape, "cpu")
    if version not in found:
        raise ValueError(f"version is {version!r}; wanted one of {tuple(found)}")
    return found[version]


def resident(field: str) -> float:
    """A line of /proc/self/status, in bytes."""
    lines = STATUS.read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    print(main(sys.argv[1], Shape.from_dict(json.loads(sys.argv[2]))))
