"""What a method of `settings` computes of a batch: its loss, weights and candidates.

`train` makes one per run; methods that train sequence models differ here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwl_kernels import (
    CumulativeCrossEntropy,
    DomainWeights,
    DynamicWeightedSampledSoftmax,
    UnigramSampler,
)

from .metrics import LeaveOneOut
from .settings import DEFERRED, Config, Method


@dataclass
class Batch:
    users: Tensor  # [B] int64
    inputs: Tensor  # [B, L] int64
    targets: Tensor  # [B, L] int64
    example_weights: Tensor  # [B, L] float32, 0 where padded


def measure_domains(
    split: LeaveOneOut, high: float = 4.0, start: int = 0, full: int = 0, *, by_item: bool = False
) -> DomainWeights:
    """Weights in (1, high) from the training part alone; of items, each is a domain of its own."""
    data, mask = split.data, split.train_mask
    items = data.items[mask]
    return DomainWeights.from_interactions(
        torch.from_numpy(data.users[mask]),
        torch.from_numpy(items),
        torch.from_numpy(items if by_item else data.item_domains[items]),
        num_domains=data.num_items if by_item else None,
        names=None if by_item else data.domain_names,
        weight_range=(1.0, high),
        start=start,
        full=full,
    )


def by_hand(measured: DomainWeights) -> DomainWeights:
    """As one would set fixed weights: the most for the sparsest quarter of the domains."""
    low, high = measured.weight_range
    interactions = measured.interactions.float()
    sparse = interactions <= interactions.quantile(0.25)
    chosen = torch.where(sparse, high, low)
    mean = (chosen * measured.shares).sum() / measured.shares.sum()
    return DomainWeights.constant(chosen / mean, names=measured.names)


def first_weighted_step(method: Method, config: Config) -> int:
    """Up to here a deferred run is that of the plain loss."""
    deferred = method.loss == "dynamic" and method.schedule == "deferred"
    return round(DEFERRED * config.steps) if deferred else 0


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Those of the loss, where the processor has them: steps are shorter."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Objective(nn.Module):
    """The value of a method's loss for a batch; methods differ here and nowhere else."""

    def __init__(self, method: Method, split: LeaveOneOut, config: Config, seed: int) -> None:
        super().__init__()
        self.method, self.split, self.negatives = method, split, config.negatives
        self.generator = torch.Generator().manual_seed(seed)
        self.step, self.begin = 0, first_weighted_step(method, config)
        by_item = method.weighed == "item"
        domains = np.arange(split.data.num_items) if by_item else split.data.item_domains
        self.item_domains = torch.from_numpy(domains)
        options: dict[str, Any] = {"temperature": config.temperature}
        weights: DomainWeights | None = None
        if method.loss in ("dynamic", "fixed"):
            full = config.steps if method.schedule == "ramped" else self.begin
            weights = measure_domains(split, method.high, self.begin, full, by_item=by_item)
            weights = by_hand(weights) if method.loss == "fixed" else weights
        self.excess = Excess(method.high, self.item_domains) if method.weighed == "excess" else None
        self.kept = None
        if weights is not None and method.thinned:
            self.kept = weights.example_weight(self.item_domains)
        if weights is not None and self.excess is None and self.kept is None:
            options["weights"] = weights
            options["item_domains"] = self.item_domains
            options["calibration"] = method.calibration
        counts = np.bincount(split.data.items[split.train_mask], minlength=split.data.num_items)
        drawn = torch.from_numpy(counts + 1)
        factors = None
        if method.candidates:
            measured = measure_domains(split)
            factors = measured.example_weight(torch.from_numpy(split.data.item_domains))
            factors = factors**method.candidates
        self.sampler = UnigramSampler(drawn, power=config.sampling_power, weights=factors)
        if method.loss == "cross-entropy":
            self.loss: CumulativeCrossEntropy | DynamicWeightedSampledSoftmax
            self.loss = CumulativeCrossEntropy(**options)
        else:
            apart = method.loss == "cvar" or self.excess is not None
            options["correction"] = "refined" if method.loss == "refined" else "standard"
            options["reduction"] = "none" if apart else "mean"
            self.loss = DynamicWeightedSampledSoftmax(**options)

    def forward(self, query: Tensor, table: Tensor, batch: Batch) -> Tensor:
        weights = batch.example_weights
        if self.method.loss == "cross-entropy":
            with bfloat16_products():
                return self.loss(query, table, batch.targets, example_weights=weights)
        if self.method.loss == "binary":
            return self._binary(query, table, batch)
        if self.method.loss == "bpr":
            return _bpr(query, F.embedding(batch.targets, table), batch)
        drawn = draw(self.sampler, table, batch.targets, self.negatives, self.generator)
        self.step += 1
        if self.kept is not None and self.step > self.begin:
            kept = self.kept[batch.targets] / self.kept.max()
            weights = weights * (torch.rand(kept.shape, generator=self.generator) < kept)
        with bfloat16_products():
            value: Tensor = self.loss(query, **drawn, example_weights=weights)
        if self.method.loss == "cvar":
            rows = value[weights > 0]
            value = rows.topk(max(round(self.method.tail * len(rows)), 1)).values.mean()
        elif self.excess is not None:
            real = weights > 0
            value = self.excess(value[real], batch.targets[real], self.step > self.begin)
        return value

    def count(self, batch: Batch) -> None:
        """Let the domain weights see a batch, as a forward does."""
        self.step += 1
        if self.loss.domain_weights is not None:
            domains = self.item_domains[batch.targets]
            real = batch.example_weights > 0
            self.loss.domain_weights.update(domains[real])

    def _binary(self, query: Tensor, table: Tensor, batch: Batch) -> Tensor:
        known, items = self.split.known, self.split.data.num_items
        keys = (batch.users * items)[:, None].expand_as(batch.targets)
        drawn = torch.randint(items, batch.targets.shape, generator=self.generator)
        for _ in range(3):  # a few of those that were known in vain stay
            where = np.searchsorted(known, (keys + drawn).numpy()).clip(max=len(known) - 1)
            again = torch.from_numpy(known[where]) == keys + drawn
            fresh = torch.randint(items, batch.targets.shape, generator=self.generator)
            drawn = torch.where(again, fresh, drawn)
        scores = [(query * F.embedding(ids, table)).sum(-1) for ids in (batch.targets, drawn)]
        rows = -F.logsigmoid(scores[0]) - F.logsigmoid(-scores[1])
        return (rows * batch.example_weights).sum() / batch.example_weights.sum()


