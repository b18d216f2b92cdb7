"""Times in turn, peak memory, and launches."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.record import ROOT
from benchmarks.speed.baselines import Loss, bound, package_loss, step
from benchmarks.speed.shapes import Inputs, Shape, random_inputs
from dwl_kernels.backends.triton.launch import release

WARM_UP = 2
# Clocks that a GPU is kept busy for while a step is queued, 1 ms and more, and at most 0.1 s.
HOLD, MOST_HOLD = 1 << 21, 1 << 27
BATCHES = 3  # different inputs take turns, so that a round finds none of its own in a cache

Round = Callable[[int], object]  # takes the number of the round


@dataclass(frozen=True)
class Timing:
    """One version's times, and how they compare with the reference round by round."""

    version: str
    runs: int
    median_ms: float  # on a GPU by device events
    low_ms: float  # quartiles
    high_ms: float
    host_ms: float  # median until the call returns; on a CPU the same
    ratio: float  # median over the rounds of this version's time over the reference's
    ratio_low: float
    ratio_high: float
    queued: bool = True  # False: the step waits for the GPU, so that host time is in its times


@dataclass(frozen=True)
class Rounds:
    """As many rounds as fit into the seconds, but no fewer and no more than these."""

    seconds: float
    least: int = 3
    most: int = 15


def compare_versions(
    shape: Shape, losses: Mapping[str, Loss], rounds: Rounds, device: str = "cpu"
) -> list[Timing]:
    """The versions against the bound, with everything on that all of them compute."""
    inputs = batches(shape, device)

    def rotating(run: Callable[[Inputs], object]) -> Round:
        return lambda number: run(inputs[number % BATCHES])

    steps = {"bound": rotating(bound(shape, device))}
    steps.update({name: rotating(step(loss)) for name, loss in losses.items()})
    return in_turn(steps, rounds, reference="bound", device=device)


def compare_levels(shape: Shape, kernel: str, rounds: Rounds, device: str = "cpu") -> list[Timing]:
    """One backend with log-Q, hits and domain weights, each on top of the one before."""
    run = step(lambda x: package_loss(x, kernel))
    steps: dict[str, Round] = {}
    for level in shape.levels:
        inputs = [random_inputs(shape, level, seed, device) for seed in range(BATCHES)]
        steps[level] = lambda number, own=inputs: run(own[number % BATCHES])  # type: ignore[misc]
    return in_turn(steps, rounds, reference="plain", device=device)


def compare_padding(shape: Shape, kernel: str, rounds: Rounds, device: str = "cpu") -> list[Timing]:
    """One backend on full rows, and with half of them padded."""
    run = step(lambda x: package_loss(x, kernel))
    full = batches(shape, device)
    padded = [inputs.half_padded() for inputs in full]
    steps: dict[str, Round] = {
        "no padding": lambda number: run(full[number % BATCHES]),
        "half padded": lambda number: run(padded[number % BATCHES]),
    }
    return in_turn(steps, rounds, reference="no padding", device=device)


def batches(shape: Shape, device: str = "cpu") -> list[Inputs]:
    return [random_inputs(shape, shape.compared_at, seed, device) for seed in range(BATCHES)]


def in_turn(
    steps: Mapping[str, Round], rounds: Rounds, reference: str, device: str = "cpu"
) -> list[Timing]:
    """Time the steps A B C, A B C, ..., so that a busy machine slows all of them alike."""
    for number in range(WARM_UP):
        start = time.perf_counter()
        for run in steps.values():
            taken_by(run, number, device)
        taken = time.perf_counter() - start  # the last one, without compilation
    holds = {name: hold_of(run, device) for name, run in steps.items()}
    runs = max(rounds.least, min(rounds.most, int(rounds.seconds / taken)))
    times: dict[str, list[Taken]] = {name: [] for name in steps}
    for number in range(WARM_UP, WARM_UP + runs):
        for name, run in steps.items():
            times[name].append(taken_by(run, number, device, holds[name]))
    timings = []
    others = [t.seconds for t in times[reference]]
    for name, own in times.items():
        low, median, high = quartiles([1e3 * t.seconds for t in own])
        ratios = [t.seconds / other for t, other in zip(own, others, strict=True)]
        ratio_low, ratio, ratio_high = quartiles(ratios)
        waited = 1e3 * statistics.median(t.host for t in own)
        queued = all(t.queued for t in own)
        timings.append(
            Timing(name, runs, median, low, high, waited, ratio, ratio_low, ratio_high, queued)
        )
    return timings


