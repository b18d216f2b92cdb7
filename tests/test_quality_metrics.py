"""Split and metrics against brute force on a few users, and the model's causality."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.quality.metrics import (
    SPARSEST,
    LeaveOneOut,
    make_groups,
    ndcg,
    rank_targets,
    recall,
)
from benchmarks.quality.model import Recurrent, SequenceModel, Transformer, dropout
from benchmarks.quality.settings import Config
from dwl_kernels.examples.data import Interactions
from dwl_kernels.examples.synthetic import synthetic


def make(sequences: list[list[int]], num_items: int = 10) -> Interactions:
    offsets = np.cumsum([0, *map(len, sequences)])
    domains = np.zeros((num_items, 1), np.int64)
    titles = [""] * num_items
    return Interactions("hand", np.concatenate(sequences), offsets, domains, ["all"], titles)


def test_last_item_tests_and_the_one_before_validates() -> None:
    split = LeaveOneOut(make([[3, 1, 4, 2], [5, 9], [6, 5, 8]]))
    assert split.users.tolist() == [0, 2]  # two items are too few to be evaluated
    assert split.target("test").tolist() == [2, 8]
    assert split.target("validation").tolist() == [4, 5]
    assert split.history(0, "test").tolist() == [3, 1, 4]
    assert split.history(0, "validation").tolist() == [3, 1]
    assert split.data.items[split.train_mask].tolist() == [3, 1, 5, 9, 6]


def test_metrics_follow_their_formulas() -> None:
    ranks = np.array([0, 1, 9, 10])
    assert recall(ranks).tolist() == [1, 1, 1, 0]
    assert ndcg(ranks) == pytest.approx([1, 1 / math.log2(3), 1 / math.log2(11), 0])


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_ties_and_nan_do_not_flatter_the_model(value: float) -> None:
    split = LeaveOneOut(make([[3, 1, 4, 2], [6, 5, 8]]))
    model = Transformer(10, Config(1, max_length=4, dim=8))
    torch.nn.init.constant_(model.items.weight, value)
    assert rank_targets(model, split, "test").tolist() == [6, 7]  # the last of the unseen


@pytest.mark.parametrize("part", ["validation", "test"])
def test_ranks_agree_with_brute_force_user_by_user(part: str) -> None:
    # 300 users need two batches; sequences of up to 20 are longer than the model's window of 8.
    split = LeaveOneOut(synthetic(users=300, items=120, domains=4, length=20))
    model = Transformer(split.data.num_items, Config(1, max_length=8, dim=16, blocks=1)).eval()
    bonus = torch.randn(split.data.num_items)
    ranks = rank_targets(model, split, part, 0 * bonus, bonus)
    assert ranks[0].tolist() == rank_targets(model, split, part).tolist()
    ranks = ranks[1]
    cut = {"validation": 2, "test": 1}[part]
    for user in (0, 1, 150, 299):
        sequence = split.data.sequence(user).tolist()
        history, target = sequence[:-cut], sequence[-cut]
        query = model(torch.tensor([history[-8:]]))[0, -1]
        scores = (model.items.weight @ query + bonus).tolist()
        unseen = set(range(split.data.num_items)) - set(history) - {target}
        assert ranks[user] == sum(scores[item] >= scores[target] for item in unseen)


@pytest.mark.parametrize("kind", [Transformer, Recurrent])
def test_model_sees_no_future_and_no_padding(kind: type[SequenceModel]) -> None:
    model = kind(50, Config(1, max_length=12, dim=16, heads=2)).eval()
    items = torch.randint(50, (3, 12))
    changed = items.clone()
    changed[:, 7:] = 0
    assert torch.allclose(model(items)[:, :7], model(changed)[:, :7], atol=1e-6)
    assert torch.allclose(model(items)[:, :7], model(items[:, :7]), atol=1e-6)


def test_dropout_leaves_out_its_part_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.ones(1001, 99)
    dropped = dropout(x, 0.1, True)
    assert (dropped == 0).double().mean() == pytest.approx(26 / 256, abs=0.005)
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    assert dropped.unique().tolist() == [0, pytest.approx(256 / 230)]
    assert dropout(x, 0.1, False) is x


def test_groups_count_a_user_for_every_domain_of_the_item() -> None:
    split = LeaveOneOut(synthetic(users=200, items=120, domains=8, length=12))
    groups = make_groups(split, "test")
    assert [group.name for group in groups[:2]] == ["all", SPARSEST]
    assert groups[0].members.sum() == 200
    domains = groups[2:]
    slots = split.data.item_domains[split.target("test")]
    assert sum(group.members.sum() for group in domains) == (slots >= 0).sum()
    assert (groups[1].members == domains[-1].members | domains[-2].members).all()
    trained = split.data.item_domains[split.data.items[split.train_mask]]
    sizes = np.bincount(trained[trained >= 0])
    named = [sizes[split.data.domain_names.index(group.name)] for group in domains]
    assert named == sorted(named, reverse=True)
