"""Every backend against `eager` in float64; `eager` against its formulas, `test_formulas`."""

from __future__ import annotations

import itertools
import threading

import cases
import pytest
import torch
from torch import Tensor

import dwl_kernels
from dwl_kernels import backends
from dwl_kernels.core import build as builders
from dwl_kernels.core.problem import GradMask

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BY_NAME = {case.name: case for case in cases.CASES}


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backend_is_as_exact_as_eager(backend: str, case: cases.Case, dtype: torch.dtype) -> None:
    cases.check(case, backend, dtype)


@pytest.mark.parametrize("correction", ["standard", "refined"])
@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["sampled", "mixed", "full", "indexed", "indexed_rows", "rows"])
def test_gradients_agree_with_finite_differences(
    backend: str, kind: str, reduction: str, correction: str
) -> None:
    if kind == "full" and correction == "refined":
        pytest.skip("the full softmax has no log-Q to refine")
    # The refined factor is detached, which finite differences cannot see: without it in the sum
    # there is nothing to check, so refined is checked where the factor saturates at 1.
    case = cases.Case(
        f"gradcheck {kind} {reduction}",
        rows=5,
        candidates=7,
        dim=3,
        kind=kind,
        log_q=True,
        ids=True,
        domains=2,
        examples=True,
        temperature="rows",
        options={"reduction": reduction} | ({} if kind == "full" else {"correction": correction}),
    )
    inputs = case.inputs(torch.float64)
    if correction == "refined":
        with torch.no_grad():
            name = "log_q" if kind == "mixed" else "positive_log_q"
            inputs[name].fill_(-3.0)
            if "table" in inputs:  # positives far below: the factor needs one of every row's own
                inputs["positive_ids"].copy_(torch.arange(5))
                inputs["negative_ids"].clamp_(min=5)
                inputs["table"][:5] = -100 * inputs["query"]
            else:
                inputs["positive"].copy_(-100 * inputs["query"])
            if kind == "mixed":  # the positives are candidates too: let them compete far below
                inputs["query"].copy_(torch.ones_like(inputs["query"]))
                inputs["positive"].fill_(-100.0)
    leaves = [k for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad]

    def loss(*values: Tensor) -> Tensor:
        return case.loss({**inputs, **dict(zip(leaves, values, strict=True))}, backend)

    # Entry by entry, or along random directions: the others agree with eager in every entry.
    values = [inputs[k] for k in leaves]
    assert torch.autograd.gradcheck(loss, values, fast_mode=backend != "eager")


def test_only_wanted_gradients_are_computed_and_each_is_right(backend: str) -> None:
    """All 32 subsets of what may require a gradient, scalar and per row."""
    names = (
        "everything",
        "everything, none",
        "mixed, everything",
        "full softmax, past the tile",
        "dual scale, everything",
        "indexed, everything",
        "by row, everything",
        "by row, none",
    )
    few = ("everything", "by row, none")  # interpreted, a call takes 0.3 s
    for name in few if backend in ("triton", "cuda") else names:
        case = BY_NAME[name]
        if backend == "cuda" and not case.in_cuda:
            continue
        reference = cases.loss_and_gradients(case, "eager", torch.float64)
        leaves = [k for k in cases.DIFFERENTIABLE if k in reference]
        for subset in itertools.product([False, True], repeat=len(leaves)):
            inputs = case.inputs(torch.float64)
            wanted = dict(zip(leaves, subset, strict=True))
            for leaf, want in wanted.items():
                inputs[leaf].requires_grad_(want)
            loss = case.loss(inputs, backend)
            assert loss.requires_grad == any(subset)
            torch.testing.assert_close(loss.detach(), reference["loss"], rtol=1e-12, atol=1e-12)
            chosen = [leaf for leaf, want in wanted.items() if want]
            if not chosen:
                continue
            upstream = torch.randn(
                loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
            )
            for leaf, gradient in zip(
                chosen,
                torch.autograd.grad(loss, [inputs[k] for k in chosen], upstream),
                strict=True,
            ):
                torch.testing.assert_close(gradient, reference[leaf], rtol=1e-10, atol=1e-12)


