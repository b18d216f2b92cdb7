"""Calibration where domains weigh 0: an infinite tilt stays where it belongs."""

import math

import pytest
import torch
from module_inputs import (
    DOMAINS,
    ITEMS,
    KINDS,
    B,
    N,
    assert_same,
    call,
    draws,
    embeddings,
    fixed,
    table_of,
)

from dwl_kernels import (
    DomainWeights,
    DualScaleSampledSoftmax,
    DynamicWeightedSampledSoftmax,
)

WEIGHTS = [0.0, 1.0, 3.0]
DOMAIN_OF = torch.arange(ITEMS) % DOMAINS  # items 0, 3, 6, ... weigh nothing


def make(kind, **options):
    options = {"weights": WEIGHTS, "item_domains": DOMAIN_OF, "calibration": 0.5} | options
    return KINDS[kind](**options)


def test_log_of_a_weight_of_zero_is_minus_infinity():
    weights = DomainWeights.constant(WEIGHTS)
    ids = torch.tensor([[0, -1], [1, 2], [-1, -1], [0, 1]])
    wanted = [-math.inf, math.log(2.0), 0.0, math.log(0.5)]
    assert weights.log_weight(ids).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_domain_of_weight_zero_spoils_no_row(kind, reduction, backend):
    if backend == "cuda" and kind in ("by row", "dual scale"):
        pytest.skip("a loss that this backend does not take")
    query, table = embeddings(dtype=torch.float32)[0], table_of(torch.float32)
    loss = call(kind, make(kind, reduction=reduction, backend=backend), query, table)
    assert loss.isfinite().all()
    gradients = torch.autograd.grad(loss.sum(), [query, table])
    assert all(gradient.isfinite().all() for gradient in gradients)
    light = DOMAIN_OF[draws()["positive_ids"]] == 0
    assert 0 < light.sum() < B
    assert not gradients[0][light].any()
    assert gradients[0][~light].any(1).all()
    if reduction == "none":
        assert not loss[light].any()


@pytest.mark.parametrize("kind", ["sampled", "table", "by row", "cross-entropy"])
def test_candidates_of_weight_zero_are_left_out(kind):
    query, table, ids = embeddings()[0], table_of(), draws()
    got = call(kind, make(kind, reduction="none", backend="eager"), query, table)
    # By hand: log w of the rest, and -inf where w is 0.
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    negative_ids, log_q = ids["negative_ids"].expand(B, N), ids["negative_log_q"]
    if kind == "by row":
        negative_ids = (ids["negative_ids"] + torch.arange(B)[:, None]) % ITEMS
    positive_ids, positive_log_q = ids["positive_ids"], ids["positive_log_q"]
    if kind == "cross-entropy":
        negative_ids, log_q, positive_log_q = torch.arange(ITEMS).expand(B, ITEMS), 0.0, 0.0
    w = weights[DOMAIN_OF[positive_ids]]
    z = (table[negative_ids] @ query[:, :, None])[..., 0] - log_q
    z = z + 0.5 * weights[DOMAIN_OF[negative_ids]].log()
    z = z.masked_fill(negative_ids == positive_ids[:, None], -math.inf)
    z_positive = (query * table[positive_ids]).sum(1) - positive_log_q + 0.5 * w.log()
    loss = torch.logaddexp(z.logsumexp(1), z_positive) - z_positive
    wanted = torch.where(w > 0, w * loss, 0.0)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)  # log w is float32 in the module


def test_candidate_of_weight_zero_that_is_never_drawn_is_left_out():
    """Its tilt and its log-Q are both -inf, and their difference is no number."""
    inputs, ids = embeddings(), draws()
    domains = torch.tensor([0, 1, 2] * 3)
    losses = []
    for log_q in (-math.inf, -2.0, math.inf):
        ids["negative_log_q"] = ids["negative_log_q"].masked_fill(domains == 0, log_q)
        loss_fn = fixed(weights=WEIGHTS, calibration=1.0)
        losses.append(loss_fn(*inputs, **ids, negative_domain_ids=domains))
    assert losses[0].isfinite()
    assert_same(losses[1], losses[0], inputs)
    assert_same(losses[2], losses[0], inputs)


