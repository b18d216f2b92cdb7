"""From a validated problem to a differentiable loss.

One registered op, ``dwl_kernels::softmax_loss``, solves a problem on any backend: it returns the
loss and, in the same call, the gradients that are wanted. A scalar loss keeps those gradients until
`backward` multiplies them by the upstream gradient. The rows of reduction "none" have no gradients
until their upstream gradient is known, so `backward` calls the op once more with it.

Where candidates are drawn by row from a table, the op returns the gradients of the products
``<q_i, c_ij>``, and `backward` sums the gradient of the table from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dwl_kernels import backends
from dwl_kernels.once import once
from dwl_kernels.problem import DualScale, Problem, Wanted, no_autocast
from dwl_kernels.table import table_gradient

# The fields of `Problem` in their order, then the call.
_SCHEMA = """softmax_loss(
    Tensor query, Tensor? positive, Tensor candidates, Tensor? target, Tensor? candidate_rows,
    Tensor? positive_log_q, Tensor? candidate_log_q,
    Tensor? positive_ids, Tensor? candidate_ids,
    Tensor? domain_ids, Tensor? domain_weights, Tensor? example_weights,
    Tensor? temperature, float tau, int ignore_index, str correction, str reduction,
    float skip_threshold, float[]? dual,
    Tensor? row_grad, bool[] wanted, str backend
) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"""
_NUM_FIELDS = 19
_NUM_TENSORS = 13  # of them, first
_SOURCES = (0, 1, 2, 6, 12, 10)  # which fields `Wanted` speaks of, in its order
_NOTHING = Wanted(*(False,) * len(_SOURCES))

_library = torch.library.Library("dwl_kernels", "DEF")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "scale(Tensor[] gradients, Tensor upstream, int[] dtypes) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Dtypes travel as places in this list: PyTorch 2.11 hands an op the numbers of a ScalarType[] list,
# which `Tensor.to` then takes for a CUDA device.
_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def softmax_loss(problem: Problem, backend: str = "auto", sparse_grad: bool = False) -> Tensor:
    """The loss of `problem`, ``[]`` or ``[B]``, attached to the autograd graph.

    `sparse_grad` makes the gradient of a table from which candidates are drawn by row sparse.
    """
    backends.check_name(backend)
    fields = _fields(problem)
    if torch.is_grad_enabled():
        wanted = Wanted(*[t is not None and t.requires_grad for t in _sources(fields)])
        if problem.by_row:
            wanted = wanted._replace(positive=wanted.candidates)
        if any(wanted):
            return _SoftmaxLoss.apply(*fields, wanted, backend, sparse_grad)
    return torch.ops.dwl_kernels.softmax_loss(*fields, None, _NOTHING, backend)[0]


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *fields, wanted, backend, sparse_grad = args
        problem = _problem(fields)
        ctx.wanted, ctx.backend, ctx.reduction = wanted, backend, problem.reduction
        sources = _sources(fields)
        ctx.dtypes = _dtypes(problem, sources)
        ctx.table = None
        if problem.by_row and wanted.candidates:
            ctx.table = (len(problem.candidates), problem.candidates.dtype, sparse_grad, backend)
        ctx.set_materialize_grads(False)
        if problem.reduction == "none":
            loss, *_ = torch.ops.dwl_kernels.softmax_loss(*fields, None, _NOTHING, backend)
            ctx.save_for_backward(*fields[:_NUM_TENSORS])
            ctx.constants = fields[_NUM_TENSORS:]
            return loss
        loss, *gradients = torch.ops.dwl_kernels.softmax_loss(*fields, None, list(wanted), backend)
        kept = [g if w else None for g, w in zip(gradients, wanted, strict=True)]
        draws = (None, None, None) if ctx.table is None else _draws(problem)
        ctx.save_for_backward(*kept, *draws, _anchor(sources, wanted))
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,) = upstream
        nothing = (None,) * (_NUM_FIELDS + 3)
        if grad is None:
            return nothing
        gradients: list[Tensor | None]
        if ctx.reduction == "none":
            fields = [*ctx.saved_tensors, *ctx.constants]
            draws, anchor = _draws(_problem(fields)), _anchor(_sources(fields), ctx.wanted)
            _, *gradients = torch.ops.dwl_kernels.softmax_loss(
                *(f if f is None else f.detach() for f in ctx.saved_tensors),
                *ctx.constants,
                grad.detach().contiguous(),
                list(ctx.wanted),
                ctx.backend,
            )
            gradients = [
                g.to(dtype) if w else None  # type: ignore[union-attr]
                for g, dtype, w in zip(gradients, ctx.dtypes, ctx.wanted, strict=True)
            ]
        else:
            gradients = list(ctx.saved_tensors[:-4])
            query, positive_ids, candidate_ids, anchor = ctx.saved_tensors[-4:]
            draws = (query, positive_ids, candidate_ids)
            present = [k for k, g in enumerate(gradients) if g is not None]
            products = torch.ops.dwl_kernels.scale(
                [gradients[k] for k in present],
                grad.detach(),
                [_DTYPES.index(ctx.dtypes[k]) for k in present],
            )
            for k, product in zip(present, products, strict=True):
                gradients[k] = product
        if ctx.table is not None:
            query, positive_ids, candidate_ids = draws
            by_row: list[Any] = [gradients[1][:, None], gradients[2]]  # type: ignore[index]
            ids = [positive_ids[:, None], candidate_ids]
            gradients[1:3] = None, table_gradient(query.detach(), ids, by_row, *ctx.table)
        placed: list[Tensor | None] = [*nothing]
        for place, gradient in zip(_SOURCES, gradients, strict=True):
            placed[place] = None if gradient is None else once(gradient, anchor)
        return tuple(placed)


def _scale(gradients: list[Tensor], upstream: Tensor, places: list[int]) -> list[Tensor]:
    """``gradient * upstream``, out of place so that backward may run twice.

    The product is made in float32: a loss scaler's 65536 is infinite in float16.
    """
    dtypes = [_DTYPES[place] for place in places]
    if upstream.is_cuda and backends.why_not("triton", "cuda") is None:
        return backends.triton.scaled(gradients, upstream, dtypes)
    products = []
    for gradient, dtype in zip(gradients, dtypes, strict=True):
        wide = gradient if gradient.dtype == torch.float64 else gradient.float()
        products.append((wide * upstream).to(dtype))
    return products


def _fake_scale(gradients: list[Tensor], upstream: Tensor, places: list[int]) -> list[Tensor]:
    return [
        g.new_empty(g.shape, dtype=_DTYPES[place])
        for g, place in zip(gradients, places, strict=True)
    ]


def _fields(problem: Problem) -> tuple[Any, ...]:
    p = problem
    return (
        *(p.query, p.positive, p.candidates, p.target, p.candidate_rows),
        *(p.positive_log_q, p.candidate_log_q, p.positive_ids, p.candidate_ids),
        *(p.domain_ids, p.domain_weights, p.example_weights),
        *(p.temperature, p.tau, p.ignore_index, p.correction, p.reduction),
        *(p.skip_threshold, _numbers(p.dual)),
    )


def _numbers(dual: DualScale | None) -> list[float] | None:
    return None if dual is None else [float(number) for number in dual]


def _problem(fields: Sequence[Any]) -> Problem:
    """The problem of what `_fields` gave."""
    *others, dual = fields
    if dual is not None:
        hardness, similarity, slate_size, competition = dual
        dual = DualScale(hardness, similarity, int(slate_size), competition)
    return Problem(*[*others, dual])


def _sources(fields: Sequence[Any]) -> list[Tensor | None]:
    """The tensors of `Wanted`, in its order."""
    return [fields[place] for place in _SOURCES]


def _anchor(sources: list[Tensor | None], wanted: Wanted) -> Tensor:
    """A tensor that takes a gradient."""
    return cast("Tensor", sources[wanted.index(True)])


def _draws(problem: Problem) -> tuple[Any, Any, Any]:
    """What the gradient of a table needs to know about the rows."""
    return problem.query, problem.target, problem.candidate_rows


def _dtypes(problem: Problem, sources: list[Tensor | None]) -> list[torch.dtype | None]:
    """The dtypes of the gradients of `Wanted`, by row those of the products in their place."""
    dtypes = [None if t is None else t.dtype for t in sources]
    if problem.by_row:
        dtypes[1:3] = [problem.candidate_gradient] * 2
    return dtypes


def _solve(*args: Any) -> tuple[Tensor, ...]:
    *fields, row_grad, wanted, backend = args
    problem = _problem(fields)
    solve = backends.pick(backend, problem)
    # The problem has been cast to the autocast dtype already; the sums in between must not be.
    with no_autocast(problem.query.device.type):
        output = solve(problem, Wanted(*wanted), row_grad)
    # An op cannot return None; a gradient that is not wanted is an empty tensor.
    return tuple([problem.query.new_empty(0) if t is None else t for t in output])


def _fake(*args: Any) -> tuple[Tensor, ...]:
    *fields, _row_grad, wanted, _backend = args
    problem = _problem(fields)
    rows = (problem.query.shape[0],) if problem.reduction == "none" else ()
    loss = problem.query.new_empty(rows, dtype=problem.accumulate)
    sources = _sources(fields)
    shapes = [None if t is None else t.shape for t in sources]
    if problem.candidate_rows is not None:
        shapes[1:3] = problem.query.shape[:1], problem.candidate_rows.shape
    dtypes = (problem.gradient, *(problem.candidate_gradient,) * 2, *(problem.accumulate,) * 3)
    gradients = [
        problem.query.new_empty(0)
        if shape is None or not want
        else problem.query.new_empty(shape, dtype=dtype)
        for shape, want, dtype in zip(shapes, wanted, dtypes, strict=True)
    ]
    return (loss, *gradients)


_library.impl("softmax_loss", _solve, "CompositeExplicitAutograd")
torch.library.register_fake("dwl_kernels::softmax_loss", _fake)
_library.impl("scale", _scale, "CompositeExplicitAutograd")
torch.library.register_fake("dwl_kernels::scale", _fake_scale)
