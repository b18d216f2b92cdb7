"""Times in turn, and peak memory in fresh processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.record import ROOT
from benchmarks.speed.baselines import LOSSES, Step, bound, package_loss, step
from benchmarks.speed.shapes import LEVELS, Inputs, Level, Shape, random_inputs

WARM_UP = 2
BATCHES = 3  # different inputs that take turns: the next round finds none of its own in a cache


@dataclass(frozen=True)
class Timing:
    """One version's times, and how they compare with the reference round by round."""

    version: str
    median_ms: float
    low_ms: float  # quartiles
    high_ms: float
    ratio: float  # median over the rounds of this version's time over the reference's
    ratio_low: float
    ratio_high: float


def compare_versions(shape: Shape, versions: Sequence[str], runs: int) -> list[Timing]:
    """The versions with log-Q, hits and domain weights on, against the three products."""
    steps = {"bound": bound(shape), **{name: step(LOSSES[name]) for name in versions}}
    return in_turn(steps, batches(shape), runs, reference="bound")


def compare_levels(shape: Shape, runs: int) -> list[Timing]:
    """The kernel with log-Q, hits and domain weights, each on top of the one before."""
    kernel = step(lambda x: package_loss(x, "cpu"))

    def step_at(level: Level) -> Step:
        inputs = random_inputs(shape, level)
        return lambda _: kernel(inputs)

    steps = {str(level): step_at(level) for level in LEVELS}
    return in_turn(steps, batches(shape), runs, reference="plain")


def batches(shape: Shape) -> list[Inputs]:
    return [random_inputs(shape, "domain weights", seed) for seed in range(BATCHES)]


def in_turn(
    steps: Mapping[str, Step], inputs: Sequence[Inputs], runs: int, reference: str
) -> list[Timing]:
    """Time the steps A B C, A B C, ..., so that a busy machine slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP + runs):
        for name, run in steps.items():
            start = time.perf_counter()
            run(inputs[number % len(inputs)])
            taken = time.perf_counter() - start
            if number >= WARM_UP:
                seconds[name].append(taken)
    timings = []
    for name, times in seconds.items():
        low, median, high = quartiles([1e3 * t for t in times])
        ratios = [own / other for own, other in zip(times, seconds[reference], strict=True)]
        ratio_low, ratio, ratio_high = quartiles(ratios)
        timings.append(Timing(name, median, low, high, ratio, ratio_low, ratio_high))
    return timings


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def peak_memory(version: str, shape: Shape, timeout: float = 600) -> float:
    """Bytes that a step needs above its inputs and gradients, at its peak, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.speed.memory", version]
    sizes = [str(shape.rows), str(shape.candidates), str(shape.dim)]
    done = subprocess.run(
        [*command, *sizes], cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {version!r} failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def as_dict(shape: Shape) -> dict[str, Any]:
    return {**asdict(shape), "dtype": str(shape.dtype).removeprefix("torch.")}
