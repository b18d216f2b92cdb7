"""Sparsity, weights and counts of the domains, against independent computations."""

import math

import numpy as np
import pytest
import torch
from domain_interactions import interactions
from hypothesis import given, settings
from hypothesis import strategies as st

from dwl_kernels.domains import DomainWeights

# Small data shrinks to readable examples; a handful of domains and slots already meets every case:
# domains never seen, rows without a domain, rows with several.
property_test = settings(max_examples=60, deadline=None)
ranges = st.tuples(st.floats(0.1, 2.0), st.floats(1.0, 10.0)).map(lambda r: (r[0], r[0] * r[1]))
momenta = st.floats(0.0, 0.999)
row_measures = st.tuples(*[st.floats(0.0, 3.0)] * 3).filter(lambda m: sum(m) > 0.1)


def reference_sparsity(users, items, domains, num_domains, measures):
    """The formulas in plain Python, in float64, over sets and dictionaries."""
    rows = [
        (u, i, [d for d in row if d >= 0])
        for u, i, row in zip(users.tolist(), items.tolist(), domains.tolist(), strict=True)
    ]
    rows = [row for row in rows if row[2]]
    all_users, all_items = {u for u, _, _ in rows}, {i for _, i, _ in rows}
    rarity, parts = {}, {}
    for d in range(num_domains):
        own = [(u, i) for u, i, row in rows if d in row]
        if not own:
            continue
        rarity[d] = math.log(len(rows) / len(own))
        times = [sum(i == item for _, i in own) for item in all_items]
        p = [t / len(own) for t in times if t]
        entropy = -sum(x * math.log(x) for x in p)
        most = math.log(len(all_items)) or 1.0
        parts[d] = (1 - len({u for u, _ in own}) / len(all_users), 1 - entropy / most)
    largest = max(rarity.values(), default=0.0)
    sparsity = [1.0] * num_domains
    for d, (few_users, low_entropy) in parts.items():
        idf = rarity[d] / largest if largest else 0.0
        mixed = measures[0] * idf + measures[1] * few_users + measures[2] * low_entropy
        sparsity[d] = mixed / sum(measures)
    return torch.tensor(sparsity, dtype=torch.float64)


@property_test
@given(interactions(), row_measures)
def test_sparsity_matches_the_formulas(data, measures):
    users, items, domains, num_domains = data
    weights = DomainWeights.from_interactions(
        users, items, domains, num_domains=num_domains, measures=measures
    )
    expected = reference_sparsity(*data, measures)
    torch.testing.assert_close(weights.sparsity().double(), expected, atol=2e-6, rtol=0)


@property_test
@given(interactions(), ranges)
def test_weights_are_the_normalised_targets_after_a_measurement(data, weight_range):
    users, items, domains, num_domains = data
    low, high = weight_range
    weights = DomainWeights.from_interactions(
        users, items, domains, num_domains=num_domains, weight_range=weight_range
    )
    target = low + (high - low) * reference_sparsity(*data, (1, 1, 1))
    torch.testing.assert_close(weights.average.double(), target, atol=1e-5 * high, rtol=0)
    rows = [target[[d for d in row if d >= 0]].mean() for row in domains.tolist() if max(row) >= 0]
    mean = torch.stack(rows).mean() if rows else target.mean()
    torch.testing.assert_close(weights().double(), target / mean, atol=1e-5 * high / low, rtol=0)


@property_test
@given(st.lists(interactions(max_rows=10), min_size=1, max_size=6), ranges, momenta)
def test_average_stays_within_the_range_and_weights_within_its_ratio(
    batches, weight_range, momentum
):
    low, high = weight_range
    weights = DomainWeights(5, weight_range=weight_range, momentum=momentum)
    bounds = torch.tensor([low, high])  # the same rounding to float32
    for _, _, domains, _ in batches:
        weights.update(torch.from_numpy(domains))
        assert weights.average.min() >= bounds[0]
        assert weights.average.max() <= bounds[1]
        assert weights().max() <= high / low * (1 + 1e-5)
        assert weights().min() >= low / high * (1 - 1e-5)
        assert bool(((weights.sparsity() >= 0) & (weights.sparsity() <= 1)).all())


