"""The reference, backend "eager", against its formulas written out row by row, option by option."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import cases
import formulas
import pytest
import torch
from torch import Tensor

import dwl_kernels

EVERYTHING: dict[str, Any] = {"log_q": True, "ids": True, "domains": 3, "examples": True}
SMALL: dict[str, Any] = {"rows": 7, "candidates": 9, "dim": 3}
KINDS = ("sampled", "in_batch", "mixed", "dual", "full", "indexed", "indexed_rows")
CORRECTIONS = ("refined", "standard")  # the full softmax has no log-Q to refine
REDUCTIONS = ("mean", "weighted_mean", "sum", "none")


def compare(case: cases.Case) -> None:
    inputs = case.inputs(torch.float64)
    got, expected = case.loss(inputs, "eager"), formulas.loss(case.kind, inputs)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    if not expected.isfinite().all():
        return
    leaves = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}
    g = torch.Generator().manual_seed(2)
    upstream = torch.randn(got.shape, generator=g, dtype=torch.float64)
    pair = [
        torch.autograd.grad(x, [*leaves.values()], upstream, materialize_grads=True)
        for x in (got, expected)
    ]
    for name, a, b in zip(leaves, *pair, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=f"{name}: {{}}".format)


def small(case: cases.Case) -> cases.Case:
    """Loops take their time; what many rows, candidates or dimensions do, the backends show."""
    return replace(case, rows=min(case.rows, 17), candidates=min(case.candidates, 33))


# Logits of 1e4 overflow without the maximum that the formulas leave out.
CASES = [small(case) for case in cases.CASES if "large logits" not in case.name]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_its_formula(case: cases.Case) -> None:
    compare(case)


NARROW = [torch.float32, torch.bfloat16, torch.float16]
LARGE = [c for c in cases.CASES if "everything" in c.name]


@pytest.mark.parametrize("case", map(small, LARGE), ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_narrow_dtypes_lose_no_more_than_their_rounding(
    case: cases.Case, dtype: torch.dtype
) -> None:
    """Of the formula in float64, of the same rounded inputs."""
    got = cases.loss_and_gradients(case, "eager", dtype)
    wanted = cases.loss_and_gradients(case, formulas.loss, dtype, upcast=True)
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        assert cases.error(value, wanted[name]) <= 3 * cases.MARGIN[dtype], name


def no_items(inputs: cases.Inputs) -> None:
    """Ids of -1 on both sides; of a table only among the negatives."""
    for name in ("ids", "positive_ids", "negative_ids"):
        if name in inputs and not ("table" in inputs and name == "positive_ids"):
            inputs[name].view(-1)[::4] = -1


@pytest.mark.parametrize(
    ("kind", "correction"),
    [(kind, correction) for kind in KINDS for correction in CORRECTIONS[kind == "full" :]],
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_option_of_every_loss_is_its_formula(
    kind: str, reduction: str, correction: str
) -> None:
    options = {"reduction": reduction}
    if kind != "full":
        options["correction"] = correction
    for temperature, plain in itertools.product(("float", "scalar", "rows"), (False, True)):
        chosen = {"ids": True} if plain else EVERYTHING
        name = f"{kind}, {reduction}, {correction}, {temperature}, {plain}"
        compare(
            cases.Case(
                name, kind=kind, temperature=temperature, options=options, change=no_items,
                **SMALL, **chosen,
            )
        )  # fmt: skip


def infinities(inputs: cases.Inputs) -> None:
    """Log-Q of +inf takes negatives out, and positives of -inf are no candidates of others."""
    inputs["negative_log_q"].view(-1)[1::3] = torch.inf
    for name in ("log_q", "positive_log_q"):
        if name in inputs:
            inputs[name][2] = -torch.inf


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("kind", ["sampled", "mixed", "dual", "indexed", "indexed_rows"])
def test_log_q_of_infinity_is_its_formula(kind: str, correction: str, in_batch: bool) -> None:
    options: dict[str, Any] = {"correction": correction, "reduction": "none"}
    if kind == "dual":
        options |= {"in_batch": in_batch}
    compare(
        cases.Case(
            f"{kind}, {correction}, infinities", kind=kind, change=infinities, options=options,
            temperature="rows", **SMALL, **EVERYTHING,
        )
    )  # fmt: skip


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("slate_size", [1, 4, 64])
@pytest.mark.parametrize(
    "strengths",
    [
        *itertools.product((0.0, 0.7), repeat=3),
        (-0.7, -0.4, -0.7),
        (-1.0, 0.7, -40.0),  # a hardness that takes the scores out of the logits, and both clips
    ],
    ids=str,
)
def test_every_strength_of_the_dual_scale_is_its_formula(
    strengths: tuple[float, float, float], slate_size: int, correction: str, in_batch: bool
) -> None:
    hardness, similarity, competition = strengths
    options = {"hardness": hardness, "similarity": similarity, "competition": competition}
    options |= {"slate_size": slate_size, "in_batch": in_batch}
    case = cases.Case(
        f"dual scale {strengths}", kind="dual", options={**options, "correction": correction},
        temperature="scalar", **SMALL, **EVERYTHING,
    )  # fmt: skip
    compare(case)


def contested(inputs: cases.Inputs) -> None:
    """Half of the rows win against all candidates, half of them lose."""
    inputs["positive"] = inputs["query"] * torch.tensor([4.0, -4.0, 4.0, -4.0, 4.0, -4, 4])[:, None]


@pytest.mark.parametrize("backend", ["eager", "chunked", "cpu"])
@pytest.mark.parametrize("strength", [0.3, 40.0])
def test_competition_moves_the_temperature_up_to_half_and_twice(
    backend: str, strength: float
) -> None:
    options = {"hardness": 0.0, "similarity": 0.0, "competition": strength, "slate_size": 3}
    case = cases.Case("contested", kind="dual", options=options, change=contested, **SMALL)
    inputs = case.inputs(torch.float64)
    found = {i: formulas.row_of("dual", inputs, i, [False] * 7) for i in range(7)}
    tau = torch.full((7,), 0.7, dtype=torch.float64)
    factors = [*formulas.temperature_factors(found, tau, inputs).values()]
    assert (max(factors) / min(factors) == pytest.approx(4.0)) == (strength == 40.0)  # both clips
    loss = dwl_kernels.dual_scale_softmax_loss(**inputs, backend=backend)
    plain = dict(inputs)
    for name in ("hardness", "similarity", "competition", "slate_size"):
        del plain[name]
    plain["temperature"] = 0.7 * torch.tensor(factors, dtype=torch.float64)
    expected = formulas.loss("sampled", plain)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    leaves = [inputs[name] for name in ("query", "positive", "negative")]
    pair = [torch.autograd.grad(x, leaves) for x in (loss, expected)]
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ignored", [-1, 0, 7, 1 << 40])
def test_target_that_is_ignored_is_the_one_that_is_named(backend: str, ignored: int) -> None:
    """Also where it is an item: its rows are padding then, and -100 is no target any more."""
    case = cases.Case("ignored", kind="full", candidates=11, log_q=True, examples=True)
    inputs = case.inputs(torch.float64)
    items = inputs["target"].clamp(min=0)
    items[::3] = 7
    inputs["target"] = torch.where(inputs["target"] == -100, ignored, items)
    loss = dwl_kernels.full_softmax_loss(**inputs, ignore_index=ignored, backend=backend)
    plain = inputs | {"target": inputs["target"].masked_fill(inputs["target"] == ignored, -100)}
    expected = formulas.loss("full", plain)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    leaves = [inputs[name] for name in ("query", "table", "bias")]
    pair = [torch.autograd.grad(x, leaves) for x in (loss, expected)]
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("probability", [1e-6, 9e-5, 1.1e-4, 0.3, 0.999])
def test_rest_of_a_probability_keeps_its_digits(backend: str, probability: float) -> None:
    """log(1 - Q+) of the refined correction, alone: one candidate as likely as the positive."""
    one = torch.ones(1, 1, dtype=torch.float64)
    log_q = torch.tensor([probability], dtype=torch.float64).log()
    loss = dwl_kernels.sampled_softmax_loss(
        *(one, one, one),
        positive_log_q=log_q,
        negative_log_q=torch.zeros(1, dtype=torch.float64),
        correction="refined",
        reduction="none",
        backend=backend,
    )
    rest = torch.log1p(torch.tensor([-probability], dtype=torch.float64))
    torch.testing.assert_close(loss, rest.sigmoid() * rest, rtol=1e-3 * probability, atol=1e-15)
