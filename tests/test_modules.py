"""The module against the functions it calls, and what only the module does."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from module_inputs import (
    DOMAINS,
    B,
    G,
    N,
    assert_same,
    draws,
    embeddings,
    fixed,
    item_domains,
)

from dwl_kernels import in_batch_softmax_loss, sampled_softmax_loss
from dwl_kernels.domains import DomainWeights
from dwl_kernels.modules import DynamicWeightedSampledSoftmax


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
    torch.testing.assert_close(kept(*inputs, **ids), sampled_softmax_loss(*inputs, backend="eager"))


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
    # A constant for all cancels in the loss, and keeps what is given at most 0.
    base = log_q if with_log_q else dict.fromkeys(log_q, -1.5)
    wanted = fixed()(
        *inputs,
        **given_ids,
        positive_log_q=base["positive_log_q"] - calibration * log_w[given_ids["domain_ids"]],
        negative_log_q=base["negative_log_q"] - calibration * log_w[negative_domain_ids],
    )
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)  # log w is float32 in the module


def test_calibration_of_in_batch_candidates_uses_the_domains_of_the_rows():
    query, positive, _ = embeddings()
    domain_ids = draws()["domain_ids"]
    log_w = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64).log()
    got = fixed(calibration=1.0)(query, positive, domain_ids=domain_ids)
    wanted = fixed()(query, positive, domain_ids=domain_ids, positive_log_q=-2 - log_w[domain_ids])
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


def test_a_batch_is_weighed_by_what_it_has_just_changed():
    inputs, domain_ids = embeddings(), torch.tensor([0, 0, 0, 0, 1, -1])
    loss_fn = DynamicWeightedSampledSoftmax(DOMAINS, backend="eager")
    got = loss_fn(*inputs, domain_ids=domain_ids)
    assert loss_fn.domain_weights.interactions.tolist() == [4, 1, 0]
    after = loss_fn.domain_weights()
    assert after[1] > 1 > after[0]
    wanted = sampled_softmax_loss(
        *inputs, domain_ids=domain_ids, domain_weights=after, backend="eager"
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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"reduction": "average"}, ValueError, "reduction is 'average'; wanted one of"),
        ({"correction": "log"}, ValueError, "correction is 'log'; wanted one of"),
        ({"backend": "gpu"}, ValueError, "gpu"),
        (
            {"num_domains": 2, "calibration": 1.0, "correction": "refined"},
            ValueError,
            "pass correction='standard', or calibration=0",
        ),
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
        ({"example_weights": [1.0] * B}, TypeError, "example_weights is a list"),
        ({"positive": None}, ValueError, "there is no positive; pass the embeddings"),
    ],
)
def test_bad_arguments_say_what_is_wanted(arguments, error, message):
    loss_fn = fixed(calibration=1.0)
    named = dict(zip(("query", "positive", "negative"), embeddings(), strict=True))
    with pytest.raises(error, match=message):
        loss_fn(**named | arguments)


def test_item_ids_out_of_range_are_named():
    loss_fn = fixed(item_domains=[0, 1])
    with pytest.raises(IndexError, match="positive_ids holds 5, but there are 2 items"):
        loss_fn(*embeddings(), positive_ids=torch.full((B,), 5))
    assert loss_fn.domain_weights.interactions.sum() == 0
    with pytest.raises(ValueError, match="domain_weights"):  # domains without weights
        DynamicWeightedSampledSoftmax()(*embeddings(), domain_ids=torch.zeros(B, dtype=torch.int64))


def test_printed_module_shows_its_choices_in_short():
    text = repr(fixed(calibration=0.5, learn_temperature=True))
    assert "temperature='learned'" in text
    assert "calibration=0.5" in text
    assert "DomainWeights(3, constant)" in text
