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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from dwl_kernels import backends
from dwl_kernels.core.batching import (
    backward_by_slices,
    is_batched,
    is_legacy_batched,
    register_by_slices,
)
from dwl_kernels.core.double_backward import (
    ReverseOnly,
    once,
    refuse_tangents,
    tracked,
    transforms_active,
)
from dwl_kernels.core.problem import (
    NUM_TENSORS,
    SOURCES,
    DualScale,
    Output,
    Problem,
    Wanted,
    autocasting,
    no_autocast,
)
from dwl_kernels.flops import tell_counters
from dwl_kernels.gather import table_gradient
from dwl_kernels.op_checks import check_problem, check_scale

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
_NOTHING = Wanted(*(False,) * len(Wanted._fields))

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
    compiling = torch.compiler.is_compiling()
    if compiling:
        # It refuses one tensor in two places of an autograd.Function. One of them may stay what it
        # is: the table, since a sparse gradient has no way through a view.
        distinct: Any = [
            f.view_as(f) if isinstance(f, Tensor) and name != "candidates" else f
            for name, f in zip(Problem._fields, problem, strict=True)
        ]
        problem = Problem(*distinct)
    loss: Tensor
    tensors, sources = problem.tensors(), problem.sources()
    if transforms_active():
        wanted = Wanted(*[t is not None and tracked(t) for t in sources])
        dtypes = [
            t.dtype for t, want in zip(sources, wanted, strict=True) if want and t is not None
        ]
        call = _call(problem, wanted, dtypes, backend, sparse_grad)
        loss, *_ = _Transformed.apply(call, *tensors)
        return loss
    watched = compiling or _watched(tensors)
    if watched:
        refuse_tangents(tensors)
        if not compiling:
            tell_counters()
    if torch.is_grad_enabled():
        wanted = Wanted(*[t is not None and t.requires_grad for t in sources])
        if True in wanted:
            leaves = [t for t in sources if t is not None and t.requires_grad]
            dtypes = [t.dtype for t in leaves]
            call = _call(problem, wanted, dtypes, backend, sparse_grad)
            apply = _SoftmaxLoss.apply if watched else _apply
            loss, _ = apply((problem, call, watched), *leaves)
            return loss
    return _solved(problem, None, _NOTHING, backend, watched).loss


class _Call(NamedTuple):
    """What a backward must know besides tensors."""

    wanted: Wanted  # by row with those of the products, from which that of the table follows
    backend: str
    dtypes: list[torch.dtype]  # of the wanted gradients
    table: Any  # by row, if its gradient is wanted: its place among them, dtype, sparse, backend
    constants: tuple[Any, ...]  # the fields of the problem that are no tensors
    again: bool  # whether the backward solves the problem: the rows of "none" know no gradients yet


def _call(
    problem: Problem, wanted: Wanted, dtypes: list[torch.dtype], backend: str, sparse_grad: bool
) -> _Call:
    table: Any = None
    if wanted.candidates and problem.by_row:
        at = int(wanted.query)
        dtypes[at : at + 1] = [problem.candidate_gradient] * 2
        table = (at, problem.candidates.dtype, sparse_grad, backend)
        wanted = wanted._replace(positive=True)
    again = problem.reduction == "none"
    return _Call(wanted, backend, dtypes, table, problem[NUM_TENSORS:], again)


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
            loss = _solved(problem, None, _NOTHING, call.backend, watched).loss
            kept = problem.tensors()
        else:
            loss, *gradients = _solved(problem, None, call.wanted, call.backend, watched)
            kept = [g for g in gradients if g is not None]
        root = loss.new_empty(0) if watched else loss.data  # `data` takes a third of the time
        # Asked here: a compiler of symbolic sizes hands the backward none from outside the forward.
        ctx.call = call, len(kept), problem.candidates.shape[0]
        ctx.save_for_backward(*kept, root, *(_draws(problem) if call.table else ()))
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
        kept, root, draws = saved[:num], saved[num], saved[num + 1 :]
        return None, *_gradients(call, kept, root, draws, table_rows, grad, watched)