class Taken(NamedTuple):
    """Seconds of one step."""

    seconds: float  # by the device's own clock
    host: float  # until the call returns
    queued: bool  # all work was queued before the first of it ran


def taken_by(run: Round, number: int, device: str, hold: int = HOLD) -> Taken:
    """Time a step. A GPU spins for `hold` clocks first, while the host queues the whole step, so
    that between the events it never waits for the host."""
    if device != "cuda":
        start = time.perf_counter()
        run(number)
        taken = time.perf_counter() - start
        return Taken(taken, taken, True)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(hold)
    begin.record()
    start = time.perf_counter()
    run(number)
    taken = time.perf_counter() - start
    end.record()
    queued = not begin.query()  # the GPU still spins
    end.synchronize()
    return Taken(begin.elapsed_time(end) / 1e3, taken, queued)


def hold_of(run: Round, device: str) -> int:
    """The clocks that cover the host time of a step; the least where it waits for the GPU."""
    hold = HOLD
    while device == "cuda" and hold <= MOST_HOLD:
        if taken_by(run, 0, device, hold).queued:
            return 2 * hold  # the host is not always as fast
        hold *= 4
    return HOLD


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def peak_memory(version: str, shape: Shape, timeout: float = 600) -> float:
    """Bytes that a step needs above its inputs and gradients, at its peak, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.speed.memory", version]
    done = subprocess.run(
        [*command, json.dumps(shape.as_dict())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {version!r} failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def peak_memories(versions: Sequence[str], shape: Shape) -> dict[str, float | None]:
    """Peaks of several versions, two processes at a time; None where one failed."""

    def peak(version: str) -> float | None:
        try:
            return peak_memory(version, shape)
        except (RuntimeError, subprocess.TimeoutExpired):
            return None

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(versions, pool.map(peak, versions), strict=True))


def peak_on_gpu(loss: Loss, shape: Shape) -> float:
    """The same by the counters of the caching allocator, which need no process of their own."""
    inputs, run = random_inputs(shape, shape.compared_at, device="cuda"), step(loss)
    some = inputs.query[:16]
    some @ some.T  # cuBLAS keeps a workspace, which is no version's own
    release()  # what a version keeps from step to step counts
    before = torch.cuda.memory_allocated()
    run(inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run(inputs)
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before - shape.gradient_bytes)


def launches_on_gpu(loss: Loss, shape: Shape) -> tuple[int, float]:
    """Kernels, copies and fills of one step, and their time in ms."""
    inputs, run = random_inputs(shape, shape.compared_at, device="cuda"), step(loss)
    run(inputs)
    events = work_on_gpu(lambda: run(inputs))
    return len(events), sum(e.time_range.elapsed_us() for e in events) / 1e3


def work_on_gpu(run: Callable[[], object]) -> list[Any]:
    """The profiler's events of the kernels, copies and fills of a call."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        time.sleep(0.05)  # by the clock of the GPU, the first event may lie before the beginning
        run()
        torch.cuda.synchronize()
    return [event for event in profile.events() or () if is_work(event)]


def is_work(event: Any) -> bool:
    """Whether an event of the profiler is the device's own work: no call, no mark, no overhead."""
    marked = event.is_user_annotation or event.name in OVERHEAD
    return event.device_type.name == "CUDA" and not marked


# What the profiler itself, or the driver, takes time for; some versions book it on the device.
OVERHEAD = {
    *("Activity Buffer Request", "Buffer Flush", "Command Buffer Full", "Driver Compiler"),
    *("Instrumentation", "Lazy Function Loading", "Resource", "Runtime Triggered Module Loading"),
    *("UVM Activity Init", "Unknown"),
}


def machine_bytes(device: str) -> float:
    """All memory of the GPU, or what this machine, or its container, gives a process."""
    if device == "cuda":
        return float(torch.cuda.get_device_properties(0).total_memory)
    found = [float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")]
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdigit():
        found.append(float(limit.read_text()))
    return min(found)