@pytest.mark.parametrize("in_batch", [False, True])
def test_tilt_of_a_padded_row_is_zero(in_batch):
    """Whatever its domain weighs, and also where it is no domain at all."""
    query, positive, negative = embeddings()
    example_weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    losses = []
    for domain in (0, 1, -1, 99):
        ids = draws() | {"domain_ids": torch.tensor([1, 2, domain, 1, 2, -1])}
        loss_fn = DynamicWeightedSampledSoftmax(
            weights=WEIGHTS, calibration=1.0, in_batch=in_batch, backend="eager"
        )
        losses.append(
            loss_fn(
                *(query, positive, negative),
                **ids,
                negative_domain_ids=torch.arange(N) % DOMAINS,
                example_weights=example_weights,
            )
        )
    assert losses[0].isfinite()
    for loss in losses[1:]:
        assert_same(loss, losses[0], [query, positive, negative])


def test_row_of_weight_zero_is_no_candidate_in_the_batch():
    query, positive, _ = embeddings()
    domain_ids = torch.tensor([1, 0, 2, 1, 0, 2])
    got = fixed(weights=WEIGHTS, calibration=1.0, reduction="none", temperature=1.0)(
        query, positive, domain_ids=domain_ids
    )
    heavy = domain_ids != 0
    wanted = fixed(weights=WEIGHTS, calibration=1.0, reduction="none", temperature=1.0)(
        query[heavy], positive[heavy], domain_ids=domain_ids[heavy]
    )
    torch.testing.assert_close(got[heavy], wanted)
    assert not got[~heavy].any()


@pytest.mark.parametrize("strength", ["hardness", "similarity", "competition"])
@pytest.mark.parametrize("in_batch", [False, True])
def test_dual_scale_does_not_count_candidates_of_weight_zero(backend, in_batch, strength):
    if backend == "cuda":
        pytest.skip("a loss that this backend does not take")
    query, positive, negative = inputs = embeddings()
    ids = draws() | {"domain_ids": torch.tensor([1, 2, 2, 1, -1, 1])}
    domains = torch.arange(N) % DOMAINS
    kept = domains != 0
    loss_fn = dual_scale(strength, backend, in_batch=in_batch)
    got = loss_fn(*inputs, **ids, negative_domain_ids=domains)
    few = ids | {name: ids[name][kept] for name in ("negative_ids", "negative_log_q")}
    wanted = loss_fn(query, positive, negative[kept], **few, negative_domain_ids=domains[kept])
    assert_same(got, wanted, inputs)


@pytest.mark.parametrize("strength", ["hardness", "similarity"])
def test_dual_scale_does_not_count_rows_of_weight_zero_in_the_batch(backend, strength):
    if backend == "cuda":
        pytest.skip("a loss that this backend does not take")
    inputs, domain_ids = embeddings()[:2], torch.tensor([1, 0, 2, 1, 0, 2])
    loss_fn = dual_scale(strength, backend, reduction="sum")
    heavy = domain_ids != 0
    got = loss_fn(*inputs, domain_ids=domain_ids)
    wanted = loss_fn(*(x[heavy] for x in inputs), domain_ids=domain_ids[heavy])
    assert_same(got, wanted, inputs)


def dual_scale(strength, backend, **options):
    """With one strength alone; a slate of one group is the same without some candidates."""
    strengths = {"hardness": 0.0, "similarity": 0.0, "competition": 0.0, strength: 1.0}
    return DualScaleSampledSoftmax(
        weights=WEIGHTS, calibration=0.5, slate_size=1, backend=backend, **strengths, **options
    )
