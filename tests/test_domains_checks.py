"""Arguments of domain weights, flags taken for ids, and schedules."""

import math

import pytest
import torch

from dwl_kernels import (
    CumulativeCrossEntropy,
    DualScaleSampledSoftmax,
    DynamicWeightedSampledSoftmax,
    domains_from_multi_hot,
)
from dwl_kernels.domains import DomainWeights


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DomainWeights(0), "num_domains is 0"),
        (lambda: DomainWeights(2, names=["a"]), "names has 1 entries for 2 domains"),
        (lambda: DomainWeights(2, weight_range=(2.0, 1.0)), "w_min <= w_max"),
        (lambda: DomainWeights(2, weight_range=(0.0, 1.0)), "0 < w_min"),
        (lambda: DomainWeights(2, weight_range=(1.0, math.inf)), "finite"),
        (lambda: DomainWeights(2, measures=(0.0, 0.0, 0.0)), "at least one positive"),
        (lambda: DomainWeights(2, measures=(1.0, -1.0, 0.0)), "none negative"),
        (lambda: DomainWeights(2, momentum=1.0), "momentum is 1.0"),
        (lambda: DomainWeights.constant([1.0, -2.0]), "not negative"),
        (lambda: DomainWeights.constant([1.0, math.nan]), "finite"),
        (lambda: DomainWeights.constant(torch.ones(2, 2)), r"wanted \[num_domains\]"),
        (lambda: DomainWeights.constant(torch.ones(2, requires_grad=True)), "detach"),
        (lambda: DomainWeights.from_interactions([1, 2], [1], [0, 0]), "items has shape"),
        (lambda: DomainWeights.from_interactions([1], [1], [[[0]]]), "domains has shape"),
    ],
)
def test_bad_options_say_what_is_wanted(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_bad_ids_say_what_is_wanted():
    weights = DomainWeights(3)
    for use in (weights.update, weights.example_weight, weights.log_weight):
        with pytest.raises(TypeError, match=r"domain_ids has dtype torch\.float32"):
            use(torch.zeros(4))
        with pytest.raises(TypeError, match=r"torch\.bool"):
            use(torch.zeros(4, dtype=torch.bool))
        with pytest.raises(TypeError, match="list"):
            use([0, 1])
        with pytest.raises(ValueError, match=r"wanted \[B\], or \[B, G\]"):
            use(torch.zeros(2, 2, 2, dtype=torch.int64))
        with pytest.raises(IndexError, match=r"holds 3, but there are 3 domains.*\[0, 3\)"):
            use(torch.tensor([0, 3]))
        with pytest.raises(IndexError, match="holds -2"):
            use(torch.tensor([0, -2]))
        with pytest.raises(ValueError, match="on meta"):
            use(torch.zeros(2, dtype=torch.int64, device="meta"))
    assert weights.interactions.tolist() == [0, 0, 0]
    with pytest.raises(TypeError, match="users has dtype"):
        DomainWeights.from_interactions([1.5], [1], [0])
    with pytest.raises(IndexError, match="domains holds 7"):
        DomainWeights.from_interactions([1], [1], [7], num_domains=3)


FLAGS = (torch.arange(50)[:, None] % torch.arange(2, 20) == 0).long()  # [50, 18] of 0 and 1


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("domain_ids", lambda flags: DomainWeights(18).update(flags)),
        ("domain_ids", lambda flags: DomainWeights(18).example_weight(flags)),
        ("domain_ids", lambda flags: DomainWeights(18).log_weight(flags)),
        ("domains", lambda flags: DomainWeights.from_interactions(range(50), range(50), flags)),
        ("item_domains", lambda flags: DynamicWeightedSampledSoftmax(item_domains=flags)),
        ("item_domains", lambda flags: CumulativeCrossEntropy(item_domains=flags.numpy())),
        ("item_domains", lambda flags: DualScaleSampledSoftmax(item_domains=flags.tolist())),
    ],
)
def test_flags_taken_for_ids_are_refused_with_the_mend(name, use):
    message = rf"^{name} names domain [01] twice in row 0, .*domains_from_multi_hot\(flags\)$"
    with pytest.raises(ValueError, match=message):
        use(FLAGS)
    use(domains_from_multi_hot(FLAGS))
    for other in (FLAGS.bool(), FLAGS.float()):
        with pytest.raises(
            TypeError, match=rf"^{name} has dtype .*domains_from_multi_hot of flags"
        ):
            use(other)


def test_refused_batch_is_not_counted():
    weights = DomainWeights(3)
    with pytest.raises(ValueError, match="names domain 1 twice in row 1"):
        weights.update(torch.tensor([[0, 1], [1, 1]]))
    assert weights.interactions.tolist() == [0, 0, 0]


def test_flags_and_their_ids_measure_the_same_domains():
    weights = DomainWeights.from_interactions(range(50), range(50), domains_from_multi_hot(FLAGS))
    assert weights.interactions.tolist() == FLAGS.sum(0).tolist()


def test_domains_named_twice_are_not_looked_for_where_that_would_wait():
    ids = torch.zeros(5, 2, dtype=torch.int64, device="meta")
    DomainWeights(3).to("meta").update(ids)
    compiled = DomainWeights(3)
    torch.compile(compiled.update, fullgraph=True, backend="aot_eager")(torch.zeros(5, 2).long())
    assert compiled.interactions.tolist() == [10, 0, 0]


@pytest.mark.parametrize(
    ("start", "full", "shares"),
    [
        (0, None, [1, 1, 1, 1, 1, 1]),
        (0, 4, [0.25, 0.5, 0.75, 1, 1, 1]),
        (2, 4, [0, 0, 0.5, 1, 1, 1]),
        (3, None, [0, 0, 0, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("constant", [False, True])
def test_schedule_leads_from_one_to_the_weights(start, full, shares, constant):
    if constant:
        weights = DomainWeights.constant([0.5, 3.0], start=start, full=full)
    else:
        weights = DomainWeights(2, momentum=0.0, start=start, full=full)
    for share in shares:
        weights.update(torch.tensor([0, 0, 0, 1]))
        expected = 1 + share * (weights.weights - 1)
        torch.testing.assert_close(weights(), expected)
    assert weights.steps == len(shares)
    again = DomainWeights(2, momentum=0.0, start=start, full=full)
    if not constant:
        again.load_state_dict(weights.state_dict())
        assert torch.equal(again(), weights())


def test_schedule_does_not_change_what_is_served():
    weights = DomainWeights(2, momentum=0.0, start=100)
    weights.update(torch.tensor([0, 0, 0, 1]))
    assert torch.equal(weights(), torch.ones(2))
    assert weights.log_weight(torch.tensor([0, 1])).tolist() == weights.weights.log().tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": -1}, "start is -1"),
        ({"start": 5, "full": 4}, "full is 4; wanted at least start, which is 5"),
    ],
)
def test_wrong_schedule_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DomainWeights(2, **arguments)


def test_sparsest_domains_are_those_with_fewest_interactions():
    weights = DomainWeights(5)
    weights.update(torch.tensor([0] * 5 + [1] * 4 + [2] * 3 + [3] * 2 + [4]))
    items = torch.tensor([[0, -1], [1, 3], [2, 4], [-1, -1], [3, -1]])
    assert weights.sparsest(items).tolist() == [False, True, True, False, True]  # 3 and 4
    assert weights.sparsest(items, 0.2).tolist() == [False, False, True, False, False]
    assert weights.sparsest(items, 1.0).tolist() == [True, True, True, False, True]
    with pytest.raises(ValueError, match="part is 0"):
        weights.sparsest(items, 0)
