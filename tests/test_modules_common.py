"""What every module has: weights, padding, temperature, state, `torch.compile`, autocast."""

import copy
import inspect

import pytest
import torch
from module_inputs import (
    DOMAINS,
    ITEMS,
    KINDS,
    D,
    assert_same,
    call,
    draws,
    embeddings,
    fixed,
    item_domains,
    table_of,
)

from dwl_kernels import (
    CumulativeCrossEntropy,
    DualScaleSampledSoftmax,
    DynamicWeightedSampledSoftmax,
    in_batch_softmax_loss,
    sampled_softmax_loss,
)
from dwl_kernels.modules.weighted import TEMPERATURE_RANGE

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def make(kind, **options):
    options = {"item_domains": item_domains(), "backend": "eager"} | options
    return KINDS[kind](DOMAINS, **options)


# ---------------------------------------------------------------- weights


@EVERY_KIND
def test_weights_follow_the_batches_in_training_only(kind):
    query, table = embeddings()[0], table_of()
    loss_fn = make(kind)
    before = loss_fn.domain_weights()
    call(kind, loss_fn.eval(), query, table)
    assert torch.equal(loss_fn.domain_weights(), before)
    call(kind, loss_fn.train(), query, table)
    slots = item_domains()[draws()["positive_ids"]]
    assert loss_fn.domain_weights.interactions.tolist() == [
        int((slots == d).any(1).sum()) for d in range(DOMAINS)
    ]
    assert not torch.equal(loss_fn.domain_weights(), before)


@EVERY_KIND
def test_fixed_weights_scale_the_rows(kind):
    query, table = embeddings()[0], table_of()
    weights = torch.tensor([0.5, 1.0, 3.0])
    item_domain = torch.arange(ITEMS) % DOMAINS
    options = {"item_domains": item_domain, "reduction": "none"}
    plain = call(kind, make(kind, weights=torch.ones(DOMAINS), **options), query, table)
    got = call(kind, make(kind, weights=weights, **options), query, table)
    torch.testing.assert_close(got, plain * weights[item_domain[draws()["positive_ids"]]])


@EVERY_KIND
@pytest.mark.parametrize("normalize", [True, False])
def test_padded_row_gives_nothing_and_its_nan_does_not_leak(kind, normalize):
    query, table = embeddings()[0], table_of()
    example_weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 2.0, 1.0])
    results = []
    for nan in (False, True):
        loss_fn = make(kind, normalize=normalize, reduction="none")
        rows = query.detach().clone()
        if nan:
            rows[2] = torch.nan
        rows.requires_grad_()
        loss = call(kind, loss_fn, rows, table, example_weights=example_weights)
        assert loss[2] == 0
        gradients = torch.autograd.grad(loss.sum(), [rows, table])
        assert not gradients[0][2].any()
        results.append([loss, *gradients, loss_fn.domain_weights.interactions])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------- temperature


def test_temperature_is_learned_and_stays_bounded():
    inputs, domain_ids = embeddings(), draws()["domain_ids"]
    loss_fn = fixed(learn_temperature=True, temperature=0.07)
    assert loss_fn.temperature.item() == pytest.approx(0.07, rel=1e-5)
    tau = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(
        sampled_softmax_loss(
            *inputs,
            domain_ids=domain_ids,
            domain_weights=loss_fn.domain_weights(),
            temperature=tau,
            backend="eager",
        ),
        tau,
    )
    loss_fn(*inputs, domain_ids=domain_ids).backward()
    (chain,) = torch.autograd.grad(loss_fn.temperature, loss_fn.temperature_logit)
    assert loss_fn.temperature_logit.grad.item() == pytest.approx(
        slope.item() * chain.item(), rel=1e-4
    )
    low, high = TEMPERATURE_RANGE
    for logit in (-1e4, 1e4):
        loss_fn.temperature_logit.data.fill_(logit)
        assert low * 0.999 <= loss_fn.temperature.item() <= high * 1.001


