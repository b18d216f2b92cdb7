"""Split and metrics against brute force on a few users, and the model's causality."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.quality.metrics import LeaveOneOut, ndcg, rank_targets, recall
from benchmarks.quality.model import SequenceModel
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
    model = SequenceModel(10, max_length=4, dim=8)
    torch.nn.init.constant_(model.items.weight, value)
    assert rank_targets(model, split, "test").tolist() == [6, 7]  # the last of the unseen


@pytest.mark.parametrize("part", ["validation", "test"])
def test_ranks_agree_with_brute_force_user_by_user(part: str) -> None:
    # 300 users need two batches; sequences of up to 20 are longer than the model's window of 8.
    split = LeaveOneOut(synthetic(users=300, items=120, domains=4, length=20))
    model = SequenceModel(split.data.num_items, max_length=8, dim=16, blocks=1).eval()
    bonus = torch.randn(split.data.num_items)
    ranks = rank_targets(model, split, part, bonus)
    cut = {"validation": 2, "test": 1}[part]
    for user in (0, 1, 150, 299):
        sequence = split.data.sequence(user).tolist()
        history, target = sequence[:-cut], sequence[-cut]
        query = model(torch.tensor([history[-8:]]))[0, -1]
        scores = (model.items.weight @ query + bonus).tolist()
        unseen = set(range(split.data.num_items)) - set(history) - {target}
        assert ranks[user] == sum(scores[item] >= scores[target] for item in unseen)


def test_model_sees_no_future_and_no_padding() -> None:
    model = SequenceModel(50, max_length=12, dim=16, heads=2).eval()
    items = torch.randint(50, (3, 12))
    changed = items.clone()
    changed[:, 7:] = 0
    assert torch.allclose(model(items)[:, :7], model(changed)[:, :7], atol=1e-6)
    assert torch.allclose(model(items)[:, :7], model(items[:, :7]), atol=1e-6)
