"""Train one model with one loss and choose its checkpoint on the validation items.

`runs` calls it for the settings whose models read sequences, and `make demo`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from benchmarks.record import replacing

from .metrics import LeaveOneOut, ndcg, rank_targets
from .model import Recurrent, SequenceModel, Transformer
from .objective import Batch, Objective, first_weighted_step
from .settings import DEFERRED, Config, Method

Model = TypeVar("Model", bound=nn.Module)
CHECKPOINTS = (0.7, 0.8, 0.9, 1.0)  # of the steps; all after deferred weights begin


@dataclass(frozen=True)
class Trained(Generic[Model]):
    """What one training run gave."""

    model: Model  # of the best checkpoint
    best_step: int
    validation: list[float]  # NDCG@10 of every checkpoint
    seconds: float  # of the processor, without ranking
    weights: list[float]  # of the domains, as the training left them


def batches(
    split: LeaveOneOut, config: Config, seed: int, steps: range | None = None
) -> Iterator[Batch]:
    """A random window of each user's training items, like lengths together, epoch after epoch.

    An epoch is settled by the seed and its number, so that a run can begin at any step.
    """
    per_epoch = steps_per_epoch(split, config.batch_size)
    steps = steps or range(config.steps)
    for epoch in range(steps.start // per_epoch, -(-steps.stop // per_epoch)):
        rng = np.random.default_rng([seed, epoch])
        starts = split.data.offsets[:-1]
        long = split.train_stops - starts - 1  # the last training item has no target
        lengths = np.minimum(long, config.max_length)
        starts = starts + rng.integers(0, long - lengths + 1)
        order = rng.permutation(np.flatnonzero(long > 0))
        # Sorting within pools of 16 batches leaves little padding and keeps the batches random.
        pools = np.array_split(order, -(-len(order) // (16 * config.batch_size)))
        ordered = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
        for number, index in enumerate(rng.permutation(per_epoch)):
            if epoch * per_epoch + number not in steps:
                continue
            users = ordered[index * config.batch_size :][: config.batch_size]
            step = np.arange(lengths[users].max())
            real = step < lengths[users, None]  # [B, L]
            place = np.where(real, starts[users, None] + step, starts[users, None])
            yield Batch(
                torch.from_numpy(users),
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


def make_sequence_model(method: Method, split: LeaveOneOut, config: Config) -> SequenceModel:
    kind = Recurrent if method.backbone == "gru" else Transformer
    return kind(split.data.num_items, config)


def train(
    method: Method,
    split: LeaveOneOut,
    config: Config,
    seed: int,
    progress: Callable[[str], object] = lambda text: None,
    states: Path | None = None,
) -> Trained[SequenceModel]:
    """Train from scratch and keep the model of the best checkpoint.

    Args:
        method: the loss and its schedule.
        split: training, validation and test items; the test items are not looked at.
        config: shared by all methods.
        seed: fixes initial weights, batches, dropout and negatives, alike for every method.
        progress: called with what is done so far, in words.
        states: a folder where the plain run of a seed leaves the state in which deferred weights
            begin, and deferred runs find it: they would train to it anyway.

    Returns:
        The model and how it came about.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
    """
    torch.manual_seed(seed)
    model = make_sequence_model(method, split, config)
    objective = Objective(method, split, config, seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    schedule = one_cycle(optimizer, config.learning_rate, config.steps)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    fork = round(DEFERRED * config.steps)
    shared = states and states / f"{method.backbone}-{seed}.pt"
    begin = 0
    if shared and first_weighted_step(method, config) and _restore(shared, parts, config):
        begin = fork
        for batch in batches(split, config, seed, range(fork)):
            objective.count(batch)
        objective.generator.set_state(torch.load(shared)["generator"])

    checkpoints = {max(round(part * config.steps), 1) for part in CHECKPOINTS}
    validation: list[float] = []
    best_step, best_state = 0, model.state_dict()
    seconds, table = 0.0, model.items.weight
    step = begin
    model.train()
    for batch in batches(split, config, seed, range(begin, config.steps)):
        started = time.process_time()
        if step >= fork:  # the schedule sets the rate anew after every step
            for group in optimizer.param_groups:
                group["lr"] *= method.late_rate
            table.requires_grad_(not method.frozen)
        value = objective(model(batch.inputs), table, batch)
        if not value.isfinite():
            raise FloatingPointError(f"loss {value.item()} in step {step}")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        step += 1
        seconds += time.process_time() - started
        progress(f"{step / config.steps:.0%}")
        if shared and step == fork and method == Method(backbone=method.backbone):
            _keep(shared, parts, config, objective.generator)
        if step in checkpoints:
            validation.append(float(ndcg(rank_targets(model, split, "validation")).mean()))
            model.train()
            if validation[-1] == max(validation):
                best_step, best_state = step, copy.deepcopy(model.state_dict())

    model.load_state_dict(best_state)
    weights = objective.loss.domain_weights
    found = [] if weights is None else weights().tolist()
    return Trained(model.eval(), best_step, validation, seconds, found)


def _keep(path: Path, parts: dict[str, Any], config: Config, generator: torch.Generator) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"generator": generator.get_state(), "dropout": torch.get_rng_state()}
    with replacing(path) as partial:
        torch.save({**state, "config": asdict(config)}, partial)


def _restore(path: Path, parts: dict[str, Any], config: Config) -> bool:
    """Take the state of the plain run up, if it is there and of the same configuration."""
    if not path.exists():
        return False
    state = torch.load(path)
    if state["config"] != asdict(config):
        return False
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["dropout"])
    return True
