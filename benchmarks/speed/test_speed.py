"""`pytest benchmarks/speed`: every version of the loss, and the goals that it is built for.

Each version runs in turn with the bound, the three products that any implementation must do. The
goals compare all versions round by round in one run, because the machine is shared. `--runs N`
sets the rounds, `--benchmark-json FILE` keeps the figures.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from typing import Any

import pytest

from benchmarks.speed.baselines import LOSSES, bound, step
from benchmarks.speed.measure import (
    BATCHES,
    WARM_UP,
    Timing,
    as_dict,
    batches,
    compare_levels,
    compare_versions,
    peak_memory,
)
from benchmarks.speed.shapes import CPU, MEMORY, Inputs, Shape

VERSIONS = ["bound", *LOSSES]


@pytest.fixture(scope="module", params=CPU, ids=lambda shape: f"D={shape.dim}")
def shape(request: pytest.FixtureRequest) -> Shape:
    return request.param


@pytest.fixture(scope="module")
def timings(shape: Shape, runs: int) -> dict[str, Timing]:
    return {t.version: t for t in compare_versions(shape, list(LOSSES), runs)}


@pytest.mark.parametrize("version", VERSIONS)
def test_step(benchmark: Any, shape: Shape, runs: int, version: str) -> None:
    inputs = batches(shape)
    reference = bound(shape)
    run = reference if version == "bound" else step(LOSSES[version])
    seconds: list[float] = []

    def bound_first() -> tuple[tuple[Inputs], dict[str, Any]]:
        batch = inputs[len(seconds) % BATCHES]
        start = time.perf_counter()
        reference(batch)
        seconds.append(time.perf_counter() - start)
        return (batch,), {}

    benchmark.group = str(shape)
    benchmark.extra_info.update(shape=as_dict(shape), operations=shape.operations)
    benchmark.pedantic(run, setup=bound_first, rounds=runs, warmup_rounds=WARM_UP)
    if benchmark.stats is not None:  # None with --benchmark-disable
        typical = statistics.median(seconds[WARM_UP:])
        benchmark.extra_info.update(
            bound_seconds=typical, times_bound=benchmark.stats["median"] / typical
        )


def test_kernel_takes_at_most_1_1_times_the_bound(timings: dict[str, Timing]) -> None:
    assert timings["cpu"].ratio <= 1.1, asdict(timings["cpu"])


@pytest.mark.parametrize(("rival", "factor"), [("eager", 4.5), ("torch.compile", 2.3)])
def test_kernel_is_faster_than_pytorch(
    timings: dict[str, Timing], rival: str, factor: float
) -> None:
    assert timings[rival].ratio / timings["cpu"].ratio >= factor


def test_corrections_cost_at_most_5_percent(shape: Shape, runs: int) -> None:
    timings = compare_levels(shape, runs)
    assert timings[-1].version == "domain weights"
    assert timings[-1].ratio <= 1.05, [asdict(t) for t in timings]


def test_kernel_needs_at_most_300_mb_above_inputs_and_gradients() -> None:
    assert peak_memory("cpu", MEMORY) <= 300e6


def test_eager_needs_over_3_gb() -> None:
    # So that a peak that is measured wrongly does not pass for a small one.
    assert peak_memory("eager", MEMORY) > 3e9
