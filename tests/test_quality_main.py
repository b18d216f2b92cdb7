"""The command: tables, picture and JSON, and nothing half-written when it stops early."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks.quality import __main__ as quality
from benchmarks.quality import report
from benchmarks.quality.metrics import LeaveOneOut, ndcg
from benchmarks.quality.model import SequenceModel
from benchmarks.quality.train import LOSSES, Run
from dwl_kernels.examples.synthetic import synthetic

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose time by handing work to other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty users in the format of ml-1m without ratings; small enough for a second of training."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    data = synthetic(users=40, items=80, domains=4, length=12)
    users = (" ".join(map(str, [u, *data.sequence(u)])) for u in range(data.num_users))
    items = (
        f"{number}\t{'|'.join(data.domain_names[d] for d in row if d >= 0)}"
        for number, row in enumerate(data.item_domains)
    )
    (folder / "sequences.txt").write_text("\n".join(users) + "\n")
    (folder / "item_domains.tsv").write_text("\n".join(items) + "\n")
    return folder


def command(folder: Path, *more: str) -> list[str]:
    return ["--data", str(folder), "--epochs", "1", "--negatives", "32", *more]


def test_run_writes_table_picture_and_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    more = ("--out", str(out), "--losses", ",".join(LOSSES), "--seeds", "2")
    assert quality.main(command(folder, *more)) == 0
    assert sorted(path.name for path in out.iterdir()) == ["quality-tiny.json", "quality-tiny.png"]
    assert (out / "quality-tiny.png").read_bytes().startswith(PNG_SIGNATURE)

    document = json.loads((out / "quality-tiny.json").read_text())
    assert {"commit", "machine", "versions", "config", "seeds", "dtype"} <= document.keys()
    assert document["data"]["users"] == 40
    assert [(run["loss"], run["seed"]) for run in document["runs"]] == [
        (loss, seed) for seed in (0, 1) for loss in LOSSES
    ]
    overall = document["results"][0]
    assert (overall["group"], overall["test_users"]) == ("all", 40)
    for change in overall["losses"]["dynamic"].values():
        assert change["change"] == pytest.approx(change["mean"] - change["plain"])

    printed = capsys.readouterr().out
    assert "tiny: dynamic against plain, 2 seeds" in printed
    assert "domain 4" in printed
    assert "quality-tiny.png" in printed


@pytest.mark.parametrize("stopped_in", ["train", "plot"])
def test_interrupted_run_leaves_nothing_behind(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped_in: str,
) -> None:
    def interrupt(*arguments: object) -> None:
        if isinstance(arguments[0], Path):
            arguments[0].write_bytes(b"half a picture")
        raise KeyboardInterrupt

    module = {"train": quality, "plot": report}[stopped_in]
    monkeypatch.setattr(module, stopped_in, interrupt)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quality.main(command(folder, "--out", str(out)))
    assert not out.exists() or not list(out.iterdir())


def test_earlier_results_survive_an_interrupted_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "quality-tiny.png").write_bytes(b"earlier")
    monkeypatch.setattr(report, "plot", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quality.main(command(folder, "--out", str(tmp_path)))
    assert (tmp_path / "quality-tiny.png").read_bytes() == b"earlier"


def test_bad_data_is_an_error_without_traceback(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "sequences.txt").write_text("1 2 3\n2 x\n")
    assert quality.main(command(folder)) == 1
    printed = capsys.readouterr().out
    assert "sequences.txt, line 2: expected user item item" in printed


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            ["--losses", "dynamic,magic"],
            f"'magic' is none of {','.join(LOSSES)}",
        ),
        (["--epochs", "0"], "'0' is no positive integer"),
        (["--calibration", "2"], "2 is not in"),
        (["--weight-range", "4", "1"], "0 < LOW <= HIGH"),
        (["--learning-rate", "-1"], "-1 is not positive"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    option: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        quality.main(option)
    assert message in capsys.readouterr().err


def test_output_folder_that_cannot_be_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(SystemExit):
        quality.main(["--out", str(tmp_path / "taken")])
    assert "taken is no folder that can be written to" in capsys.readouterr().err


# ---------------------------------------------------------------- the comparison


def run(loss: str, seed: int, ranks: np.ndarray) -> Run:
    model = SequenceModel(2, 2, dim=2)
    return Run(loss, seed, ranks, 1, [0.1], 1.0, 0.5, [], model)  # type: ignore[arg-type]


def test_change_is_paired_by_user_and_its_error_comes_from_the_users() -> None:
    rng = np.random.default_rng(0)
    plain, other = rng.integers(0, 15, (2, 3, 50))  # 3 seeds, 50 users
    runs = [run("plain", s, plain[s]) for s in range(3)]
    runs += [run("dynamic", s, other[s]) for s in range(3)]
    members = np.arange(50) < 20
    change = report.compare(runs, "dynamic", "NDCG@10", report.Group("some", 1, members))
    difference = (ndcg(other) - ndcg(plain))[:, :20].mean(0)
    assert change.change == pytest.approx(difference.mean())
    assert change.standard_error == pytest.approx(difference.std(ddof=1) / 20**0.5)
    assert change.mean == pytest.approx(ndcg(other)[:, :20].mean())
    assert change.std == pytest.approx(ndcg(other)[:, :20].mean(1).std(ddof=1))


def test_groups_count_a_user_for_every_domain_of_the_test_item() -> None:
    split = LeaveOneOut(synthetic(users=200, items=120, domains=8, length=12))
    groups = report.make_groups(split)
    assert [g.name for g in groups[:2]] == ["all", "sparsest ¼"]
    assert groups[0].users == 200
    domains = groups[2:]
    sizes = [g.interactions for g in domains]
    assert sizes == sorted(sizes, reverse=True)
    slots = split.data.item_domains[split.target("test")]
    assert sum(g.users for g in domains) == (slots >= 0).sum()
    assert groups[1].users == (domains[-1].members | domains[-2].members).sum()


@pytest.mark.parametrize("loss", LOSSES[1:])
def test_table_fits_60_columns(loss: str) -> None:
    split = LeaveOneOut(synthetic(users=200, items=120, domains=8, length=12))
    ranks = torch.randint(20, (2, 200)).numpy()
    runs = [run("plain", 0, ranks[0]), run(loss, 0, ranks[1])]
    # The widest numbers of ml-1m, and a change of a tenth.
    groups = [
        replace(g, interactions=1_000_209, name="Documentary") for g in report.make_groups(split)
    ]
    table = report.table(runs, loss, groups, "title")
    assert Console(width=200, quiet=True).measure(table).maximum <= 60
