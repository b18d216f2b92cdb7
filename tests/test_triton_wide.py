"""The wide form of the Triton backend: what embeddings above 256 elements take. Runs interpreted.

The other tests of the backends come again below with narrow embeddings, so that they stay short.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import cases
import pytest
import torch

pytest.importorskip("triton")
from test_backends import (  # noqa: F401
    test_full_softmax_is_cross_entropy,
    test_hit_gets_no_probability,
    test_nan_reaches_the_loss_of_the_rows_that_use_it_and_no_other,
    test_small_losses_keep_their_digits,
    test_strided_transposed_and_expanded_inputs,
    test_unwanted_gradients_are_none,
)
from test_edges import *  # noqa: F403
from test_edges_padding import *  # noqa: F403
from test_triton_launch import Binder
from test_triton_races import Recorder, recorder  # noqa: F401

import dwl_kernels
from dwl_kernels import backends
from dwl_kernels.backends.triton import solve as host
from dwl_kernels.backends.triton import wide as triton_wide
from dwl_kernels.core import build as builders
from dwl_kernels.core.problem import GradMask, Problem

REASON = backends.unavailable_reason("triton", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
BY_NAME = {case.name: case for case in cases.CASES}
OTHER_FORM = ("indexed_rows", "rows")  # kinds that it does not take
WIDE = [case for case in cases.CASES if case.kind not in OTHER_FORM]
# Between them they have every path through the kernels.
AT_ANY_WIDTH = pytest.mark.usefixtures("asked")
IN_ALL_DTYPES = [
    *("past the tile", "everything, weighted_mean", "refined, everything", "everything, none"),
    *("large logits", "every candidate a hit", "huge weights", "tiny weights"),
    *("a candidate of log-Q -inf", "a positive of log-Q +inf", "domains of weight zero"),
    *("mixed, everything", "in-batch, NaN in the padding", "in-batch, refined", "in-batch"),
    *("full softmax, past the tile", "full softmax, NaN in the padding", "full softmax, none"),
    *("dual scale, everything", "dual scale, in-batch, everything", "dual scale, refined"),
]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow embeddings take the wide form, as with DWL_KERNELS_WIDE=1."""
    monkeypatch.setattr(triton_wide, "asked", lambda: True)


@pytest.fixture
def backend(asked: None) -> str:
    return "triton"


def wide(case: cases.Case, dim: int = 0) -> cases.Case:
    """The case with embeddings of 257, or of a multiple of 16.

    Queries shrink, so that logits stay as large as they were: at a standard deviation of 23 their
    own rounding is all there is to see, and eager's luck with it decides. With the dual scale so do
    positives, which are a second query.
    """
    dim = dim or (320 if case.dim == 96 else 257)

    def change(inputs: cases.Inputs) -> None:
        if case.change is not None:
            case.change(inputs)
        inputs["query"] *= (case.dim / dim) ** 0.5
        if case.kind == "dual":
            inputs["positive"] *= (case.dim / dim) ** 0.5

    return dataclasses.replace(case, dim=dim, change=change)


