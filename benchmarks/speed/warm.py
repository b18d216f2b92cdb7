"""`python -m benchmarks.speed.warm`: compile what the shapes need, in processes side by side.

Compilers keep what they made on disk: Triton for every form of the kernel, PyTorch for
`torch.compile`. A run of the suite then spends its time on measuring.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator

import torch

from benchmarks.progress import in_processes
from benchmarks.speed.baselines import compiled_loss, kernels, package_loss, step
from benchmarks.speed.shapes import GPU, Level, Shape, random_inputs

Job = tuple[Shape, Level, str]


def jobs(shapes: tuple[Shape, ...], device: str) -> Iterator[Job]:
    """What takes longest comes first."""
    if device == "cuda":
        yield from ((shape, shape.compared_at, "torch.compile") for shape in shapes)
    for shape in shapes:
        yield from ((shape, level, "triton") for level in shape.levels)
        if shape.name == "sequence":
            yield shape, shape.compared_at, "padded"


def compile_one(job: Job, device: str) -> str:
    """One step; a line that says how long it took, or why it failed."""
    shape, level, version = job
    begun = time.monotonic()
    try:
        inputs = random_inputs(shape, level, device=device)
        if version == "padded":
            inputs = inputs.half_padded()
        if version == "torch.compile":
            step(compiled_loss())(inputs)
        else:
            step(lambda x: package_loss(x, "triton"))(inputs)
        outcome = f"{time.monotonic() - begun:.1f} s"
    except Exception as error:  # the suite will say so again, where it counts
        outcome = f"{type(error).__name__}: {error}"
    return f"{shape.name}, {level}, {version}: {outcome}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="", metavar="A,B", help="only these shapes")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU, to try this")
    options = parser.parse_args()
    names = [name for name in options.shapes.split(",") if name]
    chosen = tuple(shape for shape in GPU if not names or shape.name in names)
    device = "cuda" if torch.cuda.is_available() and not options.dry else "cpu"
    if device == "cpu":
        chosen = tuple(shape.shrunk(48, 40, 97, dim=16) for shape in chosen[:1])
    if "triton" not in kernels(device, dry=True):
        sys.exit("the Triton kernel does not run here")
    workers = max((os.cpu_count() or 1) - 2, 1)
    calls = {job: (job, device) for job in jobs(chosen, device)}
    for _, line in in_processes(compile_one, calls, workers):
        print(line, flush=True)


if __name__ == "__main__":
    main()
