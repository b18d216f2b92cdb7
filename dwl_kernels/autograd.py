"""From a validated problem to a differentiable loss, for the public functions.

A scalar loss is solved together with its gradients, which are kept until `backward` multiplies them
by the upstream gradient. The rows of reduction "none" have no gradients until their upstream
gradient is known, so `backward` solves the problem once more with it. Where every row has
candidates of its own, a backend gives the gradients of the products ``<q_i, c_ij>``, and `backward`
sums the gradient of the table from them.

Both go through the registered ops of `ops`, or straight to the backend where nobody watches.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from dwl_kernels import backends, ops
from dwl_kernels.core.batching import backward_by_slices, is_batched, is_legacy_batched
from dwl_kernels.core.candidates import BLOCK_ELEMENTS
from dwl_kernels.core.double_backward import (
    ReverseOnly,
    once,
    refuse_tangents,
    tracked,
    transforms_active,
)
from dwl_kernels.core.problem import NO_GRADIENTS, GradMask, Output, PerRowProblem, Problem
from dwl_kernels.flops import tell_counters
from dwl_kernels.gather import table_gradient


def softmax_loss(problem: Problem, backend: str = "auto", sparse_grad: bool = False) -> Tensor:
    """The loss of `problem`, ``[]`` or ``[B]``, attached to the autograd graph.

    `sparse_grad` makes the gradient of a table sparse whose rows are candidates per row.
    """
    backends.check_name(backend)
    compiling = torch.compiler.is_compiling()
    if compiling:
        # torch.compile does not take a tensor in two places of an autograd.Function, so each gets a
        # view. The table stays what it is, because a sparse gradient has no way through a view.
        kept = problem.item_table if isinstance(problem, PerRowProblem) else problem.candidates
        distinct = [t if t is None or t is kept else t.view_as(t) for t in problem.tensors()]
        problem = problem.with_tensors(distinct)
    loss: Tensor
    tensors = problem.tensors()
    sources: tuple[Any, ...] = problem.sources()
    if transforms_active():
        wanted = GradMask(*[t is not None and tracked(t) for t in sources])
        dtypes = [t.dtype for t in compress(sources, wanted)]
        call = _call(problem, wanted, dtypes, backend, sparse_grad, transformed=True)
        loss, *_ = _Transformed.apply(call, *tensors)
        return loss
    watched = compiling or _watched(tensors)
    if watched:
        refuse_tangents(tensors)
        if not compiling:
            tell_counters()
    if torch.is_grad_enabled():
        wanted = GradMask(*[t is not None and t.requires_grad for t in sources])
        if True in wanted:
            leaves = [*compress(sources, wanted)]
            dtypes = [t.dtype for t in leaves]
            call = _call(problem, wanted, dtypes, backend, sparse_grad)
            apply = _SoftmaxLoss.apply if watched else _apply
            loss, _ = apply((problem, call, watched), *leaves)
            return loss
    return _solved(problem, None, NO_GRADIENTS, backend, watched).loss


def loss_of(problem: Problem, query: Tensor, backend: str, sparse_grad: bool = False) -> Tensor:
    """The loss of `problem`, in the leading dimensions of `query` for reduction "none"."""
    loss = softmax_loss(problem, backend, sparse_grad)
    return loss.reshape(query.shape[:-1]) if problem.rows.reduction == "none" else loss


class _Products(NamedTuple):
    """What the gradients of candidates per row need beside those of their products."""

    place: int  # of those among the wanted ones
    number: int
    dtype: torch.dtype
    table: tuple[Any, ...] | None  # sparse_grad, backend; None where no table but embeddings


class _Call(NamedTuple):
    """What a backward must know besides tensors."""

    wanted: GradMask  # per row of the products, from which those of the embeddings follow
    backend: str
    dtypes: list[torch.dtype]  # of the wanted gradients
    products: _Products | None  # per row, if their gradients are wanted
    problem: Any  # without its tensors, where they come back to it in the backward
    again: bool  # whether the backward solves the problem: the rows of "none" know no gradients yet


def _call(
    problem: Problem,
    wanted: GradMask,
    dtypes: list[torch.dtype],
    backend: str,
    sparse_grad: bool,
    transformed: bool = False,
) -> _Call:
    products = None
    if isinstance(problem, PerRowProblem) and (wanted.positive or wanted.candidates):
        place, there = int(wanted.query), wanted.positive + wanted.candidates
        table = None
        if problem.positive is None:
            table, wanted = (sparse_grad, backend), wanted._replace(positive=True)
        count = wanted.positive + wanted.candidates
        dtypes[place : place + there] = [problem.candidate_gradient] * count
        products = _Products(place, count, problem.item_table.dtype, table)
    again = problem.rows.reduction == "none"
    empty = None
    if again or transformed:
        empty = problem.with_tensors([None] * len(problem.tensors()))
    return _Call(wanted, backend, dtypes, products, empty, again)


class _SoftmaxLoss(torch.autograd.Function):
    """The loss, and a second output that only the backward sees: what stands for its graph.

    Second derivatives are tied to it. The loss cannot stand for itself, since users divide it in
    place, nor can the leaves, which would be kept until the backward.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Any, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        problem, call, watched = inputs
        ctx.set_materialize_grads(False)
        if call.again:
            loss = _solved(problem, None, NO_GRADIENTS, call.backend, watched).loss
            kept = problem.tensors()
        else:
            loss, *gradients = _solved(problem, None, call.wanted, call.backend, watched)
            kept = [g for g in gradients if g is not None]
        root = loss.new_empty(0) if watched else loss.data  # `data` takes a third of the time
        table_inputs: tuple[Any, ...] = ()
        table_rows = 0
        if call.products is not None:
            # Asked here: a compiler of symbolic sizes hands the backward none from outside.
            table_inputs, table_rows = _table_inputs(problem), problem.item_table.shape[0]
        ctx.call = call, len(kept), table_rows
        ctx.save_for_backward(*kept, root, *table_inputs)
        return loss, root

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = upstream[0]
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        watched = torch.compiler.is_compiling() or transforms_active() or _watched((grad,))
        if watched:
            if is_batched(grad):
                return backward_by_slices(_SoftmaxLoss.backward, ctx, grad)
            refuse_tangents((grad,))
        call, num, table_rows = ctx.call
        saved = ctx.saved_tensors
        kept, root, table_inputs = saved[:num], saved[num], saved[num + 1 :]
        return None, *_gradients(call, kept, root, table_inputs, table_rows, grad, watched)