def test_learned_temperature_reaches_the_best_one():
    # Scores are far too sharp for what they know, so the best temperature is higher.
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(64, D, generator=generator)
    positive = query + 2 * torch.randn(64, D, generator=generator)
    loss_fn = DynamicWeightedSampledSoftmax(
        temperature=0.05, learn_temperature=True, backend="eager"
    )
    optimiser = torch.optim.LBFGS(loss_fn.parameters(), line_search_fn="strong_wolfe")
    start = loss_fn(query, positive).item()

    def closure():
        optimiser.zero_grad()
        loss = loss_fn(query, positive)
        loss.backward()
        return loss

    optimiser.step(closure)
    best = min(
        in_batch_softmax_loss(query, positive, temperature=tau, backend="eager").item()
        for tau in torch.logspace(-2, 1.5, 200)
    )
    assert start > 2 * best
    assert loss_fn(query, positive).item() == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("sign", [1, -1])
def test_learned_temperature_comes_back_from_a_bound(sign):
    """Pushed there by a wrong loss for a while, unlike one that was clamped to it."""
    loss_fn = fixed(learn_temperature=True, temperature=0.07)
    optimiser = torch.optim.Adam(loss_fn.parameters(), lr=0.1)
    trace = []
    for step in range(600):
        optimiser.zero_grad()
        (sign * loss_fn.temperature.log() * (-1 if step < 150 else 1)).backward()
        optimiser.step()
        trace.append(loss_fn.temperature.item())
    low, high = TEMPERATURE_RANGE
    bound = low if sign < 0 else high
    assert trace[149] == pytest.approx(bound, rel=0.1)
    assert all(low * 0.999 <= tau <= high * 1.001 for tau in trace)
    assert trace[-1] == pytest.approx(low if sign > 0 else high, rel=0.1)


@EVERY_KIND
def test_learned_temperature_of_every_module_takes_its_gradient(kind):
    """That of a number a little above and below; the dual scale detaches what else it moves."""
    query, table = embeddings()[0], table_of()
    strengths = {"hardness": 0, "similarity": 0, "competition": 0} if kind == "dual scale" else {}
    loss_fn = make(kind, learn_temperature=True, temperature=0.7, **strengths).eval()
    call(kind, loss_fn, query, table).backward()
    around = [
        call(kind, make(kind, temperature=tau, **strengths).eval(), query, table).item()
        for tau in (0.7 + 1e-5, 0.7 - 1e-5)
    ]
    (chain,) = torch.autograd.grad(loss_fn.temperature, loss_fn.temperature_logit)
    slope = (around[0] - around[1]) / 2e-5
    assert loss_fn.temperature_logit.grad.item() == pytest.approx(slope * chain.item(), rel=1e-3)


# ---------------------------------------------------------------- state


@EVERY_KIND
def test_state_dict_carries_weights_counts_and_temperature(kind):
    options = {"learn_temperature": True}
    source = make(kind, **options, temperature=0.2)
    optimiser = torch.optim.SGD(source.parameters(), lr=0.01)
    call(kind, source, embeddings()[0], table_of()).backward()
    optimiser.step()
    loaded = make(kind, **options, temperature=0.9)
    loaded.load_state_dict(copy.deepcopy(source.state_dict()))
    assert torch.equal(loaded.domain_weights(), source.domain_weights())
    assert loaded.domain_weights.interactions.sum() > 0
    assert torch.equal(loaded.temperature, source.temperature)
    for seed in (1, 2):
        query = embeddings(seed)[0]
        losses = [call(kind, fn, query, table_of(), draws(seed)) for fn in (source, loaded)]
        assert torch.equal(*losses)


def test_two_forwards_before_the_backward_keep_their_own_weights():
    inputs, loss_fn = (
        embeddings(),
        DynamicWeightedSampledSoftmax(2, reduction="none", backend="eager"),
    )
    domain_ids = torch.tensor([0, 0, 0, 0, 0, 1])
    first = loss_fn(*inputs, domain_ids=domain_ids)
    weights = loss_fn.domain_weights()
    loss_fn(*inputs, domain_ids=domain_ids)
    wanted = sampled_softmax_loss(
        *inputs,
        domain_ids=domain_ids,
        domain_weights=weights,
        reduction="none",
        backend="eager",
    )
    assert_same(first, wanted, inputs)


