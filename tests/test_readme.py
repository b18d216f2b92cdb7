"""The README: its figures are those of the committed results, its example runs."""

from __future__ import annotations

import re

import torch

import dwl_kernels
from benchmarks import readme


def test_every_figure_is_that_of_a_committed_result() -> None:
    text = readme.README.read_text("utf-8")
    assert readme.filled(text) == text, "run python -m benchmarks.readme"


def test_example_runs_as_it_stands() -> None:
    example = re.findall(r"```python\n(.*?)```", readme.README.read_text("utf-8"), re.DOTALL)[0]
    item_domains = torch.randint(0, 4, (500,))
    items = torch.randint(0, 500, (3000,))
    table = torch.nn.Embedding(500, 16)
    positive_ids = torch.randint(0, 500, (6, 9))
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