def test_unwanted_gradients_are_none(backend: str) -> None:
    case = BY_NAME["everything"]
    inputs = case.inputs(torch.float32)
    problem = builders.sampled_problem(
        **{k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()},
        correction="standard",
        reduction="mean",
    )
    output = backends.pick(backend, problem)(
        problem, GradMask(False, True, False, False, False, True), None
    )
    assert output.query is output.candidates is output.temperature is None
    assert output.positive is not None
    assert output.domain_weights is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["past the tile", "mixed, everything"])
def test_strided_transposed_and_expanded_inputs(
    backend: str, name: str, dtype: torch.dtype
) -> None:
    case = BY_NAME[name]
    expected = case.inputs(dtype)
    strided = dict(expected)
    strided["query"] = expected["query"].detach().T.contiguous().T
    strided["positive"] = torch.stack((expected["positive"].detach(),) * 2, 2)[..., 1]
    strided["negative"] = expected["negative"].detach().repeat(1, 2)[:, : case.dim]
    for key in ("negative_log_q", "negative_ids", "example_weights", "domain_ids"):
        strided[key] = torch.stack((expected[key],) * 3, -1)[..., 1]
    strided["temperature"] = torch.tensor(0.5).expand(case.rows)
    expected["temperature"] = torch.full((case.rows,), 0.5)
    for inputs in (strided, expected):
        inputs["domain_weights"] = torch.tensor(2.0).expand(5)
    leaves = ("query", "positive", "negative")
    for key in leaves:
        assert not strided[key].is_contiguous()
        strided[key].requires_grad_()
    a, b = case.loss(strided, backend), case.loss(expected, backend)
    torch.testing.assert_close(a, b)
    grads = [
        torch.autograd.grad(x, [i[k] for k in leaves]) for x, i in ((a, strided), (b, expected))
    ]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", ["short of the tile", "indexed, everything", "by row, everything"])
def test_the_same_call_gives_bitwise_the_same_result(backend: str, name: str) -> None:
    case = BY_NAME[name]
    first = cases.loss_and_gradients(case, backend, torch.float32)
    for _ in range(1 if backend == "triton" else 5):
        again = cases.loss_and_gradients(case, backend, torch.float32)
        assert all(torch.equal(first[k], again[k]) for k in first)


def test_calls_from_several_threads_do_not_disturb_each_other(backend: str) -> None:
    if backend == "triton":
        pytest.skip("the interpreter runs one launch at a time; test_gpu.py has streams")
    last = "full softmax, past the tile" if backend == "cuda" else "by row, everything"
    chosen = [BY_NAME[n] for n in ("past the tile", "mixed, everything", last)]
    expected = [cases.loss_and_gradients(case, backend, torch.float32) for case in chosen]
    results: list[dict[str, Tensor] | None] = [None] * len(chosen)

    def work(k: int) -> None:
        results[k] = cases.loss_and_gradients(chosen[k], backend, torch.float32)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(chosen))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, wanted in zip(results, expected, strict=True):
        assert got is not None
        for key in wanted:
            torch.testing.assert_close(got[key], wanted[key], rtol=1e-5, atol=1e-6)


def test_nan_reaches_the_loss_of_the_rows_that_use_it_and_no_other(backend: str) -> None:
    inputs = BY_NAME["log-Q"].inputs(torch.float32)
    with torch.no_grad():
        inputs["query"][3, 1] = torch.nan
        inputs["positive"][5, 0] = torch.inf
    loss = BY_NAME["log-Q"].loss({**inputs, "reduction": "none"}, backend)
    assert loss[3].isnan()
    assert not loss[5].isfinite()
    others = [i for i in range(17) if i not in (3, 5)]
    assert loss[others].isfinite().all()
    with torch.no_grad():
        inputs["negative"][0] = torch.nan
    assert BY_NAME["log-Q"].loss({**inputs, "reduction": "none"}, backend).isnan().all()


