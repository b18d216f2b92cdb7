"""Padding, NaN and rows of weight zero: what they reach, on every backend, and what they do not."""

from __future__ import annotations

import pytest
import torch
from edge_problems import INF, KINDS, NAN, ROWS, gradients, name_of, problem
from torch import Tensor

import dwl_kernels

GARBAGE = (0.0, NAN, -1.0, INF)


@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum", "none"])
@pytest.mark.parametrize("kind", [*KINDS, "full"])
def test_padded_rows_are_as_if_they_were_not_there(backend: str, kind: str, reduction: str) -> None:
    case, inputs = problem(kind, reduction=reduction)
    inputs["domain_ids"] = torch.tensor([[0, 1], [1, -1], [2, -1], [0, -1], [-1, -1], [3, 0]])
    inputs["domain_weights"] = torch.tensor(
        [0.5, 1.0, 2.0, 3.0, 1.0], dtype=torch.float64, requires_grad=True
    )
    kept = torch.tensor([True, False, True, False, False, True])
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 0.5], dtype=torch.float64)
    if kind == "full":
        inputs["target"] = torch.tensor([0, -100, 3, -100, 3, 8])
        weights = torch.tensor([1.0, 1.0, 2.0, 1.0, 0.0, 0.5], dtype=torch.float64)
    inputs["example_weights"] = weights

    dropped = {}
    per_row = ("query", "positive", "log_q", "ids", "positive_log_q", "positive_ids", "target")
    per_row += ("temperature", "domain_ids", "example_weights")
    for name, value in inputs.items():
        row = name in per_row or (kind == "indexed_rows" and name.startswith("negative"))
        if isinstance(value, Tensor):
            value = value.detach()[kept] if row else value.detach()
            value = value.clone().requires_grad_(inputs[name].requires_grad)
        dropped[name] = value
    expected = case.loss(dropped, "eager")
    expected_gradients = gradients(expected.sum(), dropped)

    with torch.no_grad():
        for k, row in enumerate((~kept).nonzero()[:, 0].tolist()):
            for name in ("query", "positive"):
                if name in inputs:
                    inputs[name][row] = NAN if k != 1 else INF
            inputs["temperature"][row] = GARBAGE[k]
            inputs["domain_ids"][row] = 99
            for name in ("log_q", "positive_log_q"):
                if name in inputs:
                    inputs[name][row] = (NAN, -INF, INF)[k]
            ids = name_of(inputs, "ids")
            if ids in inputs:
                inputs[ids][row] = (-1, 1 << 40, -7)[k]
            if kind == "indexed_rows":
                inputs["negative_ids"][row] = 1 << 40
                inputs["negative_log_q"][row] = NAN
    got = case.loss(inputs, backend)
    if reduction == "none":
        assert not got[~kept].any()
        torch.testing.assert_close(got[kept], expected, rtol=1e-10, atol=1e-12)
    else:
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    got_gradients = gradients(got.sum(), inputs)
    for name, gradient in got_gradients.items():
        if name in per_row:
            assert not gradient[~kept].any(), name
            gradient = gradient[kept]
        torch.testing.assert_close(
            gradient, expected_gradients[name], rtol=1e-10, atol=1e-12, msg=f"{name}: {{}}".format
        )


@pytest.mark.parametrize("kind", ["in_batch", "mixed", "dual", "full"])
@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum", "none"])
def test_batch_of_padding_gives_zeros(backend: str, kind: str, reduction: str) -> None:
    case, inputs = problem(kind, reduction=reduction)
    inputs["example_weights"] = torch.zeros(ROWS, dtype=torch.float64)
    loss = case.loss(inputs, backend)
    assert not loss.any()
    assert not any(g.any() for g in gradients(loss.sum(), inputs).values())


