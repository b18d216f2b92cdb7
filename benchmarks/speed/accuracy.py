"""No time is believed before its result: every version against the specification in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.speed.baselines import Loss, package_loss
from benchmarks.speed.peers import FORMULAS
from benchmarks.speed.shapes import Inputs, Shape, random_inputs
from dwl_kernels import backends

# A backend of this package may err twice as much as the specification in the same dtype, and this.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
# The error of a rival is a result; past this it computes something else.
RIVAL_TOLERANCE = 0.05
# Numbers of a block of rows of the logits, and of all logits that a CPU checks at once.
BLOCK = 1 << 24
CPU_CHECK = 1 << 25


class Result(NamedTuple):
    loss: Tensor  # []
    gradients: dict[str, Tensor]  # by the name of the embedding


@dataclass(frozen=True)
class Errors:
    """Largest deviations from float64, relative to the largest entry of the reference."""

    loss: float
    gradients: dict[str, float]

    @property
    def gradient(self) -> float:
        return max(self.gradients.values())


@dataclass(frozen=True)
class Verdict:
    """What may be timed, with its errors, and why the rest may not."""

    shape: Shape  # where it was checked
    errors: dict[str, Errors]
    refused: dict[str, str]  # wrong results
    failed: dict[str, str]  # no results: the version raised, a backend perhaps by design

    @property
    def passed(self) -> list[str]:
        return [name for name in self.errors if name not in self.refused]


def check(
    shape: Shape,
    losses: Mapping[str, Loss],
    device: str = "cpu",
    note: Callable[..., object] = lambda **_: None,
) -> Verdict:
    """Compare loss and gradients of every version with the truth, on the shape or fewer rows.

    `note` hears of every version before it runs and after: it may end the process.
    """
    shape = checked_shape(shape, device)
    inputs = random_inputs(shape, shape.compared_at, device=device)
    double = inputs.to(torch.float64)
    truth = specification(double)
    same_dtype = deviation(specification(inputs), truth)
    errors: dict[str, Errors] = {}
    refused: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name, loss in losses.items():
        note(begun="check", version=name)
        try:
            found = evaluate(loss, inputs)
        except Exception as error:  # a peer may raise anything; no version stops the others
            failed[name] = f"{type(error).__name__}: {str(error).strip()[:300]}"
            note(failed=failed[name], version=name)
            continue
        formula = FORMULAS.get(name)
        expected = truth if formula is None else evaluate(formula, double)
        errors[name] = deviation(found, expected)
        reason = _too_wrong(name, errors[name], same_dtype, TOLERANCE[shape.dtype])
        if reason is not None:
            refused[name] = reason
        note(version=name, refused=reason, loss=errors[name].loss, gradient=errors[name].gradient)
    return Verdict(shape, errors, refused, failed)


def checked_shape(shape: Shape, device: str) -> Shape:
    """The shape itself, on a CPU with no more rows than float64 takes seconds for."""
    width = shape.candidates * (shape.dim if shape.kind == "per-example" else 1)
    if device != "cpu" or shape.rows * width <= CPU_CHECK:
        return shape
    return shape.shrunk(max(1, CPU_CHECK // width), shape.candidates, shape.table)


def _too_wrong(name: str, found: Errors, same_dtype: Errors, tolerance: float) -> str | None:
    ours = name in backends.NAMES and name != "eager"
    pairs = {"loss": (found.loss, same_dtype.loss)}
    for leaf, error in found.gradients.items():
        pairs[f"gradient of {leaf}"] = (error, same_dtype.gradients[leaf])
    for what, (error, usual) in pairs.items():
        allowed = 2 * usual + tolerance if ours else RIVAL_TOLERANCE
        if not error <= allowed:  # NaN is too wrong
            return f"wrong {what}: error {error:.1e}, allowed {allowed:.1e}"
    return None


def evaluate(loss: Loss, inputs: Inputs) -> Result:
    leaves = inputs.leaves()
    value = loss(inputs)
    gradients = torch.autograd.grad(value, tuple(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), gradients, strict=True)
    # A gradient that is left out counts as zeros.
    named = {k: torch.zeros_like(leaf) if g is None else g for (k, leaf), g in pairs}
    return Result(value.detach(), named)


def specification(inputs: Inputs) -> Result:
    """The `eager` backend, over blocks of rows: the mean is the sum of theirs by their share."""
    rows = len(inputs.query)
    width = rows if inputs.kind == "in-batch" else inputs.query.shape[1]
    for wide in (inputs.negative, inputs.table):
        if wide is not None and inputs.kind != "per-example":
            width = len(wide)
    if inputs.kind == "per-example" and inputs.negative_ids is not None:
        width = inputs.negative_ids.shape[1] * inputs.query.shape[1]
    size = max(1, BLOCK // width)
    loss = torch.zeros((), dtype=torch.float64, device=inputs.query.device)
    sums = torch.promote_types(inputs.query.dtype, torch.float32)
    gradients = {k: torch.zeros_like(leaf, dtype=sums) for k, leaf in inputs.leaves().items()}
    for start in range(0, rows, size):
        block = _rows(inputs, start, start + size)
        share = len(block.query) / rows
        value = share * package_loss(block, "eager")
        loss += value.detach()
        # Through the slices of the block, back to the whole embeddings.
        leaves = tuple(inputs.leaves().values())
        for total, part in zip(gradients.values(), torch.autograd.grad(value, leaves), strict=True):
            total += part
    return Result(loss, gradients)


def _rows(x: Inputs, start: int, stop: int) -> Inputs:
    """Rows of the batch, as a problem of its own against all candidates."""
    rows = slice(start, stop)

    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows]

    block = replace(
        x,
        query=x.query[rows],
        positive=cut(x.positive),
        positive_log_q=cut(x.positive_log_q),
        positive_ids=cut(x.positive_ids),
        domain_ids=cut(x.domain_ids),
    )
    if x.kind == "per-example":
        return replace(
            block, negative_ids=cut(x.negative_ids), negative_log_q=cut(x.negative_log_q)
        )
    if x.kind == "in-batch":
        # All positives are candidates; ids of their own let each row drop only its own positive.
        ids = x.positive_ids
        if ids is None:
            ids = torch.arange(len(x.query), device=x.query.device)
        return replace(
            block,
            kind="shared",
            negative=x.positive,
            positive_ids=ids[rows],
            negative_ids=ids,
            negative_log_q=x.positive_log_q,
        )
    return block


def deviation(found: Result, truth: Result) -> Errors:
    def relative(value: Tensor, reference: Tensor) -> float:
        largest = reference.abs().max().clamp(min=1e-300)
        return float((value.double() - reference.double()).abs().max() / largest)

    gradients = {k: relative(found.gradients[k], truth.gradients[k]) for k in truth.gradients}
    return Errors(relative(found.loss, truth.loss), gradients)
