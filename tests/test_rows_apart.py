"""A row that weighs nothing reaches no other, whatever it holds, on every backend.

Each test solves a problem twice, the second time with NaN or an infinity in one row, and compares
everything bit by bit. Of the row's own domain the gradient is the row's loss, and may be NaN.
"""

from __future__ import annotations

import os
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

ROWS, CANDIDATES, ROW = 19, 23, 7
OWN_DOMAIN = 1  # of the row, and of no other
KINDS = ("sampled", "in_batch", "mixed", "full", "dual", "indexed", "indexed_rows", "rows")
NAN, INF = torch.nan, torch.inf
FORMS = (
    {"temperature": "rows", "correction": "standard", "reduction": "mean"},
    {"temperature": "scalar", "correction": "refined", "reduction": "none"},
    {"temperature": "scalar", "correction": "standard", "reduction": "weighted_mean"},
)
WAYS = ("its domain weighs 0", "its example weight is 0", "beside padding", "upstream 0")


def problem(
    kind: str, way: str, form: dict[str, str], dtype: torch.dtype, **options: Any
) -> tuple[cases.Case, cases.Inputs]:
    """A problem with the row made weightless in that way; its numbers are harmless still."""
    options = {"reduction": form["reduction"], **options}
    if kind != "full":
        options["correction"] = form["correction"]
    if kind == "dual":
        # The competition compares a row with the mean of all that are numbers.
        options = {"competition": 0.0, "slate_size": 3, **options}
    case = cases.Case(
        f"rows apart, {kind}",
        rows=ROWS,
        candidates=CANDIDATES,
        kind=kind,
        log_q=True,
        ids=not kind.startswith("indexed"),
        temperature=form["temperature"],
        options=options,
    )
    inputs = case.inputs(dtype)
    if kind.startswith("indexed"):  # what the row reads of the table, it alone reads
        inputs["positive_ids"] = torch.arange(ROWS)
        inputs["negative_ids"] = inputs["negative_ids"].clamp(ROWS, cases.TABLE_ROWS - 2)
    if kind == "indexed_rows":
        inputs["negative_ids"][ROW, 3:5] = cases.TABLE_ROWS - 1
    if kind == "full":
        inputs["target"] = torch.arange(ROWS)
    inputs["domain_ids"] = torch.arange(ROWS) % 2 * 2
    inputs["domain_ids"][ROW] = OWN_DOMAIN
    weights = torch.tensor([1.0, 3.0, 2.0]).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    if way in ("its domain weighs 0", "beside padding"):
        weights[OWN_DOMAIN] = 0
    inputs["domain_weights"] = weights.requires_grad_()
    if way in ("its example weight is 0", "beside padding"):
        inputs["example_weights"] = torch.ones(ROWS, dtype=weights.dtype)
        inputs["example_weights"][ROW if way == "its example weight is 0" else 2] = 0
    return case, inputs


def results(case: cases.Case, inputs: cases.Inputs, backend: str, way: str) -> dict[str, Tensor]:
    loss = case.loss(inputs, backend)
    upstream = torch.linspace(-1, 2, ROWS).to(loss) if loss.dim() else torch.tensor(1.5).to(loss)
    if way == "upstream 0":
        upstream[ROW] = 0
    leaves = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}
    gradients = torch.autograd.grad(loss, list(leaves.values()), upstream)
    found = {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}
    found = {name: value.to_dense() if value.is_sparse else value for name, value in found.items()}
    found["domain_weights"][OWN_DOMAIN] = 0
    if way == "upstream 0":
        found["loss"][ROW] = 0
    return found


def what_it_alone_holds(kind: str, padded: bool) -> list[str]:
    """The inputs that no other row reads; in a batch a positive is everybody's candidate."""
    names = ["query"]
    if kind not in ("in_batch", "mixed", "full") or (padded and kind != "full"):
        names += ["positive", "log_q"]
    if padded:
        names.append("temperature")
    if kind in ("indexed_rows", "rows"):
        names += ["candidates", "negative_log_q"]
    return names