@property_test
@given(interactions(), ranges, momenta)
def test_average_example_weighs_one(data, weight_range, momentum):
    _, _, domains, num_domains = data
    weights = DomainWeights(num_domains, weight_range=weight_range, momentum=momentum)
    ids = torch.from_numpy(domains)
    for _ in range(3):
        weights.update(ids)
    labelled = ids[(ids >= 0).any(1)]
    if len(labelled):
        assert weights.example_weight(labelled).mean().item() == pytest.approx(1.0, abs=1e-5)


@property_test
@given(st.lists(st.integers(0, 30), min_size=2, max_size=6))
def test_fewer_interactions_never_weigh_less(counts):
    weights = DomainWeights(len(counts), momentum=0.0)
    weights.update(torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)))
    order = torch.tensor(counts).argsort(stable=True)
    assert bool((weights()[order].diff() <= 1e-6).all())


@property_test
@given(st.integers(1, 12), st.integers(1, 12))
def test_fewer_users_never_weigh_less(first, second):
    # 12 interactions in each domain, spread over the same items; only the number of users differs.
    turn = np.arange(12)
    weights = DomainWeights.from_interactions(
        users=np.concatenate([turn % first, turn % second]),
        items=np.tile(turn, 2),
        domains=np.repeat([0, 1], 12),
    )
    by_users = weights() if first <= second else weights().flip(0)
    assert by_users[0] >= by_users[1]
    assert (by_users[0] > by_users[1]) == (first != second)


@property_test
@given(st.integers(1, 12), st.integers(1, 12))
def test_lower_item_entropy_never_weighs_less(first, second):
    # 12 interactions by the same users in each domain; only the number of items differs, and with
    # it the entropy.
    turn = np.arange(12)
    weights = DomainWeights.from_interactions(
        users=np.tile(turn, 2),
        items=np.concatenate([turn % first, turn % second]),
        domains=np.repeat([0, 1], 12),
    )
    entropy = weights.entropy
    if entropy[0] != entropy[1]:
        lower = int(entropy.argmin())
        assert weights()[lower] > weights()[1 - lower]


@property_test
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4))
def test_domains_that_are_alike_all_weigh_one(num_domains, users, items):
    row = [(u, i, d) for d in range(num_domains) for u in range(users) for i in range(items)]
    weights = DomainWeights.from_interactions(*np.array(row).T)
    torch.testing.assert_close(weights(), torch.ones(num_domains), atol=1e-6, rtol=0)
    streamed = DomainWeights(num_domains, momentum=0.5)
    streamed.update(torch.tensor(row)[:, 2])
    torch.testing.assert_close(streamed(), torch.ones(num_domains), atol=1e-6, rtol=0)


@property_test
@given(interactions(max_rows=20), st.floats(0.05, 0.95), st.integers(1, 30))
def test_moving_average_converges_geometrically(data, momentum, steps):
    """A share `momentum` of the way is left after every 1,024 rows that have a domain."""
    _, _, domains, num_domains = data
    weights = DomainWeights(num_domains, momentum=momentum, weight_range=(1.0, 5.0))
    start = weights.average.clone()
    for _ in range(steps):  # the same batch again: counts grow, their ratios do not
        weights.update(torch.from_numpy(domains).repeat(100, 1))
    target = 1.0 + 4.0 * weights.sparsity()
    rows = 100 * steps * int((domains >= 0).any(1).sum())
    expected = target + momentum ** (rows / 1024) * (start - target)
    torch.testing.assert_close(weights.average, expected, atol=2e-5, rtol=0)


