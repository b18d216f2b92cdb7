"""Training: what reaches the loss, what must not, and that a seed settles everything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch

from benchmarks.quality.metrics import LeaveOneOut, ndcg
from benchmarks.quality.train import (
    Config,
    TrainedLoss,
    batches,
    by_hand,
    make_loss,
    measure_domains,
    one_cycle,
    steps_per_epoch,
    train,
    with_bonus,
)
from dwl_kernels import CumulativeCrossEntropy, DualScaleSampledSoftmax
from dwl_kernels.examples.synthetic import synthetic

CONFIG = Config(epochs=1, max_length=12, batch_size=32, dim=16, blocks=1, negatives=64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose time by handing work to other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def split() -> LeaveOneOut:
    """Sequences of 6 to 20 items, some longer than the window of 12."""
    return LeaveOneOut(synthetic(users=100, items=120, domains=5, length=20))


def test_training_rows_are_steps_of_the_training_part(split: LeaveOneOut) -> None:
    allowed = set()
    for user in range(split.data.num_users):
        training = split.data.sequence(user)[:-2].tolist()
        allowed |= set(pairwise(training))
    rows = 0
    for batch in batches(split, CONFIG, np.random.default_rng(0)):
        real = batch.example_weights == 1
        pairs = zip(batch.inputs[real].tolist(), batch.targets[real].tolist(), strict=True)
        assert allowed.issuperset(pairs)
        assert set(batch.example_weights.unique().tolist()) <= {0.0, 1.0}
        rows += int(real.sum())
    assert rows == np.minimum(split.data.lengths - 3, CONFIG.max_length).sum()


def test_test_and_validation_items_do_not_reach_the_training() -> None:
    # Every user's last two items occur nowhere else, so a leak would show.
    data = synthetic(users=40, items=120, domains=3, length=12)
    items = data.items.copy()
    ends = data.offsets[1:]
    items[ends - 1] = data.num_items + 2 * np.arange(40)
    items[ends - 2] = data.num_items + 2 * np.arange(40) + 1
    domains = np.concatenate([data.item_domains, np.tile(data.item_domains[:1], (80, 1))])
    split = LeaveOneOut(replace(data, items=items, item_domains=domains))
    for batch in batches(split, CONFIG, np.random.default_rng(0)):
        assert max(batch.inputs.max(), batch.targets.max()) < data.num_items
    counted = measure_domains(split, CONFIG).interactions
    trained = domains[items[split.train_mask]]
    assert counted.tolist() == np.bincount(trained[trained >= 0], minlength=3).tolist()


def test_steps_per_epoch_is_the_number_of_batches(split: LeaveOneOut) -> None:
    assert len(list(batches(split, CONFIG, np.random.default_rng(0)))) == 4
    assert steps_per_epoch(split, CONFIG.batch_size) == 4


def test_same_seed_gives_the_same_run(split: LeaveOneOut) -> None:
    first, again, other = (train("dynamic", split, CONFIG, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.ranks, again.ranks)
    assert first.validation == again.validation
    assert first.weights == again.weights
    assert not np.array_equal(first.ranks, other.ranks)


@pytest.mark.parametrize("loss", get_args(TrainedLoss))
def test_a_few_epochs_learn_the_order(loss: TrainedLoss, split: LeaveOneOut) -> None:
    # An untrained model ranks at random among some 100 unseen items, NDCG@10 about 0.045.
    config = replace(CONFIG, epochs=30, learning_rate=0.01)
    run = train(loss, split, config, seed=0)
    assert ndcg(run.ranks).mean() > 0.09
    assert run.validation[run.best_epoch - 1] == max(run.validation)


def test_losses_differ_by_their_module_and_its_options(split: LeaveOneOut) -> None:
    made = {loss: make_loss(loss, split, CONFIG) for loss in get_args(TrainedLoss)}
    weighted = {loss for loss, module in made.items() if module.domain_weights is not None}
    assert weighted == {"dynamic", "fixed", "dual-dynamic"}
    dual = {loss for loss, module in made.items() if isinstance(module, DualScaleSampledSoftmax)}
    assert dual == {"dual", "dual-dynamic"}
    assert isinstance(made["cross-entropy"], CumulativeCrossEntropy)
    corrected = {loss for loss, module in made.items() if "refined" in repr(module)}
    assert corrected == {"refined"}
    assert {module.temperature for module in made.values()} == {CONFIG.temperature}


def test_dynamic_weights_favour_the_sparsest_domain(split: LeaveOneOut) -> None:
    weights = make_loss("dynamic", split, CONFIG).domain_weights
    assert weights is not None
    order = weights.interactions.argsort()
    assert weights()[order[0]] > weights()[order[-1]]


def test_padding_is_not_counted_as_a_domain(split: LeaveOneOut) -> None:
    loss_fn = make_loss("dynamic", split, CONFIG)
    assert loss_fn.domain_weights is not None
    before = loss_fn.domain_weights.interactions.clone()
    epoch = batches(split, CONFIG, np.random.default_rng(0))
    batch = next(batch for batch in epoch if (batch.example_weights == 0).any())
    query, negative = torch.randn(*batch.inputs.shape, 8), torch.randn(7, 8)
    loss_fn(
        query,
        query,
        negative,
        positive_ids=batch.targets,
        negative_ids=torch.arange(7),
        example_weights=batch.example_weights,
    )
    domains = split.data.item_domains[batch.targets[batch.example_weights == 1]]
    counted = loss_fn.domain_weights.interactions - before
    assert counted.tolist() == np.bincount(domains[domains >= 0], minlength=5).tolist()


def test_weights_set_by_hand_have_two_levels_and_mean_one(split: LeaveOneOut) -> None:
    measured = measure_domains(split, CONFIG)
    weights = by_hand(measured)()
    dense, sparse = weights.unique().tolist()
    assert sparse / dense == pytest.approx(4.0)
    assert (weights == sparse).sum() == 2  # the sparsest quarter of five domains, rounded up
    shares = measured.shares / measured.shares.sum()
    assert (weights * shares).sum().item() == pytest.approx(1.0, abs=1e-5)


def test_bonus_ranks_with_the_plain_model(split: LeaveOneOut) -> None:
    plain = train("plain", split, CONFIG, seed=0)
    unchanged = with_bonus(plain, split, replace(CONFIG, weight_range=(1.0, 1.0)))
    assert np.array_equal(unchanged.ranks, plain.ranks)  # a bonus of zero
    tilted = with_bonus(plain, split, replace(CONFIG, weight_range=(1.0, 100.0)))
    assert tilted.model is plain.model
    assert not np.array_equal(tilted.ranks, plain.ranks)


def test_loss_that_is_not_finite_stops_the_run(split: LeaveOneOut) -> None:
    with pytest.raises(FloatingPointError, match=r"loss (nan|inf) in step"):
        train("plain", split, replace(CONFIG, epochs=3, learning_rate=1e30), seed=0)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 11, 20, 3040])
def test_learning_rate_rises_and_falls_in_runs_of_any_length(steps: int) -> None:
    """Ten steps are one epoch of a small data set, and a tenth of them is a single one."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = one_cycle(optimizer, 0.5, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < steps:
            schedule.step()
    assert all(0 <= rate <= 0.5 + 1e-9 for rate in rates)
    if steps >= 10:
        assert max(rates) > 0.45
        assert rates[-1] < 0.01
