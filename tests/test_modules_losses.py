"""The dual scale and the cumulative cross-entropy: the functions, and what only the modules do."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from module_inputs import (
    DOMAINS,
    ITEMS,
    B,
    D,
    N,
    assert_same,
    draws,
    embeddings,
    item_domains,
    table_of,
)

from dwl_kernels import (
    CumulativeCrossEntropy,
    DualScaleSampledSoftmax,
    DynamicWeightedSampledSoftmax,
    dual_scale_softmax_loss,
    full_softmax_loss,
)

WEIGHTS = torch.tensor([0.5, 1.0, 3.0])
STRENGTHS = {"hardness": 0.7, "similarity": 0.4, "slate_size": 3, "competition": 1.5}
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum", "none"])
PADDED = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 1.0])


def dual(**options):
    options = {"weights": WEIGHTS, "temperature": 0.7, "backend": "eager"} | STRENGTHS | options
    return DualScaleSampledSoftmax(**options)


def cross_entropy(**options):
    return CumulativeCrossEntropy(**{"weights": WEIGHTS, "backend": "eager"} | options)


# ---------------------------------------------------------------- dual scale


@REDUCTIONS
@pytest.mark.parametrize("correction", ["standard", "refined"])
@pytest.mark.parametrize("in_batch", [None, True])
def test_dual_scale_module_equals_function(in_batch, correction, reduction):
    inputs, ids = embeddings(), draws()
    options = {"correction": correction, "reduction": reduction, "in_batch": in_batch}
    got = dual(**options)(*inputs, **ids, example_weights=PADDED)
    wanted = dual_scale_softmax_loss(
        *inputs,
        **ids,
        **STRENGTHS,
        **options,
        domain_weights=WEIGHTS,
        temperature=0.7,
        example_weights=PADDED,
        backend="eager",
    )
    assert_same(got, wanted, inputs)


@pytest.mark.parametrize("in_batch", [None, True])
def test_dual_scale_without_strength_is_its_base_class(in_batch):
    inputs, ids = embeddings(), draws()
    none = {"hardness": 0, "similarity": 0, "competition": 0, "in_batch": in_batch}
    plain = DynamicWeightedSampledSoftmax(
        weights=WEIGHTS, temperature=0.7, in_batch=in_batch, backend="eager"
    )
    assert_same(dual(**none)(*inputs, **ids), plain(*inputs, **ids), inputs)


def test_dual_scale_of_a_batch_and_of_a_table():
    query, table, ids = embeddings()[0], table_of(), draws()
    positive, negative = table[ids["positive_ids"]], table[ids["negative_ids"]]
    loss_fn = dual(calibration=0.5, normalize=True, item_domains=item_domains())
    assert_same(
        loss_fn(query, table=table, **ids), loss_fn(query, positive, negative, **ids), [query]
    )
    ids = {k: v for k, v in ids.items() if not k.startswith("negative")}
    assert_same(loss_fn(query, table=table, **ids), loss_fn(query, positive, **ids), [query])


def test_dual_scale_has_all_options_of_its_base_class():
    base, derived = (
        inspect.signature(module.__init__).parameters
        for module in (DynamicWeightedSampledSoftmax, DualScaleSampledSoftmax)
    )
    assert [p for name, p in derived.items() if name not in STRENGTHS] == list(base.values())
    text = repr(dual())
    assert "hardness=0.7, similarity=0.4, slate_size=3, competition=1.5, temperature=0.7" in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hardness": -math.inf}, ValueError, "hardness is -inf; wanted a finite number"),
        ({"competition": float("nan")}, ValueError, "competition is nan"),
        ({"slate_size": 0}, ValueError, "slate_size is 0; wanted at least 1"),
        ({"slate_size": 2.5}, TypeError, "slate_size is a float; wanted an int"),
    ],
)
def test_wrong_strengths_are_named_at_once(options, error, message):
    with pytest.raises(error, match=message):
        dual(**options)


# ---------------------------------------------------------------- cumulative cross-entropy


@REDUCTIONS
def test_cross_entropy_module_equals_function(reduction):
    query, table = embeddings()[0], table_of()
    bias = torch.linspace(-1, 1, ITEMS, dtype=torch.float64).requires_grad_()
    ids = draws()
    target = ids["positive_ids"].clone()
    target[4] = -100
    arguments = {"domain_ids": ids["domain_ids"], "bias": bias, "example_weights": PADDED}
    got = cross_entropy(reduction=reduction, temperature=0.7)(query, table, target, **arguments)
    wanted = full_softmax_loss(
        *(query, table, target),
        **arguments,
        domain_weights=WEIGHTS,
        temperature=0.7,
        reduction=reduction,
        backend="eager",
    )
    assert_same(got, wanted, [query, table, bias])


@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_every_step_of_every_sequence_is_a_row(ignore_index):
    """PyTorch's cross-entropy over all steps, without any weights."""
    query = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    table = table_of()
    target = torch.tensor([[3, 7, 1], [5, ignore_index, ignore_index]])
    got = CumulativeCrossEntropy(ignore_index=ignore_index, backend="eager")(query, table, target)
    wanted = F.cross_entropy(
        (query @ table.T).flatten(0, 1), target.flatten(), ignore_index=ignore_index
    )
    assert_same(got, wanted, [query, table])
    rows = CumulativeCrossEntropy(ignore_index=ignore_index, reduction="none", backend="eager")
    assert rows(query, table, target).shape == (2, 3)


