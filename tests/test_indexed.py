"""Candidates by id: the same as gathering them first, and the gradient of the table."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dwl_kernels import (
    DualScaleSampledSoftmax,
    DynamicWeightedSampledSoftmax,
    indexed_sampled_softmax_loss,
    sampled_softmax_loss,
)
from dwl_kernels.backends import chunked
from dwl_kernels.core.problem import GradMask, PerRowProblem

BY_NAME = {case.name: case for case in cases.CASES}
NAMES = ("indexed, everything", "indexed, none", "by row, everything", "by row, none")


def gathered(inputs: cases.Inputs) -> Tensor:
    """The loss of embeddings gathered by autograd, one row at a time where they differ by row."""
    inputs = dict(inputs)
    items, positive_ids, negative_ids = (
        inputs.pop(k) for k in ("table", "positive_ids", "negative_ids")
    )
    if negative_ids.dim() == 1:
        ids = {"positive_ids": positive_ids, "negative_ids": negative_ids}
        return sampled_softmax_loss(
            inputs.pop("query"), items[positive_ids], items[negative_ids], **ids, **inputs
        )
    reduction = inputs.pop("reduction", "mean")
    rows = []
    for i in range(len(inputs["query"])):
        row = {
            k: v if k == "domain_weights" else v[i] if k == "negative_log_q" else v[i : i + 1]
            for k, v in inputs.items()
        }
        own = {"positive_ids": positive_ids[i : i + 1], "negative_ids": negative_ids[i]}
        own |= {"positive": items[own["positive_ids"]], "negative": items[own["negative_ids"]]}
        rows.append(sampled_softmax_loss(**row, **own, reduction="none", backend="eager"))
    loss = torch.cat(rows)
    return loss if reduction == "none" else loss.sum() / (inputs["example_weights"] != 0).sum()


@pytest.mark.parametrize("name", NAMES)
def test_indexed_is_gather_then_dense(backend: str, name: str) -> None:
    case = BY_NAME[name]
    inputs = case.inputs(torch.float64)
    ids = inputs["negative_ids"]
    if ids.dim() == 2:  # the case has every kind of duplicate
        ids[1, :4] = ids[1, 0]
        ids[2:4, 0] = inputs["positive_ids"][2:4]
        ids[5, :2] = inputs["positive_ids"][6]
    leaves = [v for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad]
    got, expected = case.loss(inputs, backend), gathered(inputs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(0)).double()
    for a, b in zip(
        torch.autograd.grad(got, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_sparse_gradient_is_coalesced_and_equals_the_dense_one(
    backend: str, name: str, dtype: torch.dtype
) -> None:
    case = BY_NAME[name]
    inputs = case.inputs(dtype)
    gradients = {}
    for sparse in (False, True):
        loss = case.loss({**inputs, "sparse_grad": sparse}, backend)
        (gradients[sparse],) = torch.autograd.grad(loss.sum() * 3, [inputs["table"]])
    sparse_gradient = gradients[True]
    assert sparse_gradient.is_sparse
    assert sparse_gradient.is_coalesced()
    assert sparse_gradient.dtype == dtype
    ids = sparse_gradient.indices()[0]
    assert (ids.diff() > 0).all()
    assert torch.equal(sparse_gradient.to_dense(), gradients[False])


@pytest.mark.parametrize("name", NAMES)
def test_sparse_gradient_keeps_rows_that_hold_a_zero(backend: str, name: str) -> None:
    """Only rows that are zero altogether are left out."""
    inputs = BY_NAME[name].inputs(torch.float64)
    with torch.no_grad():  # one dimension of everything, so that it is zero in the gradient as well
        inputs["query"][:, 3] = inputs["table"][:, 3] = 0
    loss = BY_NAME[name].loss({**inputs, "sparse_grad": True}, backend)
    dense = BY_NAME[name].loss(inputs, backend)
    (got,), (wanted,) = (torch.autograd.grad(x.sum(), [inputs["table"]]) for x in (loss, dense))
    assert len(got.indices()[0]) == int(wanted.any(1).sum()) > 10
    torch.testing.assert_close(got.to_dense(), wanted)


def test_sparse_gradient_of_a_row_nobody_drew_is_not_stored(backend: str) -> None:
    items = torch.randn(1000, 4, requires_grad=True)
    positive_ids, negative_ids = torch.tensor([7, 9]), torch.tensor([[998, 7, 5], [998, 9, 998]])
    loss = indexed_sampled_softmax_loss(
        torch.randn(2, 4), items, positive_ids, negative_ids, sparse_grad=True, backend=backend
    )
    # 7 and 9 as candidates are hits; as positives they have a gradient.
    assert torch.autograd.grad(loss, [items])[0].indices()[0].tolist() == [5, 7, 9, 998]


@pytest.mark.parametrize("per_row", [False, True])
def test_sparse_adam_steps_as_adam_on_the_rows_that_were_drawn(backend: str, per_row: bool) -> None:
    g = torch.Generator().manual_seed(0)
    query, start = torch.randn(6, 3, generator=g), torch.randn(20, 3, generator=g)
    positive_ids = torch.randint(0, 10, (6,), generator=g)
    negative_ids = torch.randint(0, 10, (6, 4) if per_row else (4,), generator=g)
    results = []
    for sparse, optimiser in ((True, torch.optim.SparseAdam), (False, torch.optim.Adam)):
        items = start.clone().requires_grad_()
        step = optimiser([items], lr=0.1)
        for _ in range(2):
            step.zero_grad()
            indexed_sampled_softmax_loss(
                *(query, items, positive_ids, negative_ids), sparse_grad=sparse, backend=backend
            ).backward()
            step.step()
        results.append(items.detach())
    assert not torch.equal(results[0], start)
    assert torch.equal(results[0][10:], start[10:])
    torch.testing.assert_close(*results)


def test_shared_and_per_row_ids_of_the_same_negatives_agree(backend: str) -> None:
    inputs = BY_NAME["indexed, everything"].inputs(torch.float64)
    rows = len(inputs["query"])
    spread = {k: inputs[k].expand(rows, -1) for k in ("negative_ids", "negative_log_q")}
    a = indexed_sampled_softmax_loss(**inputs, backend=backend)
    b = indexed_sampled_softmax_loss(**{**inputs, **spread}, backend=backend)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_leading_dimensions_of_the_ids_are_those_of_the_query(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    query, items = torch.randn(2, 3, 4, generator=g), torch.randn(9, 4, generator=g)
    positive_ids = torch.randint(0, 9, (2, 3), generator=g)
    for shape in ((5,), (2, 3, 5)):
        negative_ids = torch.randint(0, 9, shape, generator=g)
        loss = indexed_sampled_softmax_loss(
            query, items, positive_ids, negative_ids, reduction="none", backend=backend
        )
        flat = indexed_sampled_softmax_loss(
            query.reshape(6, 4),
            items,
            positive_ids.reshape(6),
            negative_ids if len(shape) == 1 else negative_ids.reshape(6, 5),
            reduction="none",
            backend=backend,
        )
        assert torch.equal(loss, flat.reshape(2, 3))


def test_autocast_leaves_a_table_of_negatives_per_row_in_its_dtype() -> None:
    inputs = BY_NAME["by row, everything"].inputs(torch.float32)
    expected = indexed_sampled_softmax_loss(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = indexed_sampled_softmax_loss(**inputs)
        half = {**inputs, "query": inputs["query"].detach().bfloat16()}
        near = indexed_sampled_softmax_loss(**half)
    assert torch.equal(loss, expected)
    torch.testing.assert_close(near, expected, rtol=2e-2, atol=0)


def test_no_tensor_of_all_gathered_embeddings_is_made() -> None:
    """The largest tensor that `chunked` makes has an eighth of the elements of all embeddings."""
    g = torch.Generator().manual_seed(0)
    rows, k, dim = 16384, 16, 64  # 8 blocks
    problem = PerRowProblem(
        query=torch.randn(rows, dim, generator=g),
        item_table=torch.randn(100, dim, generator=g),
        positive_rows=torch.randint(0, 100, (rows,), generator=g),
        candidate_rows=torch.randint(0, 100, (rows, k), generator=g),
    )
    with Largest() as largest:
        chunked.solve(problem, GradMask(True, True, True, False, False, False))
    assert largest.elements <= rows * k * dim // 8


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return out


@pytest.mark.parametrize(
    "kind", ["shared", "by row", "compiled", "module", "module, mixed", "module, mixed, compiled"]
)
@pytest.mark.parametrize("log_q", [False, True])
@pytest.mark.parametrize("correction", ["standard", "refined"])
def test_negative_that_is_no_item_is_left_out(
    backend: str, kind: str, log_q: bool, correction: str
) -> None:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(5, 6, generator=g, dtype=torch.float64, requires_grad=True)
    items = torch.randn(20, 6, generator=g, dtype=torch.float64, requires_grad=True)
    near, far = torch.tensor([1, 2, 3, 4, 0]), torch.tensor([7, -1, 0, 3, -1, 9])
    values = -torch.rand(11, generator=g, dtype=torch.float64)
    if kind == "by row":
        far = torch.stack([far.roll(k) for k in range(5)])
    kept = far != -1

    def loss(negative_ids: Tensor, negative_log_q: Tensor) -> Tensor:
        draws = {"positive_ids": near, "negative_ids": negative_ids}
        if log_q:
            draws |= {"positive_log_q": values[:5], "negative_log_q": negative_log_q}
        if kind.startswith("module"):
            mixed = "mixed" in kind
            module = DynamicWeightedSampledSoftmax(
                in_batch=mixed or None, backend=backend, correction=correction
            )
            return module(query, table=items, **draws)
        draws |= {"correction": correction, "backend": backend}
        return indexed_sampled_softmax_loss(query, items, **draws)

    few = far[kept].reshape(*far.shape[:-1], -1)
    of_far = values[5:].expand(far.shape)
    run = torch.compile(loss, backend="aot_eager") if "compiled" in kind else loss
    a, b = run(far, of_far), loss(few, of_far[kept].reshape(few.shape))
    torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
    for x, y in zip(*(torch.autograd.grad(one, [query, items]) for one in (a, b)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-15)
    with pytest.raises(IndexError, match=r"negative_ids holds -2, .* or -1, no item"):
        loss(far - (far == -1).long(), of_far)


@pytest.mark.parametrize("correction", ["standard", "refined"])
@pytest.mark.parametrize("calibration", [0.0, 0.5])
@pytest.mark.parametrize("log_q", [False, True])
def test_dual_scale_leaves_out_what_is_no_item_where_values_are_not_looked_at(
    monkeypatch: pytest.MonkeyPatch, backend: str, log_q: bool, calibration: float, correction: str
) -> None:
    if calibration and correction == "refined":
        pytest.skip("calibration corrects the positive too")
    g = torch.Generator().manual_seed(0)
    query = torch.randn(5, 6, generator=g, dtype=torch.float64, requires_grad=True)
    items = torch.randn(20, 6, generator=g, dtype=torch.float64, requires_grad=True)
    far, values = torch.tensor([7, -1, 0, 3, -1, 9]), -torch.rand(11, generator=g)
    module = DualScaleSampledSoftmax(
        weights=[0.5, 2.0],
        item_domains=[0, 1] * 10,
        calibration=calibration,
        correction=correction,
        hardness=1.0,
        similarity=1.0,
        slate_size=1,
        backend=backend,
    )

    def loss(kept: Tensor) -> Tensor:
        draws = {"positive_ids": torch.tensor([1, 2, 3, 4, 0]), "negative_ids": far[kept]}
        if log_q:
            draws |= {"positive_log_q": values[:5], "negative_log_q": values[5:][kept]}
        return module(query, table=items, **draws)

    few = loss(far != -1)
    monkeypatch.setattr("dwl_kernels.core.drawn.checks_values", lambda tensor: False)
    all_of_them = loss(far == far)
    torch.testing.assert_close(all_of_them, few, rtol=1e-6, atol=1e-6)
    for x, y in zip(
        *(torch.autograd.grad(one, [query, items]) for one in (all_of_them, few)), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("missing", ["positive_log_q", "negative_log_q"])
def test_one_log_q_alone_raises_where_values_are_not_looked_at(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """As on CUDA, where a log-Q of +inf may leave negatives out."""
    monkeypatch.setattr("dwl_kernels.core.drawn.checks_values", lambda tensor: False)
    draws = {"positive_log_q": torch.full((3,), -1.0), "negative_log_q": torch.full((2,), -1.0)}
    draws[missing] = None
    ids = torch.tensor([0, 1, 2]), torch.tensor([3, 4])
    for loss in (
        lambda: indexed_sampled_softmax_loss(torch.ones(3, 4), torch.ones(9, 4), *ids, **draws),
        lambda: DynamicWeightedSampledSoftmax()(
            torch.ones(3, 4),
            table=torch.ones(9, 4),
            positive_ids=ids[0],
            negative_ids=ids[1],
            **draws,
        ),
    ):
        with pytest.raises(ValueError, match=f"is given without {missing}"):
            loss()