# ---------------------------------------------------------------- compiled, autocast


def compiled_and_eager_steps(kind, backend, **options):
    """Loss, gradients and counts of three training steps, compiled and not."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        tower, items = torch.nn.Linear(D, D), torch.nn.Embedding(ITEMS, D)
        loss_fn = make(kind, backend=backend, **options)

        def step(x, ids, weights, parts=(tower, items, loss_fn)):
            tower, items, loss_fn = parts
            return call(kind, loss_fn, tower(x), items.weight, ids, example_weights=weights)

        if compiled:
            step = torch.compile(step, fullgraph=True, backend="aot_eager")
        parameters = [*tower.parameters(), *items.parameters(), *loss_fn.parameters()]
        outcome = []
        for seed in range(3):
            x = embeddings(seed, dtype=torch.float32)[0].detach()
            weights = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0, 2.0])
            loss = step(x, draws(seed), weights)
            outcome += [loss.detach(), *torch.autograd.grad(loss, parameters)]
        outcome += [loss_fn.domain_weights(), loss_fn.domain_weights.interactions]
        results.append(outcome)
    return results


@EVERY_KIND
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_compiled_training_step_equals_eager(kind, backend):
    # Without `normalize` the table is a parameter as it stands.
    normalize = backend == "eager"
    eager, compiled = compiled_and_eager_steps(
        kind, backend, calibration=0.5, learn_temperature=True, normalize=normalize
    )
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other)


def test_module_compiled_by_inductor_equals_eager():
    # Only the module, and in-batch candidates: inductor compiles for seconds.
    torch._dynamo.reset()
    query, positive, _ = embeddings(dtype=torch.float32)
    domain_ids = draws()["domain_ids"]
    eager = DynamicWeightedSampledSoftmax(DOMAINS, calibration=0.5, backend="eager")
    compiled = copy.deepcopy(eager)
    got = torch.compile(compiled, fullgraph=True)(query, positive, domain_ids=domain_ids)
    wanted = eager(query, positive, domain_ids=domain_ids)
    assert torch.equal(compiled.domain_weights.interactions, eager.domain_weights.interactions)
    torch.testing.assert_close(compiled.domain_weights(), eager.domain_weights())
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    inputs = [query, positive]
    pairs = [torch.autograd.grad(loss, inputs) for loss in (got, wanted)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@EVERY_KIND
def test_autocast_rounds_the_embeddings_and_sums_in_float32(kind):
    query, table = embeddings(dtype=torch.float32)[0], table_of(torch.float32)
    loss_fn = make(kind, temperature=0.7).eval()
    exact = call(kind, loss_fn, query, table)
    with torch.autocast("cpu", torch.bfloat16):
        got = call(kind, loss_fn, query, table)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact, rtol=0.05, atol=0.05)
    for gradient in torch.autograd.grad(got, [query, table]):
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()
    if kind != "by row":  # its table keeps its dtype, as an embedding does
        rounded = call(kind, loss_fn, query.bfloat16(), table.bfloat16())
        assert torch.equal(got, rounded)


@pytest.mark.parametrize(
    "module", [CumulativeCrossEntropy, DualScaleSampledSoftmax, DynamicWeightedSampledSoftmax]
)
def test_printed_module_names_every_argument(module):
    """But for what is printed below it, the domain weights, and what the temperature says."""
    text = repr(module())
    elsewhere = {"num_domains", "weights", "domain_weights", "learn_temperature"}
    for name in set(inspect.signature(module).parameters) - elsewhere:
        assert f"{name}=" in text


@pytest.mark.parametrize(
    "module", [CumulativeCrossEntropy, DualScaleSampledSoftmax, DynamicWeightedSampledSoftmax]
)
def test_weights_go_by_the_name_that_functions_have_too(module):
    assert module(domain_weights=[1.0, 2.0]).domain_weights().tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="weights and domain_weights are the same argument"):
        module(weights=[1.0, 2.0], domain_weights=[1.0, 2.0])
