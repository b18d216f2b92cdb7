"""Blocks of rows: what comes to the second block, and to the last, shorter one."""

from __future__ import annotations

import cases
import pytest
import torch

from dwl_kernels import backends
from dwl_kernels.core import build, candidates, drawn
from dwl_kernels.core.problem import Problem

LOGITS, NUMBERS = 200, 4000  # at once, of shared candidates, and where each row has its own


# Of the CPU kernel, what the dual scale makes of the rows goes over the same blocks.
SEVERAL = [
    (name, case, dtype)
    for case in cases.CASES
    for name in ("chunked", "cpu")
    for dtype in (torch.float64, torch.float32)
    if case.rows * case.candidates > LOGITS and (name == "chunked" or case.kind == "dual")
]


@pytest.mark.parametrize(
    ("name", "case", "dtype"), SEVERAL, ids=lambda value: getattr(value, "name", str(value))
)
def test_rows_in_several_blocks_are_the_reference(
    monkeypatch: pytest.MonkeyPatch, name: str, case: cases.Case, dtype: torch.dtype
) -> None:
    if (reason := backends.unavailable_reason(name, "cpu")) is not None:
        pytest.skip(reason)
    most = NUMBERS if case.kind in ("indexed_rows", "rows") else LOGITS
    monkeypatch.setattr(candidates, "BLOCK_ELEMENTS", {"cpu": most})
    cases.check(case, name, dtype)


def problem_of(rows: int, num_candidates: int, dim: int, per_row: bool) -> Problem:
    query, table = torch.zeros(rows, dim), torch.zeros(num_candidates, dim)
    options = dict.fromkeys(
        ("positive_log_q", "negative_log_q", "domain_ids", "domain_weights", "example_weights")
    )
    options |= {"temperature": None, "correction": "standard", "reduction": "mean"}
    if not per_row:
        ids = {"positive_ids": None, "negative_ids": None}
        return build.sampled_problem(query, query, table, **options, **ids)
    ids = torch.zeros(rows, num_candidates, dtype=torch.int64)
    return drawn.per_row_problem(query, table, ids[:, 0], ids, **options)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 17])
@pytest.mark.parametrize("most", [1, 39, 40, 41, 160, 1000, 1 << 20])
def test_blocks_hold_every_row_once_and_no_more_than_fits(
    monkeypatch: pytest.MonkeyPatch, most: int, rows: int, per_row: bool
) -> None:
    monkeypatch.setattr(candidates, "BLOCK_ELEMENTS", {"cpu": most})
    problem = problem_of(rows, 10, 4, per_row)
    of_row = 10 * (4 if per_row else 1)  # logits, or the candidates themselves
    blocks = list(candidates.row_blocks(problem))
    assert [row for b in blocks for row in range(b.start, b.stop)] == [*range(rows)]
    largest = max(b.stop - b.start for b in blocks)
    assert largest == min(rows, max(most // of_row, 1))
    assert len(blocks) == -(-rows // largest)
