"""Host time of forward and backward at the shape `small`, ours against eager.

``python -m benchmarks.host [OUT]`` writes ``OUT/host.json`` (default: benchmarks/results).

On a machine with a GPU it is the time until the calls return, of a few steps at a time so that the
queue of launches stays short.

Without a GPU it is not a figure of one. Backend "triton" then runs with a driver that launches
nothing (`recorder`): validation, autograd, allocation and Triton's launcher still run. Eager runs
on the CPU, with so few numbers that its arithmetic takes no time. Launches in the driver are
missing on both sides: one or two in ours, a dozen or more in eager. So the ratio of ours to eager
can only be lower on the host of a GPU, as far as the two hosts are alike.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.record import ROOT, record, write_json
from benchmarks.recorder import recording
from benchmarks.speed.baselines import Loss, kernels, package_loss, step, usual_loss
from benchmarks.speed.measure import quartiles
from benchmarks.speed.shapes import LEVELS, Inputs, Kind, Level, Shape, random_inputs

KINDS: tuple[Kind, ...] = ("in-batch", "shared")
STEPS = 5  # of every round; more would fill the queue of launches
ROUNDS = 400


def inputs_of(kind: Kind, level: Level, device: str) -> Inputs:
    rows, dim = (512, 64) if device == "cuda" else (4, 4)
    shape = Shape("small", kind, rows, rows, dim, dtype=torch.bfloat16)
    return random_inputs(shape, level, device=device)


def function_calls(run: Callable[[], object]) -> int:
    """How many functions, of Python and C, a repeated call calls."""
    run()
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def measure(kind: Kind, level: Level, device: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """Microseconds until the calls of one step return, of all versions in turn.

    On a CPU it is processor time of the thread, which other processes disturb less.
    """
    x = inputs_of(kind, level, device)
    names = kernels("cuda") if device == "cuda" else ["triton"]
    losses: dict[str, Loss] = {"eager": usual_loss}
    losses.update({name: functools.partial(package_loss, backend=name) for name in names})
    steps = {name: step(loss) for name, loss in losses.items()}
    clock = time.perf_counter if device == "cuda" else time.thread_time
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + rounds // 4):
        for name, run in steps.items():
            start = clock()
            for _ in range(STEPS):
                run(x)
            if number >= rounds // 4:
                taken[name].append(1e6 * (clock() - start) / STEPS)
            if device == "cuda":
                torch.cuda.synchronize()
    ratios = {n: [a / b for a, b in zip(taken[n], taken["eager"], strict=True)] for n in names}
    return {
        "kind": kind,
        "level": level,
        "rounds": rounds,
        "host_us": {n: rounded(quartiles(values), 1) for n, values in taken.items()},
        "of_eager": {n: rounded(quartiles(values), 2) for n, values in ratios.items()},
        "function_calls": {n: function_calls(functools.partial(s, x)) for n, s in steps.items()},
    }


def measure_public_ways(rounds: int = ROUNDS) -> dict[str, Any]:
    """The time of a step that calls PyTorch or Triton the public way, over that of the direct way.

    With the driver that launches nothing, and the steps in turn as in `measure`.
    """
    from dwl_kernels import autograd
    from dwl_kernels.backends.triton import solve
    from dwl_kernels.backends.triton.kernels import scale_gradients

    def launch(
        kernel: Any, grid: int, entry: Any, tensors: Any, arguments: Any, *rest: Any
    ) -> None:
        kernel[(grid,)](*arguments(tensors), **rest[0])

    ways: dict[str, list[Any]] = {
        "direct": [],
        "Triton's launcher": [patch.object(m, "launch", launch) for m in (solve, scale_gradients)],
        "PyTorch's dispatcher": [patch.object(autograd, "_watched", lambda tensors: True)],
    }
    x = inputs_of("in-batch", "plain", "cpu")
    run = step(functools.partial(package_loss, backend="triton"))
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + rounds // 4):
        for name, patches in ways.items():
            with ExitStack() as stack:
                for one in patches:
                    stack.enter_context(one)
                start = time.thread_time()
                for _ in range(STEPS):
                    run(x)
                if number >= rounds // 4:
                    taken[name].append(1e6 * (time.thread_time() - start) / STEPS)
    ratios = {
        name: [a / b for a, b in zip(values, taken["direct"], strict=True)]
        for name, values in taken.items()
    }
    return {name: rounded(quartiles(values), 2) for name, values in ratios.items()}


def rounded(values: Sequence[float], digits: int) -> dict[str, float]:
    """Quartiles by name."""
    return {n: round(v, digits) for n, v in zip(("low", "median", "high"), values, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Host time of a step, ours against eager.")
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "benchmarks" / "results")
    out: Path = parser.parse_args().out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    with nullcontext() if device == "cuda" else recording():
        levels: tuple[Level, Level] = (LEVELS[0], LEVELS[-1])
        rows = [measure(kind, level, device) for kind in KINDS for level in levels]
        ways = {} if device == "cuda" else measure_public_ways()
    launched = "by the driver" if device == "cuda" else "nothing, see benchmarks/host.py"
    write_json(out / "host.json", record(launched=launched, cases=rows, public_ways=ways))
    for row in rows:
        for name, ratio in row["of_eager"].items():
            print(f"{row['kind']}, {row['level']}: {name} takes {ratio['median']} of eager's time")
    for name, ratio in ways.items():
        print(f"in-batch, plain: {name} takes {ratio['median']} of the direct way's time")


if __name__ == "__main__":
    main()
