"""The frontier of sparse domains against all: every point is there, and the choice is honest."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from test_quality_main import folder as folder  # a fixture

from benchmarks.quality import frontier
from benchmarks.quality.frontier import Point, chosen
from benchmarks.quality.metrics import LeaveOneOut
from benchmarks.quality.report import Change
from benchmarks.quality.train import Config, measure_domains
from dwl_kernels.examples.synthetic import synthetic


def point(high: float, overall: float, sparse: float, method: str = "dynamic") -> Point:
    """Its changes on the validation items; on the test items everything is lost."""

    def changes(overall: float, sparse: float) -> dict[str, Change]:
        pairs = {"all": overall, "sparsest ¼": sparse}
        return {name: Change(0.2, 0.0, 0.2, change, 0.01) for name, change in pairs.items()}

    parts = {"validation": changes(overall, sparse), "test": changes(-0.2, -0.2)}
    return Point(method, high, parts)  # type: ignore[arg-type]


def test_range_that_lifts_most_at_a_small_price_is_chosen_on_the_validation_items() -> None:
    points = [point(2, 0.001, 0.02), point(4, -0.0019, 0.05), point(8, -0.0021, 0.09)]
    best = chosen([*points, point(16, 0.1, 0.1, "bonus")])
    assert best is not None
    assert best.high == 4
    assert chosen(points[2:]) is None


def test_every_part_is_ranked_with_the_bonus_of_every_range(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    split = LeaveOneOut(synthetic(users=30, items=60, domains=3, length=8))
    config = Config(epochs=1, max_length=8)
    model: Any = object()
    monkeypatch.setattr(frontier, "train", lambda *args: SimpleNamespace(model=model, args=args))
    monkeypatch.setattr(
        frontier,
        "rank_targets",
        lambda found, split, part, bonus=None: (found is model, part, bonus),
    )
    threads = torch.get_num_threads()
    ranks, served = frontier.ranks_of_model("plain", split, config, 0, [2.0, 8.0])
    torch.set_num_threads(threads)
    assert ranks == {part: (True, part, None) for part in ("validation", "test")}
    assert list(served) == [2.0, 8.0]
    domains = torch.from_numpy(split.data.item_domains)
    for high, by_part in served.items():
        weights = measure_domains(split, replace(config, weight_range=(1.0, high)))
        for part, (own, said, bonus) in by_part.items():
            assert (own, said) == (True, part)
            torch.testing.assert_close(bonus, weights.log_weight(domains))
    assert frontier.ranks_of_model("dynamic", split, config, 0, [2.0])[1] == {}
    torch.set_num_threads(threads)


def test_every_point_is_trained_with_its_own_range_and_calibration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[Any, Any] = {}

    def in_processes(function: Any, calls: dict[Any, Any], jobs: int) -> Any:
        asked.update(calls)
        ranks = {part: np.zeros(3, np.int64) for part in ("validation", "test")}
        return [(name, (ranks, dict.fromkeys((2.0, 8.0), ranks))) for name in calls]

    monkeypatch.setattr(frontier, "in_processes", in_processes)
    config, split = Config(epochs=1, max_length=8), object()
    console = Console(quiet=True)
    frontier.all_ranks(split, config, [2.0, 8.0], 2, 1, console)  # type: ignore[arg-type]
    trained = {
        name: (loss, c.weight_range, c.calibration) for name, (loss, _, c, *_) in asked.items()
    }
    assert (
        trained.pop(("plain", 1.0, 0))
        == trained.pop(("plain", 1.0, 1))
        == (
            *("plain", config.weight_range),
            0.0,
        )
    )
    for (method, high, _), found in trained.items():
        loss, _, calibrated = method.partition(", ")
        assert found == (loss, (1.0, high), float(bool(calibrated)))
    assert len(trained) == 3 * 2 * 2


def test_frontier_has_every_method_and_range(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["--data", str(folder), "--epochs", "1", "--highs", "4,2", "--out", str(tmp_path)]
    assert frontier.main(call) == 0
    assert (tmp_path / "frontier-tiny.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / "frontier-tiny.json").read_text())
    found = [(point["method"], point["high"]) for point in document["points"]]
    methods = ("dynamic", "dynamic, calibrated", "fixed", "bonus")
    assert sorted(found) == sorted((method, high) for method in methods for high in (2, 4))
    for one in document["points"]:
        for part in ("validation", "test"):
            assert list(one["changes"][part]) == ["all", "sparsest ¼"]
            plain = document["points"][0]["changes"][part]["all"]["plain"]
            assert one["changes"][part]["all"]["plain"] == plain  # one rival for all
    assert "chosen on the validation items" in capsys.readouterr().out


def test_table_fits_60_columns() -> None:
    points = [point(16, -0.12, 0.22, method) for method in ("dynamic, calibrated", "bonus")]
    table = frontier.table(points, "title")
    assert Console(width=200, quiet=True).measure(table).maximum <= 60


@pytest.mark.parametrize("text", ["1", "0.5,2", "2,inf", "2,x", ""])
def test_highs_that_are_no_weights_are_refused(text: str) -> None:
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        frontier.highs_of(text)
