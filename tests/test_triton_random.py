"""The Triton kernels on problems that nobody chose, interpreted, against eager in float64.

Every access is checked besides (`triton_access`). DWL_KERNELS_SEED=n draws other problems than the
default, which stays the same so that a failure is this change's; the seed and the number of the
problem are the name of the test. DWL_KERNELS_PROBLEMS says how many are drawn, a few in every run
and 500 or more after a change to a kernel.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable
from typing import Any

import case_changes
import cases
import pytest
import torch
from torch import Tensor

from dwl_kernels import backends
from dwl_kernels.backends.triton import solve as host
from dwl_kernels.backends.triton.tiles import Tiles

REASON = backends.unavailable_reason("triton", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SEED = int(os.environ.get("DWL_KERNELS_SEED", "0"))
PROBLEMS = int(os.environ.get("DWL_KERNELS_PROBLEMS", "140"))

KINDS = ("sampled", "in_batch", "mixed", "full", "dual", "indexed", "indexed_rows")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# What may be done to the inputs of a case that has these.
CHANGES: tuple[tuple[tuple[str, ...], Callable[[cases.Inputs], None]], ...] = (
    (("positive_ids", "negative_ids", "positive"), case_changes.all_hits),
    (("positive_ids", "negative_ids", "positive"), case_changes.some_hits_only),
    (("positive_ids", "negative_ids", "positive"), case_changes.large_ids(1 << 40)),
    (("example_weights",), case_changes.weights(0.0)),
    (("example_weights",), case_changes.weights(1e30)),
    (("example_weights", "positive"), case_changes.padding_holds_nan),
    (("target",), case_changes.ignore_all),
    (("domain_weights",), case_changes.zero_domain),
)


def drawn(number: int) -> tuple[cases.Case, torch.dtype, host.Interpreter]:
    """Problem `number`: the case, the dtype, and the tiles and workers that solve it."""
    r = random.Random(f"{SEED} {number}")

    def chance(p: float) -> bool:
        return r.random() < p

    def size() -> int:
        if chance(0.3):
            return 16 * r.randint(1, 3)  # the kernel is told about multiples of 16
        return r.choice((1, r.randint(1, 8), r.randint(9, 40), r.randint(15, 50)))

    kind = KINDS[number % len(KINDS)]
    options: dict[str, Any] = {"reduction": r.choice(("mean", "weighted_mean", "sum", "none"))}
    if kind != "full":
        options["correction"] = r.choice(("standard", "standard", "refined"))
    elif chance(0.3):
        options["skip_threshold"] = 1e-14  # leaves out what no comparison sees
    if kind == "dual":
        # A float argument is float32, of which the quotient 1 / (1 + hardness) is exact here; 3
        # would make logits of 300, which float32 rounds by 1e-5 before they are exponents.
        options["hardness"] = r.choice((0, 1.0))
        for strength in ("similarity", "competition"):
            options[strength] = r.choice((0, 0.5, 1.0))
        options["slate_size"] = r.choice((1, 2, r.randint(3, 40)))
        options["in_batch"] = chance(0.3)
    if kind.startswith("indexed"):
        options["sparse_grad"] = chance(0.3)
    case = cases.Case(
        f"random {SEED} {number}",
        kind=kind,
        rows=size(),
        candidates=size(),
        dim=r.choice((1, r.randint(2, 20), 16, r.randint(21, 40), 32, 64)),
        log_q=chance(0.5),
        ids=chance(0.5),
        domains=r.choice((0, 0, 1, 2, 3)),
        examples=chance(0.4),
        temperature=r.choice(("float", "scalar", "rows")),
        options=options,
        frozen=tuple(name for name in cases.DIFFERENTIABLE if chance(0.2)),
    )
    inputs = case.inputs(torch.float32)
    changes = [change for names, change in CHANGES if inputs.keys() >= set(names)]
    if kind == "indexed_rows":
        changes += [case_changes.own_ids, case_changes.one_id]
    if changes and chance(0.4):
        case = dataclasses.replace(case, change=r.choice(changes))
    tiles = [r.choice((16, 16, 32, 64)) for _ in range(4)]
    if kind == "indexed_rows":
        tiles[1] = r.choice((4, 8, 16))
    workers = r.choice((1, 2, 5, r.randint(3, 40), 132))
    dtype = r.choice(DTYPES)
    return case, dtype, host.Interpreter(Tiles(*tiles, 1, 1, 4, 1), workers)


@pytest.mark.parametrize("number", range(PROBLEMS), ids=lambda n: f"seed {SEED} problem {n}")
def test_problem(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case, dtype, interpreter = drawn(number)
    monkeypatch.setattr(host, "INTERPRETER", interpreter)
    check(case, dtype)


def check(case: cases.Case, dtype: torch.dtype) -> None:
    """As `cases.check`, and where that fails, against sums of absolute values.

    A gradient is a sum over rows or candidates. Where its terms cancel, an error that is small
    beside every term is large beside the sum: in 16 bits the second product rounds its weights, as
    tensor cores ask for, by up to 2^-8 in bfloat16, and ``dL/dtau = -sum_i <q_i, dL/dq_i> / tau_i``
    is then off by that times the sum of all ``a_i p_ij |<q_i, c_j>| / tau_i^2``, however small it
    is itself. With one dimension and signs at random a hundredth of it is no rare case.
    """
    reference = cases.loss_and_gradients(case, "eager", dtype, upcast=True)
    same_dtype = cases.loss_and_gradients(case, "eager", dtype)
    got = cases.loss_and_gradients(case, "triton", dtype)
    assert got.keys() == reference.keys()
    terms: dict[str, Tensor] = {}
    for name, value in got.items():
        measured = cases.error(value, reference[name])
        allowed = 2 * cases.error(same_dtype[name], reference[name]) + cases.MARGIN[dtype]
        if measured <= allowed:
            continue
        finite = reference[name].isfinite()
        assert torch.equal(value.isfinite(), finite), name
        terms = terms or sums_of_absolute_terms(case, dtype)
        assert name in terms, f"{name}: error {measured:.2e}, allowed {allowed:.2e}"
        error, eager = (
            float((x[name] - reference[name])[finite].abs().max()) for x in (got, same_dtype)
        )
        allowed = 2 * eager + cases.MARGIN[dtype] * float(terms[name].max())
        assert error <= allowed, f"{name}: absolute error {error:.2e}, allowed {allowed:.2e}"


def sums_of_absolute_terms(case: cases.Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """For every gradient, the sum of the absolute values of what is summed up, in float64."""
    options = {**case.options, "sparse_grad": False} if case.kind[:5] == "index" else case.options
    case = dataclasses.replace(case, frozen=(), options=options)
    inputs = {
        k: v.detach().double().requires_grad_(v.requires_grad)
        if isinstance(v, Tensor) and v.is_floating_point()
        else v
        for k, v in case.inputs(dtype).items()
    }
    rows = case.loss({**inputs, "reduction": "none"}, "eager")
    loss = case.loss(inputs, "eager")
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(loss.shape, generator=generator, dtype=torch.float64)
    share = upstream  # of every row's loss
    if loss.dim() == 0:
        share = (upstream * loss / rows.sum()).detach().nan_to_num().expand(len(rows))
    leaves = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}
    totals = {k: torch.zeros_like(v) for k, v in leaves.items()}
    losses = torch.zeros(len(rows), dtype=torch.float64)
    query, dimensions = inputs["query"].detach().nan_to_num(), case.dim
    sources = [k for k in ("positive", "negative", "table") if k in leaves]
    tau = torch.as_tensor(inputs["temperature"]).detach().expand(len(rows))
    for i, row in enumerate(rows):
        gradients = torch.autograd.grad(row * share[i], list(leaves.values()), retain_graph=True)
        found = {k: g.abs().nan_to_num() for k, g in zip(leaves, gradients, strict=True)}
        for k, g in found.items():
            totals[k] += g
        # dL/dc_j = a_i p_ij q_i / tau_i says what c_j weighs in dL/dq_i.
        total = torch.zeros(dimensions, dtype=torch.float64)
        for k in sources:
            weight = found[k].sum(1) / query[i].abs().sum().clamp(min=1e-300)
            total += (weight[:, None] * inputs[k].detach().abs().nan_to_num()).sum(0)
        totals["query"][i] = total
        if "positive" in found:  # l_i = lse_i - z_i+, of which the refined loss rounds each
            weight = found["positive"][i].sum() / query[i].abs().sum().clamp(min=1e-300)
            products = (query[i] * inputs["positive"][i].detach().nan_to_num()).sum().abs()
            losses[i] = (row * share[i]).abs().nan_to_num() + 2 * weight * products
        if "temperature" in leaves:
            term = (total * query[i].abs()).sum() / tau[i]
            where = totals["temperature"]
            (where if where.dim() == 0 else where[i]).copy_(term if where.dim() else where + term)
    if case.options.get("reduction") == "weighted_mean" and "domain_weights" in leaves:
        # The norm moves as well, by at most norm / W_d.
        weights = inputs["domain_weights"].detach()
        totals["domain_weights"] += (upstream * loss).abs().detach() / weights.clamp(min=1e-300)
    if "positive" in leaves:
        scale = upstream.abs().clamp(min=1e-300)  # the loss is compared before its gradient's
        totals["loss"] = losses / scale if loss.dim() else losses.sum() / scale
    return {k: v.detach() for k, v in totals.items()}
