"""The option to leave small probabilities out of the gradients of the full softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dwl_kernels import backends, full_softmax_loss
from dwl_kernels.backends.triton import solve as triton
from dwl_kernels.backends.triton.launch import Space
from dwl_kernels.backends.triton.specialize import load_of
from dwl_kernels.core.build import full_problem

LEAVES = ("query", "table", "bias", "temperature")
REDUCTIONS = ("mean", "weighted_mean", "sum", "none")
TAU = 0.6


def problem(backend: str, dtype: torch.dtype = torch.float64) -> dict:
    """Rows of unequal weight, a few of them padding; half of the items are unlikely everywhere."""
    rows, items = (20, 96) if backend == "triton" else (130, 3000)  # in blocks of 16 x 16, slowly
    g = torch.Generator().manual_seed(5)
    inputs: dict[str, Any] = {
        "query": torch.randn(rows, 12, generator=g, dtype=torch.float64),
        "table": torch.randn(items, 12, generator=g, dtype=torch.float64),
        "bias": torch.randn(items, generator=g, dtype=torch.float64),
        "temperature": torch.full((), TAU, dtype=torch.float64),
        "example_weights": torch.rand(rows, generator=g, dtype=torch.float64) * 10,
    }
    inputs["bias"][items // 2 :] -= 12
    inputs = {k: v.to(dtype) for k, v in inputs.items()}
    for name in LEAVES:
        inputs[name].requires_grad_()
    inputs["target"] = torch.randint(0, items, (rows,), generator=g)
    inputs["target"][7] = -100
    inputs["example_weights"][3] = 0
    return inputs


def solve(
    inputs: dict, backend: str, reduction: str, skip_threshold: float, upstream: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    loss = full_softmax_loss(
        **inputs, reduction=reduction, skip_threshold=skip_threshold, backend=backend
    )
    upstream = upstream[: loss.numel()].reshape(loss.shape).to(loss)
    gradients = torch.autograd.grad(loss, [inputs[k] for k in LEAVES], upstream)
    return loss.detach(), dict(zip(LEAVES, gradients, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("threshold", [1e-7, 1e-4, 0.1])
def test_gradients_stay_within_the_documented_bound(
    backend: str, reduction: str, threshold: float
) -> None:
    inputs = problem(backend)
    q, c, weight = (inputs[k].detach() for k in ("query", "table", "example_weights"))
    upstream = torch.randn(len(q), generator=torch.Generator().manual_seed(1)).double()
    exact, expected = solve(inputs, "eager", reduction, 0.0, upstream)
    loss, got = solve(inputs, backend, reduction, threshold, upstream)
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)  # the loss leaves nothing out

    active = ((weight > 0) & (inputs["target"] != -100)).double()
    norm = {"mean": active.sum(), "weighted_mean": (active * weight).sum()}.get(reduction, 1.0)
    # What is left out of dL/dz is less than this, for every item of the row.
    row = active * threshold / norm * (upstream if reduction == "none" else upstream[0]).abs()
    query_bound = row / TAU * c.norm(dim=1).sum()
    bounds = {
        "query": query_bound[:, None],
        "table": (row / TAU * q.norm(dim=1)).sum(),
        "bias": row.sum(),
        "temperature": (query_bound * q.norm(dim=1)).sum() / TAU,
    }
    for name, bound in bounds.items():
        error = (got[name] - expected[name]).abs()
        if name in ("query", "table"):
            error = error.norm(dim=1, keepdim=True)
        assert bool((error <= bound + 1e-12).all()), name


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_threshold_below_every_probability_changes_nothing(backend: str, reduction: str) -> None:
    inputs = problem(backend, torch.float32)
    upstream = torch.randn(len(inputs["query"]), generator=torch.Generator().manual_seed(1))
    exact, expected = solve(inputs, backend, reduction, 0.0, upstream)
    loss, got = solve(inputs, backend, reduction, 1e-44, upstream)
    assert torch.equal(loss, exact)
    assert all(torch.equal(got[name], expected[name]) for name in LEAVES)


def test_nan_is_never_below_the_threshold(backend: str) -> None:
    inputs = problem(backend)
    with torch.no_grad():
        inputs["query"][5, 0] = torch.nan
    _, got = solve(inputs, backend, "mean", 1e6, torch.ones(1))
    assert bool(got["query"][5].isnan().all())
    assert bool(got["table"].isnan().all())


@pytest.mark.parametrize("before", [0, 50])
def test_triton_leaves_out_what_is_below_the_threshold(
    monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    """Of the unlikely half of the items whole blocks; above every weight all but the targets.

    Whatever the workspace held `before`: past the last row that looks like a target, too.
    """
    reason = backends.unavailable_reason("triton", "cpu")
    if reason is not None:
        pytest.skip(reason)
    workspace = triton.workspace

    def used(*size: object) -> Space:
        space = workspace(*size)
        space.integers.fill_(before)
        return space

    monkeypatch.setattr(triton, "workspace", used)
    inputs = problem("triton")
    inputs["target"].remainder_(32)
    inputs["target"][7] = -100
    _, exact = solve(inputs, "triton", "sum", 0.0, torch.ones(1))
    _, got = solve(inputs, "triton", "sum", 1e-2, torch.ones(1))
    assert float(exact["bias"][48:].abs().min()) > 0
    assert bool((got["bias"][48:] == 0).all())
    assert bool((got["table"][48:] == 0).all())
    torch.testing.assert_close(got["bias"][:32], exact["bias"][:32], rtol=1e-12, atol=0)
    torch.testing.assert_close(got["table"][:32], exact["table"][:32], rtol=1e-12, atol=0)

    _, got = solve(inputs, "triton", "sum", 100.0, torch.ones(1))
    weight, target = inputs["example_weights"], inputs["target"]
    q, c, bias = (inputs[name].detach() for name in ("query", "table", "bias"))
    p = torch.softmax(q @ c.T / TAU + bias, 1)
    active = (weight != 0) & (target != -100)
    own = target.clamp(min=0)
    expected = weight / TAU * active * (p.gather(1, own[:, None])[:, 0] - 1)
    torch.testing.assert_close(got["query"], expected[:, None] * c[own])
    assert bool((got["bias"][32:] == 0).all())  # no block of theirs holds a target


def test_form_with_a_threshold_has_tiles_of_its_own() -> None:
    """So that what a search finds for it is not taken for the full softmax without one."""
    tensors = torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, dtype=torch.int64)
    rest: dict[str, Any] = dict.fromkeys(("bias", "domain_ids", "domain_weights"))
    rest |= {"example_weights": None, "temperature": 1.0, "reduction": "mean", "ignore_index": -1}
    loads = [
        load_of(full_problem(*tensors, **rest, skip_threshold=threshold), None)
        for threshold in (0.0, 1e-6)
    ]
    assert loads == ["options", "skip"]