def test_domains_follow_from_the_targets_and_padding_has_none():
    query = torch.randn(2, 3, D, dtype=torch.float64)
    table, domains = table_of(), torch.arange(ITEMS) % DOMAINS
    target = torch.tensor([[3, 7, 1], [5, 0, 0]])  # item 0 is the padding
    example_weights = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    options = {"ignore_index": 0, "reduction": "none"}
    loss_fn = cross_entropy(item_domains=domains, **options)
    got = loss_fn(query, table, target, example_weights=example_weights)
    explicit = cross_entropy(**options)
    wanted = explicit(
        query, table, target, domain_ids=domains[target], example_weights=example_weights
    )
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    for module in (loss_fn, explicit):
        assert module.domain_weights.interactions.tolist() == [1, 1, 1]  # targets 3, 7 and 5


def test_normalize_scales_query_and_table():
    query, table, target = embeddings()[0], table_of(), draws()["positive_ids"]
    got = CumulativeCrossEntropy(normalize=True, backend="eager")(query, table, target)
    scaled = (F.normalize(x, dim=-1) for x in (query, table))
    wanted = CumulativeCrossEntropy(temperature=0.05, backend="eager")(*scaled, target)
    assert_same(got, wanted, [query, table])


def test_calibrated_cross_entropy_finds_the_probabilities_that_weights_tilt():
    # As for the sampled loss: smallest at p w, normalised, and with calibration at p.
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    domains, w = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 4.0], dtype=torch.float64)
    optimum = {0.0: p * w[domains] / (p * w[domains]).sum(), 1.0: p}
    for calibration, wanted in optimum.items():
        loss_fn = CumulativeCrossEntropy(
            weights=w.tolist(), item_domains=domains, calibration=calibration, backend="eager"
        )
        scores = wanted.log().requires_grad_()
        table = torch.eye(4, dtype=torch.float64)
        loss = loss_fn(scores.expand(4, 4), table, torch.arange(4), example_weights=p)
        (slope,) = torch.autograd.grad(loss, scores)
        torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-7, rtol=0)


def test_calibration_adds_to_the_bias():
    query, table, target = embeddings()[0], table_of(), draws()["positive_ids"]
    bias, domains = torch.linspace(-1, 1, ITEMS).double(), torch.arange(ITEMS) % DOMAINS
    got = cross_entropy(calibration=0.5, item_domains=domains)(query, table, target, bias=bias)
    tilted = bias + 0.5 * WEIGHTS.log()[domains]
    wanted = cross_entropy(item_domains=domains)(query, table, target, bias=tilted)
    torch.testing.assert_close(got, wanted)


def test_skip_threshold_reaches_the_function(monkeypatch):
    query, table, target = embeddings()[0], table_of(), draws()["positive_ids"]
    seen = {}

    def spy(*arguments, **named):
        seen.update(named)
        return full_softmax_loss(*arguments, **named)

    monkeypatch.setattr("dwl_kernels.modules.cumulative.full_softmax_loss", spy)
    CumulativeCrossEntropy(skip_threshold=1e-3, backend="eager")(query, table, target)
    assert seen["skip_threshold"] == 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": 1.0}, "calibration needs the domains of all items.*pass item_domains"),
        ({"skip_threshold": -1.0}, "skip_threshold is -1.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_bad_options_of_cross_entropy_say_what_is_wanted(options, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(**options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"domain_ids": None}, ValueError, "pass domain_ids, or target together with item_domains"),
        ({"target": torch.zeros(N).long()}, ValueError, r"target has shape \[9\]; wanted \[6\]"),
        ({"target": torch.full((B,), ITEMS)}, IndexError, f"target holds {ITEMS}"),
        ({"target": [0] * B}, TypeError, "target is a list; wanted a torch.Tensor"),
        ({"target": torch.zeros(B)}, TypeError, "target has dtype"),
        ({"example_weights": torch.ones(N)}, ValueError, "example_weights has shape"),
    ],
)
def test_bad_arguments_of_cross_entropy_say_what_is_wanted(change, error, message):
    ids = draws()
    arguments = {"target": ids["positive_ids"], "domain_ids": ids["domain_ids"]} | change
    with pytest.raises(error, match=message):
        cross_entropy()(embeddings()[0], table_of(), **arguments)


@pytest.mark.parametrize(
    ("more", "message"),
    [({}, "table has 20 rows but item_domains has 2"), ({"bias": torch.ones(3)}, "bias has shape")],
)
def test_calibration_needs_a_domain_and_a_bias_for_every_row(more, message):
    domains = [0, 1] if not more else [0] * ITEMS
    loss_fn = cross_entropy(item_domains=domains, calibration=1.0)
    target = torch.zeros(B, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        loss_fn(embeddings()[0], table_of(), target, **more)