@property_test
@given(interactions())
def test_streaming_ends_where_measuring_idf_alone_starts(data):
    users, items, domains, num_domains = data
    offline = DomainWeights.from_interactions(
        users, items, domains, num_domains=num_domains, measures=(1, 0, 0)
    )
    streamed = DomainWeights(num_domains, momentum=0.5)
    for _ in range(40):  # at most 0.5^40 of the start is left: nothing in float32
        streamed.update(torch.from_numpy(domains).repeat(1024, 1))
    torch.testing.assert_close(streamed(), offline(), atol=1e-5, rtol=0)
    assert torch.equal(streamed.interactions, 40 * 1024 * offline.interactions)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("parts", [8, 64])
def test_average_moves_by_rows_and_not_by_updates(parts, momentum):
    """An epoch of 50 steps of 512 rows, each whole or in micro-batches of 64 or 8 rows."""
    generator = torch.Generator().manual_seed(0)
    share = torch.tensor([0.7, 0.2, 0.08, 0.02]).expand(512, 4)
    whole, split = (DomainWeights(5, momentum=momentum) for _ in range(2))
    for step in range(50):
        ids = share.multinomial(1, generator=generator)
        whole.update(ids)
        for part in ids.chunk(parts):
            split.update(part)
        assert torch.equal(whole.interactions, split.interactions)
        # Where momentum is low, the first rows, which say little yet, leave a trace for a while.
        rtol = 0.01 if momentum >= 0.9 or step >= 5 else 0.02
        torch.testing.assert_close(split(), whole(), rtol=rtol, atol=0)
    # Not only because they have hardly moved: so have the averages, from 4, by as much.
    torch.testing.assert_close(4 - split.average, 4 - whole.average, rtol=0.01, atol=1e-3)
    assert (4 - whole.average).max() > 0.05


def test_rows_without_a_domain_move_nothing():
    plain, padded = DomainWeights(3, momentum=0.5), DomainWeights(3, momentum=0.5)
    for ids in torch.tensor([[0, 0, 1], [0, 2, 0]]):
        plain.update(ids)
        padded.update(torch.cat((ids, torch.full((1000,), -1))))
        padded.update(torch.full((50, 4), -1))
        padded.update(torch.zeros(0, dtype=torch.int64))
    assert torch.equal(padded.average, plain.average)
    assert torch.equal(padded(), plain())


def test_momentum_of_zero_follows_the_counts_at_once():
    weights = DomainWeights(2, momentum=0.0, weight_range=(1.0, 5.0))
    for ids in ([0], [0, 0, 1], [1]):
        weights.update(torch.tensor(ids))
        torch.testing.assert_close(weights.average, 1 + 4 * weights.sparsity())


def test_smallest_steps_are_not_lost_to_rounding():
    # 4,096 updates of one row each: 1 - m^(1/1024) is 1e-5, which float32 holds badly as 1 - m.
    weights, whole = DomainWeights(2), DomainWeights(2)
    ids = (torch.arange(4096) % 8 == 0).long()
    for row in ids.split(1):
        weights.update(row)
    whole.update(ids)
    moved, wanted = (4 - fn.average[0].item() for fn in (weights, whole))
    assert moved == pytest.approx(wanted, rel=0.02)


def test_streaming_keeps_users_and_entropy_as_measured():
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 50, 400), rng.integers(0, 80, 400)
    domains = rng.choice(3, size=400, p=[0.7, 0.25, 0.05])
    weights = DomainWeights.from_interactions(users, items, domains)
    before = weights().clone()
    for _ in range(3):
        weights.update(torch.from_numpy(domains))  # the same mix of domains: nothing to learn
    torch.testing.assert_close(weights(), before, atol=1e-6, rtol=0)


