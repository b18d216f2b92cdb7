"""The speed benchmark compares like with like, and its records are whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.record import ROOT, write_json
from benchmarks.speed.__main__ import main
from benchmarks.speed.baselines import LOSSES, bound, step
from benchmarks.speed.measure import (
    batches,
    compare_levels,
    in_turn,
    peak_memory,
    quartiles,
)
from benchmarks.speed.shapes import LEVELS, Level, Shape, random_inputs
from dwl_kernels import backends

SMALL = Shape("small", 37, 53, 8)  # odd sizes, so that swapped dimensions do not fit

# Compiling takes half a minute, and computes what "eager" computes; the linear one has neither
# hits nor weights.
PRECISE = [name for name in LOSSES if name not in ("torch.compile", "linear_cross_entropy")]


def runs_here(version: str) -> None:
    reason = backends.why_not(version, "cpu") if version in backends.NAMES else None
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("version", PRECISE)
def test_versions_compute_the_same_loss_and_gradients(version: str, level: Level) -> None:
    runs_here(version)
    inputs = random_inputs(SMALL, level)
    wanted = (inputs.query, inputs.positive, inputs.negative)
    expected = LOSSES["eager"](inputs)
    found = LOSSES[version](inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted)
    )


def test_each_level_changes_the_loss() -> None:
    losses = [LOSSES["eager"](random_inputs(SMALL, level)).item() for level in LEVELS]
    assert len(set(losses)) == len(LEVELS)


def test_hits_occur_in_the_inputs() -> None:
    inputs = random_inputs(SMALL, "hits")
    assert inputs.positive_ids is not None
    assert inputs.negative_ids is not None
    hits = inputs.positive_ids[:, None] == inputs.negative_ids
    assert 0 < hits.sum() < hits.numel() / 10


def test_log_q_is_the_probability_that_the_ids_are_drawn_with() -> None:
    # 40,000 draws: the share of the smallest ids is known to a percent.
    inputs = random_inputs(Shape("many", 1, 40_000, 1), "hits")
    assert inputs.negative_ids is not None
    assert inputs.negative_log_q is not None
    for item in (1, 2, 3):
        drawn = inputs.negative_ids == item
        probability = inputs.negative_log_q[drawn][0].exp()
        assert drawn.double().mean() == pytest.approx(float(probability), rel=0.1)


def test_bound_does_the_three_products() -> None:
    inputs = batches(SMALL)[0]
    query, negative = inputs.query.detach(), inputs.negative.detach()
    last = bound(SMALL)(inputs)
    torch.testing.assert_close(last, (query @ negative.T).T @ query)


def test_steps_are_timed_in_turn_after_a_warm_up() -> None:
    order: list[str] = []
    steps = {name: (lambda _, name=name: order.append(name)) for name in "ab"}
    timings = in_turn(steps, batches(SMALL), runs=3, reference="a")
    assert "".join(order) == "ab" * (2 + 3)
    assert [t.version for t in timings] == ["a", "b"]
    assert timings[0].ratio == timings[0].ratio_low == timings[0].ratio_high == 1.0


def test_quartiles_of_known_numbers() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_levels_are_compared_with_the_plain_loss() -> None:
    runs_here("cpu")
    timings = compare_levels(SMALL, runs=1)
    assert [t.version for t in timings] == list(LEVELS)
    assert timings[0].ratio == 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_eager_holds_several_logits_matrices() -> None:
    # 1024 x 4096 logits are 17 MB, far above what the allocator rounds by.
    shape = Shape("memory", 1024, 4096, 8)
    peak = peak_memory("eager", shape)
    assert 2 * shape.logits_bytes < peak < 8 * shape.logits_bytes


def test_unknown_version_fails_with_its_name() -> None:
    with pytest.raises(RuntimeError, match="no-such-version"):
        peak_memory("no-such-version", SMALL)


def test_json_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "results" / "speed.json"
    write_json(path, {"runs": 1})
    with pytest.raises(TypeError):  # no JSON: the old file stays, and nothing is left beside it
        write_json(path, {"runs": object()})
    assert json.loads(path.read_text()) == {"runs": 1}
    assert list(path.parent.iterdir()) == [path]


def test_step_returns_the_gradients_of_all_embeddings() -> None:
    inputs = batches(SMALL)[0]
    gradients = step(LOSSES["eager"])(inputs)
    assert isinstance(gradients, tuple)
    assert [g.shape for g in gradients] == [(37, 8), (37, 8), (53, 8)]


def test_no_rounds_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--runs", "0"])
    assert caught.value.code == 2


def test_importing_the_benchmark_does_not_import_the_compiler() -> None:
    # It takes seconds, and every process that measures memory would carry it.
    program = "import benchmarks.speed.memory, sys; print('torch._inductor' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