class _Transformed(ReverseOnly):
    """`_SoftmaxLoss` for the transforms of ``torch.func``.

    They see tensors that are inputs or outputs alone, so all of the problem goes in, and what is
    kept for the backward comes out.
    """

    @staticmethod
    def forward(call: _Call, *tensors: Any) -> tuple[Tensor, ...]:
        problem = Problem(*tensors, *call.constants)
        wanted = _NOTHING if call.again else call.wanted
        loss, *gradients = _solved(problem, None, wanted, call.backend, watched=True)
        return loss, loss.new_empty(0), *[g for g in gradients if g is not None]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.call = inputs[0]
        ctx.save_for_backward(*inputs[1:], *output)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * NUM_TENSORS
        if upstream[0] is None:
            return None, *found
        call = ctx.call
        saved = ctx.saved_tensors
        tensors, (_, root, *gradients) = saved[:NUM_TENSORS], saved[NUM_TENSORS:]
        kept = tensors if call.again else gradients
        problem = Problem(*tensors, *call.constants)
        sources = [place for place, want in zip(SOURCES, call.wanted, strict=True) if want]
        if call.table is not None:
            sources.remove(SOURCES[1])  # what is wanted of the positives is part of the table's
        draws, table_rows = _draws(problem), problem.candidates.shape[0]
        gradients = _gradients(call, kept, root, draws, table_rows, upstream[0], watched=True)
        for place, gradient in zip(sources, gradients, strict=True):
            found[place] = gradient
        return None, *found