def test_domain_never_seen_is_as_sparse_as_can_be():
    weights = DomainWeights(3, momentum=0.0, weight_range=(1.0, 7.0))
    assert weights.sparsity().tolist() == [1, 1, 1]
    assert weights().tolist() == [1, 1, 1]
    weights.update(torch.tensor([0, 0, 0, 1]))
    assert weights.sparsity()[2] == 1
    assert weights.average[2] == 7
    measured = DomainWeights.from_interactions([0, 1], [0, 1], [0, 0], num_domains=2)
    assert measured.sparsity()[1] == 1


def test_domain_of_all_interactions_is_not_sparse():
    weights = DomainWeights(2, momentum=0.0)
    weights.update(torch.zeros(10, dtype=torch.int64))
    assert weights.sparsity().tolist() == [0, 1]
    assert weights()[0] == 1
    several = DomainWeights(2, momentum=0.0)  # a domain in every row, next to a rare one
    several.update(torch.tensor([[0, -1], [0, -1], [0, 1], [0, -1]]))
    assert several.sparsity().tolist() == [0, 1]


def test_one_item_and_no_interactions_give_finite_weights():
    one = DomainWeights.from_interactions([1, 2], [5, 5], [0, 1])
    assert one().tolist() == [1, 1]
    none = np.zeros(0, dtype=np.int64)
    empty = DomainWeights.from_interactions(none, none, none, num_domains=2)
    assert empty().tolist() == [1, 1]
    unlabelled = DomainWeights.from_interactions([1, 2], [5, 5], [-1, -1], num_domains=2)
    assert unlabelled().tolist() == [1, 1]


def test_empty_batches_and_rows_without_domain_count_nothing():
    weights = DomainWeights(2)
    weights.update(torch.zeros(0, dtype=torch.int64))
    weights.update(torch.zeros(0, 3, dtype=torch.int64))
    weights.update(torch.full((4, 2), -1))
    assert weights.interactions.tolist() == [0, 0]
    assert weights().tolist() == [1, 1]


def test_several_domains_share_an_interaction():
    weights = DomainWeights(3)
    weights.update(torch.tensor([[0, 1, 2], [0, 1, -1], [-1, 0, -1]]))
    assert weights.interactions.tolist() == [3, 2, 1]
    shares = weights.shares.double() / weights.shares.sum()
    assert shares.tolist() == pytest.approx([11 / 18, 5 / 18, 2 / 18])


def test_offline_counts_users_and_entropy():
    # Domain 0: users {1, 2}, items 10 twice and 11 once. Domain 1: one interaction.
    weights = DomainWeights.from_interactions(
        users=torch.tensor([1, 1, 2, 9]),
        items=torch.tensor([10, 11, 10, 12]),
        domains=torch.tensor([[0, -1], [0, -1], [0, 1], [-1, -1]]),
    )
    assert weights.interactions.tolist() == [3, 1]
    assert weights.users.tolist() == [2, 1]
    assert weights.num_users == 2  # user 9 and item 12 have no domain
    assert weights.num_items == 2
    third = 1 / 3
    entropy = -2 * third * math.log(2 * third) - third * math.log(third)
    assert weights.entropy.tolist() == pytest.approx([entropy, 0.0])


def test_example_weight_is_the_mean_over_the_domains_that_are_there():
    weights = DomainWeights.constant([1.0, 2.0, 6.0])
    ids = torch.tensor([[0, 1], [2, -1], [-1, 2], [-1, -1]], dtype=torch.int32)
    assert weights.example_weight(ids).tolist() == [1.5, 6, 6, 1]
    torch.testing.assert_close(weights.log_weight(ids), torch.tensor([1.5, 6, 6, 1]).log())
    assert weights.example_weight(torch.tensor([2, -1])).tolist() == [6, 1]


def test_nothing_is_sparsest_where_nothing_was_counted() -> None:
    for weights in (DomainWeights(3), DomainWeights.constant([1.0, 2.0, 4.0])):
        with pytest.raises(ValueError, match="nothing was counted"):
            weights.sparsest(torch.tensor([0, 1, 2]))
