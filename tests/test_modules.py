"""The module against the functions it calls, and what only the module does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dwl_kernels import in_batch_softmax_loss, sampled_softmax_loss
from dwl_kernels.domains import DomainWeights
from dwl_kernels.modules import TEMPERATURE_RANGE, DynamicWeightedSampledSoftmax

# Sizes that differ from each other, so that a mixed-up dimension cannot pass. Float64 and `eager`:
# the backends have tests of their own.
B, N, D, DOMAINS, ITEMS, G = 6, 9, 4, 3, 20, 2


def embeddings(seed=0, rows=(B,), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape, D, generator=generator, dtype=dtype).requires_grad_()
        for shape in (rows, rows, (N,))
    ]


def draws(seed=0):
    """Ids of items and domains, log-Q, and the domains of all items."""
    generator = torch.Generator().manual_seed(100 + seed)
    return {
        "domain_ids": torch.randint(0, DOMAINS, (B,), generator=generator),
        "positive_ids": torch.randint(0, ITEMS, (B,), generator=generator),
        "negative_ids": torch.randint(0, ITEMS, (N,), generator=generator),
        "positive_log_q": torch.randn(B, generator=generator, dtype=torch.float64),
        "negative_log_q": torch.randn(N, generator=generator, dtype=torch.float64),
    }


def item_domains(seed=0):
    generator = torch.Generator().manual_seed(200 + seed)
    return torch.randint(-1, DOMAINS, (ITEMS, G), generator=generator)


def fixed(**options):
    options = {"weights": [0.5, 1.0, 3.0], "temperature": 0.7, "backend": "eager"} | options
    return DynamicWeightedSampledSoftmax(**options)


def assert_same(got, wanted, inputs):
    """The same loss and the same gradients."""
    torch.testing.assert_close(got, wanted)
    pairs = [torch.autograd.grad(loss.sum(), inputs, retain_graph=True) for loss in (got, wanted)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("correction", ["standard", "refined"])
@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum", "none"])
def test_module_equals_function(correction, reduction):
    inputs, given_ids = embeddings(), draws()
    loss_fn = fixed(correction=correction, reduction=reduction)
    example_weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 1.0])
    got = loss_fn(*inputs, **given_ids, example_weights=example_weights)
    wanted = sampled_softmax_loss(
        *inputs,
        **given_ids,
        example_weights=example_weights,
        domain_weights=torch.tensor([0.5, 1.0, 3.0]),
        temperature=0.7,
        correction=correction,
        reduction=reduction,
        backend="eager",
    )
    assert_same(got, wanted, inputs)


def test_without_negatives_the_batch_provides_the_candidates():
    query, positive, _ = embeddings()
    given_ids = draws()
    got = fixed()(
        query,
        positive,
        domain_ids=given_ids["domain_ids"],
        positive_ids=given_ids["positive_ids"],
        positive_log_q=given_ids["positive_log_q"],
    )
    wanted = in_batch_softmax_loss(
        query,
        positive,
        log_q=given_ids["positive_log_q"],
        ids=given_ids["positive_ids"],
        domain_ids=given_ids["domain_ids"],
        domain_weights=torch.tensor([0.5, 1.0, 3.0]),
        temperature=0.7,
        backend="eager",
    )
    assert_same(got, wanted, [query, positive])
    with pytest.raises(ValueError, match="negative"):
        fixed()(query, positive, **given_ids)


def test_without_domains_it_is_the_plain_loss():
    inputs = embeddings()
    got = DynamicWeightedSampledSoftmax(temperature=0.7, backend="eager")(*inputs)
    wanted = sampled_softmax_loss(*inputs, temperature=0.7, backend="eager")
    assert_same(got, wanted, inputs)


@pytest.mark.parametrize("slots", [None, G])
def test_leading_dimensions_go_through_like_rows(slots):
    lead = (2, 3)
    inputs = embeddings(rows=lead)
    domains = torch.arange(6) % DOMAINS if slots is None else item_domains()[:6]
    mask = torch.tensor([1.0, 1, 0, 1, 1, 0])
    options = {"reduction": "none", "calibration": 0.5}
    negative_domain_ids = torch.arange(N) % DOMAINS
    shaped, flat = fixed(**options), fixed(**options)
    got = shaped(
        *inputs,
        domain_ids=domains.reshape(*lead, *domains.shape[1:]),
        negative_domain_ids=negative_domain_ids,
        example_weights=mask.reshape(lead),
    )
    wanted = flat(
        *(inputs[0].flatten(0, 1), inputs[1].flatten(0, 1), inputs[2]),
        domain_ids=domains,
        negative_domain_ids=negative_domain_ids,
        example_weights=mask,
    )
    assert got.shape == lead
    assert_same(got, wanted.reshape(lead), inputs)
    counts = [loss_fn.domain_weights.interactions.tolist() for loss_fn in (shaped, flat)]
    assert counts[0] == counts[1]


def test_normalize_scales_embeddings_to_length_one():
    inputs = embeddings()
    domain_ids = draws()["domain_ids"]
    got = fixed(normalize=True)(*inputs, domain_ids=domain_ids)
    wanted = fixed()(*(F.normalize(x, dim=-1) for x in inputs), domain_ids=domain_ids)
    assert_same(got, wanted, inputs)


@pytest.mark.parametrize("normalize", [True, False])
def test_nan_in_a_padded_row_does_not_leak(normalize):
    inputs = embeddings()
    example_weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    options = {"domain_ids": draws()["domain_ids"], "example_weights": example_weights}
    loss_fn = fixed(normalize=normalize)
    wanted = torch.autograd.grad(loss_fn(*inputs, **options), inputs)
    for row in inputs[:2]:
        row.data[2] = torch.nan
    for got, want in zip(
        torch.autograd.grad(loss_fn(*inputs, **options), inputs), wanted, strict=True
    ):
        torch.testing.assert_close(got, want)


def test_no_rows_give_a_loss_of_zero():
    query, positive, negative = embeddings(rows=(0,))
    loss = fixed(calibration=1.0)(
        *(query, positive, negative),
        domain_ids=torch.zeros(0, G, dtype=torch.int64),
        negative_domain_ids=torch.zeros(N, dtype=torch.int64),
    )
    assert loss.item() == 0


def test_hits_stay_when_asked_to():
    inputs = embeddings()
    same = torch.zeros(B, dtype=torch.int64), torch.zeros(N, dtype=torch.int64)
    ids = {"positive_ids": same[0], "negative_ids": same[1]}
    removed = DynamicWeightedSampledSoftmax(backend="eager")(*inputs, **ids)
    kept = DynamicWeightedSampledSoftmax(remove_accidental_hits=False, backend="eager")
    assert removed.item() == 0  # every candidate is a hit
    torch.testing.assert_close(
        kept(*inputs, **ids), sampled_softmax_loss(*inputs, temperature=0.05, backend="eager")
    )


@pytest.mark.parametrize("calibration", [0.3, 1.0])
@pytest.mark.parametrize("with_log_q", [True, False])
def test_calibration_equals_explicit_log_q(calibration, with_log_q):
    inputs, given_ids = embeddings(), draws()
    log_q = {name: given_ids.pop(name) for name in ("positive_log_q", "negative_log_q")}
    negative_domain_ids = torch.tensor([0, 1, 2, -1, 0, 1, 2, -1, 0])
    log_w = torch.tensor([0.5, 1.0, 3.0, 1.0], dtype=torch.float64).log()  # last: no domain
    got = fixed(calibration=calibration)(
        *inputs,
        **given_ids,
        **(log_q if with_log_q else {}),
        negative_domain_ids=negative_domain_ids,
    )
    used = 1.0 if with_log_q else 0.0
    wanted = fixed()(
        *inputs,
        **given_ids,
        positive_log_q=used * log_q["positive_log_q"]
        - calibration * log_w[given_ids["domain_ids"]],
        negative_log_q=used * log_q["negative_log_q"] - calibration * log_w[negative_domain_ids],
    )
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)  # log w is float32 in the module


def test_calibration_of_in_batch_candidates_uses_the_domains_of_the_rows():
    query, positive, _ = embeddings()
    domain_ids = draws()["domain_ids"]
    log_w = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64).log()
    got = fixed(calibration=1.0)(query, positive, domain_ids=domain_ids)
    wanted = fixed()(query, positive, domain_ids=domain_ids, positive_log_q=-log_w[domain_ids])
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


def test_calibrated_training_finds_the_probabilities_that_weights_tilt():
    # One query, four items with probabilities 0.4 to 0.1, items 2 and 3 in a domain that weighs
    # four times as much. The weighted loss over all items, averaged over the true probabilities,
    # is smallest at p w normalised; with calibration 1 it is smallest at p.
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    domains, w = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 4.0], dtype=torch.float64)
    optimum = {0.0: p * w[domains] / (p * w[domains]).sum(), 1.0: p}
    for calibration, wanted in optimum.items():
        loss_fn = DynamicWeightedSampledSoftmax(
            weights=w.tolist(), calibration=calibration, temperature=1.0, backend="eager"
        )
        scores = wanted.log().requires_grad_()
        items = torch.arange(4)
        table = torch.eye(4, dtype=torch.float64)
        loss = loss_fn(
            scores.expand(4, 4),
            table,
            table,
            domain_ids=domains,
            negative_domain_ids=domains,
            positive_ids=items,
            negative_ids=items,
            example_weights=p,
        )
        (slope,) = torch.autograd.grad(loss, scores)
        torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-7, rtol=0)


def test_item_domains_stand_in_for_explicit_domain_ids():
    inputs, given_ids, table = embeddings(), draws(), item_domains()
    del given_ids["domain_ids"]
    by_item = fixed(item_domains=table.numpy(), calibration=1.0)
    explicit = fixed(calibration=1.0)
    got = by_item(*inputs, **given_ids)
    wanted = explicit(
        *inputs,
        **given_ids,
        domain_ids=table[given_ids["positive_ids"]],
        negative_domain_ids=table[given_ids["negative_ids"]],
    )
    assert_same(got, wanted, inputs)
    counts = [m.domain_weights.interactions.tolist() for m in (by_item, explicit)]
    assert counts[0] == counts[1] != [0, 0, 0]


def test_one_domain_per_item_and_ids_of_minus_one():
    inputs = embeddings()
    loss_fn = fixed(item_domains=[2, 0, 1], reduction="none", remove_accidental_hits=False)
    positive_ids = torch.tensor([0, 1, 2, -1, 0, 0], dtype=torch.int32)
    got = loss_fn(*inputs, positive_ids=positive_ids)
    plain = sampled_softmax_loss(*inputs, temperature=0.7, reduction="none", backend="eager")
    torch.testing.assert_close(got, plain * torch.tensor([3.0, 0.5, 1.0, 1.0, 3.0, 3.0]))


def test_item_domains_alone_tell_the_number_of_domains():
    assert DynamicWeightedSampledSoftmax(item_domains=[0, 4, 1]).domain_weights.num_domains == 5


def test_weights_follow_the_batches_in_training_only():
    inputs, domain_ids = embeddings(), torch.tensor([0, 0, 0, 0, 1, -1])
    loss_fn = DynamicWeightedSampledSoftmax(DOMAINS, backend="eager")
    before = loss_fn.domain_weights()
    loss_fn.eval()(*inputs, domain_ids=domain_ids)
    assert torch.equal(loss_fn.domain_weights(), before)
    loss_fn.train()
    got = loss_fn(*inputs, domain_ids=domain_ids)
    assert loss_fn.domain_weights.interactions.tolist() == [4, 1, 0]
    after = loss_fn.domain_weights()
    assert after[1] > 1 > after[0]
    wanted = sampled_softmax_loss(
        *inputs, domain_ids=domain_ids, domain_weights=after, temperature=0.05, backend="eager"
    )
    assert_same(got, wanted, inputs)


def test_padded_rows_are_not_counted_and_their_ids_not_looked_at():
    inputs = embeddings()
    example_weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    loss_fn = DynamicWeightedSampledSoftmax(2, calibration=1.0, backend="eager")
    loss_fn(
        *inputs,
        domain_ids=torch.tensor([0, 0, 99, 1, -77, -1]),
        negative_domain_ids=torch.zeros(N, dtype=torch.int64),
        example_weights=example_weights,
    )
    assert loss_fn.domain_weights.interactions.tolist() == [2, 1]


def test_fixed_weights_never_change():
    loss_fn = fixed()
    for seed in range(3):
        loss_fn(*embeddings(seed), **draws(seed))
    assert loss_fn.domain_weights().tolist() == [0.5, 1.0, 3.0]
    assert loss_fn.domain_weights.interactions.sum() == 3 * B


def test_measured_weights_are_used_as_they_are():
    measured = DomainWeights.from_interactions([0, 1, 2, 3], [0, 1, 2, 3], [0, 0, 0, 1])
    loss_fn = DynamicWeightedSampledSoftmax(weights=measured, backend="eager")
    assert loss_fn.domain_weights is measured


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, DOMAINS - 1), min_size=B, max_size=B), st.floats(1.0, 20.0))
def test_gradient_grows_by_no_more_than_the_largest_weight(domains, ratio):
    # Per row the gradient is exactly w times the plain one, so the bound holds for the norm of a
    # row, and for the sum over any rows of the norms.
    query, positive, negative = embeddings()
    state = DomainWeights(DOMAINS, weight_range=(1.0, ratio), momentum=0.0)
    loss_fn = DynamicWeightedSampledSoftmax(weights=state, temperature=1.0, backend="eager")
    got = loss_fn(query, positive, negative, domain_ids=torch.tensor(domains))
    plain = sampled_softmax_loss(query, positive, negative, backend="eager")
    norms = [torch.autograd.grad(loss, query)[0].norm(dim=-1) for loss in (got, plain)]
    share = state.shares / state.shares.sum()
    mean = (share * state.average).sum().item()
    assert bool((norms[0] <= ratio / mean * norms[1] * (1 + 1e-5)).all())
    assert norms[0].norm() <= ratio / mean * norms[1].norm() * (1 + 1e-5)


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
    loss_fn = DynamicWeightedSampledSoftmax(learn_temperature=True, backend="eager")
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


def test_state_dict_carries_weights_counts_and_temperature():
    options = {"num_domains": DOMAINS, "learn_temperature": True, "backend": "eager"}
    source = DynamicWeightedSampledSoftmax(**options, temperature=0.2)
    optimiser = torch.optim.SGD(source.parameters(), lr=0.01)
    source(*embeddings(), **draws()).backward()
    optimiser.step()
    loaded = DynamicWeightedSampledSoftmax(**options, temperature=0.9)
    loaded.load_state_dict(copy.deepcopy(source.state_dict()))
    assert torch.equal(loaded.domain_weights(), source.domain_weights())
    assert loaded.domain_weights.interactions.sum() == B
    assert torch.equal(loaded.temperature, source.temperature)
    for seed in (1, 2):
        losses = [loss_fn(*embeddings(seed), **draws(seed)) for loss_fn in (source, loaded)]
        assert torch.equal(*losses)


def compiled_and_eager_steps(backend, **options):
    """Loss, gradients and counts of three training steps, compiled and not."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        tower, table = torch.nn.Linear(D, D), torch.nn.Embedding(ITEMS, D)
        loss_fn = DynamicWeightedSampledSoftmax(
            DOMAINS, item_domains=item_domains(), backend=backend, **options
        )

        def step(x, positive_ids, negative_ids, log_q, weights, parts=(tower, table, loss_fn)):
            tower, table, loss_fn = parts
            return loss_fn(
                tower(x),
                table(positive_ids),
                table(negative_ids),
                positive_ids=positive_ids,
                negative_ids=negative_ids,
                negative_log_q=log_q,
                positive_log_q=log_q[: len(weights)],
                example_weights=weights,
            )

        if compiled:
            step = torch.compile(step, fullgraph=True, backend="aot_eager")
        parameters = [*tower.parameters(), *table.parameters(), *loss_fn.parameters()]
        outcome = []
        for seed in range(3):
            ids = draws(seed)
            x = embeddings(seed, dtype=torch.float32)[0].detach()
            weights = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0, 2.0])
            log_q = ids["negative_log_q"].float()
            loss = step(x, ids["positive_ids"], ids["negative_ids"], log_q, weights)
            outcome += [loss.detach(), *torch.autograd.grad(loss, parameters)]
        outcome += [loss_fn.domain_weights(), loss_fn.domain_weights.interactions]
        results.append(outcome)
    return results


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_compiled_training_step_equals_eager(backend):
    eager, compiled = compiled_and_eager_steps(
        backend, calibration=0.5, learn_temperature=True, normalize=True
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
        temperature=0.05,
        reduction="none",
        backend="eager",
    )
    assert_same(first, wanted, inputs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"temperature": 100.0, "learn_temperature": True}, ValueError, "strictly within"),
        ({"calibration": 1.5}, ValueError, r"calibration is 1.5; wanted a number in \[0, 1\]"),
        ({"calibration": 1.0}, ValueError, "pass num_domains or weights"),
        ({"num_domains": 2, "weights": [1.0] * 3}, ValueError, "num_domains is 2 but weights"),
        ({"num_domains": 0}, ValueError, "num_domains is 0"),
        ({"num_domains": 2, "item_domains": [0, 2]}, IndexError, "item_domains holds 2"),
        ({"item_domains": [0.5]}, TypeError, "item_domains has dtype"),
        ({"item_domains": [[[0]]]}, ValueError, r"wanted \[V\], or \[V, G\]"),
    ],
)
def test_bad_options_say_what_is_wanted(options, error, message):
    with pytest.raises(error, match=message):
        DynamicWeightedSampledSoftmax(**options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "pass domain_ids, or positive_ids together with item_domains"),
        (
            {"domain_ids": torch.zeros(B + 1, dtype=torch.int64)},
            ValueError,
            r"domain_ids has shape \[7\]",
        ),
        ({"domain_ids": torch.zeros(B)}, TypeError, "domain_ids has dtype"),
        ({"domain_ids": torch.full((B,), DOMAINS)}, IndexError, "domain_ids holds 3"),
        (
            {"domain_ids": torch.zeros(B, dtype=torch.int64)},
            ValueError,
            "pass negative_domain_ids, or negative_ids together with item_domains",
        ),
        (
            {"domain_ids": torch.zeros(B, dtype=torch.int64), "example_weights": torch.ones(B + 1)},
            ValueError,
            "example_weights has shape",
        ),
    ],
)
def test_bad_arguments_say_what_is_wanted(arguments, error, message):
    loss_fn = fixed(calibration=1.0)
    with pytest.raises(error, match=message):
        loss_fn(*embeddings(), **arguments)


def test_item_ids_out_of_range_are_named():
    loss_fn = fixed(item_domains=[0, 1])
    with pytest.raises(IndexError, match="positive_ids holds 5, but there are 2 items"):
        loss_fn(*embeddings(), positive_ids=torch.full((B,), 5))
    assert loss_fn.domain_weights.interactions.sum() == 0
    with pytest.raises(ValueError, match="domain_weights"):  # domains without weights
        DynamicWeightedSampledSoftmax()(*embeddings(), domain_ids=torch.zeros(B, dtype=torch.int64))


def test_printed_module_shows_its_choices_in_short():
    text = repr(fixed(calibration=0.5, learn_temperature=True))
    assert "temperature=learned" in text
    assert "calibration=0.5" in text
    assert "DomainWeights(3, constant)" in text
