"""Train one model with one loss, choose the epoch on the validation items, rank the test items."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dwl_kernels import (
    CumulativeCrossEntropy,
    DomainWeights,
    DualScaleSampledSoftmax,
    DynamicWeightedSampledSoftmax,
    UnigramSampler,
)
from dwl_kernels.core.problem import Correction

from .metrics import LeaveOneOut, ndcg, rank_targets
from .model import SequenceModel

TrainedLoss = Literal[
    "plain", "dynamic", "fixed", "refined", "dual", "dual-dynamic", "cross-entropy"
]
Loss = Literal[TrainedLoss, "bonus"]
LOSSES: tuple[Loss, ...] = get_args(Loss)


@dataclass(frozen=True)
class Config:
    """Everything that shapes a run; the same for every loss."""

    epochs: int
    max_length: int
    batch_size: int = 64  # sequences
    learning_rate: float = 5e-3
    dim: int = 64
    blocks: int = 2
    heads: int = 1
    dropout: float = 0.1
    negatives: int = 1024  # shared by the rows of a batch
    sampling_power: float = 0.75  # negatives are drawn by popularity to this power
    temperature: float = 1.0
    weight_range: tuple[float, float] = (1.0, 4.0)
    calibration: float = 0.0


@dataclass(frozen=True)
class Run:
    """What one training run gave."""

    loss: Loss
    seed: int
    ranks: np.ndarray  # [E] int64, of the test items, 0 is the best
    best_epoch: int
    validation: list[float]  # NDCG@10 of every epoch
    seconds: float
    loss_share: float  # part of the training time that the loss and its gradients took
    weights: list[float]  # of the domains, as the training left them
    model: SequenceModel  # of the best epoch


@dataclass
class Batch:
    inputs: Tensor  # [B, L] int64
    targets: Tensor  # [B, L] int64
    example_weights: Tensor  # [B, L] float32, 0 where padded


def batches(split: LeaveOneOut, config: Config, rng: np.random.Generator) -> Iterator[Batch]:
    """One epoch: a random window of each user's training items, like lengths together."""
    starts = split.data.offsets[:-1]
    steps = split.train_stops - starts - 1  # the last training item has no target
    lengths = np.minimum(steps, config.max_length)
    starts = starts + rng.integers(0, steps - lengths + 1)
    order = rng.permutation(np.flatnonzero(steps > 0))
    # Sorting within pools of 16 batches leaves little padding and keeps the batches random.
    pools = np.array_split(order, -(-len(order) // (16 * config.batch_size)))
    ordered = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    for index in rng.permutation(-(-len(ordered) // config.batch_size)):
        users = ordered[index * config.batch_size :][: config.batch_size]
        step = np.arange(lengths[users].max())
        real = step < lengths[users, None]  # [B, L]
        place = np.where(real, starts[users, None] + step, starts[users, None])
        yield Batch(
            torch.from_numpy(split.data.items[place]),
            torch.from_numpy(split.data.items[place + 1]),
            torch.from_numpy(real.astype(np.float32)),
        )


def steps_per_epoch(split: LeaveOneOut, batch_size: int) -> int:
    return -(-int((split.train_stops - split.data.offsets[:-1] > 1).sum()) // batch_size)


def one_cycle(
    optimizer: torch.optim.Optimizer, learning_rate: float, steps: int
) -> torch.optim.lr_scheduler.OneCycleLR:
    """A tenth of the run warms up, two steps at least: PyTorch divides by their number less 1."""
    share = min(max(0.1, 2 / steps), 0.9)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, steps, pct_start=share, cycle_momentum=False
    )


def measure_domains(split: LeaveOneOut, config: Config) -> DomainWeights:
    """Domain weights from the training part alone."""
    data, mask = split.data, split.train_mask
    items = data.items[mask]
    return DomainWeights.from_interactions(
        torch.from_numpy(data.users[mask]),
        torch.from_numpy(items),
        torch.from_numpy(data.item_domains[items]),
        names=data.domain_names,
        weight_range=config.weight_range,
    )


def make_loss(
    loss: TrainedLoss, split: LeaveOneOut, config: Config
) -> DynamicWeightedSampledSoftmax | CumulativeCrossEntropy:
    """The compared losses differ here and nowhere else."""
    if loss == "cross-entropy":
        return CumulativeCrossEntropy(temperature=config.temperature)
    module = DualScaleSampledSoftmax if loss.startswith("dual") else DynamicWeightedSampledSoftmax
    if loss in ("plain", "refined", "dual"):
        correction: Correction = "refined" if loss == "refined" else "standard"
        return module(temperature=config.temperature, correction=correction)
    weights = measure_domains(split, config)
    if loss == "fixed":
        weights = by_hand(weights)
    return module(
        weights=weights,
        item_domains=torch.from_numpy(split.data.item_domains),
        calibration=config.calibration,
        temperature=config.temperature,
    )


def by_hand(measured: DomainWeights) -> DomainWeights:
    """As one would set fixed weights: the most for the sparsest quarter of the domains."""
    low, high = measured.weight_range
    interactions = measured.interactions.float()
    sparse = interactions <= interactions.quantile(0.25)
    chosen = torch.where(sparse, high, low)
    mean = (chosen * measured.shares).sum() / measured.shares.sum()
    return DomainWeights.constant(chosen / mean, names=measured.names)


def train(
    loss: TrainedLoss,
    split: LeaveOneOut,
    config: Config,
    seed: int,
    progress: Callable[[str], object] = lambda text: None,
) -> Run:
    """Train from scratch and rank the test items with the model of the best validation epoch.

    Args:
        loss: "plain" is the sampled softmax with log-Q and weighs all examples alike. "dynamic"
            weighs by the measured domains, "fixed" gives the sparsest quarter of the domains the
            most and the others the least. "refined" takes the positive out of the denominator,
            "dual" weighs candidates and moves temperatures, "dual-dynamic" weighs by domain as
            well. "cross-entropy" has the whole catalogue as candidates.
        split: training, validation and test items.
        config: shared by all losses.
        seed: fixes initial weights, batches, dropout and negatives, alike for every loss.
        progress: called with what is done so far, in words.

    Returns:
        The ranks of the test items and how they came about.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
    """
    torch.manual_seed(seed)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    data = split.data
    model = SequenceModel(
        data.num_items, config.max_length, config.dim, config.blocks, config.heads, config.dropout
    )
    loss_fn = make_loss(loss, split, config)
    counts = np.bincount(data.items[split.train_mask], minlength=data.num_items)
    sampler = UnigramSampler(torch.from_numpy(counts + 1), power=config.sampling_power)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    steps = steps_per_epoch(split, config.batch_size)
    schedule = one_cycle(optimizer, config.learning_rate, config.epochs * steps)
    table = model.items.weight
    validation: list[float] = []
    best_epoch, best_state = 0, model.state_dict()
    started, in_loss, in_training = time.perf_counter(), 0.0, 0.0

    for epoch in range(config.epochs):
        model.train()
        loss_fn.train()
        for step, batch in enumerate(batches(split, config, rng)):
            step_started = time.perf_counter()
            query = model(batch.inputs)  # [B, L, D]
            if loss == "cross-entropy":
                candidates = {"table": table, "target": batch.targets}
            else:
                candidates = draw(sampler, table, batch.targets, config.negatives, generator)

            loss_started = time.perf_counter()
            value = loss_fn(query, **candidates, example_weights=batch.example_weights)
            in_loss += time.perf_counter() - loss_started  # the forward pass makes the gradients
            if not value.isfinite():
                raise FloatingPointError(f"loss {value.item()} in step {step} of epoch {epoch}")

            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            in_training += time.perf_counter() - step_started
            so_far = f", NDCG@10 {validation[-1]:.3f}" if validation else ""
            progress(f"{(epoch + (step + 1) / steps) / config.epochs:.0%}{so_far}")
        validation.append(float(ndcg(rank_targets(model, split, "validation")).mean()))
        if validation[-1] == max(validation):
            best_epoch, best_state = epoch + 1, copy.deepcopy(model.state_dict())

    model.load_state_dict(best_state)
    weights = loss_fn.domain_weights
    return Run(
        loss=loss,
        seed=seed,
        ranks=rank_targets(model, split, "test"),
        best_epoch=best_epoch,
        validation=validation,
        seconds=time.perf_counter() - started,
        loss_share=in_loss / in_training,
        weights=[] if weights is None else weights().tolist(),
        model=model,
    )


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


def with_bonus(plain: Run, split: LeaveOneOut, config: Config) -> Run:
    """The rival that costs nothing: log-weights added to the scores of the plain model."""
    weights = measure_domains(split, config)
    bonus = weights.log_weight(torch.from_numpy(split.data.item_domains))
    ranks = rank_targets(plain.model, split, "test", bonus)
    return replace(plain, loss="bonus", ranks=ranks, weights=weights().tolist())
