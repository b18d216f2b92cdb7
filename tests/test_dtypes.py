"""Dtypes of what goes in: ids of two of them, numbers of any; and how 16 bits are rounded."""

from __future__ import annotations

from typing import Any

import case_changes
import cases
import formulas
import pytest
import torch
from module_inputs import KINDS, B, D, table_of
from torch import Tensor

LARGE = 1 << 32  # an id of 64 bits that differs from 5 by this has the same 32 bits
PAIRS = [
    *((torch.int32, torch.int64), (torch.int64, torch.int32), (torch.int16, torch.int64)),
    *((torch.int64, torch.uint8), (torch.int32, torch.int16), (torch.int32, torch.int32)),
]


def of_two_dtypes(
    first: torch.dtype, second: torch.dtype, large: int = LARGE
) -> tuple[Tensor, Tensor]:
    """Ids of six rows and of nine candidates, some of them raised where there are 64 bits."""
    ids, others = torch.tensor([5, 5, 7, 9, 5, 8]), torch.tensor([5, 7, 6, 5, 9, 5, 7, 5, 4])
    if first == torch.int64:
        ids[[0, 2]] += large
    if second == torch.int64:
        others[[0, 1, 3]] += large
    return ids.to(first), others.to(second)


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=str)
@pytest.mark.parametrize("kind", ["sampled", "mixed", "dual"])
def test_ids_of_two_dtypes_are_the_same_items(
    backend: str, kind: str, first: torch.dtype, second: torch.dtype
) -> None:
    if kind == "dual" and backend == "cuda":
        pytest.skip("not of this backend")
    case = cases.Case(f"ids of {kind}", rows=6, candidates=9, dim=4, kind=kind, log_q=True)
    inputs = case.inputs(torch.float64)
    name = "ids" if kind == "mixed" else "positive_ids"
    inputs[name], inputs["negative_ids"] = of_two_dtypes(first, second)
    hits = inputs[name].long()[:, None] == inputs["negative_ids"].long()
    assert bool(hits.any())
    got, expected = case.loss(inputs, backend), formulas.loss(kind, inputs)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    leaves = [inputs[x] for x in ("query", "positive", "negative")]
    pair = [torch.autograd.grad(loss, leaves) for loss in (got, expected)]
    for one, other in zip(*pair, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=str)
@pytest.mark.parametrize("kind", ["sampled", "table", "by row", "dual scale"])
def test_modules_take_ids_of_two_dtypes(kind: str, first: torch.dtype, second: torch.dtype) -> None:
    table = table_of()
    query = torch.randn(B, D, generator=torch.Generator().manual_seed(0)).double()
    options: dict[str, Any] = {"temperature": 0.5}
    ids, others = of_two_dtypes(first, second, large=0)
    if kind == "by row":
        others = torch.stack([others.roll(i) for i in range(B)])
    named: dict[str, Any] = {"positive_ids": ids, "negative_ids": others}
    plain = {"query": query, "table": table, **named, **options}
    if kind in ("table", "by row"):
        given = {"table": table, **named}
        expected = formulas.loss("indexed" if kind == "table" else "indexed_rows", plain)
    else:
        given = {"positive": table[ids.long()], "negative": table[others.long()], **named}
        plain |= given
        if kind == "dual scale":
            plain |= {"hardness": 1.0, "similarity": 1.0}
        expected = formulas.loss("dual" if kind == "dual scale" else "sampled", plain)
    loss_fn = KINDS[kind](**options, item_domains=[0, 1] * 10, weights=[1.0, 1.0])
    torch.testing.assert_close(loss_fn(query, **given), expected)


