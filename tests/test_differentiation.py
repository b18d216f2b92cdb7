"""What PyTorch can ask of a differentiable function: each loss gives the right answer, or raises.

The losses are differentiable once, in reverse mode. A forward-mode derivative or a second one would
come out as 0 in silence, so every way to ask for them has to raise. Everything that asks for
ordinary gradients in an unusual way has to work: transforms, batches of upstream gradients, vmap.
"""

from __future__ import annotations

import module_inputs
import pytest
import torch
from cases import Case
from differentiated import (
    IDS,
    KINDS,
    OPTIONS,
    SIZES,
    assert_all_close,
    gradients,
    leaves_of,
    loss_and_values,
)
from torch.autograd import forward_ad

import dwl_kernels
from dwl_kernels import backends

FUNCTIONS = [f"{kind}, {reduction}" for kind in KINDS for reduction in ("mean", "none")]
MODULES = [f"module, {kind}" for kind in module_inputs.KINDS]
ALL = FUNCTIONS + MODULES
REFUSAL = "differentiable once"


def of_one(loss, values, place):
    """`loss` as a function of one of its inputs."""
    return lambda value: loss(*values[:place], value, *values[place + 1 :])


# ---------------------------------------------------------------- what must raise


def dual_number(f, x):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, torch.ones_like(x)))


def dual_number_that_requires_grad(f, x):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x)))


def dual_number_without_grad(f, x):
    with torch.no_grad():
        return dual_number(f, x)


def dual_upstream_gradient(f, x):
    x = x.clone().requires_grad_()
    loss = f(x)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(loss), torch.ones_like(loss))
        return torch.autograd.grad(loss, x, upstream)


FORWARD_OR_TWICE = {
    "dual number": dual_number,
    "dual number that requires grad": dual_number_that_requires_grad,
    "dual number, no_grad": dual_number_without_grad,
    "dual upstream gradient": dual_upstream_gradient,
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "func.jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "func.hessian": lambda f, x: torch.func.hessian(f)(x),
    "func.grad twice": lambda f, x: torch.func.grad(lambda y: torch.func.grad(f)(y).sum())(x),
    "func.jacrev twice": lambda f, x: torch.func.jacrev(torch.func.jacrev(f))(x),
    "functional.jvp": lambda f, x: torch.autograd.functional.jvp(f, x, torch.ones_like(x)),
    "functional.hvp": lambda f, x: torch.autograd.functional.hvp(f, x, torch.ones_like(x)),
    "functional.hessian": torch.autograd.functional.hessian,
    "functional.jacobian, forward-mode": lambda f, x: torch.autograd.functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
}


@pytest.mark.parametrize("way", FORWARD_OR_TWICE)
@pytest.mark.parametrize("name", ALL)
def test_forward_mode_and_second_derivatives_raise(name, way):
    loss, values = loss_and_values(name)
    for place, value in enumerate(values):
        with pytest.raises(RuntimeError, match=REFUSAL):
            FORWARD_OR_TWICE[way](of_one(loss, values, place), value)


@pytest.mark.parametrize("name", ["positive_log_q", "negative_log_q", "example_weights"])
def test_tangents_of_what_has_no_gradient_raise_too(name):
    case = Case("tangents", **SIZES, **OPTIONS)
    inputs = case.inputs(torch.float64)

    def loss(value):
        return case.loss({**inputs, name: value}, "eager")

    for way in ("dual number", "dual number, no_grad", "func.jvp"):
        with pytest.raises(RuntimeError, match=REFUSAL):
            FORWARD_OR_TWICE[way](loss, inputs[name])
    with pytest.raises(ValueError, match="requires a gradient, which this loss does not give"):
        torch.func.grad(loss)(inputs[name])


@pytest.mark.parametrize("unused", [False, True], ids=["", "allow_unused"])
@pytest.mark.parametrize("name", ALL)
def test_gradient_of_a_gradient_raises_by_every_input(name, unused):
    loss, values = loss_and_values(name)
    for first in range(len(values)):
        for second in range(len(values)):
            leaves = leaves_of(values)
            (gradient,) = torch.autograd.grad(loss(*leaves), leaves[first], create_graph=True)
            with pytest.raises(RuntimeError, match=REFUSAL):
                torch.autograd.grad(gradient.sum(), leaves[second], allow_unused=unused)


