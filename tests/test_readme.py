"""The README: its figures are those of the committed results, its example runs."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from typing import Any

import pytest

import dwl_kernels
from benchmarks import readme


def test_every_figure_is_that_of_a_committed_result() -> None:
    text = readme.README.read_text("utf-8")
    assert readme.filled(text) == text, "run python -m benchmarks.readme"


def test_every_table_of_figures_is_written_by_the_command() -> None:
    """Outside the comments that the command fills, no table and no line holds a measured figure."""
    text = readme.README.read_text("utf-8")
    by_hand = re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->\n", "", text, flags=re.DOTALL)
    figures = re.findall(r"\d+(?:\.\d+)?(?: ms\b| MB\b| GB\b| times\b|×)", by_hand)
    assert figures == [], "write it by benchmarks/readme.py, from a committed result"


def test_changed_figure_no_longer_passes() -> None:
    text = readme.README.read_text("utf-8")
    figure = re.search(r"\d\.\d\d, \d+ MB", text)
    assert figure is not None
    changed = text.replace(figure[0], "0" + figure[0], 1)
    assert readme.filled(changed) != changed


def test_linked_files_are_committed() -> None:
    text = readme.README.read_text("utf-8")
    relative = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert relative == [], "a package index shows absolute links only"
    links = re.findall(rf"\]\((?:{readme.BLOB}|{readme.RAW})([^)#]+)\)", text)
    assert links
    assert [link for link in links if not (readme.ROOT / link).exists()] == []


@pytest.fixture(scope="module")
def speed() -> dict[str, Any]:
    return readme.read(readme.SPEED_CPU)


def test_version_that_was_not_run_says_why(speed: dict[str, Any]) -> None:
    figures = copy.deepcopy(speed["shapes"][0])
    assert readme.cell(figures, "no-such-version") == "–"
    figures["refused"], figures["too_large"] = {"a": "wrong loss"}, {"b": 24e9}
    assert readme.cell(figures, "a") == "refused"
    assert readme.cell(figures, "b") == "needs 24 GB"
    readme.by_version(figures)["eager"].pop("peak_bytes")
    assert readme.cell(figures, "eager").endswith("not measured")


def test_gpu_is_not_measured_until_its_result_is_committed(speed: dict[str, Any]) -> None:
    assert "not measured" in readme.gpu_line([speed])
    on_gpu = copy.deepcopy(speed)
    on_gpu["device"], on_gpu["machine"]["gpu"] = "cuda", "some GPU"
    assert readme.gpu_line([speed, on_gpu]) == ""
    assert "on a GPU (some GPU)" in readme.result(on_gpu)
    assert "some GPU" in readme.speed_table(on_gpu)


BLOCKS = re.findall(r"```python\n(.*?)```", readme.README.read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs_in_a_fresh_process(number: int) -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKS[number]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    if number == 0:
        losses = [float(one) for one in re.findall(r"loss (\d+\.\d+)", done.stdout)]
        assert len(losses) == 3
        assert all(0 < one < 20 for one in losses)


def test_every_public_name_is_in_the_readme() -> None:
    text = readme.README.read_text("utf-8")
    assert [name for name in dwl_kernels.__all__ if f"`{name}`" not in text] == []