def _gradients(
    call: _Call,
    kept: Sequence[Any],
    root: Tensor,
    draws: Sequence[Any],
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
        detached: Any = [t if t is None else t.detach() for t in kept]
        problem = Problem(*detached, *call.constants)
        _, *found = _solved(problem, upstream.contiguous(), call.wanted, call.backend, watched)
        present = [g for g in found if g is not None]
        gradients = [g.to(dtype) for g, dtype in zip(present, call.dtypes, strict=True)]
    if call.table is not None:
        at, *options = call.table
        query, positive_ids, candidate_ids = draws
        products = [gradients[at][:, None], gradients[at + 1]]
        ids = [positive_ids[:, None], candidate_ids]
        gradients[at : at + 2] = [
            table_gradient(query.detach(), ids, products, table_rows, *options)
        ]
    if watched or torch.is_grad_enabled():
        gradients = [once(g, root, grad) for g in gradients]
    return gradients


# What `Function.apply` comes to where no transform of functions is at work.
_apply: Any = super(torch.autograd.Function, _SoftmaxLoss).apply


def _solved(
    problem: Problem, row_grad: Tensor | None, wanted: Wanted, backend: str, watched: bool
) -> Output:
    """The output of the registered op, straight from the backend where nobody watches."""
    if not watched:
        return _solve(problem, row_grad, wanted, backend)
    call = (*_fields(problem), row_grad, list(wanted), backend)
    loss, *gradients = torch.ops.dwl_kernels.softmax_loss(*call)
    return Output(loss, *[g if w else None for g, w in zip(gradients, wanted, strict=True)])


def _scaled(
    gradients: Sequence[Tensor], upstream: Tensor, dtypes: list[torch.dtype], watched: bool
) -> Sequence[Tensor]:
    """The products of the op ``scale``, likewise."""
    if not watched:
        # Of a graph that is not kept nobody asks again: its gradients become the products.
        return _products([*gradients], upstream, dtypes, in_place=not _keeps_graph())
    places = [_DTYPES.index(dtype) for dtype in dtypes]
    return torch.ops.dwl_kernels.scale(gradients, upstream, places)


def _watched(tensors: Sequence[Any]) -> bool:
    """Whether a call that is not compiled must go through PyTorch's dispatcher all the same.

    That takes its time. It must where a mode wants to see the op and not what it consists of, where
    tensors are of a subclass, without memory or in a batch, and where one may carry a tangent.
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
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _products(
    gradients: list[Tensor], upstream: Tensor, dtypes: list[torch.dtype], in_place: bool = False
) -> list[Tensor]:
    """``gradient * upstream``, where backward may run twice out of place.

    The product is made in float32: a loss scaler's 65536 is infinite in float16.
    """
    if upstream.is_cuda and backends.why_not("triton", "cuda") is None:
        return backends.triton.scaled(gradients, upstream, dtypes, in_place)
    products = []
    for gradient, dtype in zip(gradients, dtypes, strict=True):
        if in_place and gradient.dtype == dtype == upstream.dtype:
            products.append(gradient.mul_(upstream))
            continue
        wide = gradient if gradient.dtype == torch.float64 else gradient.float()
        products.append((wide * upstream).to(dtype))
    return products


def _solve(problem: Problem, row_grad: Tensor | None, wanted: Wanted, backend: str) -> Output:
    solve = backends.pick(backend, problem)
    if autocasting(problem.query.device.type):
        # The problem has been cast to its dtype already; the sums in between must not be.
        with no_autocast(problem.query.device.type):
            return solve(problem, wanted, row_grad)
    return solve(problem, wanted, row_grad)


def _draws(problem: Problem) -> tuple[Any, Any, Any]:
    """What the gradient of a table needs to know about the rows."""
    return problem.query, problem.target, problem.candidate_rows


# The registered ops.


def _fields(problem: Problem) -> tuple[Any, ...]:
    """The problem as arguments of the op."""
    dual = problem.dual
    return *problem[:-1], None if dual is None else [float(number) for number in dual]


def _problem(fields: list[Any]) -> Problem:
    """The problem of what `_fields` gave."""
    dual = fields[-1]
    if dual is not None:
        if len(dual) != len(DualScale._fields):
            raise ValueError(f"dual has {len(dual)} numbers; wanted {len(DualScale._fields)}")
        hardness, similarity, slate_size, competition = dual
        dual = DualScale(hardness, similarity, int(slate_size), competition)
    return Problem(*[*fields[:-1], dual])


def _softmax_loss(*args: Any) -> tuple[Tensor, ...]:
    *fields, row_grad, wanted, backend = args
    problem = _problem(fields)
    check_problem(problem, row_grad, wanted, backend)
    output = _solve(problem, row_grad, Wanted(*wanted), backend)
    # An op cannot return None; a gradient that is not wanted is an empty tensor.
    return tuple([problem.query.new_empty(0) if t is None else t for t in output])


def _fake_softmax_loss(*args: Any) -> tuple[Tensor, ...]:
    *fields, _row_grad, wanted, _backend = args
    problem = _problem(fields)
    rows = (problem.query.shape[0],) if problem.reduction == "none" else ()
    loss = problem.query.new_empty(rows, dtype=problem.accumulate)
    shapes = [None if t is None else t.shape for t in problem.sources()]
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


def _scale(gradients: list[Tensor], upstream: Tensor, places: list[int]) -> list[Tensor]:
    check_scale(gradients, upstream, places, _DTYPES)
    return _products(gradients, upstream, [_DTYPES[place] for place in places])


def _fake_scale(gradients: list[Tensor], upstream: Tensor, places: list[int]) -> list[Tensor]:
    return [
        g.new_empty(g.shape, dtype=_DTYPES[place])
        for g, place in zip(gradients, places, strict=True)
    ]


_library.impl("softmax_loss", _softmax_loss, "CompositeExplicitAutograd")
torch.library.register_fake("dwl_kernels::softmax_loss", _fake_softmax_loss)
_library.impl("scale", _scale, "CompositeExplicitAutograd")
torch.library.register_fake("dwl_kernels::scale", _fake_scale)
for _name in ("softmax_loss", "scale"):
    register_by_slices(_library, _name)
