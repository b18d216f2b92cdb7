"""What is known of the rows of a loss, on every backend, against the formula row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cases
import formulas
import pytest
import torch
from torch import Tensor

import dwl_kernels
from dwl_kernels import SoftmaxStatistics, softmax_statistics

# Logits of 1e4 overflow without the maximum that the formulas leave out.
KNOWN = [
    replace(case, rows=min(case.rows, 17), candidates=min(case.candidates, 33))
    for case in cases.CASES
    if "large logits" not in case.name
]
LOSSES = {
    "sampled": dwl_kernels.sampled_softmax_loss,
    "rows": dwl_kernels.sampled_softmax_loss,
    "in_batch": dwl_kernels.in_batch_softmax_loss,
    "mixed": dwl_kernels.in_batch_softmax_loss,
    "full": dwl_kernels.full_softmax_loss,
    "indexed": dwl_kernels.indexed_sampled_softmax_loss,
    "indexed_rows": dwl_kernels.indexed_sampled_softmax_loss,
    "dual": dwl_kernels.dual_scale_softmax_loss,
}


def detached(inputs: cases.Inputs) -> cases.Inputs:
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def wide(inputs: cases.Inputs) -> cases.Inputs:
    return {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }


def compare(kind: str, inputs: cases.Inputs, backend: str, margin: float) -> None:
    both_ids = "query_ids" in inputs and ("ids" in inputs or "positive_ids" in inputs)
    if backend == "cuda" and (both_ids or kind in cases.NOT_IN_CUDA):
        pytest.skip("the cuda backend does not take this loss")
    found = softmax_statistics(LOSSES[kind], **inputs, backend=backend)
    lse, log_p, rank = formulas.statistics(kind, wide(inputs))
    assert found.rank.dtype == torch.int64
    assert torch.equal(found.rank, rank)
    for got, expected in ((found.log_sum_exp, lse), (found.log_probability, log_p)):
        finite = expected[expected.isfinite()].abs()
        scale = float(finite.max()) if len(finite) else 1.0
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=margin * max(scale, 1.0))


@pytest.mark.parametrize("known", KNOWN, ids=lambda case: case.name)
def test_statistics_of_every_case_are_the_formula(backend: str, known: cases.Case) -> None:
    compare(known.kind, detached(known.inputs(torch.float64)), backend, 1e-11)


@pytest.mark.parametrize(
    "known", [c for c in KNOWN if "everything" in c.name], ids=lambda c: c.name
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_keep_ranks(backend: str, known: cases.Case, dtype: torch.dtype) -> None:
    compare(known.kind, detached(known.inputs(dtype)), backend, 4e-6)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("correction", ["standard", "refined"])
def test_ties_come_before_the_positive(backend: str, kind: str, correction: str) -> None:
    """Whole numbers, and for every positive a candidate of its embedding."""
    case = cases.Case(
        f"ties {kind}", rows=21, candidates=600 if backend == "cpu" else 43, kind=kind
    )
    inputs = detached(case.inputs(torch.float64))
    for name in ("query", "positive", "negative", "table"):
        if name in inputs:
            inputs[name] = (inputs[name] * 2).round().float()
    if "positive" in inputs and "negative" in inputs:
        if kind == "rows":
            inputs["negative"][:, 7] = inputs["positive"]
        else:
            inputs["negative"][:21] = inputs["positive"]
    elif "positive" in inputs:
        inputs["positive"][10:20] = inputs["positive"][:10]
    else:
        inputs["table"][20:40] = inputs["table"][:20]
    inputs["temperature"] = 0.5
    if kind != "full":
        inputs["correction"] = correction
    compare(kind, inputs, backend, 4e-6)


def test_rounded_products_of_equal_embeddings_tie(backend: str) -> None:
    """A candidate of the positive's embedding is ahead of it, wherever it stands."""
    g = torch.Generator().manual_seed(0)
    query, positive = torch.randn(30, 33, generator=g), torch.randn(30, 33, generator=g)
    others = torch.randn(600, 33, generator=g)
    places = torch.randperm(630, generator=g)
    loss = dwl_kernels.sampled_softmax_loss
    alone = softmax_statistics(loss, query, positive, others, temperature=0.3, backend=backend)
    for i in range(0, 30, 7):
        again = torch.cat((positive, others))[places]
        row = slice(i, i + 1)
        found = softmax_statistics(
            loss, query[row], positive[row], again, temperature=0.3, backend=backend
        )
        of_others = positive[torch.arange(30) != i]
        ahead = of_others.double() @ query[i].double() > positive[i].double() @ query[i].double()
        assert found.rank.item() == alone.rank[i].item() + 1 + int(ahead.sum())


