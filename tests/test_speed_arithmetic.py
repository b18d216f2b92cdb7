"""What the speed benchmark makes of the times that it takes, and what every timed call gets."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed import measure, report
from benchmarks.speed.baselines import bound, usual_loss
from benchmarks.speed.measure import BATCHES, WARM_UP, Rounds, batches, in_turn
from benchmarks.speed.shapes import TINY, Inputs, Shape, random_inputs

SHARED = TINY[0]


class Clock:
    """A clock that steps move, by so many seconds each time that they run."""

    def __init__(self) -> None:
        self.now = 0.0

    def step(self, *seconds: float) -> Callable[[int], None]:
        def run(number: int) -> None:
            self.now += seconds[number]

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock.now)
    return clock


def test_times_are_milliseconds_and_ratios_are_of_the_same_round(clock: Clock) -> None:
    warm = (9.0,) * WARM_UP
    steps = {
        "bound": clock.step(*warm, 0.001, 0.002, 0.004, 0.008, 0.016),
        "other": clock.step(*warm, 0.006, 0.004, 0.002, 0.016, 0.008),  # 6, 2, 1/2, 2, 1/2 times
    }
    first, second = in_turn(steps, Rounds(0, least=5), reference="bound")
    assert (first.low_ms, first.median_ms, first.high_ms) == pytest.approx((2, 4, 8))
    assert (first.ratio_low, first.ratio, first.ratio_high) == (1, 1, 1)
    assert (second.low_ms, second.median_ms, second.high_ms) == pytest.approx((4, 6, 8))
    assert (second.ratio_low, second.ratio, second.ratio_high) == pytest.approx((0.5, 2, 2))
    assert (first.host_ms, second.host_ms) == pytest.approx((4, 6))


@pytest.mark.parametrize(("seconds", "runs"), [(0.0, 3), (2.6, 5), (100.0, 15)])
def test_as_many_rounds_as_fit_into_the_seconds(clock: Clock, seconds: float, runs: int) -> None:
    """By the last round of the warm-up; the first one compiles."""
    steps = {name: clock.step(100.0, *[0.25] * 30) for name in "ab"}
    timings = in_turn(steps, Rounds(seconds, least=3, most=15), reference="a")
    assert [t.runs for t in timings] == [runs, runs]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Inputs]]:
    """What every step was called with, in turn; the steps compute nothing."""
    found: list[tuple[str, Inputs]] = []
    monkeypatch.setattr(measure, "bound", lambda *_: lambda x: found.append(("bound", x)))
    monkeypatch.setattr(measure, "step", lambda loss: lambda x: found.append((loss, x)))
    return found


def alike(first: Inputs, second: Inputs) -> bool:
    return torch.equal(first.query, second.query)


def assert_rotated(found: list[Inputs]) -> None:
    """No call gets the inputs of the one before, and all batches take their turns."""
    assert not any(alike(one, next) for one, next in pairwise(found))
    assert all(alike(one, third) for one, third in zip(found, found[BATCHES:], strict=False))


def test_every_round_gets_other_inputs_and_every_version_the_same(
    calls: list[tuple[str, Inputs]],
) -> None:
    losses: Any = {"first": "first", "second": "second"}
    measure.compare_versions(SHARED, losses, Rounds(0, least=5))
    by_name = {n: [x for name, x in calls if name == n] for n in ("bound", "first", "second")}
    for found in by_name.values():
        assert len(found) == WARM_UP + 5
        assert_rotated(found)
    assert all(a is b is c for a, b, c in zip(*by_name.values(), strict=True))


def test_levels_get_their_own_inputs_in_turn(calls: list[tuple[str, Inputs]]) -> None:
    measure.compare_levels(SHARED, "chunked", Rounds(0, least=4))
    levels = len(SHARED.levels)
    for place in range(levels):
        found = [x for _, x in calls[place::levels]]
        assert_rotated(found)
        for x in found:
            on = (x.positive_log_q, x.positive_ids, x.domain_ids)
            assert [one is not None for one in on] == [place >= n for n in (1, 2, 3)]


def test_padding_is_compared_on_the_same_inputs_with_half_of_the_rows(
    calls: list[tuple[str, Inputs]],
) -> None:
    measure.compare_padding(SHARED, "chunked", Rounds(0, least=4))
    full, padded = ([x for _, x in calls[place::2]] for place in (0, 1))
    assert_rotated(full)
    assert all(x.example_weights is None for x in full)
    for one, other in zip(full, padded, strict=True):
        assert one.query is other.query
        assert other.example_weights is not None
        assert int((other.example_weights == 0).sum()) == -(-SHARED.rows // 2)


class Products(TorchDispatchMode):
    """The products of matrices and their results."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[torch.Tensor, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.mm:
            self.found.append((*args[:2], out))
        return out


