"""From a validated problem to a differentiable loss.

One registered op, ``dwl_kernels::softmax_loss``, solves a problem on any backend: it returns the
loss and, in the same call, the gradients that are wanted. A scalar loss keeps those gradients until
`backward` multiplies them by the upstream gradient. The rows of reduction "none" have no gradients
until their upstream gradient is known, so `backward` calls the op once more with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dwl_kernels import backends
from dwl_kernels.problem import Output, Problem, Wanted

# The fields of `Problem` in their order, then the call.
_SCHEMA = """softmax_loss(
    Tensor query, Tensor? positive, Tensor candidates,
    Tensor? positive_log_q, Tensor? candidate_log_q,
    Tensor? positive_ids, Tensor? candidate_ids,
    Tensor? domain_ids, Tensor? domain_weights, Tensor? example_weights,
    Tensor? temperature, float tau, str correction, str reduction,
    Tensor? row_grad, bool[] wanted, str backend
) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"""
_NUM_FIELDS = 14

_library = torch.library.Library("dwl_kernels", "DEF")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "scale(Tensor[] gradients, Tensor upstream, ScalarType[] dtypes) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


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
        problem = Problem(*fields)
        ctx.wanted, ctx.backend = wanted, backend
        ctx.reduction = problem.reduction
        ctx.set_materialize_grads(False)
        if problem.reduction == "none":
            loss, *_ = torch.ops.dwl_kernels.softmax_loss(*fields, None, (False,) * 5, backend)
            ctx.save_for_backward(*(f for f in fields if f is None or isinstance(f, Tensor)))
            ctx.constants = [f for f in fields if f is not None and not isinstance(f, Tensor)]
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
            sources = _sources(Problem(*fields))
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
            *gradients, anchor = ctx.saved_tensors
            present = [k for k, g in enumerate(gradients) if g is not None]
            products = torch.ops.dwl_kernels.scale(
                [gradients[k] for k in present], grad.detach(), [ctx.dtypes[k] for k in present]
            )
            for k, product in zip(present, products, strict=True):
                gradients[k] = product
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            gradients = [None if g is None else _Once.apply(g, anchor) for g in gradients]
        query, positive, candidates, temperature, domain_weights = gradients
        return (
            *(query, positive, candidates, None, None, None, None, None),
            *(domain_weights, None, temperature),
            *nothing[11:],
        )


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


def _scale(gradients: list[Tensor], upstream: Tensor, dtypes: list[torch.dtype]) -> list[Tensor]:
    """``gradient * upstream``, out of place so that backward may run twice.

    The product is made in float32: a loss scaler's 65536 is infinite in float16.
    """
    if upstream.is_cuda and backends.why_not("triton", "cuda") is None:
        return backends.triton.scaled(gradients, upstream, dtypes)
    products = []
    for gradient, dtype in zip(gradients, dtypes, strict=True):
        wide = gradient if gradient.dtype == torch.float64 else gradient.float()
        products.append((wide * upstream).to(dtype))
    return products


def _fake_scale(
    gradients: list[Tensor], upstream: Tensor, dtypes: list[torch.dtype]
) -> list[Tensor]:
    return [g.new_empty(g.shape, dtype=d) for g, d in zip(gradients, dtypes, strict=True)]


def _fields(problem: Problem) -> tuple[Any, ...]:
    p = problem
    return (
        *(p.query, p.positive, p.candidates, p.positive_log_q, p.candidate_log_q),
        *(p.positive_ids, p.candidate_ids, p.domain_ids, p.domain_weights, p.example_weights),
        *(p.temperature, p.tau, p.correction, p.reduction),
    )


def _sources(p: Problem) -> tuple[Tensor | None, ...]:
    """The tensors of `Wanted`, in its order."""
    return p.query, p.positive, p.candidates, p.temperature, p.domain_weights


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _solve(*args: Any) -> tuple[Tensor, ...]:
    *fields, row_grad, wanted, backend = args
    problem = Problem(*fields)
    solve = backends.pick(backend, problem)
    # The problem has been cast to the autocast dtype already; the sums in between must not be.
    with torch.autocast(problem.query.device.type, enabled=False):
        output = solve(problem, Wanted(*wanted), row_grad)
    # An op cannot return None; a gradient that is not wanted is an empty tensor.
    return tuple(problem.query.new_empty(0) if t is None else t for t in output)


def _fake(*args: Any) -> tuple[Tensor, ...]:
    *fields, _row_grad, wanted, _backend = args
    problem = Problem(*fields)
    rows = (problem.query.shape[0],) if problem.reduction == "none" else ()
    loss = problem.query.new_empty(rows, dtype=problem.accumulate)
    dtypes = (*(problem.gradient,) * 3, *(problem.accumulate,) * 2)
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
_library.impl("scale", _scale, "CompositeExplicitAutograd")
torch.library.register_fake("dwl_kernels::scale", _fake_scale)
