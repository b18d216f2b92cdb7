"""Matrix factorisation on cosines, where the dual scale belongs: split, training, ranks, metrics.

`runs` calls it for the settings of the dual scale.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

import dwl_kernels
from dwl_kernels import DualScaleSampledSoftmax, UniformSampler
from dwl_kernels.examples.data import Interactions

from .metrics import ndcg, recall
from .settings import Config, Method
from .train import CHECKPOINTS, Trained, one_cycle

K = 20
PAIRS_PER_BATCH = 4096


@dataclass(frozen=True)
class RandomSplit:
    """70% of the interactions train, 10% validate, 20% test, the same for every seed.

    Args:
        data: what users took.
        shifted: whether test items are drawn evenly by popularity, an interaction in proportion to
            one over the count of its item; the others are then popular ones.
    """

    data: Interactions
    shifted: bool = False

    @cached_property
    def part(self) -> np.ndarray:  # [n] 0 trains, 1 validates, 2 tests
        rng, data = np.random.default_rng(0), self.data
        n = len(data.items)
        counts = np.bincount(data.items, minlength=data.num_items)
        late = rng.exponential(size=n) * (counts[data.items] if self.shifted else 1)
        parts = np.zeros(n, np.int64)
        order = np.argsort(late)  # drawn without replacement by one over the count
        tests, rest = order[: round(0.2 * n)], order[round(0.2 * n) :]
        parts[tests] = 2
        parts[rng.permutation(rest)[: round(0.1 * n)]] = 1
        return parts

    def pairs(self, part: str) -> tuple[np.ndarray, np.ndarray]:  # users, items: [P] each
        """Sorted by user. Users and items that do not train are not asked for."""
        data, users = self.data, self.data.users
        trains = self.part == 0
        known = np.isin(users, users[trains]) & np.isin(data.items, data.items[trains])
        wanted = self.part == {"training": 0, "validation": 1, "test": 2}[part]
        return users[wanted & known], data.items[wanted & known]

    def seen(self, part: str) -> list[np.ndarray]:
        """Of every user what came before that part."""
        data, users = self.data, self.data.users
        before = self.part < {"validation": 1, "test": 2}[part]
        stops = np.cumsum(np.bincount(users[before], minlength=data.num_users))
        return np.split(data.items[before], stops[:-1])


class Factors(nn.Module):
    """A vector for every user and item; the score is their cosine."""

    def __init__(self, users: int, items: int, dim: int) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, dim), nn.Embedding(items, dim)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.1)


def make_model(method: Method, split: RandomSplit, config: Config) -> Factors:
    return Factors(split.data.num_users, split.data.num_items, config.dim)


def train_factors(
    method: Method, split: RandomSplit, config: Config, seed: int
) -> Trained[Factors]:
    """Train from scratch and keep the model of the checkpoint with the best NDCG@20.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
    """
    torch.manual_seed(seed)
    data = split.data
    model = make_model(method, split, config)
    loss_fn = DualScaleSampledSoftmax(
        normalize=True,
        temperature=method.temperature or config.temperature,
        hardness=method.hardness,
        similarity=method.similarity,
        competition=method.competition,
    )
    sampler, generator = UniformSampler(data.num_items), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    schedule = one_cycle(optimizer, config.learning_rate, config.steps)
    checkpoints = {max(round(part * config.steps), 1) for part in CHECKPOINTS}
    validation: list[float] = []
    best_step, best_state, seconds = 0, model.state_dict(), 0.0
    for step, (users, items) in enumerate(batches(split, config, seed), 1):
        started = time.process_time()
        negative, _ = sampler.sample(config.negatives, generator=generator)
        value = loss_fn(
            model.users(users),
            model.items(items),
            model.items(negative),
            positive_ids=items,
            negative_ids=negative,
        )
        if not value.isfinite():
            raise FloatingPointError(f"loss {value.item()} in step {step}")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        seconds += time.process_time() - started
        if step in checkpoints:
            found = metrics(rank_pairs(model, split, "validation"), split, "validation")
            validation.append(found["NDCG@20"])
            if validation[-1] == max(validation):
                best_step, best_state = step, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    return Trained(model, best_step, validation, seconds, [])


def batches(split: RandomSplit, config: Config, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of the training part in an order of each epoch's own."""
    users, items = (torch.from_numpy(one) for one in split.pairs("training"))
    generator, step = torch.Generator().manual_seed(seed), 0
    while True:
        for rows in torch.randperm(len(users), generator=generator).split(config.batch_size):
            if step == config.steps:
                return
            step += 1
            yield users[rows], items[rows]


@torch.no_grad()
def rank_pairs(model: Factors, split: RandomSplit, part: str) -> np.ndarray:  # [P] int64
    """Rank every held-out item among all that its user has not seen before; 0 is the best."""
    users, items = split.pairs(part)
    seen = split.seen(part)
    queries, table = (
        nn.functional.normalize(one.weight, dim=1) for one in (model.users, model.items)
    )
    ranks = []
    for start in range(0, len(users), PAIRS_PER_BATCH):
        asked = users[start : start + PAIRS_PER_BATCH]
        histories = [seen[user] for user in asked]
        offsets = torch.tensor([0, *map(len, histories)]).cumsum(0)
        target = torch.from_numpy(items[start : start + PAIRS_PER_BATCH])
        known = offsets, torch.from_numpy(np.concatenate(histories))
        ranks.append(dwl_kernels.rank_targets(queries[asked], table, target, seen=known) - 1)
    return torch.cat(ranks).numpy()


def metrics(ranks: np.ndarray, split: RandomSplit, part: str) -> dict[str, float]:
    """Means over users: the share of a user's items that are found, and NDCG, both at 20."""
    users, _ = split.pairs(part)
    held = np.bincount(users, minlength=split.data.num_users)
    asked = held > 0
    best = np.cumsum(1 / np.log2(np.arange(K) + 2.0))[np.minimum(held[asked], K) - 1]
    gained, found = (
        np.bincount(users, weights=metric(ranks, K), minlength=len(held))[asked]
        for metric in (ndcg, recall)
    )
    return {
        "NDCG@20": float((gained / best).mean()),
        "Recall@20": float((found / held[asked]).mean()),
    }
