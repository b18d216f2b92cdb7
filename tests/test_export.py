"""Programs for batches of any size: ``torch.export`` and ``torch.compile(dynamic=True)``.

A check that compares a symbolic size with a number holds a program to the size it was traced with;
PyTorch then raises in an export, and compiles again in a step. Gradients of a compiled step are
compared too; an exported program has none.
"""

from __future__ import annotations

import copy
import io

import cases
import module_inputs
import pytest
import torch
import torch.distributed as dist
from cases import TABLE_ROWS, Case
from torch import Tensor, nn
from torch.export import Dim, export

import dwl_kernels

CANDIDATES, DIM = 11, 7  # sizes that start out equal are one symbol: no batch below is 5, 7 or 11
EVERYTHING = {"log_q": True, "ids": True, "domains": 2, "examples": True, "temperature": "rows"}
PLAIN = ("sampled", "in_batch", "full", "indexed", "indexed_rows", "dual")
# A loss, what it is given, and choices.
FUNCTIONS = {
    **{f"{kind}, plain": (kind, {}, {}) for kind in PLAIN},
    **{f"{kind}, everything": (kind, EVERYTHING, {}) for kind in (*PLAIN, "mixed")},
    **{
        f"{kind}, none": (kind, EVERYTHING, {"reduction": "none"})
        for kind in ("sampled", "indexed_rows")
    },
    "sampled, one domain": ("sampled", {"domains": 1}, {"reduction": "sum"}),
    "sampled, one temperature": ("sampled", {"temperature": "scalar"}, {}),
    "sampled, refined": ("sampled", EVERYTHING, {"correction": "refined"}),
    "full, threshold": ("full", EVERYTHING, {"skip_threshold": 1e-4}),
    "mixed, weighted mean": ("mixed", EVERYTHING, {"reduction": "weighted_mean"}),
    "dual, batch": ("dual", EVERYTHING, {"in_batch": True}),
}
MODULES = ["table, eval", "by row, train", "dual scale, eval", "cross-entropy, eval"]


class Loss(nn.Module):
    """A loss of named tensors, as a module with one argument: export wants both."""

    def __init__(self, loss, **choices):
        super().__init__()
        self.loss, self.choices = loss, choices

    def forward(self, inputs):
        return self.loss(**inputs, **self.choices)


def loss_of(name):
    kind, last = name.split(", ")
    if name in FUNCTIONS:
        function = {
            "sampled": dwl_kernels.sampled_softmax_loss,
            "in_batch": dwl_kernels.in_batch_softmax_loss,
            "mixed": dwl_kernels.in_batch_softmax_loss,
            "full": dwl_kernels.full_softmax_loss,
            "dual": dwl_kernels.dual_scale_softmax_loss,
        }.get(kind, dwl_kernels.indexed_sampled_softmax_loss)
        return Loss(function, **FUNCTIONS[name][2], backend="eager")
    choices = {"normalize": True, "learn_temperature": True} if last == "eval" else {}
    items = CANDIDATES if kind == "cross-entropy" else TABLE_ROWS
    module = module_inputs.KINDS[kind](
        item_domains=[item % 4 for item in range(items)],
        calibration=0.5,
        backend="eager",
        **choices,
    )
    return Loss(module).train(last == "train")


def case_of(name, rows):
    kind, _ = name.split(", ")
    given = EVERYTHING | {"temperature": "float"}  # modules have a temperature of their own
    if name in FUNCTIONS:
        kind, given, _ = FUNCTIONS[name]
    elif kind in ("table", "by row"):
        kind = {"table": "indexed", "by row": "indexed_rows"}[kind]
    elif kind != "sampled":
        kind = {"in-batch": "in_batch", "dual scale": "dual", "cross-entropy": "full"}[kind]
    return Case(name, rows=rows, candidates=CANDIDATES, dim=DIM, kind=kind, **given)


def inputs_of(name, *leading):
    """The tensors that a loss is given, ``[*leading]`` in what is per row."""
    rows = torch.Size(leading).numel()
    found = case_of(name, rows).inputs(torch.float32)
    found = {k: v.detach() for k, v in found.items() if isinstance(v, Tensor)}
    if name not in FUNCTIONS:
        names = {"log_q": "positive_log_q", "ids": "positive_ids"}  # of the batch's own positives
        found = {names.get(k, k): v for k, v in found.items() if k != "domain_weights"}
        found.pop("domain_ids")  # by item
        for side in ("positive_ids", "negative_ids"):
            if side in found:
                found[side] = found[side] % TABLE_ROWS
    return {
        k: v.reshape(*leading, *v.shape[1:]) if v.dim() and len(v) == rows else v
        for k, v in found.items()
    }