class Excess(nn.Module):
    """Domains of a larger loss weigh more: group DRO (1911.08731) within (1, high)."""

    RATE = 0.01  # of the ascent; 1,000 steps of a loss 0.5 above the mean multiply by 150

    def __init__(self, high: float, item_domains: Tensor) -> None:  # [V, G]
        super().__init__()
        self.limit = math.log(high)
        self.item_domains = item_domains
        self.log_weight = torch.zeros(int(item_domains.max()) + 1)

    def forward(self, rows: Tensor, targets: Tensor, weighed: bool) -> Tensor:  # both [R]
        if not weighed:
            return rows.mean()
        domains = self.item_domains[targets]  # [R, G]
        inside = torch.zeros(len(rows), len(self.log_weight) + 1)
        inside = inside.scatter_(1, domains.remainder(inside.shape[1]), 1.0)[:, :-1]
        count = inside.sum(0)
        above = torch.where(count > 0, inside.T @ rows.detach() / count - rows.detach().mean(), 0.0)
        self.log_weight += self.RATE * above
        self.log_weight -= self.log_weight.min()
        self.log_weight.clamp_(max=self.limit)
        weights = inside @ self.log_weight.exp() / inside.sum(1)
        weights = weights.nan_to_num(1.0)
        return (rows * weights).sum() / weights.sum()


def _bpr(query: Tensor, positive: Tensor, batch: Batch) -> Tensor:  # both [B, L, D]
    scores = torch.einsum("bld,cld->lbc", query, positive)
    own = scores.diagonal(dim1=1, dim2=2)[..., None]  # [L, B, 1]
    real, ids = batch.example_weights.T, batch.targets.T  # [L, B]
    pairs = real[:, :, None] * real[:, None, :] * (ids[:, :, None] != ids[:, None, :])
    return -(F.logsigmoid(own - scores) * pairs).sum() / pairs.sum().clamp(min=1)


def draw(
    sampler: UnigramSampler,
    table: Tensor,  # [V, D]
    targets: Tensor,  # [B, L]
    negatives: int,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Positives and sampled negatives, as the sampled losses take them."""
    negative_ids, negative_log_q = sampler.sample(negatives, generator=generator)
    return {
        "positive": F.embedding(targets, table),
        "negative": F.embedding(negative_ids, table),
        "positive_ids": targets,
        "negative_ids": negative_ids,
        "positive_log_q": sampler.log_q(targets),
        "negative_log_q": negative_log_q,
    }