class _Transformed(ReverseOnly):
    """`_SoftmaxLoss` for the transforms of ``torch.func``.

    A transform sees only tensors that are inputs or outputs. So all of the problem goes in, and
    what is kept for the backward comes out.
    """

    @staticmethod
    def forward(call: _Call, *tensors: Any) -> tuple[Tensor, ...]:
        problem = call.problem.with_tensors(tensors)
        wanted = NO_GRADIENTS if call.again else call.wanted
        loss, *gradients = _solved(problem, None, wanted, call.backend, watched=True)
        return loss, loss.new_empty(0), *[g for g in gradients if g is not None]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.call = inputs[0]
        ctx.save_for_backward(*inputs[1:], *output)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        call = ctx.call
        num = len(call.problem.tensors())
        if upstream[0] is None:
            return (None,) * (num + 1)
        saved = ctx.saved_tensors
        tensors, (_, root, *gradients) = saved[:num], saved[num:]
        kept = tensors if call.again else gradients
        problem = call.problem.with_tensors(tensors)
        table_inputs: tuple[Any, ...] = ()
        table_rows = 0
        if call.products is not None:
            table_inputs, table_rows = _table_inputs(problem), problem.item_table.shape[0]
        found = _gradients(call, kept, root, table_inputs, table_rows, upstream[0], watched=True)
        # Where the wanted gradients go: to what they are the gradients of. With a table's the
        # positives have none of their own.
        of_table = call.products is not None and call.products.table is not None
        wanted = call.wanted._replace(positive=False) if of_table else call.wanted
        mask = problem.with_tensors(range(num)).sources()
        given = dict(zip(compress(mask, wanted), found, strict=True))
        return None, *[given.get(place) for place in range(num)]


