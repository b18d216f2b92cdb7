"""The differentiable face: upstream gradients, autocast, compilation, op registration."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import dwl_kernels
from dwl_kernels import ops
from dwl_kernels.core import build as builders
from dwl_kernels.core import drawn

BY_NAME = {case.name: case for case in cases.CASES}


def _op_arguments(
    case: cases.Case,
    backend: str,
    wanted: bool,
    row_grad: bool,
    dtype: torch.dtype = torch.float32,
) -> tuple:
    inputs = case.inputs(dtype)
    inputs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    defaults: dict[str, object] = {"correction": "standard", "reduction": "mean"}
    build = builders.sampled_problem
    if case.kind == "mixed":
        build = builders.in_batch_problem
    elif case.kind == "full":
        build = builders.full_problem
        defaults = {"reduction": "mean", "ignore_index": -100, "skip_threshold": 1e-3}
    elif case.kind == "indexed_rows":
        build = drawn.per_row_problem
        for ids, rows in (("positive_ids", "positive_rows"), ("negative_ids", "negative_rows")):
            inputs[rows] = inputs.pop(ids)
    elif case.kind == "dual":
        for name in ("hardness", "similarity", "competition"):
            del inputs[name]
        defaults["dual"] = dwl_kernels.core.problem.DualScale(1.0, 0.5, 4, 1.0)
    problem = build(**{**defaults, **inputs})
    upstream = torch.randn(case.rows) if row_grad else None
    masks = [wanted] * 6
    masks[1] = wanted and problem.sources()[1] is not None
    masks[3] = wanted and case.kind == "full"
    masks[1] |= wanted and problem.per_row
    return (*ops.arguments_of(problem), upstream, masks, backend)


@pytest.mark.parametrize(
    "name",
    [
        "everything",
        "mixed, everything",
        "everything, none",
        "full softmax, past the tile",
        "dual scale, everything",
        "by row, everything",
        "by row, none",
        "embeddings by row, everything",
        "mixed, positives of a query, everything",
    ],
)
def test_registered_op_passes_opcheck(backend: str, name: str) -> None:
    for wanted in (True, False):
        arguments = _op_arguments(BY_NAME[name], backend, wanted, name.endswith("none"))
        torch.library.opcheck(torch.ops.dwl_kernels.softmax_loss.default, arguments)


def assert_fake_is_alike(op: Any, arguments: tuple) -> None:
    """The fake of an op says the dtypes and shapes that the op gives."""
    outputs = op(*arguments)
    with FakeTensorMode() as mode:
        fakes = op(
            *tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, arguments)
        )
    for real, fake in zip(outputs, fakes, strict=True):
        assert (real.dtype, real.shape) == (fake.dtype, fake.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "name", ["everything", "full softmax, past the tile", "by row, everything"]
)
def test_fake_has_the_dtypes_of_every_gradient(name: str, dtype: torch.dtype) -> None:
    arguments = _op_arguments(BY_NAME[name], "chunked", True, False, dtype)
    assert_fake_is_alike(torch.ops.dwl_kernels.softmax_loss, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fakes_of_what_follows_have_the_dtypes_that_are_asked_for(dtype: torch.dtype) -> None:
    source, ids = torch.ones(5, 4, dtype=torch.float16), torch.zeros(5, 3, dtype=torch.int64)
    arguments = (source, [ids], [torch.ones(5, 3)], 7, dtype, False, "chunked")
    assert_fake_is_alike(torch.ops.dwl_kernels.table_gradient, arguments)
    gradients, places = [source, source.double()], [ops.DTYPES.index(dtype)] * 2
    assert_fake_is_alike(torch.ops.dwl_kernels.scale, (gradients, torch.ones(()), places))


@pytest.mark.parametrize("name", ["softmax_loss", "scale", "table_gradient"])
def test_registered_op_takes_no_list_of_dtypes(name: str) -> None:
    """PyTorch 2.11 hands the kernel of an op numbers in their place."""
    assert "ScalarType[]" not in str(getattr(torch.ops.dwl_kernels, name).default._schema)


def test_native_op_passes_opcheck() -> None:
    from dwl_kernels.backends.cpu import solve as cpu

    if cpu.does_not_build() is not None:
        pytest.skip(f"no CPU kernel: {cpu.does_not_build()}")
    query, positive, candidates = torch.randn(9, 4), torch.randn(9, 4), torch.randn(5, 4)
    ids = torch.arange(9), torch.arange(5)
    log_q, dual = (torch.randn(9), torch.randn(5)), (torch.randn(9, 4), torch.randn(9))
    rows = (torch.rand(9) + 0.1, torch.rand(9))
    of_two_kinds = ([ids[0], ids[0] % 3], [ids[1], ids[1] % 3])
    optional = (*log_q, *dual, *of_two_kinds, torch.rand(9), torch.arange(9) > 2)
    for wanted in ((True,) * 4, (False,) * 4):
        arguments = (query, positive, candidates, None, *rows, *optional, False, *wanted, wanted[0])
        torch.library.opcheck(torch.ops.dwl_kernels_native.sampled_softmax.default, arguments)


def test_native_op_of_candidates_per_row_passes_opcheck() -> None:
    from dwl_kernels.backends.cpu import solve as cpu

    if cpu.does_not_build() is not None:
        pytest.skip(f"no CPU kernel: {cpu.does_not_build()}")
    ids = torch.arange(9) % 7, torch.arange(45).reshape(9, 5) % 7
    rows = (torch.rand(9) + 0.1, torch.rand(9), torch.randn(9), torch.randn(9, 5))
    for wanted in (True, False):
        arguments = (torch.randn(9, 4), torch.randn(7, 4), None, *ids, *rows, torch.arange(9) > 2)
        arguments = (*arguments, False, wanted, wanted, wanted)
        torch.library.opcheck(torch.ops.dwl_kernels_native.indexed_softmax.default, arguments)


@pytest.mark.parametrize("backend", ["eager", "chunked", "cpu", "triton"], indirect=True)
def test_gradients_are_copied_only_where_the_graph_is_kept(backend: str) -> None:
    query = torch.randn(5, 4, requires_grad=True)
    loss = dwl_kernels.in_batch_softmax_loss(query, torch.randn(5, 4), backend=backend)
    (made, *_) = loss.grad_fn.saved_tensors  # type: ignore[union-attr]
    upstream = torch.tensor(-3.0)
    (kept,) = torch.autograd.grad(loss, [query], upstream, retain_graph=True)
    assert kept.data_ptr() != made.data_ptr()
    (last,) = torch.autograd.grad(loss, [query], upstream)
    assert last.data_ptr() == made.data_ptr()
    torch.testing.assert_close(last, kept, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["everything", "everything, none", "by row, everything", "by row, none"]
)
def test_backward_may_run_twice(backend: str, name: str) -> None:
    inputs = BY_NAME[name].inputs(torch.float32)
    loss = BY_NAME[name].loss(inputs, backend).sum()
    loss.backward(retain_graph=True)
    first = inputs["query"].grad.clone()
    loss.backward()
    torch.testing.assert_close(inputs["query"].grad, 2 * first)


@pytest.mark.parametrize(
    "name", ["everything", "everything, none", "by row, everything", "by row, none"]
)
def test_double_backward_raises(backend: str, name: str) -> None:
    inputs = BY_NAME[name].inputs(torch.float32)
    loss = BY_NAME[name].loss(inputs, backend).sum()
    (gradient,) = torch.autograd.grad(loss, [inputs["query"]], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_loss_scale_of_float16_does_not_overflow_or_underflow() -> None:
    """A scaler multiplies a mean over many rows by 65536, which float16 itself cannot hold."""
    case = cases.Case("float16 scaler", rows=300, candidates=50, dim=8)
    inputs = case.inputs(torch.float16)
    (case.loss(inputs, "chunked") * 65536.0).backward()
    reference = {
        k: v.detach().double().requires_grad_() if isinstance(v, Tensor) else v
        for k, v in inputs.items()
    }
    (case.loss(reference, "eager") * 65536.0).backward()
    for name in ("query", "positive", "negative"):
        torch.testing.assert_close(
            inputs[name].grad.double(), reference[name].grad, rtol=1e-3, atol=1e-3
        )


def test_leading_dimensions_flow_through(backend: str) -> None:
    case = cases.Case("leading", rows=12, candidates=9, dim=6, **cases._FULL_ROWS)
    flat = case.inputs(torch.float64)
    shaped = {
        k: v.detach().reshape(3, 4, *v.shape[1:]).requires_grad_(v.requires_grad)
        if isinstance(v, Tensor) and v.shape[:1] == (12,)
        else v
        for k, v in flat.items()
    }
    assert shaped["domain_ids"].shape == (3, 4, 2)
    for reduction in ("mean", "none"):
        a = case.loss({**flat, "reduction": reduction}, backend)
        b = case.loss({**shaped, "reduction": reduction}, backend)
        assert b.shape == (() if reduction == "mean" else (3, 4))
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=0, atol=0)
        (da,) = torch.autograd.grad(a.sum(), [flat["query"]])
        (db,) = torch.autograd.grad(b.sum(), [shaped["query"]])
        assert db.shape == (3, 4, 6)
        torch.testing.assert_close(da, db.reshape(da.shape), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_in_its_dtype_and_returns_float32(dtype: torch.dtype) -> None:
    case = BY_NAME["everything"]
    inputs = case.inputs(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        loss = case.loss(inputs, "auto")
    loss.backward()
    assert loss.dtype == torch.float32
    rounded = dict(inputs)
    for name in ("query", "positive", "negative"):
        rounded[name] = inputs[name].detach().to(dtype).requires_grad_()
    expected = case.loss(rounded, "auto")
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    expected.backward()
    assert inputs["query"].grad.dtype == torch.float32
    torch.testing.assert_close(inputs["query"].grad, rounded["query"].grad.float())


@pytest.mark.parametrize(
    ("name", "reduction"),
    [
        ("mixed, everything", "mean"),
        ("full softmax", "mean"),
        ("full softmax, past the tile", "none"),
        ("dual scale, everything", "mean"),
        ("indexed, everything", "none"),
        ("by row, everything", "mean"),
    ],
)
def test_compiled_step_gives_the_same_loss_and_gradients(
    backend: str, name: str, reduction: str
) -> None:
    case = BY_NAME[name]
    inputs = {**case.inputs(torch.float32), "reduction": reduction}
    leaves = [k for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad]

    def step(inputs: cases.Inputs) -> Tensor:
        return case.loss(inputs, backend).sum() * 3

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    a, b = step(inputs), compiled(inputs)
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    values = [inputs[k] for k in leaves]
    for x, y in zip(torch.autograd.grad(a, values), torch.autograd.grad(b, values), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_no_grad_and_frozen_inputs_build_no_graph(backend: str) -> None:
    inputs = BY_NAME["everything"].inputs(torch.float32)
    with torch.no_grad():
        assert not BY_NAME["everything"].loss(inputs, backend).requires_grad
    frozen = {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    assert not BY_NAME["everything"].loss(frozen, backend).requires_grad


@pytest.mark.parametrize(
    "name",
    [
        "NaN in the padding",
        "in-batch, NaN in the padding",
        "indexed, NaN in the padding",
        "by row, NaN in the padding",
    ],
)
def test_padded_rows_get_exact_zeros(backend: str, name: str) -> None:
    inputs = BY_NAME[name].inputs(torch.float32)
    padded = inputs["example_weights"] == 0
    BY_NAME[name].loss(inputs, backend).backward()
    for key in {"query", "positive", "temperature"} & inputs.keys():
        assert (inputs[key].grad[padded] == 0).all(), key
        assert inputs[key].grad.isfinite().all(), key
