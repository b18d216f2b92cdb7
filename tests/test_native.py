"""The CPU kernel where its threads share the candidates, or the rows, or raise their reference.

A part of the candidates has at least 1,024, a tile up to 512, a block of rows 64 to 128, so these
problems are larger than the cases of all backends. Those cover the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

import dwl_kernels
from dwl_kernels.backends.cpu import solve as cpu

EVERYTHING = {"log_q": True, "ids": True, "domains": 2, "examples": True, "temperature": "rows"}


@pytest.fixture(autouse=True)
def _kernel() -> None:
    if cpu.does_not_build() is not None:
        pytest.skip(f"no CPU kernel: {cpu.does_not_build()}")


@pytest.fixture(params=[1, 2, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _far_candidate(inputs: cases.Inputs) -> None:
    """The last candidate, of the last part, outscores the positive of one row by 200 nats."""
    inputs["negative"][-1] = inputs["query"][9] * 0.7 * 200 / inputs["query"][9].square().sum()


def _far_positives(inputs: cases.Inputs) -> None:
    """Positives that lead by 100 nats and more: refined, they are no part of the sum."""
    inputs["positive"] += inputs["query"] * 100 / inputs["query"].square().sum(1, keepdim=True)


def _infinite_hit(inputs: cases.Inputs) -> None:
    """A candidate of log-Q -inf that is a hit of every row."""
    inputs["positive_ids"].fill_(3)
    inputs["negative_ids"].clamp_(min=4)
    inputs["negative_ids"][77] = 3
    inputs["negative_log_q"][77] = -torch.inf


def _far_apart(inputs: cases.Inputs) -> None:
    """Logits of standard deviation 130 and more."""
    inputs["query"] *= 30


def _rising(inputs: cases.Inputs) -> None:
    """Every tile has a candidate that outscores all before it, the last positive by 300 nats."""
    candidates = inputs["table" if "table" in inputs else "negative"]
    inputs["query"][:, 0] = 0.7
    candidates[:, 0] = torch.linspace(-20, 300, len(candidates)).to(candidates)


def _nan_row(inputs: cases.Inputs) -> None:
    inputs["query"][11, 3] = torch.nan


REFINED = {"correction": "refined"}
PARTS = [
    cases.Case("four parts", rows=150, candidates=4100, **EVERYTHING),
    cases.Case("two parts of two groups", rows=70, candidates=2600, **EVERYTHING),
    cases.Case("four groups", rows=515, candidates=40, **EVERYTHING),
    cases.Case("few rows of many candidates", rows=2, candidates=4100),
    cases.Case("refined", 150, 4100, **EVERYTHING, options=REFINED),
    cases.Case("rows", 150, 4100, **EVERYTHING, options={"reduction": "none"}),
    cases.Case("in-batch", rows=2100, dim=3, kind="mixed", **EVERYTHING),
    cases.Case("full", 150, 4100, kind="full", log_q=True, domains=1, temperature="scalar"),
    cases.Case("full, few items", 515, 40, kind="full", log_q=True),
    cases.Case("dual", 70, 2600, kind="dual", log_q=True, ids=True),
    cases.Case("far candidate", 150, 4100, change=_far_candidate),
    cases.Case("far, refined", 70, 2600, change=_far_positives, options=REFINED),
    cases.Case("far apart", 150, 4100, **EVERYTHING, change=_far_apart),
    cases.Case("far apart, refined", 150, 4100, change=_far_apart, options=REFINED),
    cases.Case("far apart, in-batch", rows=2100, dim=3, kind="in_batch", change=_far_apart),
    cases.Case("rising, dual", 70, 2600, kind="dual", log_q=True, change=_rising),
    cases.Case("rising", 150, 4100, **EVERYTHING, change=_rising),
    cases.Case("rising, refined", 70, 2600, **EVERYTHING, change=_rising, options=REFINED),
    cases.Case("rising, full", 150, 4100, kind="full", log_q=True, domains=1, change=_rising),
    cases.Case("NaN row", 150, 4100, **EVERYTHING, change=_nan_row),
    cases.Case("NaN row, refined", 70, 2600, **EVERYTHING, change=_nan_row, options=REFINED),
    cases.Case("infinite hit", 70, 2600, log_q=True, ids=True, change=_infinite_hit),
]

RAISED = [case for case in PARTS if case.name.startswith("rising")]


@pytest.mark.parametrize("case", PARTS, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_parts_and_groups_of_threads_are_as_exact(
    threads: int, case: cases.Case, dtype: torch.dtype
) -> None:
    cases.check(case, "cpu", dtype)


@pytest.mark.parametrize("case", [*PARTS[:3], *RAISED], ids=lambda case: case.name)
def test_threads_give_bitwise_the_same_every_time(threads: int, case: cases.Case) -> None:
    first = cases.loss_and_gradients(case, "cpu", torch.float32)
    for _ in range(3):
        again = cases.loss_and_gradients(case, "cpu", torch.float32)
        assert all(torch.equal(first[k], again[k]) for k in first)


def _full_softmax_gradients(skip_threshold: float, rise: float = 0.0) -> dict[str, Tensor]:
    """Of 200 rows over 4,100 items, of which [700, 1500) and the last are unlikely for all rows.

    Every item scores `rise` more than the one before it.
    """
    g = torch.Generator().manual_seed(2)
    leaves = {
        "query": torch.randn(200, 8, generator=g),
        "table": torch.randn(4100, 8, generator=g),
        "bias": torch.randn(4100, generator=g),
    }
    leaves["bias"][700:1500] -= 20
    leaves["bias"][-1] -= 20
    leaves["bias"] += rise * torch.arange(4100)
    for leaf in leaves.values():
        leaf.requires_grad_()
    target = torch.randint(0, 700, (200,), generator=g)
    loss = dwl_kernels.full_softmax_loss(
        **leaves, target=target, reduction="sum", skip_threshold=skip_threshold, backend="cpu"
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True))


def test_segments_below_the_threshold_are_left_out_and_no_others(threads: int) -> None:
    exact, got = _full_softmax_gradients(0.0), _full_softmax_gradients(1e-4)
    assert float(exact["bias"][700:1500].abs().min()) > 0
    zero = got["bias"] == 0
    assert torch.equal(zero, (got["table"] == 0).all(1))
    assert int(zero[700:1500].sum()) >= 600  # whole segments of 128 inside
    zero[700:1500] = False
    assert not bool(zero.any())  # the last item shares its segment with likely ones
    kept = got["bias"] != 0
    torch.testing.assert_close(got["bias"][kept], exact["bias"][kept])
    torch.testing.assert_close(got["table"][kept], exact["table"][kept])
    torch.testing.assert_close(got["query"], exact["query"], rtol=1e-5, atol=1e-5)


def test_a_threshold_above_every_weight_leaves_the_targets(threads: int) -> None:
    exact, got = _full_softmax_gradients(0.0), _full_softmax_gradients(1.5)
    assert bool((got["bias"][700:] == 0).all())
    # dL/dz of the targets, p - 1 summed by item, is all that is left.
    assert float(got["bias"].sum()) == pytest.approx(-200, abs=1.0)
    assert bool((got["bias"] <= 0).all())
    assert float(exact["bias"].sum()) == pytest.approx(0, abs=1e-3)


def test_a_threshold_leaves_out_what_a_later_tile_has_made_unlikely(threads: int) -> None:
    """Items of the first tiles lead there, and are 40 nats below the last ones."""
    exact, got = _full_softmax_gradients(0.0, 0.01), _full_softmax_gradients(1e-6, 0.01)
    first = exact["bias"][:1500]
    targets = first < 0
    assert bool((first != 0).all())
    assert torch.equal(got["bias"][:1500] != 0, targets)
    torch.testing.assert_close(got["query"], exact["query"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got["table"][-1500:], exact["table"][-1500:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("correction", ["standard", "refined"])
def test_nan_candidate_makes_nan_of_the_rows_that_compete_with_it(
    threads: int, correction: str
) -> None:
    g = torch.Generator().manual_seed(0)
    query, positive = torch.randn(70, 4, generator=g), torch.randn(70, 4, generator=g)
    negative = torch.randn(2600, 4, generator=g)
    arguments: dict[str, Any] = {
        "positive_ids": torch.arange(70),
        "negative_ids": torch.arange(2600) + 1000,
        "correction": correction,
        "reduction": "none",
        "backend": "cpu",
    }
    arguments["negative_ids"][2400] = 5  # a hit of row 5
    expected = dwl_kernels.sampled_softmax_loss(query, positive, negative, **arguments)
    negative[2400] = torch.nan
    loss = dwl_kernels.sampled_softmax_loss(query, positive, negative, **arguments)
    assert loss[5] == expected[5]
    assert bool(loss[[i for i in range(70) if i != 5]].isnan().all())


@pytest.mark.parametrize("correction", ["standard", "refined"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nan_of_any_payload_stays_nan(dtype: torch.dtype, correction: str) -> None:
    """Exponents are put together from bits, which could make a number of the bits of a NaN."""
    bits = torch.tensor([0x7FC00000, 0x7FC00155, -0x3FFF01, 0x7F800001], dtype=torch.int32)
    query = torch.ones(4, 1, dtype=dtype)
    query[:] = bits.view(torch.float32)[:, None]
    for positive in (torch.ones(4, 1, dtype=dtype), query):
        loss = dwl_kernels.sampled_softmax_loss(
            query, positive, torch.ones(9, 1, dtype=dtype),
            correction=correction, reduction="none", backend="cpu",
        )  # fmt: skip
        assert bool(loss.isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("correction", ["standard", "refined"])
def test_huge_logits_of_every_part_give_a_finite_loss(
    threads: int, correction: str, dtype: torch.dtype
) -> None:
    """One dimension, so that the logits are exact; each row's best candidate is in the last part.

    A temperature that is no power of two rounds them, and the maximum has to be rounded alike.
    """
    largest = torch.finfo(dtype).max
    values = torch.rand(2600, 1, generator=torch.Generator().manual_seed(0)).to(dtype) / 2
    values[2500] = 0.625
    positive = torch.tensor([[0.25], [0.5], [0.625]], dtype=dtype)
    query = torch.full((3, 1), largest / 4, dtype=dtype, requires_grad=True)
    loss = dwl_kernels.sampled_softmax_loss(
        query, positive, values, temperature=0.3,
        correction=correction, reduction="none", backend="cpu",
    )  # fmt: skip
    gaps = torch.tensor([0.375, 0.125, 0.0], dtype=dtype)
    expected = gaps * (largest / 4 / 0.3)
    # The last row competes with its equal.
    expected[2] = math.log(2) if correction == "standard" else 0.0
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), query)
    torch.testing.assert_close(gradient, gaps[:, None] / 0.3, rtol=1e-5, atol=1e-7)