@pytest.mark.parametrize("correction", ["standard", "refined"])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_reaches_its_row_and_no_other(backend: str, kind: str, correction: str) -> None:
    case, inputs = problem(kind, correction=correction)
    others = [0, 1, 2, 4, 5]
    expected = case.loss(inputs, "eager").detach()
    if kind == "dual":  # whose means leave a row out that is NaN, as they leave out padding
        weights = torch.ones(ROWS, dtype=torch.float64)
        weights[3] = 0
        expected = case.loss({**inputs, "example_weights": weights}, "eager").detach()
    with torch.no_grad():
        inputs["query"][3, 1] = NAN
    loss = case.loss(inputs, backend)
    assert loss[3].isnan()
    torch.testing.assert_close(loss[others], expected[others], rtol=1e-10, atol=1e-12)
    loss.sum().backward()
    assert inputs["query"].grad[others].isfinite().all()
    assert inputs["query"].grad[3].isnan().any()


def test_nan_positive_of_the_batch_leaves_padded_rows_zero(backend: str) -> None:
    for kind in ("in_batch", "mixed"):
        case, inputs = problem(kind)
        inputs["example_weights"] = torch.tensor([1.0, 1, 0, 1, 0, 1], dtype=torch.float64)
        with torch.no_grad():
            inputs["positive"][3] = NAN
        loss = case.loss(inputs, backend)
        assert loss[[0, 1, 3, 5]].isnan().all()
        got = gradients(loss.sum(), inputs)
        for name in ("query", "positive", "temperature"):
            assert not got[name][[2, 4]].any(), name


@pytest.mark.parametrize("correction", ["standard", "refined"])
def test_row_of_weight_zero_gives_zeros_whatever_it_holds(backend: str, correction: str) -> None:
    """Its domain weighs nothing; unlike padding it counts in the mean."""
    case, inputs = problem("sampled", reduction="mean", correction=correction)
    inputs["domain_ids"] = torch.tensor([0, 0, 1, 0, 0, 0])
    inputs["domain_weights"] = torch.tensor([1.0, 0.0], dtype=torch.float64)
    expected = case.loss(inputs, "eager")
    with torch.no_grad():
        inputs["positive"][2] = NAN
    loss = case.loss(inputs, backend)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    got = gradients(loss, inputs)
    assert not got["query"][2].any()
    assert got["negative"].isfinite().all()


@pytest.mark.parametrize("correction", ["standard", "refined"])
def test_row_of_weight_zero_that_is_nan_reaches_its_own_domain_alone(
    backend: str, correction: str
) -> None:
    """Its weight has the gradient of its loss, the temperature nothing of it."""
    case, inputs = problem("sampled", reduction="mean", correction=correction)
    inputs["domain_ids"] = torch.tensor([0, 0, 1, 0, 0, 0])
    inputs["domain_weights"] = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    inputs["temperature"] = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    expected = gradients(case.loss(inputs, "chunked"), inputs)
    with torch.no_grad():
        inputs["query"][2] = NAN
    got = gradients(case.loss(inputs, backend), inputs)
    assert not got["query"][2].any()
    assert got["domain_weights"][1].isnan()
    for name in ("temperature", "negative"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        got["domain_weights"][0], expected["domain_weights"][0], rtol=1e-10, atol=1e-12
    )


def test_row_that_weighs_nothing_for_its_infinite_logit_gives_no_gradient(backend: str) -> None:
    """The refined correction weighs it by a sigmoid that is 0."""
    query = torch.tensor([[torch.inf]], requires_grad=True)
    positive, negative = torch.ones(1, 1, requires_grad=True), -torch.ones(1, 1)
    loss = dwl_kernels.sampled_softmax_loss(
        query, positive, negative, correction="refined", backend=backend
    )
    loss.backward()
    assert loss == 0
    assert positive.grad == 0
    assert query.grad == 0


def test_row_of_weight_zero_is_no_anomaly() -> None:
    query = torch.tensor([[NAN], [1.0]], requires_grad=True)
    weights = {"domain_ids": torch.tensor([0, 1]), "domain_weights": torch.tensor([0.0, 1.0])}
    with torch.autograd.detect_anomaly():
        loss = dwl_kernels.sampled_softmax_loss(
            query, torch.ones(2, 1), torch.ones(1, 1), **weights, backend="eager"
        )
        loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("kind", ["shared", "rows", "mixed", "dual", "full", "indexed_rows"])
