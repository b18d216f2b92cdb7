"""The speed benchmark compares like with like."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.record import ROOT
from benchmarks.speed import measure
from benchmarks.speed.baselines import bound, kernels, step, usual_loss
from benchmarks.speed.measure import (
    Rounds,
    batches,
    compare_levels,
    compare_padding,
    in_turn,
    is_work,
    machine_bytes,
    peak_memories,
    peak_memory,
    quartiles,
)
from benchmarks.speed.shapes import TINY, Shape

SHARED = TINY[0]
ONCE = Rounds(0, least=1)


def test_steps_are_timed_in_turn_after_a_warm_up() -> None:
    order: list[str] = []
    steps = {name: (lambda number, name=name: order.append(f"{name}{number}")) for name in "ab"}
    timings = in_turn(steps, Rounds(0, least=3), reference="a")
    assert order == [f"{name}{number}" for number in range(2 + 3) for name in "ab"]
    assert [(t.version, t.runs) for t in timings] == [("a", 3), ("b", 3)]
    assert timings[0].ratio == timings[0].ratio_low == timings[0].ratio_high == 1.0


def test_cheap_steps_take_the_most_rounds() -> None:
    (timing,) = in_turn({"a": lambda number: None}, Rounds(10, most=7), reference="a")
    assert timing.runs == 7


class FakeGPU:
    """A queue that one device works off, by a simulated clock in seconds; the host runs ahead."""

    def __init__(self) -> None:
        self.host = self.free = 0.0
        self.queue: list[str] = []

    def work(self, seconds: float, host: float, name: str = "launch") -> None:
        self.host += host
        self.free = max(self.free, self.host) + seconds
        self.queue.append(name)

    def synchronize(self) -> None:
        self.host = max(self.host, self.free)

    def event(self, enable_timing: bool) -> Any:
        def record() -> None:
            self.queue.append("event")
            event.at = max(self.free, self.host)

        event = SimpleNamespace(at=0.0, record=record)
        event.query = lambda: event.at <= self.host
        event.synchronize = lambda: setattr(self, "host", max(self.host, event.at))
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGPU:
    fake = FakeGPU()
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "synchronize", fake.synchronize)
    monkeypatch.setattr(
        torch.cuda, "_sleep", lambda clocks: fake.work(clocks / 2e9, 0.0, "spin"), raising=False
    )
    monkeypatch.setattr(measure.time, "perf_counter", lambda: fake.host)
    return fake


def test_only_launches_that_wait_for_a_busy_gpu_lie_between_the_events(gpu: FakeGPU) -> None:
    def step(number: int) -> None:
        gpu.work(70e-6, host=30e-6)  # the GPU would be idle for these 30
        gpu.work(40e-6, host=200e-6)  # and for most of these

    taken = measure.taken_by(step, 0, "cuda")
    assert gpu.queue == ["spin", "event", "launch", "launch", "event"]
    assert taken.seconds == pytest.approx(110e-6)
    assert taken.host == pytest.approx(230e-6)
    assert taken.queued


def test_slow_host_is_covered_by_a_longer_spin(gpu: FakeGPU) -> None:
    """Of 30 ms of Python before a launch of 10 us, nothing is device time."""
    (timing,) = in_turn({"a": lambda number: gpu.work(1e-5, 30e-3)}, ONCE, "a", device="cuda")
    assert timing.median_ms == pytest.approx(1e-2)
    assert timing.host_ms == pytest.approx(30)
    assert timing.queued


@pytest.mark.parametrize("wait", [lambda gpu: gpu.synchronize(), lambda gpu: gpu.work(0, 1.0)])
def test_host_time_that_cannot_be_kept_out_is_marked(
    gpu: FakeGPU, wait: Callable[[FakeGPU], None]
) -> None:
    """A step that reads a number back, or whose host takes seconds."""

    def step(number: int) -> None:
        gpu.work(1e-5, 1e-5)
        wait(gpu)
        gpu.work(1e-5, 1e-5)

    (timing,) = in_turn({"a": step}, ONCE, "a", device="cuda")
    assert not timing.queued


def test_quartiles_of_known_numbers() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


@pytest.mark.parametrize("shape", TINY, ids=str)
def test_levels_are_compared_with_the_plain_loss(shape: Shape) -> None:
    timings = compare_levels(shape, "chunked", ONCE)
    assert [t.version for t in timings] == list(shape.levels)
    assert timings[0].ratio == 1.0


def test_padding_is_compared_with_full_rows() -> None:
    timings = compare_padding(SHARED, "chunked", ONCE)
    assert [t.version for t in timings] == ["no padding", "half padded"]


def test_bound_does_the_three_products() -> None:
    inputs = batches(SHARED)[0]
    assert inputs.negative is not None
    torch.manual_seed(0)
    last = bound(SHARED)(inputs)
    torch.manual_seed(0)
    dz = torch.randn(SHARED.rows, SHARED.candidates)
    torch.testing.assert_close(last, dz.T @ inputs.query)


def test_bound_per_example_moves_the_gathered_bytes() -> None:
    shape = TINY[3]
    copied = bound(shape)(batches(shape)[0])
    assert isinstance(copied, torch.Tensor)
    moved = 2 * copied.numel() * copied.itemsize  # read, and written
    assert moved == pytest.approx(shape.gathered_bytes, abs=8)


@pytest.mark.parametrize("shape", TINY, ids=str)
def test_step_returns_the_gradients_of_all_embeddings(shape: Shape) -> None:
    inputs = batches(shape)[0]
    gradients = step(usual_loss)(inputs)
    assert isinstance(gradients, tuple)
    assert [g.shape for g in gradients] == [leaf.shape for leaf in inputs.leaves().values()]


def test_batches_are_different() -> None:
    first, second, _ = batches(SHARED)
    assert not torch.equal(first.query, second.query)


def test_kernels_of_a_cpu_are_made_for_it() -> None:
    assert set(kernels("cpu")) <= {"cpu"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_eager_holds_several_logits_matrices() -> None:
    # 1024 x 4096 logits are 17 MB, far above what the allocator rounds by.
    shape = Shape("memory", "shared", 1024, 4096, 8)
    peak = peak_memory("eager", shape)
    assert 2 * shape.logits_bytes < peak < 8 * shape.logits_bytes
    assert peak < machine_bytes("cpu")


def test_unknown_version_fails_with_its_name() -> None:
    with pytest.raises(RuntimeError, match="no-such-version"):
        peak_memory("no-such-version", SHARED)
    assert peak_memories(["no-such-version"], SHARED) == {"no-such-version": None}


def test_importing_the_benchmark_does_not_import_the_compiler() -> None:
    # It takes seconds, and every process that measures memory would carry it.
    program = "import benchmarks.speed.memory, sys; print('torch._inductor' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_what_the_profiler_books_beside_kernels_is_no_work() -> None:
    def event(name: str, device: str = "CUDA", mark: bool = False) -> Any:
        kind = SimpleNamespace(name=device)
        return SimpleNamespace(name=name, device_type=kind, is_user_annotation=mark)

    work = [event("softmax_loss_kernel"), event("Memset (Device)"), event("Memcpy DtoD")]
    others = [
        *(event("cuLaunchKernelEx", "CPU"), event("Activity Buffer Request")),
        *(event("Lazy Function Loading"), event("step", mark=True)),
    ]
    assert [e for e in (*work, *others) if is_work(e)] == work
