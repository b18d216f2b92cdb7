"""`python -m benchmarks.tiles LOG [SHAPE ...]`: time the tiles that the search would try.

Each candidate has a process of its own, so that one that hangs or dies takes no other along. They
compile side by side and take turns on the device. LOG gets a line of JSON for each as it comes. The
default tiles are also timed with the fence before products, and without it.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.record import ROOT, append_line
from benchmarks.speed.baselines import package_loss, step
from benchmarks.speed.shapes import GPU, Level, Shape, random_inputs
from dwl_kernels.backends.triton import solve as host
from dwl_kernels.backends.triton import specialize
from dwl_kernels.backends.triton import tiles as triton_tiles
from dwl_kernels.backends.triton.tiles import Load, Tiles

SHAPES = ("two-tower", "sequence", "wide", "catalogue")  # in this order, where none is named
FENCES = (None, True, False)  # of the default tiles; None: as the kernel decides
LIMIT = float(os.environ.get("TILE_SECONDS", "90"))  # of one process


def candidates(shape: Shape) -> list[Tiles]:
    major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 9
    load: Load = "options" if shape.kind == "full" else "plain"
    default = triton_tiles.default(shape.dim, shape.dtype, major, False, load)
    return triton_tiles.around(default, load)


def one(name: str, tiles: Tiles, fence: bool | None, lock: str, level: Level = "plain") -> None:
    """The median time of a step with these tiles, in ms, on the last line."""
    (shape,) = (s for s in GPU if s.name == name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":  # interpreted
        shape = shape.shrunk(48, 40, 97, dim=16)
        host.INTERPRETER = host.Interpreter(tiles, workers=5)
    host.choose = lambda *_: tiles  # type: ignore[attr-defined]
    if fence is not None:
        if not hasattr(specialize, "fenced"):
            sys.exit("these kernels have no fence to switch")
        specialize.fenced = lambda *_: fence
    inputs = random_inputs(shape, level, device=device)
    run = step(lambda x: package_loss(x, "triton"))
    if device == "cuda":  # compiles beside the others, and leaves the device to the one in turn
        with patch.object(host, "launch", lambda *_: None):
            run(inputs)
        torch.cuda.synchronize()
    with open(lock) as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # the system releases the lock when a process dies
        if device == "cuda":
            from triton.testing import do_bench

            print(do_bench(lambda: run(inputs), return_mode="median"))
        else:
            begun = time.perf_counter()
            run(inputs)
            print(1e3 * (time.perf_counter() - begun))


def main(log: Path, names: list[str]) -> int:
    found: dict[str, list[tuple[float, Tiles]]] = {}
    few = None if torch.cuda.is_available() else 2
    jobs = [
        (shape, tiles, fence)
        for name in names or SHAPES
        for shape in GPU
        if shape.name == name
        for k, tiles in enumerate(candidates(shape)[:few])
        for fence in (FENCES if k == 0 else (None,))
    ]
    with tempfile.NamedTemporaryFile() as lock:

        def measure(job: tuple[Shape, Tiles, bool | None]) -> None:
            shape, tiles, fence = job
            given = [shape.name, json.dumps(tiles), json.dumps(fence), lock.name]
            command = [sys.executable, "-m", "benchmarks.tiles", "--one", *given]
            figures: dict[str, object] = {
                "shape": str(shape),
                "tiles": tiles._asdict(),
                "fence": fence,
            }
            try:
                done = subprocess.run(
                    command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT
                )
                if done.returncode == 0:
                    figures["ms"] = taken = float(done.stdout.splitlines()[-1])
                    found.setdefault(shape.name, []).append((taken, tiles))
                else:
                    figures["failed"] = f"ended with {done.returncode}: {done.stderr[-300:]}"
            except subprocess.TimeoutExpired:
                figures["failed"] = f"ended after {LIMIT:g} s"
            append_line(log, **figures)

        workers = max(1, (os.cpu_count() or 1) - 2)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(measure, jobs))
    for name, times in found.items():
        print(f"{name}: {min(times)[0]:.4g} ms with {min(times)[1]}")
    return int(sum(map(len, found.values())) < len(jobs))


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        one(sys.argv[2], Tiles(*json.loads(sys.argv[3])), json.loads(sys.argv[4]), sys.argv[5])
    else:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
