"""The example scripts, as a user runs them."""

from __future__ import annotations

import io
import random
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dwl_kernels import CumulativeCrossEntropy
from dwl_kernels.examples import sasrec
from dwl_kernels.examples.data import from_command_line

SHORT = {"two_tower": ["--steps", "20"], "sasrec": ["--epochs", "1"]}


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"dwl_kernels.examples.{script}", *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def grouplens(tmp_path: Path) -> Path:
    """A folder like ml-1m: 60 films, 12 users with 5 to 20 of them."""
    draw = random.Random(0)
    films = "".join(f"{film}::Film {film} (1999)::Drama|Noir\n" for film in range(1, 61))
    ratings = "".join(
        f"{user}::{film}::{draw.randint(1, 5)}::{1_000 * user + place}\n"
        for user in range(1, 13)
        for place, film in enumerate(draw.sample(range(1, 61), draw.randint(5, 20)))
    )
    every_film = "".join(f"13::{film}::4::{film}\n" for film in range(1, 61))
    (tmp_path / "movies.dat").write_text(films, "latin-1")
    (tmp_path / "ratings.dat").write_text(ratings + every_film, "utf-8")
    return tmp_path


def recommended(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.partition("user 0 gets:\n")[2].splitlines()


@pytest.mark.parametrize("script", SHORT)
def test_ten_recommendations_from_synthetic_ratings(script: str) -> None:
    done = run(script, "--users", "300", *SHORT[script])
    items = recommended(done)
    assert len(set(items)) == 10
    assert all(re.fullmatch(r"  item \d+ \(domain \d+(, domain \d+)?\)", item) for item in items)
    recall = re.search(r"Recall@\d+ (\d\.\d+)", done.stdout)
    assert recall is not None
    assert 0 <= float(recall[1]) <= 1


@pytest.mark.parametrize("script", SHORT)
def test_ten_recommendations_from_a_folder_of_ratings(script: str, grouplens: Path) -> None:
    items = recommended(run(script, "--data", str(grouplens), *SHORT[script]))
    assert len(set(items)) == 10
    titles = [re.fullmatch(r"  Film (\d+) \(1999\) \(Drama, Noir\)", item) for item in items]
    assert all(titles)
    ratings = [line.split("::") for line in (grouplens / "ratings.dat").read_text().splitlines()]
    taken = [film for user, film, *_ in ratings if user == "1"]  # in the order of time
    assert not {title[1] for title in titles if title} & set(taken[:-1])


# ---------------------------------------------------------------- two processes


def run_here(script: str, *options: str) -> str:
    """What a script prints in a process of a group, as `torchrun` starts it."""
    said, command = io.StringIO(), [script, "--users", "60", *options]
    with patch.object(sys, "argv", command), redirect_stdout(said), suppress(SystemExit):
        runpy.run_module(f"dwl_kernels.examples.{script}", run_name="__main__")
    return said.getvalue()


@pytest.mark.parametrize("script", SHORT)
def test_script_on_two_processes_prints_once(two_ranks: Any, script: str) -> None:
    first, second = two_ranks(run_here, script, *SHORT[script])
    assert len(set(first.partition("user 0 gets:\n")[2].splitlines())) == 10
    assert "user 0" not in second


def sasrec_step(sharded: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a batch, of which each process has every second sequence."""
    torch.manual_seed(0)
    model = sasrec.SASRec(11, dim=4, dropout=0.0).double()
    items = torch.randint(11, (4, 6))
    items[1, 4:] = sasrec.PADDING
    if sharded:
        sasrec.spread(model)
        items = items[torch.distributed.get_rank() :: 2]
    loss_fn = CumulativeCrossEntropy(ignore_index=sasrec.PADDING)
    loss = loss_fn(model(items[:, :-1]), model.items.weight, items[:, 1:])
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        grad: Any = parameter.grad
        gradients[name] = grad.full_tensor() if sharded else grad
        if sharded:
            held = parameter.to_local()  # type: ignore[attr-defined]
            assert held.numel() <= (parameter.numel() + 4 * 4) // 2  # a row more than half
    return loss.detach(), gradients


def test_sharded_sasrec_has_the_gradients_of_one_process(two_ranks: Any) -> None:
    loss, gradients = sasrec_step(False)
    for mine, found in two_ranks(sasrec_step, True):
        torch.testing.assert_close(mine, loss)
        torch.testing.assert_close(found, gradients)


def test_wrong_folder_ends_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script", "--data", str(tmp_path)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit, match=r"^error: .*found nothing$"):
        from_command_line("A script.", epochs=5)


@pytest.mark.parametrize("option", ["--epochs", "--users"])
def test_no_epochs_and_no_users_are_refused(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["script", option, "0"])
    with pytest.raises(SystemExit):
        from_command_line("A script.", epochs=5)
    assert f"argument {option}: 0 is less than 1" in capsys.readouterr().err
