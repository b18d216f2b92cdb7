"""`pytest benchmarks/speed`: every version of the loss, and the goals that it is built for.

Each version runs in turn with the bound. The goals compare all versions round by round in one run,
because the machine is shared. `--runs N` sets the rounds, `--benchmark-json FILE` keeps the
figures.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from typing import Any

import pytest
import torch

from benchmarks.speed.accuracy import check
from benchmarks.speed.baselines import Loss, bound, kernels, losses, step
from benchmarks.speed.measure import (
    BATCHES,
    WARM_UP,
    Rounds,
    Timing,
    batches,
    compare_levels,
    compare_versions,
    peak_memory,
)
from benchmarks.speed.shapes import CPU, GPU, Inputs, Shape, scales
from benchmarks.speed.suite import SCALED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = GPU if DEVICE == "cuda" else CPU

# Times the bound that the kernel may take; of the H200 goals, fractions of the bound turned over.
AT_MOST = {
    "cuda": {"two-tower": 1 / 0.45, "sequence": 1 / 0.45, "wide": 1 / 0.55, "per-example": 1 / 0.6},
    "cpu": {"cpu": 1.1, "catalogue": 1.25, "per-example": 5.0},
}[DEVICE]
AT_MOST_BFLOAT16 = 1.3  # on a CPU with products of bfloat16, candidates that rows share
# Times as fast as these, at the shapes named `cpu` in float32, or on every shape of a GPU.
FASTER = {
    "cuda": [("eager", 4.0), ("torch.compile", 2.0)],
    "cpu": [("eager", 4.5), ("torch.compile", 2.3)],
}[DEVICE]
FLAT, WORST = 1.1, 1.4  # times the bound, for logits up to a standard deviation of 30, and for any
OVERHEAD = {"cuda": 1.03, "cpu": 1.05}[DEVICE]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> Shape:
    return request.param


@pytest.fixture(scope="module")
def versions(shape: Shape) -> dict[str, Loss]:
    """The versions that were found to be right."""
    torch.compiler.reset()
    found = losses(shape, DEVICE)
    return {name: found[name] for name in check(shape, found, DEVICE).passed}


@pytest.fixture(scope="module")
def timings(shape: Shape, versions: dict[str, Loss], runs: int) -> dict[str, Timing]:
    rounds = Rounds(0, least=runs)
    return {t.version: t for t in compare_versions(shape, versions, rounds, DEVICE)}


@pytest.fixture(scope="module", params=kernels(DEVICE))
def kernel(request: pytest.FixtureRequest, shape: Shape, versions: dict[str, Loss]) -> str:
    if request.param not in versions:
        pytest.skip(f"{request.param} does not take {shape}")
    return request.param


NAMES = [*losses(next(s for s in SHAPES if s.kind == "full"), DEVICE), "bound"]


@pytest.mark.parametrize("version", NAMES)
def test_step(
    benchmark: Any, shape: Shape, versions: dict[str, Loss], runs: int, version: str
) -> None:
    reference = bound(shape, DEVICE)
    if version != "bound" and version not in versions:
        pytest.skip(f"{version} does not take {shape}, or was refused")
    run = reference if version == "bound" else step(versions[version])
    inputs = batches(shape, DEVICE)
    seconds: list[float] = []

    def waiting(step_: Any, batch: Inputs) -> None:
        step_(batch)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def bound_first() -> tuple[tuple[Any, Inputs], dict[str, Any]]:
        batch = inputs[len(seconds) % BATCHES]
        start = time.perf_counter()
        waiting(reference, batch)
        seconds.append(time.perf_counter() - start)
        return (run, batch), {}

    benchmark.group = str(shape)
    benchmark.extra_info.update(shape=shape.as_dict())
    benchmark.pedantic(waiting, setup=bound_first, rounds=runs, warmup_rounds=WARM_UP)
    if benchmark.stats is not None:  # None with --benchmark-disable
        typical = statistics.median(seconds[WARM_UP:])
        benchmark.extra_info.update(
            bound_seconds=typical, times_bound=benchmark.stats["median"] / typical
        )


def test_kernel_stays_near_the_bound(shape: Shape, kernel: str, timings: dict[str, Timing]) -> None:
    most = AT_MOST.get(shape.name)
    if DEVICE == "cpu" and shape.dtype == torch.bfloat16:
        most = AT_MOST_BFLOAT16 if shape.kind != "per-example" else None
    if most is None:
        pytest.skip(f"no goal for {shape}")
    assert timings[kernel].ratio <= most, asdict(timings[kernel])


def test_logits_of_every_scale_take_the_same_time(shape: Shape, kernel: str, runs: int) -> None:
    if shape.name != SCALED or shape.dtype != torch.float32:
        pytest.skip(f"no goal for {shape.name}")
    own = {kernel: losses(shape, DEVICE)[kernel]}
    for scaled in scales(shape):
        usual = scaled.spread is not None and scaled.spread <= 30
        _, timing = compare_versions(scaled, own, Rounds(0, least=runs), DEVICE)
        assert timing.ratio <= (FLAT if usual else WORST), (str(scaled), asdict(timing))


@pytest.mark.parametrize(("rival", "factor"), FASTER)
def test_kernel_is_faster_than_pytorch(
    shape: Shape, kernel: str, timings: dict[str, Timing], rival: str, factor: float
) -> None:
    if DEVICE == "cpu" and (shape.name != "cpu" or shape.dtype != torch.float32):
        pytest.skip(f"no goal for {shape}")
    assert timings[rival].ratio / timings[kernel].ratio >= factor


def test_small_problem_keeps_the_host_no_longer_than_eager(
    shape: Shape, kernel: str, timings: dict[str, Timing]
) -> None:
    if shape.name != "small":
        pytest.skip("larger ones are bound by the device")
    assert timings[kernel].host_ms <= timings["eager"].host_ms


def test_kernel_is_faster_than_every_peer_on_the_catalogue(
    shape: Shape, kernel: str, timings: dict[str, Timing]
) -> None:
    if shape.name != "catalogue":
        pytest.skip("peers compute a full softmax")
    own = ("bound", "chunked", *kernels(DEVICE))
    best = min(t.ratio for name, t in timings.items() if name not in own)
    assert timings[kernel].ratio < best, {k: t.ratio for k, t in timings.items()}


def test_corrections_cost_next_to_nothing(shape: Shape, kernel: str, runs: int) -> None:
    if DEVICE == "cpu" and shape.name != "cpu":
        pytest.skip(f"no goal for {shape.name}")
    ladder = compare_levels(shape, kernel, Rounds(0, least=runs), DEVICE)
    assert ladder[-1].ratio <= OVERHEAD, [asdict(t) for t in ladder]


@pytest.mark.skipif(DEVICE != "cpu", reason="reads /proc")
def test_kernel_needs_a_fraction_of_the_memory_of_eager(shape: Shape, kernel: str) -> None:
    """5% of the logits, which eager makes more than once; per example a tenth of eager's."""
    if shape.kind != "per-example" and shape.logits_bytes < 100e6:
        pytest.skip("resident sizes repeat to a megabyte, which is much of these logits")
    eager, peak = peak_memory("eager", shape), peak_memory(kernel, shape)
    if shape.kind == "per-example":
        assert peak <= 0.1 * eager
    else:
        assert eager > shape.logits_bytes  # a peak that is measured wrongly must not pass
        assert peak <= 0.05 * shape.logits_bytes