@pytest.mark.parametrize("unused", [False, True], ids=["", "allow_unused"])
@pytest.mark.parametrize("name", ALL)
def test_gradient_of_a_gradient_raises_by_the_upstream_one(name, unused):
    loss, values = loss_and_values(name)
    for place in range(len(values)):
        leaves = leaves_of(values)
        upstream = torch.ones((), dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(*leaves), leaves[place], upstream, create_graph=True)
        with pytest.raises(RuntimeError, match=REFUSAL):
            torch.autograd.grad(gradient.sum(), upstream, allow_unused=unused)


@pytest.mark.parametrize("name", ALL)
def test_penalty_of_the_gradient_raises_behind_a_tower(name):
    """The usual way to a second derivative; the loss alone knows nothing of the tower."""
    loss, values = loss_and_values(name)
    tower = torch.nn.Linear(4, 4).double()
    features = values[0].clone().requires_grad_()
    value = loss(tower(features), *values[1:])
    (gradient,) = torch.autograd.grad(value, features, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSAL):
        (value + gradient.square().sum()).backward()


@pytest.mark.parametrize("kind", ["table", "by row"])
def test_gradient_of_a_sparse_gradient_raises(kind):
    ids = {k: IDS[k] for k in ("positive_ids", "negative_ids")}
    if kind == "by row":
        ids["negative_ids"] = ids["negative_ids"].expand(module_inputs.B, -1)
    query, table = module_inputs.embeddings()[0], module_inputs.table_of()
    loss = dwl_kernels.indexed_sampled_softmax_loss(query, table, **ids, sparse_grad=True)
    (gradient,) = torch.autograd.grad(loss, table, create_graph=True)
    assert gradient.is_sparse
    for source in (query, table):
        with pytest.raises(RuntimeError, match=REFUSAL):
            torch.autograd.grad(gradient.to_dense().sum(), source, allow_unused=True)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", ALL)
def test_trace_of_jit_raises(name):
    loss, values = loss_and_values(name)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace .* cannot record the losses"):
        torch.jit.trace(loss, tuple(leaves_of(values)))


# ---------------------------------------------------------------- what must work


@pytest.mark.parametrize("name", ALL)
def test_graph_of_the_gradients_leaves_them_as_they_are(name):
    loss, values = loss_and_values(name)
    leaves = leaves_of(values)
    value = loss(*leaves)
    with_graph = torch.autograd.grad(value, leaves, create_graph=True)
    for got, wanted in zip(with_graph, gradients(loss, values), strict=True):
        assert torch.equal(got, wanted)
    # Anything else may be differentiated next to a gradient that is only looked at.
    (value + with_graph[0].detach().sum() * 2).backward()


@pytest.mark.parametrize("name", ALL)
def test_transforms_give_the_ordinary_gradients(name):
    loss, values = loss_and_values(name)
    wanted = gradients(loss, values)
    places = tuple(range(len(values)))
    assert_all_close(torch.func.grad(loss, places)(*values), wanted)
    assert_all_close(torch.func.jacrev(loss, places)(*values), wanted)
    value, pull = torch.func.vjp(loss, *values)
    torch.testing.assert_close(value, loss(*values))
    assert_all_close(pull(-2 * torch.ones_like(value)), [-2 * g for g in wanted])
    for place in places:  # alone, where nothing else is wanted
        assert_all_close(
            [torch.func.grad(of_one(loss, values, place))(values[place])], wanted[place:][:1]
        )