def test_small_losses_keep_their_digits(backend: str) -> None:
    """A positive that leads by 30 nats has a loss of 1e-13 that lse - z+ would round to zero."""
    query = torch.ones(4, 1)
    positive, negative = 40 * torch.ones(4, 1), 10 * torch.ones(2, 1)
    loss = dwl_kernels.sampled_softmax_loss(query, positive, negative, backend=backend)
    expected = 2 * torch.exp(torch.tensor(-30.0))
    if backend in ("cpu", "triton", "cuda"):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    else:
        assert float(loss) <= 1e-6


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_full_softmax_is_cross_entropy(backend: str, reduction: str) -> None:
    inputs = BY_NAME["full softmax, bias"].inputs(torch.float64)
    query, table, bias, tau = (inputs[k] for k in ("query", "table", "bias", "temperature"))
    got = BY_NAME["full softmax, bias"].loss({**inputs, "reduction": reduction}, backend)
    expected = torch.nn.functional.cross_entropy(
        query @ table.T / tau + bias, inputs["target"], reduction=reduction
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    leaves = [query, table, bias, tau]
    for a, b in zip(
        torch.autograd.grad(got.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_dual_scale_without_strength_is_the_plain_loss(backend: str) -> None:
    case = BY_NAME["everything"]
    inputs = case.inputs(torch.float32)
    leaves = [v for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad]
    plain = case.loss(inputs, backend)
    dual = dwl_kernels.dual_scale_softmax_loss(
        **inputs, hardness=0, similarity=0, competition=0, backend=backend
    )
    assert torch.equal(plain, dual)
    for a, b in zip(
        torch.autograd.grad(plain, leaves), torch.autograd.grad(dual, leaves), strict=True
    ):
        assert torch.equal(a, b)


def test_dual_scale_takes_the_other_rows_as_any_candidates(backend: str) -> None:
    """In a batch it is the loss of candidates by id, where a row's own positive is a hit."""
    inputs = BY_NAME["dual scale, everything"].inputs(torch.float64)
    del inputs["example_weights"]  # padded rows are nobody's candidates; the cases have them
    query, positive, negative = (inputs.pop(k) for k in ("query", "positive", "negative"))
    for others in (False, True):
        both = [torch.cat((positive, negative)) if others else positive]
        for name in ("log_q", "ids"):
            own, more = inputs["positive_" + name], inputs["negative_" + name]
            both.append(torch.cat((own, more)) if others else own)
        arguments = {**inputs, "negative": negative if others else None, "in_batch": True}
        if not others:
            arguments |= {"negative_log_q": None, "negative_ids": None}
        got = dwl_kernels.dual_scale_softmax_loss(query, positive, **arguments, backend=backend)
        wanted = dwl_kernels.dual_scale_softmax_loss(
            *(query, positive, both[0]),
            **{**inputs, "negative_log_q": both[1], "negative_ids": both[2], "backend": "eager"},
        )
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
        leaves = [query, positive, negative, inputs["temperature"]][: 4 if others else 2]
        for a, b in zip(
            torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, leaves), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_hit_gets_no_probability(backend: str) -> None:
    query = torch.tensor([[1.0]], requires_grad=True)
    negative = torch.tensor([[50.0], [0.5]], requires_grad=True)
    loss = dwl_kernels.sampled_softmax_loss(
        query,
        torch.tensor([[1.0]]),
        negative,
        positive_ids=torch.tensor([7]),
        negative_ids=torch.tensor([7, 8]),
        backend=backend,
    )
    loss.backward()
    p = torch.sigmoid(torch.tensor(-0.5))
    torch.testing.assert_close(loss.detach(), torch.log1p(torch.exp(torch.tensor(-0.5))))
    torch.testing.assert_close(negative.grad, torch.stack((torch.zeros(1), p[None])))
