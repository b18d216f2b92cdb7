"""Cosines of users and items, where the dual scale belongs: split, models, training, metrics.

`runs` calls it for the settings of the dual scale.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dwl_kernels
from dwl_kernels import DualScaleSampledSoftmax, UniformSampler
from dwl_kernels.examples.data import Interactions

from .metrics import ndcg, recall
from .objective import bfloat16_products
from .settings import Config, Method
from .train import CHECKPOINTS, Trained, one_cycle

K = 20
PAIRS_PER_BATCH = 4096
LAYERS = 3  # of LightGCN, steps over the graph
# Its times the rows of a batch, and the learning rate: by NDCG@20 of the softmax loss on validation
# items of ml-1m, and by what a processor can do.
GRAPH_ROWS, GRAPH_RATE = 4, 3.0


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
    """Matrix factorisation: a vector for every user and item; the score is their cosine."""

    def __init__(self, users: int, items: int, dim: int) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, dim), nn.Embedding(items, dim)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self) -> tuple[Tensor, Tensor]:  # of all users [U, D], of all items [V, D]
        return self.users.weight, self.items.weight


class LightGCN(Factors):
    """The mean of the vectors and of what `LAYERS` steps over the graph make of them (2002.02126).

    A step adds up the neighbours of a node, each divided by the root of both their degrees.
    """

    graph: Tensor  # [U + V, U + V] sparse, symmetric

    def __init__(self, split: RandomSplit, dim: int) -> None:
        data = split.data
        super().__init__(data.num_users, data.num_items, dim)
        users, items = (torch.from_numpy(one) for one in split.pairs("training"))
        ends = torch.stack([users, items + data.num_users])
        ends = torch.cat([ends, ends.flip(0)], 1)
        nodes = data.num_users + data.num_items
        degree = torch.bincount(ends[0], minlength=nodes).float()
        weights = (degree[ends[0]] * degree[ends[1]]).rsqrt()
        graph = torch.sparse_coo_tensor(ends, weights, (nodes, nodes), check_invariants=True)
        with warnings.catch_warnings():  # that CSR tensors are new
            warnings.simplefilter("ignore", UserWarning)
            self.register_buffer("graph", graph.coalesce().to_sparse_csr(), persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        layers = [torch.cat([self.users.weight, self.items.weight])]
        for _ in range(LAYERS):
            layers.append(_Step.apply(self.graph, layers[-1]))
        mixed = torch.stack(layers).mean(0)
        users, items = mixed.split((len(self.users.weight), len(self.items.weight)))
        return users, items


class _Step(torch.autograd.Function):
    """`graph @ x`. PyTorch's own backward transposes the graph anew, which is symmetric."""

    @staticmethod
    def forward(ctx: Any, graph: Tensor, x: Tensor) -> Tensor:
        ctx.graph = graph
        return graph @ x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, ctx.graph @ gradients[0]


def make_model(method: Method, split: RandomSplit, config: Config) -> Factors:
    if method.backbone == "graph":
        return LightGCN(split, config.dim)
    return Factors(split.data.num_users, split.data.num_items, config.dim)


def train_factors(
    method: Method, split: RandomSplit, config: Config, seed: int
) -> Trained[Factors]:
    """Train from scratch and keep the model of the checkpoint with the best NDCG@20.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
    """
    torch.manual_seed(seed)
    if method.backbone == "graph":  # a step over the graph costs more than the rows do
        more = GRAPH_ROWS
        steps, rate = config.steps // more, GRAPH_RATE * config.learning_rate
        rows = config.batch_size * more
        config = replace(config, steps=steps, batch_size=rows, learning_rate=rate)
    model = make_model(method, split, config)
    loss_fn = DualScaleSampledSoftmax(
        normalize=True,
        temperature=method.temperature or config.temperature,
        hardness=method.hardness,
        similarity=method.similarity,
        competition=method.competition,
    )
    sampler, generator = UniformSampler(split.data.num_items), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    schedule = one_cycle(optimizer, config.learning_rate, config.steps)
    checkpoints = {max(round(part * config.steps), 1) for part in CHECKPOINTS}
    validation: list[float] = []
    best_step, best_state, seconds = 0, model.state_dict(), 0.0
    for step, (users, items) in enumerate(batches(split, config, seed), 1):
        started = time.process_time()
        negative, _ = sampler.sample(config.negatives, generator=generator)
        user_table, item_table = model()
        with bfloat16_products():
            value = loss_fn(
                nn.functional.embedding(users, user_table),
                nn.functional.embedding(items, item_table),
                nn.functional.embedding(negative, item_table),
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
    queries, table = (nn.functional.normalize(one, dim=1) for one in model())
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
