"""What the tables say: gains at a price, along the curve of each seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks import readme
from benchmarks.quality import claims, report
from benchmarks.quality.metrics import SPARSEST
from benchmarks.quality.settings import METHODS

STRENGTHS = [-1.0, 0.0, 1.0, 2.0]


def run(method: str, seed: int, overall: list[float], sparse: list[float]) -> dict[str, Any]:
    """On the validation items the dial is of no use."""

    def part(overall: list[float], sparse: list[float]) -> dict[str, Any]:
        return {
            "all": {"NDCG@10": overall, "Recall@10": overall},
            SPARSEST: {"NDCG@10": sparse, "Recall@10": sparse},
        }

    still = part([0.2, 0.2, 0.1, 0.0], [0.1, 0.2, 0.2, 0.2])
    served = {"validation": still, "test": part(overall, sparse)}
    return {"method": method, "seed": seed, **served}


def document(*found: dict[str, Any]) -> dict[str, Any]:
    named = {"name": "hand"}
    return {"setting": "domains", "data": named, "strengths": STRENGTHS, "runs": list(found)}


PLAIN = run("plain", 0, [0.19, 0.2, 0.196, 0.18], [0.1, 0.2, 0.24, 0.3])
OTHER = run("other", 0, [0.2, 0.19, 0.17, 0.1], [0.22, 0.26, 0.3, 0.4])


def test_gain_at_a_price_lies_between_two_strengths() -> None:
    found = report.gains(document(PLAIN), "plain", prices=(0.0, 0.01, 0.02, 0.06, 0.1, 0.5))
    # At 1% halfway from strength 0 to 1, at 6% halfway from 1 to 2; no further than the last.
    assert found[0] == pytest.approx([0, 0.1, 0.2, 0.35, 0.5, 0.5])


def test_gain_is_against_plain_of_the_same_seed_without_the_dial() -> None:
    cold = run("plain", 1, [0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1])
    one = run("other", 1, [0.09, 0.095, 0.1, 0.1], [0.2, 0.2, 0.2, 0.12])
    found = report.gains(document(PLAIN, OTHER, cold, one), "other", prices=(0.0, 0.05))
    # In parts of 0.15, what plain has of the group on average over the seeds.
    assert found == pytest.approx(np.array([[0.02, 0.06], [0.1, 0.1]]) / 0.15)


def test_price_that_cannot_be_kept_has_no_gain() -> None:
    dear = run("dear", 0, [0.1] * 4, [0.4] * 4)
    found = report.gains(document(PLAIN, dear), "dear", prices=(0.1, 0.6))
    assert np.isnan(found[0, 0])
    assert found[0, 1] == pytest.approx(1.0)
    assert str(report.mean(found[:, 0])) == "–"


def test_dial_is_chosen_on_validation_items_and_read_on_test_items() -> None:
    chosen = report.chosen(document(PLAIN, OTHER), "other", price=0.1)
    assert chosen.strength == 0  # the best of those at which validation loses nothing
    assert chosen.overall.value == pytest.approx(-0.05)
    assert chosen.gain.value == pytest.approx(0.3)
    assert chosen.validated == 0
    dear = run("dear", 0, [0.1] * 4, [0.4] * 4)
    dear["validation"] = dear["test"]
    found = document(PLAIN, OTHER, dear)
    assert np.isnan(report.chosen(found, "dear", price=0.1).validated)
    assert report.chosen(found, "dear", price=0.5).validated == pytest.approx(1.0)
    assert claims.served_table(found).splitlines()[-1] == ("| dear | 0.1000 | – | – | – | – |")


def test_weights_stand_below_plain_where_validation_items_prefer_them() -> None:
    good = run("good", 0, [0.2] * 4, [0.1, 0.3, 0.4, 0.4])
    good["validation"] = good["test"]
    rows = claims.dial_table({"ml-1m": document(PLAIN, OTHER, good)}).splitlines()[2:]
    assert rows[0].startswith("| ml-1m, 1 seed: plain | 0.2000 | +0.0; +0.0 |")
    assert rows[1].startswith("| ml-1m, 1 seed: good | 0.2000 | +100.0; +0.0 |")
    assert rows[2].startswith("| amazon-beauty | not run yet |")
    alone = claims.dial_table({"ml-1m": document(PLAIN, OTHER)}).splitlines()[2:]
    assert alone[1].startswith("| amazon-beauty | not run yet |")


def test_error_is_the_standard_error_over_seeds() -> None:
    found = report.mean([0.1, 0.2, 0.3])
    assert found.value == pytest.approx(0.2)
    assert found.error == pytest.approx(0.1 / 3**0.5)
    assert str(found) == "+20.0 ± 5.8"
    assert str(report.mean([0.1])) == "+10.0"


@pytest.mark.parametrize(
    ("t", "seeds", "p"), [(12.706, 2, 0.05), (2.776, 5, 0.05), (4.604, 5, 0.01)]
)
def test_p_values_are_those_of_the_tables_of_student(t: float, seeds: int, p: float) -> None:
    values = np.arange(seeds, dtype=float)
    values -= values.mean()
    assert report.p_value(values + t * report.mean(values).error) == pytest.approx(p, rel=0.02)
    assert np.isnan(report.p_value([0.1]))
    assert np.isnan(report.p_value([float("nan"), 0.1]))


def test_table_fits_60_columns() -> None:
    names = list(METHODS["domains"])
    found = [
        run(name, seed, [0.19, 0.2, 0.196, 0.18], [0.1, 0.2, 0.24, 0.3 + seed])
        for seed in range(2)
        for name in names
    ]
    console = Console(width=60)
    with console.capture() as shown:
        console.print(report.table(document(*found)))
    lines = shown.get().splitlines()
    assert max(map(len, lines)) <= 60
    assert not any("…" in line for line in lines)


def test_picture_has_every_method(tmp_path: Path) -> None:
    report.plot(tmp_path / "a.png", document(PLAIN, OTHER))
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_committed_tables_are_those_of_the_committed_runs() -> None:
    written = (readme.ROOT / readme.QUALITY_TABLES).read_text("utf-8")
    assert claims.tables(claims.documents_in(readme.QUALITY)) == written


def test_claims_name_what_was_not_run_and_what_was_not_reached() -> None:
    said = claims.section({}, "link", "picture")
    assert said.count("not run yet") == 3 + len(claims.DATA)
    users = {"test": {"all": 10, SPARSEST: 5, "Film-Noir": 2}}
    runs = []
    for one in (PLAIN, OTHER):
        aimed = one["test"] | {"Film-Noir": one["test"][SPARSEST]}
        runs.append(one | {"dials": {"Film-Noir": {"test": aimed, "validation": aimed}}})
    found = {**document(*runs), "users": users}
    said = claims.domain_claim(found)
    assert "At a price of 10% (plain, 1 seed) Recall@10 +50.0, NDCG@10 +50.0: not reached" in said
    own, ours = (
        {"method": f"SASRec, {name}", "seed": 0, "test": {"all": {"NDCG@5": [value]}}}
        for name, value in (("binary", 0.1), ("cumulative", 0.18))
    )
    both = {"setting": "cumulative", "runs": [own, ours]}
    assert (
        claims.cumulative_claim({"ml-1m-cumulative": both})
        == "NDCG@5 in %: ml-1m, SASRec +80.0, 1 seed: reached"
    )


def test_claim_of_the_dual_scale_is_an_average_over_data_sets() -> None:
    def of(name: str, method: str, seed: int, value: float) -> dict[str, Any]:
        found = {"all": {"NDCG@20": [value]}}
        return {"method": method, "seed": seed, "test": found, "validation": found}

    documents = {}
    for name, gains in (("ml-1m", (0.06, 0.10)), ("lastfm", (0.12, 0.12))):
        runs = [of(name, "softmax", seed, 0.1) for seed in (0, 1)]
        runs += [of(name, "softmax at 0.3", seed, 0.09) for seed in (0, 1)]
        runs += [of(name, "hardness +0.5", seed, 0.09) for seed in (0, 1)]
        runs += [of(name, "competition +1", seed, 0.1 + gains[seed] / 10) for seed in (0, 1)]
        documents[f"{name}-dual-scale"] = {"setting": "dual-scale", "runs": runs}
    colder = [of("lastfm", "competition +1 at 0.15", seed, 0.114) for seed in (0, 1)]
    better = {"setting": "dual-scale", "runs": documents["lastfm-dual-scale"]["runs"] + colder}
    assert "competition +1, the default, +14.0 ± 0.0. By data set: " in claims.dual_claim(
        {"lastfm-dual-scale": better}
    )
    assert claims.dual_claim(documents) == (
        "NDCG@20 in %: random split +10.0 ± 1.0 on average, 2 seeds: reached; "
        "competition +1, the default, +10.0 ± 1.0. By data set: "
        "ml-1m +8.0 ± 2.0 (competition +1); lastfm +12.0 ± 0.0 (competition +1)"
    )
