"""Domains and temperatures of rows that are refused, and those that look wrong and are not."""

from __future__ import annotations

import pytest
import torch
from good_arguments import B, good, ids

import dwl_kernels
from dwl_kernels import (
    full_softmax_loss,
    sampled_softmax_loss,
)


@pytest.mark.parametrize("bad", [5, -2, 1 << 40])
def test_domain_id_out_of_range_is_an_index_error(backend: str, bad: int) -> None:
    domain_ids = torch.tensor([0, bad, 1, -1])
    with pytest.raises(IndexError, match=rf"domain_ids holds {bad}, .*\[0, 5\), or -1"):
        sampled_softmax_loss(
            **good(domain_ids=domain_ids, domain_weights=torch.ones(5), backend=backend)
        )


def test_domain_ids_of_padding_are_not_looked_at(backend: str) -> None:
    domain_ids = torch.tensor([0, 77, 1, -1])
    loss = sampled_softmax_loss(
        **good(
            domain_ids=domain_ids,
            domain_weights=torch.ones(5),
            example_weights=torch.tensor([1, 0, 1, 1]),
            backend=backend,
        )
    )
    assert loss.isfinite()


TWICE = r"domain_ids names domain 1 twice in row 2, which looks multi-hot; .*domains_from_multi_hot"


def test_domain_named_twice_in_a_row_is_refused(backend: str) -> None:
    for domain_ids in ([[0, 1], [0, -1], [1, 1], [0, 0]], [[0, 1, 2]] * 2 + [[1, -1, 1]] * 2):
        inputs = good(domain_ids=torch.tensor(domain_ids), domain_weights=torch.ones(5))
        with pytest.raises(ValueError, match=TWICE):
            sampled_softmax_loss(**inputs, backend=backend)
        with pytest.raises(ValueError, match=TWICE):
            full_softmax_loss(
                **{k: v for k, v in inputs.items() if k not in ("positive", "negative")},
                **{"table": inputs["negative"], "target": ids(B), "backend": backend},
            )


def test_padded_rows_and_missing_domains_may_repeat(backend: str) -> None:
    domain_ids = torch.tensor([[0, 1, 2], [-1, -1, -1], [1, 1, 0], [-1, 3, -1]])
    weights = {"domain_weights": torch.ones(5), "example_weights": torch.tensor([1, 1, 0, 1])}
    got = sampled_softmax_loss(**good(domain_ids=domain_ids, **weights, backend=backend))
    domain_ids[2] = -1
    assert torch.equal(
        got, sampled_softmax_loss(**good(domain_ids=domain_ids, **weights, backend=backend))
    )


def test_flags_of_more_domains_than_two_are_never_taken_for_ids() -> None:
    flags = torch.eye(B, dtype=torch.int64)
    inputs = good(domain_ids=flags[:, :3], domain_weights=torch.ones(3))
    with pytest.raises(ValueError, match="looks multi-hot"):
        sampled_softmax_loss(**inputs)
    inputs["domain_ids"] = dwl_kernels.domains_from_multi_hot(flags[:, :3])
    assert sampled_softmax_loss(**inputs).isfinite()


@pytest.mark.parametrize("rows", [1, 4])
def test_temperature_of_one_element_is_that_of_all_rows(backend: str, rows: int) -> None:
    inputs = {k: v[:rows] for k, v in good(backend=backend).items() if k != "backend"}
    results = []
    for shape in ((), (1,)):
        temperature = torch.full(shape, 0.5, requires_grad=True)
        loss = sampled_softmax_loss(**inputs, temperature=temperature, backend=backend)
        (gradient,) = torch.autograd.grad(loss, temperature)
        assert gradient.shape == shape
        results.append((loss, gradient.view(())))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_temperature_of_another_number_of_rows_says_what_fits() -> None:
    with pytest.raises(ValueError, match=r"temperature has shape \[2\]; wanted \[4\].*\[1\]"):
        sampled_softmax_loss(**good(temperature=torch.ones(2)))