def test_what_is_taken_out_reaches_nothing(backend: str, kind: str, value: float) -> None:
    """By its id, by its log-Q, or as a row of a table that is no item."""
    if backend == "cuda" and kind == "dual":
        pytest.skip("it does not take the dual scale")
    expected, got = taken_out(kind, backend, 0.0), taken_out(kind, backend, value)
    for right, found in zip(expected, got, strict=True):
        assert right.isfinite().all()
        assert torch.equal(found, right)


def taken_out(kind: str, backend: str, value: float) -> list[Tensor]:
    """The loss and all gradients with `value` in what is taken out."""
    torch.manual_seed(0)
    query, positive = torch.randn(2, 4, 8)
    candidates = torch.randn(4, 6, 8) if kind == "rows" else torch.randn(6, 8)
    candidates[..., 1, :], candidates[..., 4, 3] = value, value
    tau = torch.full((4,), 0.5)
    for leaf in (query, positive, candidates, tau):
        leaf.requires_grad_()
    own, ids = torch.tensor([10, 11, 12, 13]), torch.tensor([2, 7, 3, 5, 6, 12])
    log_q, negative_log_q = torch.full((4,), -1.0), torch.full((6,), -2.0)
    negative_log_q[4] = INF
    options = {"temperature": tau, "backend": backend}
    if kind == "full":
        items, bias = torch.tensor([2, -1, 3, 5, 6, 12]), -negative_log_q
        options |= {"table_ids": items, "bias": bias}
        loss = dwl_kernels.full_softmax_loss(
            query, candidates, torch.tensor([0, 2, 3, 5]), **options
        )
    elif kind == "indexed_rows":
        drawn = torch.tensor([1, 7, 3, 5, 4, 2]).expand(4, 6)
        options |= {"positive_log_q": log_q, "negative_log_q": negative_log_q.expand(4, 6)}
        options |= {"ignore_index": 7, "table_ids": torch.tensor([2, -1, 3, 5, 6, 12])}
        loss = dwl_kernels.indexed_sampled_softmax_loss(
            query, candidates, torch.tensor([0, 2, 3, 5]), drawn, **options
        )
    else:
        options |= {"ignore_index": 7, "positive_ids": own, "positive_log_q": log_q}
        shape = candidates.shape[:-1]
        options |= {"negative_ids": ids.expand(shape)}
        options |= {"negative_log_q": negative_log_q.expand(shape)}
        function = dwl_kernels.sampled_softmax_loss
        if kind == "mixed":
            function = dwl_kernels.in_batch_softmax_loss
            options["negative"] = candidates
        elif kind == "dual":
            function = dwl_kernels.dual_scale_softmax_loss
        own_negatives = () if kind == "mixed" else (candidates,)
        loss = function(query, positive, *own_negatives, **options)
    leaves = [query, candidates, tau]
    if kind not in ("full", "indexed_rows"):
        leaves.append(positive)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


# The kernels of a GPU answer NaN: a select for every logit would be the price.
@pytest.mark.parametrize("backend", ["eager", "chunked", "cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positive", [-1.0, 1.0])
def test_infinite_query_does_not_meet_what_is_left_out(
    backend: str, dtype: torch.dtype, positive: float
) -> None:
    """Its loss is infinite, or NaN where the positive's logit is: what is out changes neither."""
    g = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(40, 6, generator=g) for name in ("query", "positive")}
    inputs["negative"] = torch.randn(33, 6, generator=g)
    inputs["query"][2, 1] = INF
    inputs["positive"][2, 1] = positive
    weights, negative_log_q = torch.ones(40), torch.full((33,), -3.0)
    weights[::3], negative_log_q[::4] = 0, INF

    def loss(backend: str, dtype: torch.dtype) -> Tensor:
        return dwl_kernels.in_batch_softmax_loss(
            **{name: value.to(dtype) for name, value in inputs.items()},
            log_q=torch.full((40,), -3.0),
            negative_log_q=negative_log_q,
            example_weights=weights,
            reduction="none",
            backend=backend,
        )

    expected = loss("eager", torch.float64)
    assert not expected[2].isfinite()
    got = loss(backend, dtype).double()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())