@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.name)
def test_wide_embeddings_are_as_exact_as_eager(case: cases.Case) -> None:
    cases.check(wide(case), "triton", torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mixed, everything", "full softmax, none"])
def test_wide_embeddings_of_16_bits_are_as_exact_as_eager(name: str, dtype: torch.dtype) -> None:
    cases.check(wide(BY_NAME[name]), "triton", dtype)


@AT_ANY_WIDTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", IN_ALL_DTYPES)
def test_narrow_embeddings_are_as_exact_as_eager(name: str, dtype: torch.dtype) -> None:
    cases.check(BY_NAME[name], "triton", dtype)


@pytest.mark.parametrize("d", [768, 1024, 4096])
def test_width_has_no_end(d: int) -> None:
    case = wide(dataclasses.replace(BY_NAME["mixed, everything"], rows=5, candidates=7), d)
    for dtype in (torch.float32, torch.bfloat16):
        cases.check(case, "triton", dtype)


@AT_ANY_WIDTH
@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize(
    "name", ["everything, none", "full softmax, past the tile", "large logits"]
)
def test_float32_with_products_in_tf32(name: str, precision: str) -> None:
    """The fixed reference; on a CPU the products themselves are no less exact."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        cases.check(BY_NAME[name], "triton", torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


@AT_ANY_WIDTH
@pytest.mark.parametrize(
    ("block_rows", "work"), [(1, (16, 32, 512)), (7, (2, 16, 16)), (1000, (4, 1024, 16))], ids=str
)
@pytest.mark.parametrize("name", ["in-batch, NaN in the padding", "full softmax, none"])
def test_blocks_do_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch, name: str, work: tuple[int, ...], block_rows: int
) -> None:
    chosen = triton_wide.Interpreter(triton_wide.Work(*work, 4), block_rows)
    monkeypatch.setattr(triton_wide, "INTERPRETER", chosen)
    cases.check(BY_NAME[name], "triton", torch.float64)


@AT_ANY_WIDTH
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("precision", ["high", "highest"])
@pytest.mark.parametrize("at", [0, 90, 149])
def test_a_candidate_far_above_all_others_makes_the_rows_pass_again(
    dtype: torch.dtype, precision: str, at: int
) -> None:
    """Logits of 3 and one of 300: in the first block of candidates, later, and last of all."""
    query = torch.linspace(0, 1, 33)[:, None].to(dtype).requires_grad_()
    negative = torch.full((150, 1), 3.0)
    negative[at] = 300
    negative = negative.to(dtype).requires_grad_()
    losses = {}
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        for backend in ("triton", "eager"):
            loss = dwl_kernels.sampled_softmax_loss(
                query, query.detach(), negative, reduction="none", backend=backend
            )
            gradients = torch.autograd.grad(loss.sum(), (query, negative))
            losses[backend] = (loss, *gradients)
    finally:
        torch.set_float32_matmul_precision(before)
    for ours, theirs in zip(losses["triton"], losses["eager"], strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.01, atol=0.01)


@AT_ANY_WIDTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["sampled", "in_batch", "full"])
def test_candidate_of_infinite_logit_takes_the_row_and_nothing_else(
    kind: str, dtype: torch.dtype
) -> None:
    """The same infinities, NaN and numbers as `eager` has, in the loss and in every gradient."""
    case = cases.Case(f"infinite {kind}", kind=kind, log_q=True, dim=5)
    expected = {}
    for backend in ("eager", "triton"):
        inputs = case.inputs(dtype)
        inputs["temperature"] = 20.0
        with torch.no_grad():
            if kind == "sampled":
                inputs["negative_log_q"][5] = -torch.inf
            elif kind == "full":
                inputs["bias"][5] = torch.inf
                inputs["target"][inputs["target"] == 5] = 6
            else:
                inputs["positive"][5] = torch.inf
                inputs["query"].abs_()
        loss = case.loss({**inputs, "reduction": "none"}, backend)
        leaves = {k: v for k, v in inputs.items() if getattr(v, "requires_grad", False)}
        upstream = torch.linspace(0.5, 1, len(loss)).to(loss)
        gradients = torch.autograd.grad(loss, list(leaves.values()), upstream)
        found = {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}
        if not expected:
            expected = found
    for name, value in found.items():
        finite = expected[name].isfinite()
        assert torch.equal(value.isfinite(), finite), name
        torch.testing.assert_close(value[finite], expected[name][finite], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("name", ["mixed, everything", "full softmax, past the tile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_call_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    case = wide(BY_NAME[name])
    first, again = (cases.loss_and_gradients(case, "triton", dtype) for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)


@AT_ANY_WIDTH
@pytest.mark.parametrize("name", ["everything, none", "mixed, everything"])
def test_each_gradient_alone_is_right(name: str) -> None:
    reference = cases.loss_and_gradients(BY_NAME[name], "eager", torch.float64)
    for leaf in (key for key in cases.DIFFERENTIABLE if key in reference):
        inputs = BY_NAME[name].inputs(torch.float64)
        for key, value in inputs.items():
            if isinstance(value, torch.Tensor):
                value.requires_grad_(key == leaf)
        loss = BY_NAME[name].loss(inputs, "triton")
        g = torch.Generator().manual_seed(1)
        upstream = torch.randn(loss.shape, generator=g, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(loss, inputs[leaf], upstream)
        torch.testing.assert_close(gradient, reference[leaf], rtol=1e-10, atol=1e-12)


@AT_ANY_WIDTH
@pytest.mark.parametrize("wanted", [("bias",), ("table",), ("query", "bias"), ("temperature",)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bias_and_table_need_no_other_gradient(wanted: tuple[str, ...], reduction: str) -> None:
    case = BY_NAME["full softmax, weighted_mean"]
    results = []
    for backend in ("triton", "eager"):
        inputs = {**case.inputs(torch.float64), "reduction": reduction}
        for name in ("query", "table", "bias", "temperature", "domain_weights"):
            inputs[name].requires_grad_(name in wanted)
        loss = case.loss(inputs, backend)
        results.append(torch.autograd.grad(loss.sum(), [inputs[name] for name in wanted]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@AT_ANY_WIDTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_log_q_of_a_batch_gets_the_gradient_of_both_roles(dtype: torch.dtype) -> None:
    inputs = BY_NAME["mixed, everything"].inputs(dtype)
    inputs = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    problem = builders.in_batch_problem(**inputs, correction="standard", reduction="mean")
    wanted = GradMask(False, False, False, True, False, False)
    ours, theirs = (backends.pick(b, problem)(problem, wanted, None) for b in ("triton", "eager"))
    assert ours.candidates is ours.query is None
    exact = dtype == torch.float64
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if exact else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(ours.candidate_log_q, theirs.candidate_log_q, **tolerance)


@AT_ANY_WIDTH
def test_bad_values_give_nan_in_their_rows_where_nothing_checks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU: domains, weights, temperatures and targets that cannot be."""
    monkeypatch.setattr(host, "checks_values", lambda tensor: False)
    monkeypatch.setattr("dwl_kernels.core.values.checks_values", lambda tensor: False)
    query, positive, negative = torch.ones(5, 3), torch.ones(5, 3), torch.ones(6, 3)
    loss = dwl_kernels.sampled_softmax_loss(
        *(query, positive, negative),
        domain_ids=torch.tensor([0, 7, 1, -9, -1]),
        domain_weights=torch.tensor([1.0, -1.0]),
        temperature=torch.tensor([1.0, 1.0, 1.0, 1.0, -2.0]),
        reduction="none",
        backend="triton",
    )
    assert loss.isnan().tolist() == [False, True, True, True, True]
    target = torch.tensor([0, 41, -100, 2, 1 << 40])
    loss = dwl_kernels.full_softmax_loss(
        query, torch.ones(41, 3), target, reduction="none", backend="triton"
    )
    assert loss.isnan().tolist() == [False, True, False, False, True]
    assert loss[2] == 0


def accepted(kind: str, **options: Any) -> Problem:
    case = cases.Case("accepted", kind=kind, dim=257, options=options)
    inputs = {
        k: v.detach() if isinstance(v, torch.Tensor) else v
        for k, v in case.inputs(torch.float32).items()
    }
    found: list[Problem] = []

    def note(name: str, problem: Problem) -> Any:
        found.append(problem)
        return backends.reference.solve.solve

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "pick", note)
        case.loss(inputs, "auto")
    return found[0]


