"""Training: what reaches the loss, what must not, and that a seed settles everything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from benchmarks.quality import objective as objectives
from benchmarks.quality import train as training
from benchmarks.quality.metrics import LeaveOneOut, ndcg, rank_targets
from benchmarks.quality.objective import (
    Excess,
    Objective,
    by_hand,
    first_weighted_step,
    measure_domains,
)
from benchmarks.quality.settings import METHODS, Config, Loss, Method
from benchmarks.quality.train import batches, one_cycle, steps_per_epoch, train
from dwl_kernels import CumulativeCrossEntropy
from dwl_kernels.examples.synthetic import synthetic

CONFIG = Config(steps=4, max_length=12, batch_size=32, dim=16, blocks=1, negatives=64)
SEQUENCE_METHODS = (
    METHODS["domains"] | METHODS["beyond"] | METHODS["cumulative"] | {"refined": Method("refined")}
)


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
        training_part = split.data.sequence(user)[:-2].tolist()
        allowed |= set(pairwise(training_part))
    rows = 0
    for batch in batches(split, CONFIG, 0):
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
    for batch in batches(split, CONFIG, 0):
        assert max(batch.inputs.max(), batch.targets.max()) < data.num_items
    counted = measure_domains(split).interactions
    trained = domains[items[split.train_mask]]
    assert counted.tolist() == np.bincount(trained[trained >= 0], minlength=3).tolist()


def test_negatives_are_drawn_by_the_popularity_of_the_training_part(
    split: LeaveOneOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the two last items of every user nothing is known."""
    made, sampler = [], objectives.UnigramSampler

    def make(counts: torch.Tensor, power: float, weights: None) -> objectives.UnigramSampler:
        made.append((counts, power))
        return sampler(counts, power, weights=weights)

    monkeypatch.setattr(objectives, "UnigramSampler", make)
    Objective(Method(), split, CONFIG, 0)
    ((counts, power),) = made
    expected = [1] * split.data.num_items  # every item can be drawn
    for user in range(split.data.num_users):
        for item in split.data.sequence(user)[:-2]:
            expected[item] += 1
    assert counts.tolist() == expected
    assert power == CONFIG.sampling_power != 1