def test_statistics_are_the_loss_without_its_weights(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    query, positive = torch.randn(2, 9, 6, generator=g), torch.randn(2, 9, 6, generator=g)
    options: dict[str, Any] = {"temperature": torch.tensor(0.5), "backend": backend}
    weights = torch.rand(2, 9, generator=g) + 0.5
    weights[0, 3:6] = 0
    loss = dwl_kernels.in_batch_softmax_loss
    found = softmax_statistics(loss, query, positive, example_weights=weights, **options)
    assert isinstance(found, SoftmaxStatistics)
    rows = loss(query, positive, example_weights=weights, reduction="none", **options)
    torch.testing.assert_close(-found.log_probability * weights, rows)
    assert found.rank.shape == (2, 9)
    assert not found.rank[0, 3:6].any()
    assert not found.log_sum_exp[0, 3:6].any()
    assert (found.rank[weights > 0] > 0).all()


def test_positive_of_nan_has_the_worst_rank_of_its_row(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    query, table = torch.randn(9, 4, generator=g), torch.randn(40, 4, generator=g)
    query[2] = torch.nan
    target = torch.arange(9)
    found = softmax_statistics(dwl_kernels.full_softmax_loss, query, table, target, backend=backend)
    assert found.rank[2] == 40
    assert found.log_probability.isnan().nonzero().tolist() == [[2]]
    assert (found.rank[:2] < 40).all()


def test_no_rows_and_no_candidates(backend: str) -> None:
    loss, nothing = dwl_kernels.sampled_softmax_loss, torch.ones(0, 2)
    found = softmax_statistics(loss, nothing, nothing, torch.ones(3, 2), backend=backend)
    assert [one.shape for one in found] == [(0,)] * 3
    alone = softmax_statistics(loss, torch.ones(3, 2), torch.ones(3, 2), nothing, backend=backend)
    assert alone.rank.tolist() == [1, 1, 1]
    assert alone.log_sum_exp.tolist() == [2, 2, 2]


def test_nothing_has_a_gradient_and_autocast_casts_as_the_loss_does() -> None:
    query = torch.randn(5, 4, requires_grad=True)
    found = softmax_statistics(dwl_kernels.in_batch_softmax_loss, query, query)
    assert not any(one.requires_grad for one in found)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = softmax_statistics(dwl_kernels.in_batch_softmax_loss, query, query)
    narrow = query.bfloat16()
    expected = softmax_statistics(dwl_kernels.in_batch_softmax_loss, narrow, narrow)
    assert all(torch.equal(a, b) for a, b in zip(cast, expected, strict=True))


def test_registered_op_passes_opcheck() -> None:
    from dwl_kernels.core.build import sampled_problem
    from dwl_kernels.ops import arguments_of

    options: dict[str, Any] = dict.fromkeys(
        ("domain_ids", "domain_weights", "example_weights", "temperature")
    )
    ids: dict[str, Any] = dict.fromkeys(
        ("positive_log_q", "negative_log_q", "positive_ids", "negative_ids")
    )
    embeddings = torch.randn(5, 4), torch.randn(5, 4), torch.randn(7, 4)
    problem = sampled_problem(
        *embeddings, **ids, **options, correction="standard", reduction="mean"
    )
    call = (*arguments_of(problem), "auto")
    torch.library.opcheck(torch.ops.dwl_kernels.softmax_statistics.default, call)


def test_what_is_no_loss_is_named() -> None:
    query = torch.ones(2, 2)
    for other in (torch.nn.functional.cross_entropy, dwl_kernels.CumulativeCrossEntropy()):
        with pytest.raises(TypeError, match="wanted one of the loss functions: sampled_softmax"):
            softmax_statistics(other, query, query)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="missing a required argument: 'target'"):
        softmax_statistics(dwl_kernels.full_softmax_loss, query, query)
    with pytest.raises(ValueError, match="positive has shape"):
        softmax_statistics(dwl_kernels.in_batch_softmax_loss, query, torch.ones(3, 2))
