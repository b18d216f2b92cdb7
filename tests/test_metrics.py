"""Accuracy, reciprocal rank and NDCG, by their formulas, over all rows and by domain."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dwl_kernels import accuracy_at, mrr, ndcg_at

RANK = torch.tensor([[1, 2, 0], [11, 3, 1]])


def test_means_leave_out_rows_without_a_rank() -> None:
    assert accuracy_at(RANK, 1).item() == pytest.approx(2 / 5)
    assert accuracy_at(RANK, 3).item() == pytest.approx(4 / 5)
    assert mrr(RANK).item() == pytest.approx((1 + 1 / 2 + 1 / 11 + 1 / 3 + 1) / 5)
    assert ndcg_at(RANK, 10).item() == pytest.approx((1 + 1 / math.log2(3) + 1 / 2 + 1) / 5)
    assert accuracy_at(torch.zeros(3, dtype=torch.int64), 1).isnan()


def test_every_domain_has_the_mean_of_its_rows() -> None:
    domains = torch.tensor([[0, 0, 1], [2, -1, 2]])
    for metric in (lambda r, **o: ndcg_at(r, 10, **o), mrr, lambda r, **o: accuracy_at(r, 2, **o)):
        found = metric(RANK, domain_ids=domains, num_domains=4)
        assert found[0] == metric(torch.tensor([1, 2]))
        assert found[2] == metric(torch.tensor([11, 1]))
        assert found[[1, 3]].isnan().all()  # no rank, no rows
    assert mrr(RANK, domain_ids=domains).shape == (3,)


def test_row_of_several_domains_counts_in_each() -> None:
    several = torch.tensor([[0, 1], [1, -1], [-1, -1], [0, 1]])
    found = accuracy_at(torch.tensor([1, 5, 1, 5]), 1, domain_ids=several)
    assert found.tolist() == pytest.approx([1 / 2, 1 / 3])


def test_no_rows_have_no_mean() -> None:
    nobody = torch.zeros(0, dtype=torch.int64)
    assert mrr(nobody).isnan()
    assert mrr(nobody, domain_ids=nobody, num_domains=2).isnan().all()
    assert mrr(nobody, domain_ids=nobody).shape == (0,)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"rank": RANK.float()}, TypeError, "rank has dtype torch.float32"),
        ({"k": 0}, ValueError, "k is 0; wanted at least 1"),
        ({"k": 1.5}, TypeError, "k is a float"),
        ({"num_domains": 3}, ValueError, "without domain_ids"),
        ({"domain_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, "a domain per rank"),
        ({"domain_ids": torch.full((2, 3), 4), "num_domains": 4}, IndexError, "holds 4"),
        ({"domain_ids": torch.full((2, 3), -2)}, IndexError, "holds -2"),
        ({"domain_ids": torch.zeros(2, 3, 2).long()}, ValueError, "names domain 0 twice in row 0"),
        ({"domain_ids": torch.zeros(2, 3)}, TypeError, "domain_ids has dtype"),
    ],
)
def test_bad_input_is_named(changed: dict[str, Any], error: type, message: str) -> None:
    arguments: dict[str, Any] = {"rank": RANK, "k": 1}
    accuracy_at(**arguments)
    with pytest.raises(error, match=message):
        accuracy_at(**{**arguments, **changed})
