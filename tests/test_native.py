"""The CPU kernel where its threads share the candidates, or the rows, or lose their reference.

A part of the candidates has at least 1,024, a tile up to 512, a block of rows 64 to 128, so these
problems are larger than the cases of all backends. Those cover the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import cases
import pytest
import torch
from torch import Tensor

import dwl_kernels
from dwl_kernels.backends import native

EVERYTHING = {"log_q": True, "ids": True, "domains": 2, "examples": True, "temperature": "rows"}


@pytest.fixture(autouse=True)
def _kernel() -> None:
    if native.why_not() is not None:
        pytest.skip(f"no CPU kernel: {native.why_not()}")


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


PARTS = [
    cases.Case("four parts", rows=150, candidates=4100, **EVERYTHING),
    cases.Case("two parts of two groups", rows=70, candidates=2600, **EVERYTHING),
    cases.Case("four groups", rows=515, candidates=40, **EVERYTHING),
    cases.Case("few rows of many candidates", rows=2, candidates=4100),
    cases.Case("refined", 150, 4100, **EVERYTHING, options={"correction": "refined"}),
    cases.Case("rows", 150, 4100, **EVERYTHING, options={"reduction": "none"}),
    cases.Case("in-batch", rows=2100, dim=3, kind="mixed", **EVERYTHING),
    cases.Case("full", 150, 4100, kind="full", log_q=True, domains=1, temperature="scalar"),
    cases.Case("full, few items", 515, 40, kind="full", log_q=True),
    cases.Case("dual", 70, 2600, kind="dual", log_q=True, ids=True),
    cases.Case("far candidate", 150, 4100, change=_far_candidate),
    cases.Case("far, refined", 70, 2600, change=_far_positives, options={"correction": "refined"}),
    cases.Case("infinite hit", 70, 2600, log_q=True, ids=True, change=_infinite_hit),
]


@pytest.mark.parametrize("case", PARTS, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_parts_and_groups_of_threads_are_as_exact(
    threads: int, case: cases.Case, dtype: torch.dtype
) -> None:
    cases.check(case, "cpu", dtype)


@pytest.mark.parametrize("case", PARTS[:3], ids=lambda case: case.name)
def test_threads_give_bitwise_the_same_every_time(threads: int, case: cases.Case) -> None:
    first = cases.loss_and_gradients(case, "cpu", torch.float32)
    for _ in range(3):
        again = cases.loss_and_gradients(case, "cpu", torch.float32)
        assert all(torch.equal(first[k], again[k]) for k in first)


def _full_softmax_gradients(skip_threshold: float) -> dict[str, Tensor]:
    """Of 200 rows over 4,100 items, of which [700, 1500) and the last are unlikely for all rows."""
    g = torch.Generator().manual_seed(2)
    leaves = {
        "query": torch.randn(200, 8, generator=g),
        "table": torch.randn(4100, 8, generator=g),
        "bias": torch.randn(4100, generator=g),
    }
    leaves["bias"][700:1500] -= 20
    leaves["bias"][-1] -= 20
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
