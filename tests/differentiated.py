"""Losses by name, with the values that they are differentiated by."""

from __future__ import annotations

import module_inputs
import torch
from cases import Case

SIZES = {"rows": 5, "candidates": 6, "dim": 4}
OPTIONS = {"log_q": True, "ids": True, "domains": 2, "examples": True, "temperature": "rows"}
KINDS = ("sampled", "in_batch", "mixed", "full", "indexed", "indexed_rows", "dual")
IDS = module_inputs.draws()


def loss_and_values(name, backend="eager", **options):
    """The sum of a loss as a function of its differentiable inputs, and these. In float64."""
    kind, which = name.split(", ")
    if kind == "module":
        loss_fn = module_inputs.KINDS[which](
            weights=[0.5, 1.0, 3.0],
            item_domains=module_inputs.item_domains(),
            normalize=True,
            backend=backend,
            **options,
        ).eval()  # counting changes buffers, which is no business of a transform
        query, table = module_inputs.embeddings()[0], module_inputs.table_of()

        def of_module(query, table):
            return module_inputs.call(which, loss_fn, query, table, IDS)

        return of_module, [query.detach(), table.detach()]
    case = Case(name, **SIZES, kind=kind, **OPTIONS)
    dtype = torch.float32 if backend == "triton" else torch.float64
    inputs = {**case.inputs(dtype), "reduction": which, **options}
    leaves = [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad]
    values = [inputs[k].detach() for k in leaves]

    def of_function(*values):
        return case.loss({**inputs, **dict(zip(leaves, values, strict=True))}, backend).sum()

    return of_function, values


def leaves_of(values):
    return [value.clone().requires_grad_() for value in values]


def gradients(loss, values):
    leaves = leaves_of(values)
    return torch.autograd.grad(loss(*leaves), leaves)


def assert_all_close(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