@pytest.mark.parametrize("shape", TINY[:3], ids=str)
def test_bound_multiplies_what_every_implementation_must(shape: Shape) -> None:
    inputs = batches(shape)[0]
    run = bound(shape)
    with Products() as products:
        run(inputs)
    candidates = {"shared": inputs.negative, "in-batch": inputs.positive, "full": inputs.table}
    query, c = inputs.query, candidates[shape.kind]
    assert c is not None
    (q, ct, z), (dz, c2, query_grad), (dzt, q2, candidate_grad) = products.found
    torch.testing.assert_close((q, ct, c2, q2), (query, c.T, c, query))
    torch.testing.assert_close(dzt, dz.T)
    torch.testing.assert_close(z, query @ c.T)
    torch.testing.assert_close(query_grad, dz @ c)
    torch.testing.assert_close(candidate_grad, dz.T @ query)
    operations = sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in products.found)
    assert operations == shape.operations


def test_memory_of_a_gpu_is_what_the_second_step_adds_less_its_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = SimpleNamespace(now=1000, peak=0, runs=0)

    def run(x: Inputs) -> None:
        state.runs += 1
        state.now += 500 if state.runs == 1 else 0  # a workspace that stays
        state.peak = max(state.peak, state.now + (9000 if state.runs == 1 else 7000))

    fakes = {
        "synchronize": lambda: None,
        "memory_allocated": lambda: state.now,
        "max_memory_allocated": lambda: state.peak,
        "reset_peak_memory_stats": lambda: setattr(state, "peak", state.now),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    inputs = random_inputs(SHARED, "plain")
    monkeypatch.setattr(measure, "random_inputs", lambda *args, device: inputs)
    monkeypatch.setattr(measure, "step", lambda loss: run)
    peak = measure.peak_on_gpu(usual_loss, SHARED)
    assert peak == 500 + 7000 - SHARED.gradient_bytes
    assert state.runs == 2


def test_launches_are_counted_and_their_microseconds_summed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spans = [SimpleNamespace(elapsed_us=lambda us=us: us) for us in (10.0, 200.0, 3000.0)]
    events = [SimpleNamespace(time_range=span) for span in spans]
    monkeypatch.setattr(measure, "work_on_gpu", lambda run: events)
    monkeypatch.setattr(measure, "random_inputs", lambda *args, device: None)
    monkeypatch.setattr(measure, "step", lambda loss: lambda x: None)
    assert measure.launches_on_gpu(usual_loss, SHARED) == (3, pytest.approx(3.21))


def test_report_shows_half_of_what_lies_between_the_quartiles() -> None:
    row: dict[str, Any] = {"version": "cpu", "median_ms": 20.0, "low_ms": 17.0, "high_ms": 23.0}
    row |= {"ratio": 1.25, "peak_bytes": 3e6}
    figures: dict[str, Any] = {"shape": SHARED.as_dict(), "level": "plain", "bound": {}}
    figures |= {"versions": [row], "errors": {"cpu": {"loss": 1e-7, "gradient": 3e-6}}}
    figures |= {"failed": {}, "too_large": {}, "refused": {}}
    cells = [next(iter(column.cells)) for column in report.shape_table(figures).columns]
    assert cells == ["cpu", "20", "15%", "1.25", "3", "3e-06"]