NUMBERS = ("positive_log_q", "negative_log_q", "log_q", "bias", "domain_weights")
NUMBERS += ("example_weights", "temperature")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["sampled", "mixed", "dual", "full", "indexed_rows"])
def test_numbers_of_any_dtype_count_as_they_are(
    kind: str, given: torch.dtype, dtype: torch.dtype
) -> None:
    """Log-Q, weights and temperatures of a narrower or wider dtype than the embeddings."""
    case = cases.Case(
        f"numbers of {kind}", rows=6, candidates=9, dim=4, kind=kind, temperature="rows",
        log_q=True, ids=True, domains=2, examples=True,
    )  # fmt: skip
    inputs = case.inputs(dtype)
    for name in NUMBERS:
        if name in inputs:
            value = inputs[name].detach().to(given)
            inputs[name] = value.requires_grad_(inputs[name].requires_grad)
    loss = case.loss(inputs, "chunked")
    exact = {
        name: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rounding = 1e-6 if dtype != torch.float64 else 1e-12
    torch.testing.assert_close(loss.double(), formulas.loss(kind, exact), rtol=rounding, atol=0)
    loss.backward()
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    assert all(x.grad.dtype == x.dtype for x in leaves)


@pytest.mark.parametrize("kind", ["sampled", "in_batch", "full", "indexed", "indexed_rows"])
def test_gradients_of_16_bits_are_rounded_to_the_nearest(backend: str, kind: str) -> None:
    """Truncated, entries are too small by half a unit in the last place, on the mean."""
    if kind == "indexed_rows" and backend == "cuda":
        pytest.skip("not of this backend")
    spread = case_changes.set(
        temperature=8.0
    )  # probabilities of a few percent, in all of their places
    size: dict[str, Any] = {"rows": 48, "candidates": 40, "dim": 32}
    case = cases.Case(f"rounding of {kind}", kind=kind, change=spread, **size)
    inputs = case.inputs(torch.bfloat16)
    exact = {
        name: x.detach().double().requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }
    leaves = {k: x for k, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
    wanted = torch.autograd.grad(formulas.loss(kind, exact), [exact[name] for name in leaves])
    # Without oneDNN `cpu` multiplies in float32; with it probabilities are rounded as well.
    for in_float32 in (False, True) if backend == "cpu" else (False,):
        with torch.backends.mkldnn.flags(enabled=not in_float32):
            got = torch.autograd.grad(case.loss(inputs, backend), [*leaves.values()])
        for name, one, other in zip(leaves, got, wanted, strict=True):
            large = other.abs() > other.abs().max() / 50  # smaller ones hold what others cancel
            unit = 2.0 ** (other.abs().log2().floor() - 7)
            off = ((one.double().abs() - other.abs()) / unit)[large]
            assert off.numel() > 200
            assert abs(float(off.mean())) < 0.1, name
            # The kernels round probabilities too, and a table sums gradients that are rounded.
            if (in_float32 or backend in ("eager", "chunked")) and kind != "indexed":
                assert float(off.abs().max()) < 0.52, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["sampled", "by row"])
def test_calibration_without_log_q_is_of_the_dtype_of_the_logits(
    backend: str, kind: str, dtype: torch.dtype
) -> None:
    """Its logarithms are of weights in float32."""
    if kind == "by row" and backend == "cuda":
        pytest.skip("not of this backend")
    table, query = table_of(dtype), table_of(dtype, seed=1)[:B].detach()
    weights = torch.tensor([0.5, 2.0])
    loss_fn = KINDS[kind](weights=weights, item_domains=[0, 1] * 10, calibration=1.0)
    loss_fn.backend = backend
    ids, others = of_two_dtypes(torch.int64, torch.int64, large=0)
    plain: dict[str, Any] = {"positive_ids": ids, "negative_ids": others, "temperature": 1.0}
    if kind == "by row":
        plain["negative_ids"] = torch.stack([others.roll(i) for i in range(B)])
    named = {name: plain[name] for name in ("positive_ids", "negative_ids")}
    given = {"table": table}
    if kind == "sampled":
        given = {"positive": table[ids], "negative": table[others]}
    loss = loss_fn(query, **given, **named)
    log_weights = weights.to(dtype).log()
    plain |= given | {"query": query, "domain_ids": ids % 2, "domain_weights": weights.to(dtype)}
    plain["positive_log_q"] = -log_weights[ids % 2]
    plain["negative_log_q"] = -log_weights[plain["negative_ids"] % 2]
    expected = formulas.loss("indexed_rows" if kind == "by row" else "sampled", plain)
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    (got,), (wanted,) = (
        torch.autograd.grad(x, [table], retain_graph=True) for x in (loss, expected)
    )
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-6)
