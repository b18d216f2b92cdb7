"""The frontier of sparse domains against all: every point is there, and the choice is honest."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from rich.console import Console
from test_quality_main import folder as folder  # a fixture

from benchmarks.quality import frontier
from benchmarks.quality.frontier import Point, chosen
from benchmarks.quality.report import Change


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
