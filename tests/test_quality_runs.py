"""The command: runs are kept and not trained again, and their file is never half-written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.quality import __main__ as quality
from benchmarks.quality import factors, runs
from benchmarks.quality.factors import (
    Factors,
    LightGCN,
    RandomSplit,
    batches,
    rank_pairs,
    train_factors,
)
from benchmarks.quality.metrics import LeaveOneOut, make_groups
from benchmarks.quality.settings import METHODS, Config, Method
from dwl_kernels.examples.synthetic import synthetic

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
Trained = list[tuple[str, int]]


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


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """The runs of the command, one after the other in this process."""
    done: Trained = []

    def in_turn(
        function: Callable[..., Any], calls: dict[Any, tuple[Any, ...]], *_: Any
    ) -> Iterator[tuple[Any, Any]]:
        for key, call in calls.items():
            done.append(key)
            yield key, function(*call)

    monkeypatch.setattr(runs, "in_processes", in_turn)
    return done


def command(folder: Path, *more: str) -> list[str]:
    out = folder.parent / "out"
    return ["--data", str(folder), "--steps", "3", "--out", str(out), "--models", f"{out}/m", *more]


def test_runs_are_kept_and_a_later_command_adds_what_is_missing(
    folder: Path, trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = "--methods", "deferred;fixed"
    assert quality.main(command(folder, *methods)) == 0
    path = folder.parent / "out" / "tiny.json"
    first = path.read_text()
    # The plain model is always there, because the others are compared with it.
    assert trained == [(0, "plain"), (0, "deferred"), (0, "fixed")]
    assert path.with_suffix(".png").read_bytes().startswith(PNG_SIGNATURE)
    assert "tiny, fixed, seed 0: NDCG@10" in capsys.readouterr().out

    trained.clear()
    assert quality.main(command(folder, *methods, "--seeds", "2")) == 0
    assert trained == [(1, "plain"), (1, "deferred"), (1, "fixed")]
    assert path.read_text().splitlines()[: len(first.splitlines()) - 3] == [
        *first.splitlines()[:-3]
    ]
    document = json.loads(path.read_text())
    assert [(run["seed"], run["method"]) for run in document["runs"]] == [
        (seed, method) for seed in (0, 1) for method in ("plain", "deferred", "fixed")
    ]
    run = document["runs"][1]
    assert {"commit", "time", "versions", "seconds", "best_step", "checkpoints"} <= run.keys()
    assert document["users"]["test"]["all"] == 40
    assert set(run["test"]) == set(document["users"]["test"])
    assert list(run["validation"]) == ["all", runs.SPARSEST]
    for part in runs.PARTS:
        for group in run[part].values():
            assert {len(values) for values in group.values()} == {len(runs.STRENGTHS)}
    assert list(run["test"]["all"]) == ["NDCG@10", "Recall@10"]


def test_metrics_come_from_the_models_where_the_file_lost_them(
    folder: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quality.main(command(folder, "--methods", "plain")) == 0
    path = folder.parent / "out" / "tiny.json"
    first = path.read_text()
    path.unlink()
    monkeypatch.setattr(runs, "train", lambda *_, **__: pytest.fail("it was trained before"))
    assert quality.main(command(folder, "--methods", "plain")) == 0
    assert path.read_text() == first
    # Models of another configuration are of no use.
    path.unlink()
    with pytest.raises(pytest.fail.Exception):
        quality.main(command(folder, "--methods", "plain", "--steps", "4"))


def test_another_command_may_add_runs_to_the_file_meanwhile(
    folder: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder.parent / "out" / "tiny.json"
    whole = runs.finished

    def meanwhile(*call: Any) -> dict[str, Any]:
        if call[3] == "fixed":
            document = json.loads(path.read_text())
            document["runs"].append({**document["runs"][0], "method": "ramped"})
            path.write_text(json.dumps(document))
        return whole(*call)

    monkeypatch.setattr(runs, "finished", meanwhile)
    assert quality.main(command(folder, "--methods", "fixed")) == 0
    found = [run["method"] for run in json.loads(path.read_text())["runs"]]
    assert found == ["plain", "ramped", "fixed"]


def test_every_dial_raises_what_it_is_for(folder: Path) -> None:
    split = runs.split_of(str(folder), "domains")
    assert isinstance(split, LeaveOneOut)
    config = Config(steps=2, max_length=12, dim=8, negatives=16)
    model, _ = runs.trained_once(Method(), split, config, 0, folder)
    still, most = runs.STRENGTHS.index(0.0), len(runs.STRENGTHS) - 1
    found = {dial: runs.dial_of(dial, split, model)["test"] for dial in runs.dials(split)}
    assert list(found) == [runs.SPARSEST, runs.TILT]
    for dial in found.values():
        raised = dial[runs.SPARSEST]["Recall@10"]
        assert raised[most] >= raised[still] >= raised[0]
        assert raised[most] > raised[0]
        assert dial["all"]["NDCG@10"][still] == found[runs.TILT]["all"]["NDCG@10"][still]
    assert set(found[runs.TILT]) == {"all", runs.SPARSEST} < set(found[runs.SPARSEST])
    assert len(found[runs.SPARSEST]) == 2 + len(split.data.domain_names)
    aimed = runs.dial_of(split.data.domain_names[0], split, model)["test"]
    raised = aimed[split.data.domain_names[0]]["Recall@10"]
    assert raised[most] > raised[still] > raised[0]


def test_metrics_are_means_over_the_users_of_a_group(folder: Path) -> None:
    split = runs.split_of(str(folder), "domains")
    assert isinstance(split, LeaveOneOut)
    ranks = np.zeros((len(runs.STRENGTHS), 40), np.int64)
    ranks[3, :10] = 20
    found = runs.summary(ranks, make_groups(split, "test"), ["NDCG@10"])
    assert found["all"]["NDCG@10"] == [0.75 if n == 3 else 1.0 for n in range(len(ranks))]


def test_runs_of_another_configuration_are_not_mixed(
    folder: Path, trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quality.main(command(folder, "--methods", "plain")) == 0
    assert quality.main(command(folder, "--steps", "4")) == 1
    assert "tiny.json holds runs of another configuration" in capsys.readouterr().out
    path = folder.parent / "out" / "tiny.json"
    path.write_text(path.read_text().replace("-2.0,", "-4.0,", 1))  # of the strengths
    assert quality.main(command(folder, "--methods", "fixed")) == 1
    assert "tiny.json holds runs of another configuration" in capsys.readouterr().out


def test_interrupted_run_leaves_those_before_it(
    folder: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runs.train

    def train(method: Method, *given: Any, **options: Any) -> Any:
        if method.loss == "fixed":
            raise KeyboardInterrupt
        return whole(method, *given, **options)

    monkeypatch.setattr(runs, "train", train)
    with pytest.raises(KeyboardInterrupt):
        quality.main(command(folder, "--methods", "fixed"))
    document = json.loads((folder.parent / "out" / "tiny.json").read_text())
    assert [run["method"] for run in document["runs"]] == ["plain"]
    assert not list(folder.parent.rglob("*.tmp"))


@pytest.mark.parametrize("setting", ["beyond", "cumulative", "dual-scale", "dual-scale-shifted"])
def test_other_settings_have_files_and_tables_of_their_own(
    setting: str, folder: Path, trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    names = list(METHODS[setting])[:2]  # type: ignore[index]
    call = command(folder, "--setting", setting, "--methods", ";".join(names), "--seeds", "2")
    assert quality.main(call) == 0
    document = json.loads((folder.parent / "out" / f"tiny-{setting}.json").read_text())
    assert {run["method"] for run in document["runs"]} == set(names)
    assert document["strengths"] == [0.0] or setting == "beyond"
    assert list(document["runs"][0]["test"]) == ["all"] or setting == "beyond"
    assert names[1] in capsys.readouterr().out


def test_bad_data_is_an_error_without_traceback(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "sequences.txt").write_text("1 2 3\n2 x\n")
    assert quality.main(command(folder)) == 1
    assert "sequences.txt, line 2: expected user item item" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--methods", "plain;magic"], "'magic' is none of plain; from the start;"),
        (["--steps", "0"], "'0' is no positive integer"),
        (["--setting", "speed"], "invalid choice: 'speed'"),
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


# ---------------------------------------------------------------- matrix factorisation

SPLIT = RandomSplit(synthetic(users=60, items=100, domains=4, length=30))


def test_random_split_is_of_all_interactions_and_shifted_tests_rare_items() -> None:
    shifted = RandomSplit(SPLIT.data, shifted=True)
    counts = np.bincount(SPLIT.data.items)
    popularity = []
    for split in (SPLIT, shifted):
        sizes = np.bincount(split.part) / len(split.part)
        assert sizes == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
        popularity.append(counts[SPLIT.data.items[split.part == 2]].mean())
    assert popularity[1] < 0.8 * popularity[0]


def test_factors_train_on_the_training_part_alone() -> None:
    allowed = set(zip(*SPLIT.pairs("training"), strict=True))
    held = {*zip(*SPLIT.pairs("validation"), strict=True), *zip(*SPLIT.pairs("test"), strict=True)}
    assert not allowed & held
    config = Config(steps=30, batch_size=64)
    seen = {
        pair
        for users, items in batches(SPLIT, config, 0)
        for pair in zip(users.tolist(), items.tolist(), strict=True)
    }
    assert seen <= allowed


def test_ranks_of_factors_agree_with_brute_force() -> None:
    torch.manual_seed(0)
    model = Factors(SPLIT.data.num_users, SPLIT.data.num_items, 8)
    scores = torch.nn.functional.cosine_similarity(
        model.users.weight[:, None], model.items.weight[None], dim=2
    )
    for part, before in (("validation", 1), ("test", 2)):
        ranks = rank_pairs(model, SPLIT, part)
        for user, item, rank in list(zip(*SPLIT.pairs(part), ranks, strict=True))[:20]:
            mine = SPLIT.data.users == user
            seen = set(SPLIT.data.items[mine & (SPLIT.part < before)].tolist())
            others = [scores[user, j] for j in range(scores.shape[1]) if j not in seen]
            assert rank == sum(score > scores[user, item] for score in others)


def test_metrics_of_several_items_follow_their_formulas() -> None:
    users, _ = SPLIT.pairs("test")
    held = np.bincount(users)
    ranks = np.concatenate([np.arange(n) for n in held])
    found = factors.metrics(ranks, SPLIT, "test")
    assert found["NDCG@20"] == pytest.approx(1)
    assert found["Recall@20"] == pytest.approx(1)
    assert factors.metrics(ranks + 20, SPLIT, "test") == {"NDCG@20": 0, "Recall@20": 0}


def test_graph_mixes_neighbours_by_their_degrees() -> None:
    torch.manual_seed(0)
    model = LightGCN(SPLIT, 8)
    users, items = SPLIT.pairs("training")
    nodes = SPLIT.data.num_users + SPLIT.data.num_items
    edges = torch.zeros(nodes, nodes, dtype=torch.float64)
    edges[users, items + SPLIT.data.num_users] = 1
    edges += edges.T.clone()
    degree = edges.sum(1).clamp(min=1)
    step = edges / (degree[:, None] * degree).sqrt()
    first = torch.cat([model.users.weight, model.items.weight]).detach().double()
    layers = [first, step @ first, step @ step @ first, step @ step @ step @ first]
    wanted = torch.stack(layers).mean(0)
    found = torch.cat(model())
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)
    toward = torch.randn_like(found)
    found.backward(toward)
    mixed = toward.double()
    wanted = torch.stack([mixed, step @ mixed, step @ step @ mixed, step @ step @ step @ mixed])
    assert model.users.weight.grad is not None
    torch.testing.assert_close(
        model.users.weight.grad.double(),
        wanted.mean(0)[: SPLIT.data.num_users],
        atol=1e-6,
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "name", ["softmax", "LightGCN softmax", "hardness -0.5", "similarity -0.5", "competition -1"]
)
def test_factors_learn_with_every_strength(name: str) -> None:
    config = Config(steps=150, batch_size=256, learning_rate=1e-2, dim=16, temperature=0.2)
    trained = train_factors(METHODS["dual-scale"][name], SPLIT, config, 0)
    untrained = Factors(SPLIT.data.num_users, SPLIT.data.num_items, 16)
    least, most = (
        factors.metrics(rank_pairs(model, SPLIT, "test"), SPLIT, "test")["NDCG@20"]
        for model in (untrained, trained.model)
    )
    assert most > least + 0.05
