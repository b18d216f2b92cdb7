"""Infinities, NaN, padding and sizes of 0: what they reach, on every backend, and what they do not.

Expected values come from `row_losses`, the formulas written out row by row.
"""

from __future__ import annotations

import pytest
import torch
from case import MARGIN
from edge_problems import (
    INF,
    KINDS,
    NAN,
    ROWS,
    assert_same,
    gradients,
    name_of,
    problem,
    row_losses,
)

import dwl_kernels


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "dual"])
def test_reference_of_this_file_agrees_with_the_backends(backend: str, kind: str) -> None:
    case, inputs = problem(kind)
    got, expected = case.loss(inputs, backend), row_losses(kind, inputs)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert_same(gradients(got.sum(), inputs), gradients(expected.sum(), inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_positive_that_is_never_drawn_has_loss_and_gradients_zero(backend: str, kind: str) -> None:
    """Log-Q -inf is a limit: a positive ever more likely. In a batch it is nobody's candidate."""
    case, inputs = problem(kind, **({"competition": 0.0} if kind == "dual" else {}))
    usual = case.loss(inputs, backend).detach()
    inputs[name_of(inputs, "log_q")][2] = -INF
    loss = case.loss(inputs, backend)
    assert loss[2] == 0
    others = [i for i in range(ROWS) if i != 2]
    expected = usual[others] if kind == "dual" else row_losses(kind, inputs, others)
    torch.testing.assert_close(loss[others], expected, rtol=1e-10, atol=1e-12)
    got = gradients(loss.sum(), inputs)
    assert all(g.isfinite().all() for g in got.values())
    assert not got["query"][2].any()
    assert not got["temperature"][2].any()
    if "positive" in got:
        assert not got["positive"][2].any()
    if kind != "dual":
        assert_same(got, gradients(row_losses(kind, inputs, others).sum(), inputs))
    for reduction, norm in (("mean", ROWS), ("sum", 1), ("weighted_mean", ROWS)):
        total = case.loss({**inputs, "reduction": reduction}, backend)
        torch.testing.assert_close(total, loss.sum() / norm, rtol=1e-10, atol=1e-12)
        assert all(g.isfinite().all() for g in gradients(total, inputs).values())


@pytest.mark.parametrize("kind", KINDS)
def test_positive_of_infinite_log_q_is_lost_and_no_other_row(backend: str, kind: str) -> None:
    case, inputs = problem(kind)
    inputs[name_of(inputs, "log_q")][2] = INF
    loss = case.loss(inputs, backend)
    assert loss[2] == INF
    others = [i for i in range(ROWS) if i != 2]
    assert loss[others].isfinite().all()
    if kind != "dual":
        expected = row_losses(kind, inputs, others)
        torch.testing.assert_close(loss[others], expected, rtol=1e-10, atol=1e-12)
    total = case.loss({**inputs, "reduction": "mean"}, backend)
    assert total == INF
    assert all(g.isfinite().all() for g in gradients(total, inputs).values())


def test_infinite_loss_goes_to_the_weights_of_its_own_domains(backend: str) -> None:
    case, inputs = problem("sampled", reduction="mean")
    inputs["domain_ids"] = torch.tensor([[0, 1], [1, -1], [2, -1], [0, -1], [-1, -1], [3, 0]])
    inputs["domain_weights"] = torch.ones(5, dtype=torch.float64, requires_grad=True)
    inputs["positive_log_q"][2] = INF
    gradient = gradients(case.loss(inputs, backend), inputs)["domain_weights"]
    assert gradient[2] == INF
    assert gradient[[0, 1, 3]].isfinite().all()
    assert gradient[[0, 1, 3]].gt(0).all()
    assert gradient[4] == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("kind", ["sampled", "in_batch", "mixed", "dual"])
def test_no_item_is_nobodys_hit(backend: str, kind: str, dtype: torch.dtype) -> None:
    """Ids of -1 are not the same item; those below, hashes say, are items."""
    case, inputs = problem(kind)
    ids = name_of(inputs, "ids")
    inputs[ids] = torch.tensor([-1, -1, 7, -2, -1, 7], dtype=dtype)
    hits = torch.tensor([-1, -1, 7, -2, -3, -1, 8, 9, -2], dtype=dtype)
    if "negative_ids" in inputs:
        inputs["negative_ids"] = hits
    got = case.loss(inputs, backend)
    if kind == "dual":  # the same with ids that are all different but for those that are items
        inputs[ids] = torch.tensor([100, 101, 7, -2, 102, 7])
        inputs["negative_ids"] = torch.tensor([200, 201, 7, -2, -3, 202, 8, 9, -2])
        expected = case.loss(inputs, "eager")
    else:
        expected = row_losses(kind, inputs)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert_same(gradients(got.sum(), inputs), gradients(expected.sum(), inputs))


@pytest.mark.parametrize("kind", ["sampled", "in_batch", "mixed"])
def test_refined_correction_counts_what_is_no_item(backend: str, kind: str) -> None:
    case, inputs = problem(kind, correction="refined")
    different = {**inputs}
    ids = name_of(inputs, "ids")
    inputs[ids] = torch.tensor([-1, -1, 7, -2, -1, 7])
    different[ids] = torch.tensor([100, 101, 7, -2, 102, 7])
    if "negative_ids" in inputs:
        inputs["negative_ids"] = torch.tensor([-1, -1, 7, -2, -3, -1, 8, 9, -2])
        different["negative_ids"] = torch.tensor([200, 201, 7, -2, -3, 202, 8, 9, -2])
    got, expected = case.loss(inputs, backend), case.loss(different, "eager")
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


CHOICES = {
    "refined": {"correction": "refined"},
    "hardness": {"similarity": 0.0, "competition": 0.0},
    "similarity": {"hardness": 0.0, "competition": 0.0},
    # Slates of one group, or of one for every candidate, are the same without some of them.
    "competition": {"hardness": 0.0, "similarity": 0.0, "slate_size": 1},
    "both scales, refined": {"slate_size": 64, "correction": "refined"},
    "weights, refined": {"competition": 0.0, "correction": "refined"},
}
OF_DUAL = [choice for choice in CHOICES if choice != "refined"]


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize(
    ("kind", "choice", "in_batch"),
    [
        *((kind, "refined", False) for kind in KINDS if kind not in ("in_batch", "dual")),
        *(("dual", choice, in_batch) for choice in OF_DUAL for in_batch in (False, True)),
    ],
)
def test_negative_of_log_q_infinity_is_as_if_it_were_not_there(
    backend: str, kind: str, choice: str, in_batch: bool, ids: bool
) -> None:
    options = CHOICES[choice] | ({"in_batch": in_batch} if kind == "dual" else {})
    case, inputs = problem(kind, **options)
    if ids and "table" in inputs:  # hits
        inputs["negative_ids"].view(-1)[:4] = torch.tensor([0, 1, 5, 0])
    elif not ids and "table" not in inputs:
        del inputs[name_of(inputs, "ids")], inputs["negative_ids"]
    kept = torch.tensor([True, False, True, False, True, True, True, True, False])
    if kind == "indexed_rows":
        kept = torch.stack([kept.roll(i) for i in range(ROWS)])
    inputs["negative_log_q"] = inputs["negative_log_q"].masked_fill(~kept, INF)
    dropped = dict(inputs)
    for name in ("negative", "negative_ids", "negative_log_q"):
        if name in inputs:
            few = inputs[name][kept]
            dropped[name] = few.view(ROWS, -1) if kind == "indexed_rows" else few
    got, expected = case.loss(inputs, backend), case.loss(dropped, "eager")
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert_same(gradients(got.sum(), inputs), gradients(expected.sum(), inputs))


@pytest.mark.parametrize("value", [INF, -INF])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize(
    ("kind", "choice"),
    [
        *(("in_batch", "refined"), ("mixed", "refined")),
        *(("dual", choice) for choice in ("hardness", "similarity", "weights, refined")),
    ],
)
def test_positive_of_infinite_log_q_does_not_count_among_the_candidates_of_others(
    backend: str, kind: str, choice: str, ids: bool, value: float
) -> None:
    case, inputs = problem(
        kind, **CHOICES[choice], **({"in_batch": True} if kind == "dual" else {})
    )
    if ids:  # one that is a hit of another row, and one that is no item
        inputs[name_of(inputs, "ids")] = torch.tensor([0, 1, 1, -1, -1, 5])
    else:
        inputs.pop("negative_ids", None)
        del inputs[name_of(inputs, "ids")]
    gone = torch.tensor([False, False, True, True, False, False])
    padded = inputs | {"example_weights": (~gone).double()}
    log_q = name_of(inputs, "log_q")
    inputs[log_q] = inputs[log_q].masked_fill(gone, value)
    got, expected = case.loss(inputs, backend)[~gone], case.loss(padded, "eager")[~gone]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert_same(gradients(got.sum(), inputs), gradients(expected.sum(), inputs))


@pytest.mark.parametrize("kind", ["sampled", "mixed", "dual", "indexed_rows"])
def test_refined_row_whose_negatives_are_all_taken_out(backend: str, kind: str) -> None:
    case, inputs = problem(kind, correction="refined")
    inputs["negative_log_q"] = torch.full_like(inputs["negative_log_q"], INF)
    loss = case.loss(inputs, backend)
    if kind == "mixed":
        few = inputs | {name: inputs[name][:0] for name in inputs if name.startswith("negative")}
        expected = case.loss(few, "eager")
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    else:
        assert not loss.any()
        assert not any(g.any() for g in gradients(loss.sum(), inputs).values())


@pytest.mark.parametrize("kind", ["sampled", "in_batch", "full", "indexed_rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_up_to_the_largest_numbers_give_a_finite_loss(
    backend: str, kind: str, dtype: torch.dtype
) -> None:
    """One-dimensional embeddings, so that the logits are exact; the loss is a difference."""
    largest = torch.finfo(dtype).max
    query = torch.full((2, 1), largest, dtype=dtype, requires_grad=True)
    values = torch.tensor([[0.5], [0.25], [0.75], [0.75]], dtype=dtype)
    if kind == "in_batch":
        loss = dwl_kernels.in_batch_softmax_loss(
            query, values[:2], negative=values[2:], reduction="none", backend=backend
        )
    elif kind == "full":
        loss = dwl_kernels.full_softmax_loss(
            query, values, torch.tensor([0, 1]), reduction="none", backend=backend
        )
    elif kind == "indexed_rows":
        draws = torch.tensor([[1, 2, 3], [0, 2, 3]])
        loss = dwl_kernels.indexed_sampled_softmax_loss(
            query, values, torch.tensor([0, 1]), draws, reduction="none", backend=backend
        )
    else:
        loss = dwl_kernels.sampled_softmax_loss(
            query, values[:2], values[2:], reduction="none", backend=backend
        )
    expected = torch.tensor([0.25, 0.5], dtype=dtype) * largest
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), query)
    torch.testing.assert_close(gradient, torch.tensor([[0.25], [0.5]], dtype=dtype))


@pytest.mark.parametrize("value", [0.0, -0.5, NAN, INF])
@pytest.mark.parametrize("shape", ["scalar", "rows"])
def test_tensor_of_temperatures_must_be_positive(backend: str, value: float, shape: str) -> None:
    case, inputs = problem("sampled")
    temperature = torch.full((ROWS,), 0.5, dtype=torch.float64)
    temperature[3] = value
    inputs["temperature"] = temperature if shape == "rows" else temperature[3]
    with pytest.raises(ValueError, match="wanted a positive, finite number"):
        case.loss(inputs, backend)


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("shape", [(3, 0), (0, 4), (0, 0), (0,)])
def test_table_without_draws_has_gradient_zero(
    backend: str, shape: tuple[int, ...], sparse_grad: bool
) -> None:
    if backend == "cuda" and len(shape) == 2:
        pytest.skip("not of this backend")
    rows = shape[0] if len(shape) == 2 else 3
    query = torch.randn(rows, 4, requires_grad=True)
    table = torch.ones(5, 4, requires_grad=True)
    loss = dwl_kernels.indexed_sampled_softmax_loss(
        query,
        table,
        torch.arange(rows),
        torch.zeros(shape, dtype=torch.int64),
        sparse_grad=sparse_grad,
        backend=backend,
    )
    loss.backward()
    assert loss == 0
    assert not query.grad.any()
    assert not table.grad.to_dense().any()


def test_candidate_with_the_embedding_of_the_positive_ties_with_it(backend: str) -> None:
    """Logits in the hundreds, whose last digits decide what either of the two gets."""
    if backend == "cuda":
        pytest.skip("it takes no candidates per row")
    generator = torch.Generator().manual_seed(2)
    query = 5 * torch.randn(3, 200, generator=generator)
    positive = torch.randn(3, 200, generator=generator)
    more = torch.randn(3, 4, 200, generator=generator)
    negative = torch.cat((positive[:, None], more), 1)

    def found(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (query, positive, negative)]
        loss = dwl_kernels.sampled_softmax_loss(*leaves, temperature=0.3, backend=name)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    exact = found("eager", torch.float64)
    for got, eager, right in zip(
        found(backend, torch.float32), found("eager", torch.float32), exact, strict=True
    ):
        error, usual = (
            (one.double() - right).abs().max() / right.abs().max() for one in (got, eager)
        )
        assert error <= 2 * usual + MARGIN[torch.float32]
