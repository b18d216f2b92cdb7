"""A small problem of any loss, and its comparison with `eager` in float64. `cases` has them all."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import case_changes
import torch
from torch import Tensor

import dwl_kernels

# What a backend may add to twice the error of eager in its own dtype, relative to the largest
# entry of the reference.
MARGIN = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 4e-3,
}
DIFFERENTIABLE = (
    *("query", "positive", "negative", "table", "bias"),
    *("temperature", "domain_weights"),
)

TABLE_ROWS = 41  # of the table from which indexed candidates are drawn

NOT_IN_CUDA = {"dual", "indexed_rows", "rows"}  # kinds that its kernel does not take

Inputs = dict[str, Any]
Formula = Callable[[str, Inputs], Tensor]  # of a kind and its inputs, in the place of a backend


@dataclass(frozen=True)
class Case:
    name: str
    rows: int = 17
    candidates: int = 33  # of `negative`
    dim: int = 20
    # "in_batch", "mixed" (both candidates), "full" (log_q: a bias), "dual", "indexed" (ids in the
    # place of positives and negatives), "indexed_rows" and "rows" (every row has ids, or negatives,
    # of its own)
    kind: str = "sampled"
    log_q: bool = False
    ids: bool = False
    domains: int = 0  # slots per row
    examples: bool = False
    temperature: str = "float"  # "scalar" and "rows" are tensors with a gradient
    options: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Inputs], None] | None = None
    frozen: tuple[str, ...] = ()  # what takes no gradient

    @property
    def in_cuda(self) -> bool:
        """Whether the kernel of the CUDA backend takes it."""
        both_ids = self.ids and self.change is case_changes.query_ids
        return self.kind not in NOT_IN_CUDA and not both_ids

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> Inputs:
        """Keyword arguments of the loss; leaves that take a gradient require it."""
        g = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        b, n, d = self.rows, self.candidates, self.dim

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=g)

        inputs: Inputs = {"query": normal(b, d), "positive": normal(b, d), "temperature": 0.7}
        prefix = "" if self.kind in ("in_batch", "mixed") else "positive_"
        inputs["negative"] = normal(n, d)
        if self.log_q:
            inputs[prefix + "log_q"] = torch.log_softmax(normal(b), 0)
            inputs["negative_log_q"] = torch.log_softmax(normal(n), 0)
        if self.ids:
            inputs[prefix + "ids"] = integers(0, 12, b)
            inputs["negative_ids"] = integers(0, 12, n)
        if self.kind == "rows":
            inputs["negative"] = normal(b, n, d)
            if self.log_q:
                inputs["negative_log_q"] = torch.log_softmax(normal(b, n), 1)
            if self.ids:
                inputs["negative_ids"] = integers(0, 12, b, n)
        elif self.kind == "in_batch":
            inputs = {k: v for k, v in inputs.items() if not k.startswith("negative")}
        elif self.kind == "full":
            full = {"query": inputs["query"], "table": inputs["negative"]}
            full["target"] = integers(0, n, b)
            full["target"][1::4] = -100
            if self.log_q:
                full["bias"] = inputs["negative_log_q"]
            inputs = {**full, "temperature": 0.7}
        elif self.kind.startswith("indexed"):
            per_row = self.kind == "indexed_rows"
            shape = (b, n) if per_row else (n,)
            indexed = {"query": inputs["query"], "table": normal(TABLE_ROWS, d)}
            # Few different ids: duplicates inside a row, across rows, and of the positives.
            indexed["positive_ids"] = integers(0, 12, b)
            indexed["negative_ids"] = integers(0, TABLE_ROWS, *shape)
            if self.log_q:
                indexed["positive_log_q"] = inputs["positive_log_q"]
                indexed["negative_log_q"] = inputs["negative_log_q"]
                if per_row:
                    indexed["negative_log_q"] = torch.log_softmax(normal(b, n), 1)
            inputs = {**indexed, "temperature": 0.7}
        if self.domains:
            shape = (b,) if self.domains == 1 else (b, self.domains)
            inputs["domain_ids"] = each_once(integers(-1, 5, *shape))
            inputs["domain_weights"] = normal(5).exp()
        if self.examples:
            inputs["example_weights"] = normal(b).exp() * (integers(0, 3, b) > 0)
        if self.temperature == "scalar":
            inputs["temperature"] = torch.tensor(0.6, dtype=torch.float64)
        elif self.temperature == "rows":
            inputs["temperature"] = 0.3 + normal(b).exp()
        if self.change is not None:
            self.change(inputs)
        for name, value in inputs.items():
            if not isinstance(value, Tensor):
                continue
            if value.is_floating_point():
                embedding = name in ("query", "positive", "negative", "table")
                narrow = dtype if embedding or dtype == torch.float64 else torch.float32
                value = value.to(narrow)
            learned = name in DIFFERENTIABLE and name not in self.frozen
            inputs[name] = value.to(device).requires_grad_(learned)
        return inputs | self.strengths() | self.options

    def strengths(self) -> dict[str, float]:
        """Those of the dual scale, all on unless the options say otherwise."""
        names = ("hardness", "similarity", "competition") if self.kind == "dual" else ()
        return dict.fromkeys(names, 1.0)

    def loss(self, inputs: Inputs, backend: str | Formula) -> Tensor:
        if not isinstance(backend, str):
            return backend(self.kind, inputs)
        function = {
            "sampled": dwl_kernels.sampled_softmax_loss,
            "rows": dwl_kernels.sampled_softmax_loss,
            "in_batch": dwl_kernels.in_batch_softmax_loss,
            "mixed": dwl_kernels.in_batch_softmax_loss,
            "full": dwl_kernels.full_softmax_loss,
            "indexed": dwl_kernels.indexed_sampled_softmax_loss,
            "indexed_rows": dwl_kernels.indexed_sampled_softmax_loss,
            "dual": dwl_kernels.dual_scale_softmax_loss,
        }[self.kind]
        return function(**inputs, backend=backend)


def loss_and_gradients(
    case: Case,
    backend: str | Formula,
    dtype: torch.dtype,
    device: str = "cpu",
    upcast: bool = False,
) -> dict[str, Tensor]:
    """The loss and all gradients under a random upstream gradient, in float64.

    `upcast` computes in float64 from the same rounded inputs: the reference.
    """
    inputs = case.inputs(dtype, device)
    if upcast:
        inputs = {
            k: v.detach().double().requires_grad_(v.requires_grad)
            if isinstance(v, Tensor) and v.is_floating_point()
            else v
            for k, v in inputs.items()
        }
    loss = case.loss(inputs, backend)
    g = torch.Generator().manual_seed(1)
    upstream = torch.randn(loss.shape, generator=g, dtype=torch.float64).to(loss)
    leaves = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}
    gradients = torch.autograd.grad(loss, list(leaves.values()), upstream) if leaves else ()
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert gradient.dtype == leaf.dtype, name
        assert gradient.shape == leaf.shape, name
    results = {"loss": loss, **dict(zip(leaves, gradients, strict=True))}
    dense = {k: v.to_dense() if v.is_sparse else v for k, v in results.items()}
    return {name: value.detach().double().cpu() for name, value in dense.items()}


def error(value: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest finite reference entry; inf and NaN must coincide."""
    finite = reference.isfinite()
    if not torch.equal(value[~finite].nan_to_num(7.0), reference[~finite].nan_to_num(7.0)):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = float(reference[finite].abs().max())
    difference = float((value[finite] - reference[finite]).abs().max())
    if difference != difference:
        return float("inf")
    return difference / scale if scale > 0 else (0.0 if difference == 0 else float("inf"))


def check(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Fails unless `backend` is as exact as design section 7 of the formulas asks."""
    reference = loss_and_gradients(case, "eager", dtype, upcast=True)
    same_dtype = loss_and_gradients(case, "eager", dtype)
    got = loss_and_gradients(case, backend, dtype, device)
    assert got.keys() == reference.keys()
    for name, value in got.items():
        allowed = 2 * error(same_dtype[name], reference[name]) + MARGIN[dtype]
        measured = error(value, reference[name])
        assert measured <= allowed, f"{name}: error {measured:.2e}, allowed {allowed:.2e}"


def each_once(domain_ids: Tensor) -> Tensor:  # [M] or [M, G]
    """-1 in the place of a domain that its row has named before."""
    if domain_ids.dim() == 1:
        return domain_ids
    again = (domain_ids[:, :, None] == domain_ids[:, None, :]).tril(-1).any(-1)
    return domain_ids.masked_fill(again, -1)
