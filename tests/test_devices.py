"""One device, that of the query: with `meta` in the place of a GPU, and every operation watched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cases
import pytest
import torch
from module_inputs import ITEMS, KINDS, B, D, N, draws, item_domains
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from dwl_kernels import (
    CountMinSketch,
    DomainWeights,
    LogUniformSampler,
    StreamingFrequency,
    UniformSampler,
    UnigramSampler,
    backends,
    ops,
)
from dwl_kernels.backends import chunked
from dwl_kernels.core import values

COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
META = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """An operation of two devices fails, as on a GPU; but for copies, and numbers of a CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
        devices = {x.device.type for x in given}
        assert func in COPIES or len(devices) < 2, f"{func} of {devices}"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend itself runs, and not what stands for it on `meta`."""
    monkeypatch.setattr(ops, "softmax_loss", ops.solve)
    with OneDevice():
        yield


CASES = [c for c in cases.CASES if "everything" in c.name or c.kind == "full" or "NaN" in c.name]


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", ["eager", "chunked"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_and_gradients_are_made_on_the_device_of_the_query(
    case: cases.Case, name: str
) -> None:
    inputs = case.inputs(torch.float32, "meta")
    loss = case.loss(inputs, name)
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    gradients = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    assert {x.device for x in (loss, *gradients)} == {META}


ARRAYS = ("target", "ids", "positive_ids", "negative_ids", "domain_ids")
EVERYTHING: dict[str, Any] = {"log_q": True, "ids": True, "domains": 2, "examples": True}
OF_KINDS = [
    cases.Case(f"devices of {kind}", kind=kind, temperature="rows", rows=5, **EVERYTHING)
    for kind in ("sampled", "mixed", "dual", "full", "indexed", "indexed_rows")
]


@pytest.mark.parametrize("case", OF_KINDS, ids=lambda case: case.kind)
def test_arrays_go_to_the_device_of_the_query(case: cases.Case) -> None:
    inputs, arrays = case.inputs(torch.float32, "meta"), case.inputs(torch.float32)
    inputs |= {name: arrays[name].numpy() for name in ARRAYS if name in arrays}
    assert case.loss(inputs, "chunked").device == META


@pytest.mark.parametrize("case", OF_KINDS, ids=lambda case: case.kind)
def test_argument_on_another_device_is_named(case: cases.Case) -> None:
    inputs, others = case.inputs(torch.float32), case.inputs(torch.float32, "meta")
    for name in inputs.keys() - {"query", *case.strengths()}:
        with pytest.raises(ValueError, match=f"{name} is on meta but query is on cpu"):
            case.loss(inputs | {name: others[name]}, "chunked")


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arrays", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_modules_work_on_the_device_of_the_query(kind: str, arrays: bool, training: bool) -> None:
    """Of ids on that device, and of arrays, which go there."""
    loss_fn = KINDS[kind](
        3, item_domains=item_domains(), calibration=0.5, normalize=True, backend="chunked"
    )
    loss_fn.to(META).train(training)
    query, table = (torch.randn(n, D, device=META, requires_grad=True) for n in (B, ITEMS))
    given = draws()
    if kind == "by row":
        given |= {name: x.expand(B, N) for name, x in given.items() if name.startswith("negative")}
    given = {
        name: x.numpy() if arrays and name.endswith("ids") else x.to(META)
        for name, x in given.items()
    }
    given["example_weights"] = torch.ones(B, device=META)
    if kind == "cross-entropy":
        rows = {name: given[name] for name in ("domain_ids", "example_weights")}
        loss = loss_fn(query, table, given["positive_ids"], **rows)
    elif kind in ("table", "by row"):
        loss = loss_fn(query, table=table, **given)
    elif kind == "in-batch":
        given = {name: x for name, x in given.items() if not name.startswith("negative")}
        loss = loss_fn(query, table[:B], **given)
    else:
        loss = loss_fn(query, table[:B], table[B : B + N], **given)
    loss.backward()
    assert loss.device == query.grad.device == table.grad.device == META


@pytest.mark.usefixtures("one_device")
def test_checkpointed_forward_weighs_on_the_device_of_the_query() -> None:
    loss_fn = KINDS["sampled"](3, backend="chunked").to(META)
    query = torch.randn(B, D, device=META, requires_grad=True)
    domain_ids = torch.zeros(B, dtype=torch.int64, device=META)
    loss = checkpoint(lambda x: loss_fn(x, x, x, domain_ids=domain_ids), query, use_reentrant=False)
    loss.backward()
    assert query.grad.device == META


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    "make",
    [
        lambda: UniformSampler(7),
        lambda: LogUniformSampler(7),
        lambda: UnigramSampler(torch.arange(7)),
    ],
)
def test_samplers_draw_on_their_device(make: Any) -> None:
    sampler = make().to(META)
    drawn = sampler.sample((3, 2))
    assert {x.device for x in (*drawn, sampler.log_q(drawn[0]))} == {META}
    assert sampler.log_q(torch.arange(3).numpy()).device == META


@pytest.mark.usefixtures("one_device")
def test_counts_are_kept_on_their_device() -> None:
    ids = torch.zeros(3, dtype=torch.int64, device=META)
    for counts in (CountMinSketch(8), StreamingFrequency(8), DomainWeights(3)):
        counts.to(META).update(ids)
        counts.update(ids.new_zeros(2, device="cpu").numpy())
        with pytest.raises(ValueError, match="is on cpu"):
            counts.update(torch.zeros(3, dtype=torch.int64))
    assert DomainWeights(3).to(META).log_weight(ids).device == META


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_of_a_table_is_summed_on_its_device(weighted: bool) -> None:
    ids = torch.zeros(5, 3, dtype=torch.int64, device=META)
    coefficients = [torch.ones(5, 3, device=META)] if weighted else []
    source = torch.ones(5, 4, device=META)
    table, _ = chunked.table_gradient(source, [ids], coefficients, 7, torch.bfloat16, False)
    assert (table.device, table.shape, table.dtype) == (META, (7, 4), torch.bfloat16)


@pytest.mark.parametrize("name", ["eager", "chunked", "cpu"])
@pytest.mark.parametrize(
    ("what", "wrong"),
    [
        *(("example_weights", -1.0), ("temperature", -1.0), ("temperature", torch.inf)),
        *(("domain_ids", 5), ("domain_ids", -2), ("target", 33), ("target", -1)),
    ],
)
def test_wrong_value_makes_its_row_nan_where_a_look_would_wait(
    monkeypatch: pytest.MonkeyPatch, what: str, wrong: float, name: str
) -> None:
    if (reason := backends.unavailable_reason(name, "cpu")) is not None:
        pytest.skip(reason)
    if name == "cpu" and (what, wrong) == ("temperature", -1.0):
        pytest.skip("the kernel looks at it itself, and raises")
    case = cases.Case("wrong", kind="full", temperature="rows", **EVERYTHING)
    inputs = {**case.inputs(torch.float32), "reduction": "none"}
    inputs["example_weights"] += 1
    inputs["target"].clamp_(min=0)
    expected = case.loss(inputs, name).detach()
    with torch.no_grad():
        inputs[what][3] = wrong
    monkeypatch.setattr(values, "checks_values", lambda tensor: False)
    loss = case.loss(inputs, name).detach()
    assert loss[3].isnan()
    others = torch.arange(case.rows) != 3
    torch.testing.assert_close(loss[others], expected[others])