def test_checkpoint_is_chosen_on_the_validation_items_alone(
    split: LeaveOneOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of four checkpoints validates best; the test items are not looked at."""
    asked: list[str] = []
    states: list[torch.Tensor] = []

    def rank(model: torch.nn.Module, split: LeaveOneOut, part: str) -> np.ndarray:
        asked.append(part)
        states.append(model.items.weight.detach().clone())  # type: ignore[union-attr,operator]
        return np.full(len(split.users), [5, 0, 9, 7][len(asked) - 1])

    monkeypatch.setattr(training, "rank_targets", rank)
    trained = train(Method(), split, replace(CONFIG, steps=10), seed=0)
    assert asked == ["validation"] * 4
    assert trained.best_step == 8
    assert trained.validation == pytest.approx([float(ndcg(np.array(r))) for r in (5, 0, 9, 7)])
    assert torch.equal(trained.model.items.weight, states[1])
    assert not torch.equal(states[1], states[2])


def test_draws_carry_their_ids_and_the_log_q_of_the_sampler(split: LeaveOneOut) -> None:
    sampler = objectives.UnigramSampler(torch.arange(1, 121))
    table, targets = torch.randn(120, 4), torch.tensor([[3, 5], [7, 5]])
    drawn = objectives.draw(sampler, table, targets, 50, torch.Generator().manual_seed(0))
    ids = drawn["negative_ids"]
    assert ids.shape == (50,)
    assert torch.equal(drawn["positive_ids"], targets)
    assert torch.equal(drawn["positive"], table[targets])
    assert torch.equal(drawn["negative"], table[ids])
    for name, items in (("positive_log_q", targets), ("negative_log_q", ids)):
        exact = ((items + 1) / (120 * 121 / 2)).log()
        torch.testing.assert_close(drawn[name], exact)


def test_negatives_of_the_binary_loss_are_new_to_the_user(
    split: LeaveOneOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = Objective(Method("binary"), split, CONFIG, 0)
    batch = next(iter(batches(split, CONFIG, 0)))
    asked = []
    monkeypatch.setattr(
        objectives.F, "embedding", lambda ids, table: asked.append(ids) or table[ids]
    )
    objective(torch.randn(*batch.targets.shape, 4), torch.randn(120, 4), batch)
    targets, drawn = asked
    assert torch.equal(targets, batch.targets)
    known = [
        item in split.data.sequence(user)[:-2]
        for user, row in zip(batch.users, drawn.tolist(), strict=True)
        for item in row
    ]
    assert np.mean(known) < 0.02  # of 120 items a user knows 4 to 18


def test_windows_of_long_sequences_start_anywhere(split: LeaveOneOut) -> None:
    """Over many epochs the first training step of every user is seen, and the last one."""
    seen = set()
    for batch in batches(split, replace(CONFIG, max_length=10, steps=400), 0):
        real = batch.example_weights == 1
        seen |= {*zip(batch.inputs[real].tolist(), batch.targets[real].tolist(), strict=True)}
    for user in range(split.data.num_users):
        steps = list(pairwise(split.data.sequence(user)[:-2].tolist()))
        assert {steps[0], steps[-1]} <= seen


def test_batches_can_begin_at_any_step(split: LeaveOneOut) -> None:
    config = replace(CONFIG, steps=11)
    every = list(batches(split, config, 0))
    assert (len(every), steps_per_epoch(split, config.batch_size)) == (11, 4)
    later = list(batches(split, config, 0, range(5, 11)))
    assert len(later) == 6
    for one, other in zip(every[5:], later, strict=True):
        assert torch.equal(one.targets, other.targets)
    assert not torch.equal(every[0].users, every[4].users)  # an epoch later


def test_same_seed_gives_the_same_run(split: LeaveOneOut) -> None:
    first, again, other = (train(Method("dynamic"), split, CONFIG, seed) for seed in (1, 1, 2))
    assert first.validation == again.validation
    assert first.weights == again.weights
    tables = [trained.model.items.weight for trained in (first, again, other)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


@pytest.mark.parametrize("calibration", [0.0, 1.0])
def test_deferred_run_goes_on_from_the_plain_one_as_if_it_had_trained_itself(
    calibration: float, split: LeaveOneOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, steps=11)
    method = Method("dynamic", schedule="deferred", calibration=calibration)
    assert first_weighted_step(method, config) == 7
    alone = train(method, split, config, 3)
    train(Method(), split, config, 3, states=tmp_path)
    begun = []
    counted = Objective.count
    monkeypatch.setattr(Objective, "count", lambda *given: begun.append(1) or counted(*given))
    branched = train(method, split, config, 3, states=tmp_path)
    assert len(begun) == 7
    assert branched.weights == alone.weights
    for one, other in zip(branched.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(one, other)
    # Of another configuration the state is of no use.
    begun.clear()
    train(method, split, replace(config, learning_rate=0.1), 3, states=tmp_path)
    assert not begun


def test_deferred_weights_are_one_until_they_begin(split: LeaveOneOut) -> None:
    config = replace(CONFIG, steps=5)
    found = {}
    for schedule in ("start", "ramped", "deferred"):
        objective = Objective(Method("dynamic", schedule=schedule), split, config, 0)
        weights = objective.loss.domain_weights
        assert weights is not None
        found[schedule] = [float(weights().max())]
        for batch in batches(split, config, 0):
            objective.count(batch)
            found[schedule].append(float(weights().max()))
    assert found["deferred"][:4] == [1.0] * 4
    assert found["deferred"][4] == found["start"][4] > 1
    assert found["ramped"] == sorted(found["ramped"])
    assert (found["ramped"][0], found["ramped"][5]) == (1.0, found["start"][5])


@pytest.mark.parametrize(
    "method",
    [*(Method(loss, tail=0.7) for loss in get_args(Loss)), Method("cross-entropy", backbone="gru")],
    ids=lambda method: f"{method.loss} {method.backbone}",
)
def test_a_few_steps_learn_the_order(method: Method, split: LeaveOneOut) -> None:
    # An untrained model ranks at random among some 100 unseen items, NDCG@10 about 0.045.
    config = replace(CONFIG, steps=120, learning_rate=0.01)
    trained = train(method, split, config, seed=0)
    assert ndcg(rank_targets(trained.model, split, "test")).mean() > 0.09
    step = [round(part * config.steps) for part in training.CHECKPOINTS].index(trained.best_step)
    assert trained.validation[step] == max(trained.validation)


def test_methods_differ_by_their_loss_and_its_options(split: LeaveOneOut) -> None:
    made = {
        name: Objective(method, split, CONFIG, 0).loss for name, method in SEQUENCE_METHODS.items()
    }
    for name, loss in made.items():
        method = SEQUENCE_METHODS[name]
        weights = loss.domain_weights
        apart = method.thinned or method.weighed == "excess"  # not by the weights of the loss
        assert (weights is not None) == (method.loss in ("dynamic", "fixed") and not apart)
        assert isinstance(loss, CumulativeCrossEntropy) == (method.loss == "cross-entropy")
        assert ("refined" in repr(loss)) == (method.loss == "refined")
        assert loss.temperature == CONFIG.temperature
        assert loss.calibration == method.calibration
        if weights is not None and method.loss == "dynamic":
            assert weights.weight_range == (1.0, method.high)


def test_value_at_risk_is_the_mean_of_the_largest_losses(split: LeaveOneOut) -> None:
    batch = next(iter(batches(split, CONFIG, 0)))
    query, table = torch.randn(*batch.targets.shape, 8), torch.randn(120, 8)
    rows = Objective(Method("cvar", tail=1.0), split, CONFIG, 0)
    value = rows(query, table, batch)
    plain = Objective(Method(), split, CONFIG, 0)(query, table, batch)
    torch.testing.assert_close(value, plain)
    half = Objective(Method("cvar", tail=0.5), split, CONFIG, 0)(query, table, batch)
    drawn = objectives.draw(
        rows.sampler, table, batch.targets, CONFIG.negatives, torch.Generator().manual_seed(0)
    )
    with objectives.bfloat16_products():
        each = rows.loss(query, **drawn, example_weights=batch.example_weights)
    real = each[batch.example_weights > 0].sort(descending=True).values
    torch.testing.assert_close(half, real[: round(len(real) / 2)].mean())


def test_dynamic_weights_favour_the_sparsest_domain(split: LeaveOneOut) -> None:
    weights = Objective(Method("dynamic"), split, CONFIG, 0).loss.domain_weights
    assert weights is not None
    order = weights.interactions.argsort()
    assert weights()[order[0]] > weights()[order[-1]]


def test_padding_is_not_counted_as_a_domain(split: LeaveOneOut) -> None:
    """Neither by a forward, nor where a deferred run counts what it does not train."""
    batch = next(b for b in batches(split, CONFIG, 0) if (b.example_weights == 0).any())
    domains = split.data.item_domains[batch.targets[batch.example_weights == 1]]
    expected = np.bincount(domains[domains >= 0], minlength=5).tolist()
    for forward in (True, False):
        objective = Objective(Method("dynamic"), split, CONFIG, 0)
        weights = objective.loss.domain_weights
        assert weights is not None
        before = weights.interactions.clone()
        if forward:
            query = torch.randn(*batch.inputs.shape, 8, requires_grad=True)
            objective(query, torch.randn(120, 8), batch)
        else:
            objective.count(batch)
        assert (weights.interactions - before).tolist() == expected


def test_weights_set_by_hand_have_two_levels_and_mean_one(split: LeaveOneOut) -> None:
    measured = measure_domains(split)
    weights = by_hand(measured)()
    dense, sparse = weights.unique().tolist()
    assert sparse / dense == pytest.approx(4.0)
    assert (weights == sparse).sum() == 2  # the sparsest quarter of five domains, rounded up
    shares = measured.shares / measured.shares.sum()
    assert (weights * shares).sum().item() == pytest.approx(1.0, abs=1e-5)


def test_loss_that_is_not_finite_stops_the_run(split: LeaveOneOut) -> None:
    with pytest.raises(FloatingPointError, match=r"loss (nan|inf) in step"):
        train(Method(), split, replace(CONFIG, steps=12, learning_rate=1e30), seed=0)


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


def test_weights_of_items_rise_with_their_rarity(split: LeaveOneOut) -> None:
    objective = Objective(Method("dynamic", weighed="item"), split, CONFIG, 0)
    weights = objective.loss.domain_weights
    assert weights is not None
    counts = np.bincount(split.data.items[split.train_mask], minlength=split.data.num_items)
    assert weights.interactions.tolist() == counts.tolist()
    assert weights()[counts.argmin()] > weights()[counts.argmax()]


def test_domains_of_a_larger_loss_come_to_weigh_more() -> None:
    excess = Excess(4.0, torch.tensor([[0, -1], [1, -1], [1, 0], [-1, -1]]))
    rows, targets = torch.tensor([1.0, 3.0, 2.0, 2.0]), torch.tensor([0, 1, 2, 3])
    assert excess(rows, targets, weighed=False) == 2.0
    for _ in range(20):
        before = excess.log_weight.clone()
        value = excess(rows.requires_grad_(), targets, weighed=True)
        assert excess.log_weight[1] - excess.log_weight[0] > before[1] - before[0]
    # Domain 0 is at the mean of rows 0 and 2, 1.5, domain 1 at 2.5, of all at 2.
    assert excess.log_weight.tolist() == pytest.approx([0.0, 20 * Excess.RATE])
    (slope,) = torch.autograd.grad(value, rows)
    heavy = excess.log_weight[1].exp().item()
    weights = torch.tensor([1.0, heavy, (1 + heavy) / 2, 1.0])
    torch.testing.assert_close(slope, weights / weights.sum())
    for _ in range(200):
        excess(rows, targets, weighed=True)
    assert excess.log_weight[1].exp().item() == pytest.approx(4.0)


def test_rows_are_left_out_in_proportion_to_weights(split: LeaveOneOut) -> None:
    objective = Objective(Method("dynamic", thinned=True), split, CONFIG, 0)
    asked = []
    objective.loss.forward = (  # type: ignore[method-assign]
        lambda *_, example_weights, **__: asked.append(example_weights) or torch.tensor(0.0)
    )
    batch = next(iter(batches(split, CONFIG, 0)))
    query, table = torch.randn(*batch.targets.shape, 8), torch.randn(120, 8)
    for _ in range(300):
        objective(query, table, batch)
    found = torch.stack(asked).mean(0)
    weight = measure_domains(split).example_weight(objective.item_domains)
    wanted = weight[batch.targets] / weight.max() * batch.example_weights
    torch.testing.assert_close(found, wanted, atol=0.15, rtol=0)
    assert set(torch.stack(asked).unique().tolist()) == {0.0, 1.0}


def test_candidates_of_sparse_domains_are_drawn_more_often_and_log_q_says_so(
    split: LeaveOneOut,
) -> None:
    ids = torch.arange(split.data.num_items)
    plain, sparse = (
        Objective(Method(candidates=power), split, CONFIG, 0).sampler.log_q(ids)
        for power in (0.0, 1.0)
    )
    bonus = measure_domains(split).log_weight(torch.from_numpy(split.data.item_domains))
    torch.testing.assert_close(sparse, torch.log_softmax(plain + bonus, 0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("change", [{"frozen": True}, {"late_rate": 0.0}])
def test_deferred_run_can_leave_the_table_as_it_was(
    change: dict[str, float], split: LeaveOneOut, tmp_path: Path
) -> None:
    """With the table frozen, or no rate, it is that of the plain run where weights began."""
    config = replace(CONFIG, steps=10)
    train(Method(), split, config, 0, states=tmp_path)
    fork = torch.load(tmp_path / "transformer-0.pt")["model"]["items.weight"]
    method = Method("dynamic", schedule="deferred", **change)  # type: ignore[arg-type]
    for states in (tmp_path, None):
        found = train(method, split, config, 0, states=states).model.items.weight
        torch.testing.assert_close(found.detach(), fork, atol=0, rtol=0)


def test_deferred_runs_begin_with_the_state_of_the_plain_run(
    split: LeaveOneOut, tmp_path: Path
) -> None:
    """Not with that of another method whose loss has no weights either, and they are as if they had
    trained to it.
    """
    config = replace(CONFIG, steps=10)
    train(Method(), split, config, 0, states=tmp_path)
    for method in (Method(candidates=1.0), Method("refined")):
        train(method, split, config, 0, states=tmp_path)
    for name, method in METHODS["beyond"].items():
        # The mean of row losses is rounded otherwise, and Adam makes steps of what is nearly 0.
        if method.schedule != "deferred" or method.weighed == "excess":
            continue
        found, wanted = (
            train(method, split, config, 0, states=states).model.items.weight
            for states in (tmp_path, None)
        )
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0, msg=name)