def program(name, strict, *leading):
    """A loss, and what is exported of it with every leading size a symbol."""
    loss, inputs = loss_of(name), inputs_of(name, *leading)
    sizes = {place: Dim(f"size{place}", min=2, max=1000) for place in range(len(leading))}
    per_row = {k: v.shape[: len(leading)] == leading for k, v in inputs.items()}
    shapes = {k: sizes if per_row[k] else None for k in inputs}
    return export(
        copy.deepcopy(loss), (inputs,), dynamic_shapes={"inputs": shapes}, strict=strict
    ), loss


def assert_same_at(name, exported, loss, *sizes):
    run = exported.module()
    for size in sizes:
        inputs = inputs_of(name, *size)
        torch.testing.assert_close(run(inputs), loss(inputs))


@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_exported_program_takes_any_batch_of_sequences(name):
    exported, loss = program(name, False, 6, 3)
    assert_same_at(name, exported, loss, (6, 3), (2, 4), (9, 2))
    nodes = [
        node for node in exported.graph.nodes if "dwl_kernels.softmax_loss" in str(node.target)
    ]
    assert len(nodes) == 1  # the op itself, and not what it does in PyTorch


@pytest.mark.parametrize("name", ["indexed_rows, everything", "in-batch, eval"])
def test_program_of_a_strict_export_takes_any_batch(name):
    exported, loss = program(name, True, 6)
    assert_same_at(name, exported, loss, (6,), (2,), (19,))


def test_exported_program_is_saved_and_loaded():
    name = "cross-entropy, eval"
    exported, loss = program(name, False, 6)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    assert_same_at(name, torch.export.load(file), loss, (6,), (13,))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_program_counts_what_its_module_would(strict):
    """A program has counts of its own, which it changes; its source keeps those it has."""
    exported, loss = program("in-batch, train", strict, 6)
    assert loss.loss.domain_weights.steps == 0
    run = exported.module()
    for size in (6, 13):
        inputs = inputs_of("in-batch, train", size)
        run(inputs)
        loss(inputs)
    state, counted = loss.loss.domain_weights.state_dict(), run.loss.domain_weights
    for key in state.keys() - {"arguments"}:
        assert torch.equal(getattr(counted, key), state[key]), key
    assert counted.steps == 2


def test_loss_over_a_process_group_is_not_exported(tmp_path):
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        loss = Loss(dwl_kernels.in_batch_softmax_loss, process_group=dist.group.WORLD)
        with pytest.raises(RuntimeError, match="export the model without its loss"):
            export(loss, (inputs_of("in_batch, plain", 6),))
    finally:
        dist.destroy_process_group()


def leaves_in(inputs):
    names = ("query", *cases.DIFFERENTIABLE)
    return {k: v.requires_grad_() if k in names else v for k, v in inputs.items()}


@pytest.mark.parametrize(
    "name",
    ["indexed, everything", "indexed_rows, everything", "in-batch, train"],
)
@torch._dynamo.config.patch(error_on_recompile=True)
def test_step_is_compiled_once_for_all_batches(name):
    torch._dynamo.reset()
    loss = loss_of(name)
    compiled = torch.compile(copy.deepcopy(loss), dynamic=True, fullgraph=True, backend="aot_eager")
    for size in (6, 9, 16):
        results = []
        for step in (loss, compiled):
            inputs = leaves_in(inputs_of(name, size))
            value = step(inputs).sum()
            leaves = [v for v in inputs.values() if v.requires_grad]
            results.append((value, *torch.autograd.grad(value, leaves)))
        torch.testing.assert_close(*results)


def test_sparse_gradient_goes_around_the_graph():
    """PyTorch traces no sparse tensor: it falls back to what is not compiled."""
    torch._dynamo.reset()
    loss = Loss(dwl_kernels.indexed_sampled_softmax_loss, sparse_grad=True, backend="eager")
    compiled = torch.compile(loss, backend="eager")
    results = []
    for step in (loss, compiled):
        inputs = leaves_in(inputs_of("indexed_rows, plain", 6))
        (gradient,) = torch.autograd.grad(step(inputs), inputs["table"])
        assert gradient.is_sparse
        results.append(gradient.to_dense())
    assert torch.equal(*results)
