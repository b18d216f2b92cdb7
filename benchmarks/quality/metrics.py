"""Leave-one-out split and full-ranking metrics, overall and per domain."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import dwl_kernels
from dwl_kernels.examples.data import Interactions

from .model import SequenceModel

K = 10
SPARSEST = "sparsest ¼"
USERS_PER_BATCH = 256


@dataclass(frozen=True)
class LeaveOneOut:
    """The last item of a user is the test item, the one before validates, the rest trains.

    A user with fewer than three items only trains.
    """

    data: Interactions

    @cached_property
    def users(self) -> np.ndarray:  # [E] int64, who is evaluated
        return np.flatnonzero(self.data.lengths >= 3)

    @cached_property
    def train_stops(self) -> np.ndarray:  # [U] int64, user u trains on items[offsets[u]:stops[u]]
        return np.where(self.data.lengths >= 3, self.data.offsets[1:] - 2, self.data.offsets[1:])

    @cached_property
    def train_mask(self) -> np.ndarray:  # [n] bool, which interactions train
        return np.arange(len(self.data.items)) < np.repeat(self.train_stops, self.data.lengths)

    def target(self, part: str) -> np.ndarray:  # [E] int64
        """The item to be ranked for each evaluated user, `part` is "validation" or "test"."""
        ends = self.data.offsets[1:][self.users]
        return self.data.items[ends - _from_end(part)]

    @cached_property
    def known(self) -> np.ndarray:  # sorted user * V + item of what trains
        mask = self.train_mask
        return np.sort(self.data.users[mask] * self.data.num_items + self.data.items[mask])

    def history(self, user: int, part: str) -> np.ndarray:
        """What the user had seen before that item."""
        return self.data.sequence(user)[: -_from_end(part)]


def _from_end(part: str) -> int:
    return {"validation": 2, "test": 1}[part]


@torch.no_grad()
def rank_targets(
    model: SequenceModel,
    split: LeaveOneOut,
    part: str,
    *bonuses: Tensor,  # [V] each, added to the scores
) -> np.ndarray:  # [E] int64, or [bonuses, E]
    """Rank every user's target among all items that the user has not seen; 0 is the best rank.

    Equal scores rank before the target and NaN ranks it last, so a broken model cannot look good.
    """
    model.eval()
    targets = torch.from_numpy(split.target(part))
    lengths = split.data.lengths[split.users]
    ranks = torch.empty(max(len(bonuses), 1), len(targets), dtype=torch.int64)
    for batch in np.array_split(np.argsort(lengths), -(-len(lengths) // USERS_PER_BATCH)):
        histories = [torch.from_numpy(split.history(u, part)) for u in split.users[batch]]
        recent = [history[-model.max_length :] for history in histories]
        last = torch.tensor([len(history) - 1 for history in recent])
        query = model(pad_sequence(recent, batch_first=True))[torch.arange(len(batch)), last]
        offsets = torch.tensor([0, *map(len, histories)]).cumsum(0)
        seen = offsets, torch.cat(histories)
        asked = query, model.items.weight, targets[batch]
        for number, bonus in enumerate(bonuses or (None,)):
            found = dwl_kernels.rank_targets(*asked, seen=seen, bias=bonus)
            ranks[number, batch] = found - 1
    return ranks.numpy() if bonuses else ranks[0].numpy()


def recall(ranks: np.ndarray, k: int = K) -> np.ndarray:
    """1 where the only relevant item is among the first k, else 0."""
    return (ranks < k).astype(np.float64)


def ndcg(ranks: np.ndarray, k: int = K) -> np.ndarray:
    """`1 / log2(rank + 2)` where the only relevant item is among the first k, else 0."""
    return np.where(ranks < k, 1 / np.log2(ranks + 2.0), 0.0)


@dataclass(frozen=True)
class Group:
    """Users that are reported together."""

    name: str
    members: np.ndarray  # [E] bool


def make_groups(split: LeaveOneOut, part: str) -> list[Group]:
    """All users, those of the sparsest quarter of the domains, then each domain by size.

    A user belongs to every domain of the item of that part; domains without users are left out.
    Sizes are those of the training part, from which the weights are measured.
    """
    data = split.data
    targets = split.target(part)
    trained = data.item_domains[data.items[split.train_mask]]
    sizes = np.bincount(trained[trained >= 0], minlength=len(data.domain_names))
    domains = data.item_domains[targets]  # [E, G]
    by_size = np.argsort(-sizes, kind="stable")
    quarter = -(-len(sizes) // 4)
    of_domain: list[np.ndarray] = [(domains == d).any(axis=1) for d in by_size]
    groups = [
        Group("all", np.ones(len(domains), bool)),
        Group(SPARSEST, np.any([of_domain[n] for n in range(len(sizes) - quarter, len(sizes))], 0)),
        *(Group(data.domain_names[d], of) for d, of in zip(by_size, of_domain, strict=True)),
    ]
    return [group for group in groups if group.members.any()]
