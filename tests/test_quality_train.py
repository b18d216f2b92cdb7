"""Training: what reaches the loss, what must not, and that a seed settles everything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch

from benchmarks.quality import train as training
from benchmarks.quality.metrics import LeaveOneOut, ndcg
from benchmarks.quality.train import (
    Config,
    Run,
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


def test_negatives_are_drawn_by_the_popularity_of_the_training_part(
    split: LeaveOneOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the two last items of every user nothing is known."""
    made, sampler = [], training.UnigramSampler

    def make(counts: torch.Tensor, power: float) -> training.UnigramSampler:
        made.append((counts, power))
        return sampler(counts, power)

    monkeypatch.setattr(training, "UnigramSampler", make)
    train("plain", split, CONFIG, seed=0)
    ((counts, power),) = made
    expected = [1] * split.data.num_items  # every item can be drawn
    for user in range(split.data.num_users):
        for item in split.data.sequence(user)[:-2]:
            expected[item] += 1
    assert counts.tolist() == expected
    assert power == CONFIG.sampling_power != 1


def test_epoch_is_chosen_on_the_validation_items_and_ranked_on_the_test_items(
    split: LeaveOneOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three epochs validates best; the test items would have the last one."""
    asked: list[str] = []
    states: list[torch.Tensor] = []
    ranks = {"validation": [5, 0, 9], "test": [7, 7, 0]}

    def rank(model: torch.nn.Module, split: LeaveOneOut, part: str) -> np.ndarray:
        asked.append(part)
        states.append(model.items.weight.detach().clone())  # type: ignore[union-attr,operator]
        return np.full(len(split.users), ranks[part][min(len(asked), 3) - 1])

    monkeypatch.setattr(training, "rank_targets", rank)
    run = train("plain", split, replace(CONFIG, epochs=3), seed=0)
    assert asked == ["validation"] * 3 + ["test"]
    assert run.best_epoch == 2
    expected = [float(ndcg(np.array([r]))[0]) for r in ranks["validation"]]
    assert run.validation == pytest.approx(expected)
    assert torch.equal(run.model.items.weight, states[1])
    assert not torch.equal(states[1], states[2])
    assert torch.equal(states[3], states[1])  # the test items are ranked by the chosen model


def test_draws_carry_their_ids_and_the_log_q_of_the_sampler(split: LeaveOneOut) -> None:
    sampler = training.UnigramSampler(torch.arange(1, 121))
    table, targets = torch.randn(120, 4), torch.tensor([[3, 5], [7, 5]])
    drawn = training.draw(sampler, table, targets, 50, torch.Generator().manual_seed(0))
    ids = drawn["negative_ids"]
    assert ids.shape == (50,)
    assert torch.equal(drawn["positive_ids"], targets)
    assert torch.equal(drawn["positive"], table[targets])
    assert torch.equal(drawn["negative"], table[ids])
    for name, items in (("positive_log_q", targets), ("negative_log_q", ids)):
        exact = ((items + 1) / (120 * 121 / 2)).log()
        torch.testing.assert_close(drawn[name], exact)


def test_windows_of_long_sequences_start_anywhere(split: LeaveOneOut) -> None:
    """Over many epochs the first training step of every user is seen, and the last one."""
    seen = set()
    rng = np.random.default_rng(0)
    config = replace(CONFIG, max_length=10)
    for _ in range(100):
        for batch in batches(split, config, rng):
            real = batch.example_weights == 1
            seen |= {*zip(batch.inputs[real].tolist(), batch.targets[real].tolist(), strict=True)}
    for user in range(split.data.num_users):
        steps = list(pairwise(split.data.sequence(user)[:-2].tolist()))
        assert {steps[0], steps[-1]} <= seen


def test_calibration_and_range_reach_the_weighted_losses(split: LeaveOneOut) -> None:
    config = replace(CONFIG, calibration=0.5, weight_range=(1.0, 7.0), temperature=0.3)
    for loss in ("dynamic", "dual-dynamic"):
        module = make_loss(loss, split, config)
        assert (module.calibration, module.temperature) == (0.5, 0.3)
        assert module.domain_weights is not None
        assert module.domain_weights.weight_range == (1.0, 7.0)


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


def test_bonus_ranks_the_test_items_with_the_log_weights_of_the_training_part(
    split: LeaveOneOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(training, "rank_targets", lambda *args: asked.append(args) or args[2])
    plain = Run("plain", 0, np.zeros(1), 1, [], 0.0, 0.0, [], None)  # type: ignore[arg-type]
    assert with_bonus(plain, split, CONFIG).ranks == "test"
    weights = measure_domains(split, CONFIG)()
    for item, bonus in enumerate(asked[0][3].tolist()):
        domains = [d for d in split.data.item_domains[item] if d >= 0]
        mean = sum(float(weights[d]) for d in domains) / len(domains)
        assert bonus == pytest.approx(np.log(mean), abs=1e-5)


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
