"""The example scripts, as a user runs them."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