@pytest.mark.parametrize("name", ALL)
def test_batch_of_upstream_gradients(name):
    loss, values = loss_and_values(name)
    wanted = gradients(loss, values)
    leaves = leaves_of(values)
    upstream = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    got = torch.autograd.grad(loss(*leaves), leaves, upstream, is_grads_batched=True)
    assert_all_close(got, [torch.stack([u * g for u in upstream]) for g in wanted])
    jacobian = torch.autograd.functional.jacobian(loss, tuple(values), vectorize=True)
    assert_all_close(jacobian, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_jacobian_of_the_rows(kind):
    case = Case(kind, **SIZES, kind=kind, **OPTIONS)
    inputs = {**case.inputs(torch.float64), "reduction": "none"}

    def rows(query):
        return case.loss({**inputs, "query": query}, "eager")

    query = inputs["query"].detach()
    leaf = query.clone().requires_grad_()
    loss = rows(leaf)
    wanted = torch.stack([torch.autograd.grad(row, leaf, retain_graph=True)[0] for row in loss])
    assert_all_close([torch.func.jacrev(rows)(query)], [wanted])
    for vectorize in (False, True):
        got = torch.autograd.functional.jacobian(rows, query, vectorize=vectorize)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", ALL)
def test_vmap_is_the_slices_one_by_one(name):
    loss, values = loss_and_values(name)
    places = tuple(range(len(values)))
    for batched in ([0], places):
        stacked = [torch.stack([v, v * 1.5]) if i in batched else v for i, v in enumerate(values)]
        dims = tuple(0 if i in batched else None for i in places)
        slices = [[v[k] if i in batched else v for i, v in enumerate(stacked)] for k in (0, 1)]
        wanted = torch.stack([loss(*one) for one in slices])
        torch.testing.assert_close(torch.func.vmap(loss, dims)(*stacked), wanted)
        behind = [v.movedim(0, -1) if i in batched else v for i, v in enumerate(stacked)]
        last = tuple(-1 if dim == 0 else None for dim in dims)
        torch.testing.assert_close(torch.func.vmap(loss, last)(*behind), wanted)
        got = torch.func.vmap(torch.func.grad(loss, places), dims)(*stacked)
        for k, one in enumerate(slices):
            assert_all_close([g[k] for g in got], gradients(loss, one))


@pytest.mark.parametrize("shared", [True, False])
def test_vmap_over_ids(shared):
    query, table = (x.detach() for x in (module_inputs.embeddings()[0], module_inputs.table_of()))
    shape = (3, 5) if shared else (3, module_inputs.B, 5)
    generator = torch.Generator().manual_seed(0)
    negative_ids = torch.randint(module_inputs.ITEMS, shape, generator=generator)

    def loss(table, negative_ids):
        return dwl_kernels.indexed_sampled_softmax_loss(
            query, table, IDS["positive_ids"], negative_ids, backend="eager"
        )

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(table, negative_ids)
    wanted = [gradients(lambda t, ids=ids: loss(t, ids), [table])[0] for ids in negative_ids]
    torch.testing.assert_close(got, torch.stack(wanted))


@pytest.mark.parametrize("kind", ["table", "by row"])
def test_sparse_gradients_have_no_batches(kind):
    ids = IDS["negative_ids"]
    ids = ids if kind == "table" else ids.expand(module_inputs.B, -1)
    query, table = module_inputs.embeddings()[0], module_inputs.table_of()

    def loss(query, table):
        return dwl_kernels.indexed_sampled_softmax_loss(
            query, table, IDS["positive_ids"], ids, sparse_grad=True
        )

    message = r"sparse ones .* pass sparse_grad=False"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(
            loss(query, table), table, torch.ones(2).double(), is_grads_batched=True
        )
    queries, table = torch.stack([query.detach()] * 2), table.detach()
    with pytest.raises(RuntimeError, match=message):
        torch.func.vmap(torch.func.grad(loss, 1), (0, None))(queries, table)
    assert torch.func.grad(loss, 1)(queries[0], table).is_sparse  # one alone is no batch


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("kind", ["sampled", "indexed_rows"])
def test_kernels_behind_a_transform(backend, kind):
    reason = backends.unavailable_reason(backend, "cpu")
    if reason is not None:
        pytest.skip(f"backend {backend!r} cannot run here: {reason}")
    loss, values = loss_and_values(f"{kind}, mean", backend)
    assert_all_close(
        torch.func.grad(loss, tuple(range(len(values))))(*values), gradients(loss, values)
    )
    with pytest.raises(RuntimeError, match=REFUSAL):
        dual_number(of_one(loss, values, 0), values[0])
