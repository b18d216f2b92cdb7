"""From a validated problem to a differentiable loss.

One registered op, ``dwl_kernels::softmax_loss``, solves a problem on any backend: it returns the
loss and, in the same call, the gradients that are wanted. A scalar loss keeps those gradients until
`backward` multiplies them by the upstream gradient. The rows of reduction "none" have no gradients
until their upstream gradient is known, so `backward` calls the op once more with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dwl_kernels import backends
from dwl_kernels.problem import DualScale, Output, Problem, Wanted

# The fields of `Problem` in their order, then the call.
_SCHEMA = """softmax_loss(
    Tensor query, Tensor? positive, Tensor candidates, Tensor? target,
    Tensor? positive_log_q, Tensor? candidate_log_q,
    Tensor? positive_ids, Tensor? candidate_ids,
    Tensor? domain_ids, Tensor? domain_weights, Tensor? example_weights,
    Tensor? temperature, float tau, int ignore_index, str correction, str reduction, float[]? dual,
    Tensor? row_grad, bool[] wanted, str backend
) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"""
_NUM_FIELDS = 17
_NUM_TENSORS = 12  # of them, first
_SOURCES = (0, 1, 2, 5, 11, 9)  # which fields `Wanted` speaks of, in its order

_library = torch.library.Library("dwl_kernels", "DEF")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


def softmax_loss(problem: Problem, backend: str = "auto") -> Tensor:
    """The loss of `problem`, ``[]`` or ``[B]``, attached to the autograd graph."""
    backends.check_name(backend)
    fields = _fields(problem)
    wanted = Wanted(*(torch.is_grad_enabled() and _requires_grad(t) for t in _sources(problem)))
    if any(wanted):
        return _SoftmaxLoss.apply(*fields, wanted, backend)
    return torch.ops.dwl_kernels.softmax_loss(*fields, None, wanted, backend)[0]


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *fields, wanted, backend = args
        problem = _problem(fields)
        ctx.wanted, ctx.backend = wanted, backend
        ctx.reduction = problem.reduction
        ctx.set_materialize_grads(False)
        if problem.reduction == "none":
            loss, *_ = torch.ops.dwl_kernels.softmax_loss(
                *fields, None, (False,) * len(_SOURCES), backend
            )
            ctx.save_for_backward(*fields[:_NUM_TENSORS])
            ctx.constants = fields[_NUM_TENSORS:]
            return loss
        sources = _sources(problem)
        loss, *gradients = torch.ops.dwl_kernels.softmax_loss(*fields, None, wanted, backend)
        kept = (g if w else None for g, w in zip(gradients, wanted, strict=True))
        ctx.save_for_backward(*kept, sources[wanted.index(True)])
        ctx.dtypes = [None if t is None else t.dtype for t in sources]
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,) = upstream
        nothing = (None,) * (_NUM_FIELDS + 2)
        if grad is None:
            return nothing
        gradients: list[Tensor | None]
        if ctx.reduction == "none":
            fields = [*ctx.saved_tensors, *ctx.constants]
            sources = _sources(_problem(fields))
            anchor = sources[ctx.wanted.index(True)]
            _, *gradients = torch.ops.dwl_kernels.softmax_loss(
                *(f.detach() if isinstance(f, Tensor) else f for f in fields),
                grad.detach().contiguous(),
                ctx.wanted,
                ctx.backend,
            )
            gradients = [
                None if g is None or t is None or not w else g.to(t.dtype)
                for g, t, w in zip(gradients, sources, ctx.wanted, strict=True)
            ]
        else:
            *kept, anchor = ctx.saved_tensors
            gradients = [
                None if g is None else scaled(g, grad.detach(), dtype)
                for g, dtype in zip(kept, ctx.dtypes, strict=True)
            ]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            gradients = [None if g is None else _Once.apply(g, anchor) for g in gradients]
        placed: list[Tensor | None] = [*nothing]
        for place, gradient in zip(_SOURCES, gradients, strict=True):
            placed[place] = gradient
        return tuple(placed)


class _Once(torch.autograd.Function):
    """Ties a gradient to the graph, so that differentiating it again raises and is not just zero.

    PyTorch's `once_differentiable` looks at the upstream gradient alone, which is a constant here.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "the losses of dwl_kernels are differentiable once; for double backward write the loss "
            "in plain PyTorch"
        )


def scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * upstream``, out of place so that backward may run twice.

    The product is made in float32: a loss scaler's 65536 is infinite in float16.
    """
    if gradient.dtype in (torch.float32, torch.float64):
        return (gradient * upstream).to(dtype)
    return (gradient.float() * upstream).to(dtype)


def _fields(problem: Problem) -> tuple[Any, ...]:
    p = problem
    return (
        *(p.query, p.positive, p.candidates, p.target, p.positive_log_q, p.candidate_log_q),
        *(p.positive_ids, p.candidate_ids, p.domain_ids, p.domain_weights, p.example_weights),
        *(p.temperature, p.tau, p.ignore_index, p.correction, p.reduction, _numbers(p.dual)),
    )


def _numbers(dual: DualScale | None) -> list[float] | None:
    return None if dual is None else [float(number) for number in dual]


def _problem(fields: Sequence[Any]) -> Problem:
    """The problem of what `_fields` gave."""
    *others, dual = fields
    if dual is not None:
        hardness, similarity, slate_size, competition = dual
        dual = DualScale(hardness, similarity, int(slate_size), competition)
    return Problem(*others, dual)


def _sources(problem: Problem) -> tuple[Tensor | None, ...]:
    """The tensors of `Wanted`, in its order."""
    fields = _fields(problem)
    return tuple(fields[place] for place in _SOURCES)


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _solve(*args: Any) -> tuple[Tensor, ...]:
    *fields, row_grad, wanted, backend = args
    problem = _problem(fields)
    solve = backends.pick(backend, problem)
    # The problem has been cast to the autocast dtype already; the sums in between must not be.
    with torch.autocast(problem.query.device.type, enabled=False):
        output = solve(problem, Wanted(*wanted), row_grad)
    # An op cannot return None; a gradient that is not wanted is an empty tensor.
    return tuple(problem.query.new_empty(0) if t is None else t for t in output)


def _fake(*args: Any) -> tuple[Tensor, ...]:
    *fields, _row_grad, wanted, _backend = args
    problem = _problem(fields)
    rows = (problem.query.shape[0],) if problem.reduction == "none" else ()
    loss = problem.query.new_empty(rows, dtype=problem.accumulate)
    dtypes = (*(problem.gradient,) * 3, *(problem.accumulate,) * 3)
    gradients = Output(
        loss,
        *(
            source.new_empty(source.shape, dtype=dtype) if want and source is not None else None
            for source, want, dtype in zip(_sources(problem), wanted, dtypes, strict=True)
        ),
    )
    return tuple(problem.query.new_empty(0) if t is None else t for t in gradients)


_library.impl("softmax_loss", _solve, "CompositeExplicitAutograd")
torch.library.register_fake("dwl_kernels::softmax_loss", _fake)