def poison(inputs: cases.Inputs, name: str, value: float) -> None:
    with torch.no_grad():
        if name == "log_q":
            inputs["log_q" if "log_q" in inputs else "positive_log_q"][ROW] = value
        elif name == "candidates":
            own = inputs["table"][cases.TABLE_ROWS - 1] if "table" in inputs else None
            (inputs["negative"][ROW, 3:5] if own is None else own).fill_(value)
        elif name == "positive" and "table" in inputs:
            inputs["table"][inputs["positive_ids"][ROW]] = value
        elif name == "query" and value == INF:
            inputs["query"][ROW, 1] = value
        else:
            inputs[name][ROW] = value


def check(
    kind: str, way: str, form: dict[str, str], dtype: torch.dtype, backend: str, **options: Any
) -> None:
    expected = results(*problem(kind, way, form, dtype, **options), backend, way)
    padded = way == "its example weight is 0"
    for name in what_it_alone_holds(kind, padded):
        if name == "temperature" and form["temperature"] != "rows":
            continue
        for value in (NAN, INF) if name == "query" else (NAN,):
            case, inputs = problem(kind, way, form, dtype, **options)
            poison(inputs, name, value)
            got = results(case, inputs, backend, way)
            for output, right in expected.items():
                assert torch.equal(got[output], right), f"{output} for {value} in {name}"
            for output in ("query", "positive", "temperature"):
                if output == "positive" and kind in ("in_batch", "mixed"):
                    continue
                if output in got and got[output].dim():
                    assert not got[output][ROW].any(), f"{output} for {value} in {name}"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_row_that_weighs_nothing_reaches_no_other(backend: str, kind: str, way: str) -> None:
    """In the interpreter each way has one of the forms, so that all kinds see all of them."""
    numbers = [number for number, form in enumerate(FORMS) if fits(form, way)]
    if backend in ("triton", "cuda") and way != "upstream 0":
        numbers = [numbers[(KINDS.index(kind) + WAYS.index(way)) % len(numbers)]]
    for number in numbers:
        check(kind, way, FORMS[number], torch.float32, backend)


def fits(form: dict[str, str], way: str) -> bool:
    return way != "upstream 0" or form["reduction"] == "none"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["sampled", "full"])
def test_row_that_weighs_nothing_reaches_no_other_in_any_dtype(
    backend: str, kind: str, dtype: torch.dtype
) -> None:
    check(kind, "beside padding", FORMS[0], dtype, backend)


def test_row_that_weighs_nothing_does_not_compete(backend: str) -> None:
    """The mean of the competition leaves it out where it is NaN, so bits may differ."""
    if backend == "cuda":
        pytest.skip("it does not take the dual scale")
    for way in ("its domain weighs 0", "beside padding"):
        case, inputs = problem("dual", way, FORMS[0], torch.float32, competition=1.0)
        poison(inputs, "query", NAN)
        got = results(case, inputs, backend, way)
        expected = results(case, inputs, "eager", way)
        for name, right in expected.items():
            assert got[name].isfinite().all(), name
            torch.testing.assert_close(got[name], right, rtol=1e-4, atol=1e-5)
        for name in ("query", "positive", "temperature"):
            assert not got[name][ROW].any(), name


@pytest.mark.parametrize("kind", ["sampled", "in_batch", "full", "dual"])
@pytest.mark.parametrize("way", ["its domain weighs 0", "upstream 0"])
def test_row_that_weighs_nothing_reaches_no_other_in_the_wide_form(
    monkeypatch: pytest.MonkeyPatch, kind: str, way: str
) -> None:
    from dwl_kernels.backends.triton import solve, wide

    if os.environ.get("TRITON_INTERPRET") != "1" or solve.unavailable_reason("cpu") is not None:
        pytest.skip("Triton's interpreter does not run here")
    monkeypatch.setattr(wide, "asked", lambda: True)
    check(kind, way, FORMS[1], torch.float32, "triton")


@pytest.mark.parametrize("kind", ["sampled", "full", "indexed_rows"])
def test_candidate_that_is_nan_leaves_a_row_that_weighs_nothing_zero(
    backend: str, kind: str
) -> None:
    if backend == "cuda" and kind in cases.NOT_IN_CUDA:
        pytest.skip("it does not take this kind")
    case, inputs = problem(kind, "its domain weighs 0", FORMS[0], torch.float32)
    with torch.no_grad():
        if kind == "sampled":
            inputs["negative"][3] = NAN
        else:
            inputs["table"][CANDIDATES - 2] = NAN
    got = results(case, inputs, backend, "its domain weighs 0")
    assert not got["query"][ROW].any()
    assert not got["temperature"][ROW].any()