def _gradients(
    call: _Call,
    kept: Sequence[Any],
    root: Tensor,
    table_inputs: Sequence[Any],
    table_rows: int,
    grad: Tensor,
    watched: bool,
) -> list[Tensor]:
    """The wanted gradients, from the ones at an upstream gradient of 1 or from the problem."""
    upstream = grad.detach() if grad.requires_grad else grad
    gradients: list[Any]
    if not call.again:
        gradients = [*_scaled(kept, upstream, call.dtypes, watched)]
    else:
        problem = call.problem.with_tensors([t if t is None else t.detach() for t in kept])
        _, *found = _solved(problem, upstream.contiguous(), call.wanted, call.backend, watched)
        present = [g for g in found if g is not None]
        gradients = [g.to(dtype) for g, dtype in zip(present, call.dtypes, strict=True)]
    if call.products is not None:
        place, number, dtype, table = call.products
        query, positive_rows, candidate_rows = table_inputs
        products = [g if g.dim() == 2 else g[:, None] for g in gradients[place : place + number]]
        if table is None:
            found = [_of_embeddings(g, query.detach(), dtype, watched) for g in products]
        else:
            ids = [positive_rows[:, None], candidate_rows]
            found = [table_gradient(query.detach(), ids, products, table_rows, dtype, *table)]
        gradients[place : place + number] = found
    if watched or torch.is_grad_enabled():
        gradients = [once(g, root, grad) for g in gradients]
    return gradients


def _of_embeddings(
    products: Tensor,  # [B, J] dL/d<q_i, c_ij>
    query: Tensor,  # [B, D]
    dtype: torch.dtype,
    watched: bool,
) -> Tensor:  # [B J, D]
    """``dL/dc_ij = dL/d<q_i, c_ij> q_i``. A row without a gradient may hold NaN."""
    query = query.to(products.dtype).masked_fill((products == 0).all(1, keepdim=True), 0)
    (rows, width), dim = products.shape, query.shape[1]
    if watched or dtype == products.dtype:
        gradient = products[:, :, None] * query[:, None]
        return gradient.to(dtype).reshape(rows * width, dim)
    # Beside a gradient in 16 bits, that in 32 would be twice its size.
    gradient = torch.empty((rows, width, dim), dtype=dtype, device=query.device)
    step = max(BLOCK_ELEMENTS.get(query.device.type, 1 << 22) // max(width * dim, 1), 1)
    for first in range(0, rows, step):
        block = slice(first, first + step)
        gradient[block] = products[block, :, None] * query[block, None]
    return gradient.view(rows * width, dim)


# What `Function.apply` comes to where no transform of functions is at work: without it a small step
# calls 16 functions more, of some 350 (`function_calls` in `host.json`).
_apply: Any = super(torch.autograd.Function, _SoftmaxLoss).apply


def _table_inputs(problem: Any) -> tuple[Any, ...]:
    """What the gradients of candidates per row need to know about the rows."""
    if problem.positive is not None:
        return problem.query, None, None
    return problem.query, problem.positive_rows, problem.candidate_rows


def _solved(
    problem: Problem, row_grad: Tensor | None, wanted: GradMask, backend: str, watched: bool
) -> Output:
    """The output of the registered op, straight from the backend where nobody watches."""
    solve = ops.softmax_loss if watched else ops.solve
    return solve(problem, row_grad, wanted, backend)


def _scaled(
    gradients: Sequence[Tensor], upstream: Tensor, dtypes: list[torch.dtype], watched: bool
) -> Sequence[Tensor]:
    """The products of the op ``scale``, likewise."""
    if watched:
        return ops.scale(gradients, upstream, dtypes)
    # Of a graph that is not kept nobody asks again: its gradients become the products.
    return backends.scaled([*gradients], upstream, dtypes, in_place=not _keeps_graph())


def _watched(tensors: Sequence[Any]) -> bool:
    """Whether a call must go through PyTorch's dispatcher.

    With it the host takes 1.8 times as long for a small step (`public_ways` in `host.json`).

    True under a dispatch or function mode, tracing and forward mode, and for tensors of a subclass,
    on the meta device or in a batch; else the backend is called directly.
    """
    return (
        not _CAN_ASK
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or not _PLAIN.issuperset(map(type, tensors))
        or tensors[0].is_meta
        or is_legacy_batched(tensors[0])
    )


_PLAIN = {Tensor, Parameter, type(None)}
# A PyTorch that has these no more gets the slower ways, which are always right.
_CAN_ASK = hasattr(forward_ad, "_current_level") and all(
    hasattr(torch._C, name)
    for name in ("_len_torch_dispatch_stack", "_len_torch_function_stack", "_get_tracing_state")
)
# Saves no time, but the memory of all gradients once more.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