@pytest.mark.parametrize("kind", ["sampled", "in_batch", "mixed", "full", "indexed", "dual"])
def test_triton_takes_wide_embeddings(kind: str) -> None:
    problem = accepted(kind)
    assert backends.unsupported_reason("triton", problem) is None
    assert backends.pick("triton", problem) is backends.triton_backend.solve


def test_candidates_per_row_go_the_way_they_went() -> None:
    problem = accepted("indexed_rows")
    with pytest.raises(RuntimeError, match=r"by row.*at most 256.*chunked"):
        backends.pick("triton", problem)
    assert backends.unsupported_reason("chunked", problem) is None


def test_option_asks_for_the_wide_form(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        for value, wanted in (("1", True), ("0", False)):
            monkeypatch.setenv("DWL_KERNELS_WIDE", value)
            triton_wide.asked.cache_clear()
            assert triton_wide.asked() == wanted
    finally:
        triton_wide.asked.cache_clear()


def test_blocks_of_rows_fit_the_cache_and_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_wide, "interpreting", lambda: False)
    for rows, stride, size in (
        *((8192, 8192, 1024), (16384, 16384, 512), (300, 1024, 300), (10_000, 10_240, 819)),
        *((65536, 1024, 8192), (16384, 262144, 512), (4096, 1 << 24, 8), (3, 1 << 28, 1)),
    ):
        blocks = list(triton_wide.row_blocks(rows, stride))
        assert blocks[0] == (0, size)
        assert blocks[-1][1] == rows
        assert all(a[1] == b[0] for a, b in itertools.pairwise(blocks))


@AT_ANY_WIDTH
def test_problems_of_other_sizes_may_be_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry of the launcher is one compiled kernel: Triton is asked what it would compile."""
    binder = Binder()
    monkeypatch.setattr(triton_wide, "launch", binder)
    for kind in ("sampled", "mixed", "full"):
        for rows, candidates in itertools.product((1, 2, 16, 17, 49), (1, 16, 17, 70)):
            for options in ({}, {"log_q": True}, {"ids": True, "examples": True}):
                case = cases.Case("sizes", rows, candidates, 16, kind, **options)
                case.loss(case.inputs(torch.bfloat16), "triton")
    assert len(binder.found) > 20


# Races and bounds: a launch has as many programs here as on a device, one after another.


@pytest.fixture
def watched(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> Recorder:  # noqa: F811
    """Addresses by program; `triton_access` sees to it that they lie in its tensors."""
    from triton.runtime import interpreter

    builder, launch = interpreter.interpreter_builder, triton_wide.launch
    set_grid_idx = builder.set_grid_idx

    def set_worker(x: int, y: int, z: int) -> None:
        recorder.worker = x
        set_grid_idx(x, y, z)

    def watched_launch(kernel: Any, programs: int, entry: Any, tensors: Any, *rest: Any) -> None:
        recorder.touched = {False: [], True: []}
        launch(kernel, programs, entry, tensors, *rest)
        recorder.worker = 0
        recorder.barrier()

    monkeypatch.setattr(builder, "set_grid_idx", set_worker)
    monkeypatch.setattr(triton_wide, "launch", watched_launch)
    return recorder


@AT_ANY_WIDTH
@pytest.mark.parametrize(
    "name",
    [
        *("plain", "mixed, everything", "in-batch, NaN in the padding", "refined, everything"),
        *("everything, none", "everything, weighted_mean", "full softmax, NaN in the padding"),
        "dual scale, everything",
    ],
)
def test_no_program_touches_what_another_one_writes(watched: Recorder, name: str) -> None:
    for dtype in (torch.float32, torch.float16):
        cases.loss_and_gradients(BY_NAME[name], "triton", dtype)
    assert watched.barriers >= 4
    assert watched.accesses > 1000
