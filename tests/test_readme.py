"""The README: its figures are those of the committed results, its example runs."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch

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
    links = re.findall(r"\]\((?!http)([^)#]+)\)", readme.README.read_text("utf-8"))
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
    assert readme.result(on_gpu).startswith("On a GPU (some GPU), ")
    assert "some GPU" in readme.speed_table(on_gpu)


def test_example_runs_as_it_stands() -> None:
    example = re.findall(r"```python\n(.*?)```", readme.README.read_text("utf-8"), re.DOTALL)[0]
    item_domains = torch.randint(0, 4, (500,))
    items = torch.randint(0, 500, (3000,))
    table = torch.nn.Embedding(500, 16)
    positive_ids = items[torch.randint(0, 3000, (6, 9))]  # seen, so none has log-Q -inf
    query = torch.randn(6, 9, 16, requires_grad=True)
    exec(
        example,
        {
            "users": torch.randint(0, 50, (3000,)),
            "items": items,
            "domains": item_domains[items],
            "item_domains": item_domains,
            "item_counts": torch.bincount(items, minlength=500),
            "table": table,
            "positive_ids": positive_ids,
            "query": query,
            "mask": torch.rand(6, 9) > 0.3,
        },
    )
    assert query.grad is not None
    assert query.grad.isfinite().all()


def test_every_public_name_is_in_the_readme() -> None:
    text = readme.README.read_text("utf-8")
    assert [name for name in dwl_kernels.__all__ if f"`{name}`" not in text] == []
