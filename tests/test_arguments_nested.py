"""Nested tensors are refused with a mend that works."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from argument_inputs import DOMAINS, IDS, NEGATIVE_IDS, QUERY, TABLE

from dwl_kernels import (
    CumulativeCrossEntropy,
    DynamicWeightedSampledSoftmax,
    full_softmax_loss,
)

# ---------------------------------------------------------------- nested tensors


def jagged(values: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([values[:2], values[2:]], layout=torch.jagged)


def strided(values: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a prototype
        return torch.nested.nested_tensor([values[:2], values[2:]])


def with_gaps(values: torch.Tensor) -> torch.Tensor:
    """Of two sequences of which only parts count."""
    padded = torch.full((2, 4, *values.shape[1:]), 77, dtype=values.dtype)
    padded[0, :2], padded[1, 1:2] = values[:2], values[2:]
    return torch.nested.narrow(
        padded, 1, torch.tensor([0, 1]), torch.tensor([2, 1]), layout=torch.jagged
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nested", [jagged, strided, with_gaps])
@pytest.mark.parametrize("kind", ["function", "module", "module of a table"])
def test_nested_tensors_are_refused_with_a_mend_that_works(kind: str, nested: Any) -> None:
    named: dict[str, Any] = {
        "query": QUERY,
        "target": torch.tensor(IDS),
        "example_weights": torch.tensor([1.0, 0.0, 2.0]),
        "domain_ids": torch.tensor(DOMAINS),
    }

    def run(query: Any, target: Any, example_weights: Any, domain_ids: Any) -> torch.Tensor:
        rows = {"example_weights": example_weights, "domain_ids": domain_ids}
        if kind == "function":
            weights = torch.tensor([0.5, 2.0])
            return full_softmax_loss(query, TABLE, target, domain_weights=weights, **rows)
        if kind == "module":
            return CumulativeCrossEntropy(weights=[0.5, 2.0])(query, TABLE, target, **rows)
        loss_fn = DynamicWeightedSampledSoftmax(weights=[0.5, 2.0])
        negative_ids = torch.tensor(NEGATIVE_IDS)
        return loss_fn(query, table=TABLE, positive_ids=target, negative_ids=negative_ids, **rows)

    for name, value in named.items():
        given = {**named, name: nested(value)}
        with pytest.raises(TypeError, match=r"is a nested tensor; pass the rows .*dense") as caught:
            run(**given)
        message = str(caught.value)
        called, mend = message.split()[0], message.split(", ")[1]
        given[name] = eval(mend, {"torch": torch, called: given[name]})
        assert torch.equal(run(**given), run(**named))


def test_gradient_flows_through_the_mend_of_nested_tensors() -> None:
    rows = jagged(QUERY).requires_grad_()
    full_softmax_loss(rows.values(), TABLE, torch.tensor(IDS)).backward()
    plain = QUERY.clone().requires_grad_()
    full_softmax_loss(plain, TABLE, torch.tensor(IDS)).backward()
    torch.testing.assert_close(rows.grad.values(), plain.grad)
