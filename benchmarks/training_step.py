"""The share of the loss in a whole training step, with plain PyTorch and with this package.

``python -m benchmarks.training_step`` trains models of the sizes of MovieLens 1M on random ids: a
step is the model, the loss, both backwards and Adam. The loss alone is timed on embeddings of the
same shapes. Steps are taken in turn; ``results/training-step.json`` keeps the medians.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.progress import Progress
from benchmarks.quality.model import Transformer
from benchmarks.quality.settings import Config
from benchmarks.record import ROOT, record, write_json
from dwl_kernels import full_softmax_loss, in_batch_softmax_loss

USERS, ITEMS, DIM = 6040, 3706, 64
ROWS = 4096  # of a batch of the two towers
SEQUENCES, LENGTH = 64, 50
RESULT = ROOT / "benchmarks" / "results" / "training-step.json"

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Model:
    name: str
    modules: nn.Module
    inputs: Callable[[], tuple[Tensor, ...]]  # what the loss takes, from the model
    losses: dict[str, Loss]


def in_batch(query: Tensor, positive: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
    """The in-batch softmax with log-Q and hits, as most people write it."""
    logits = query @ positive.T - log_q
    hits = ids[:, None] == ids
    hits.fill_diagonal_(False)
    logits = logits.masked_fill(hits, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(query)))


def two_towers() -> Model:
    """Tables with one hidden layer on either side."""

    def tower(rows: int) -> nn.Module:
        hidden = nn.Linear(DIM, 2 * DIM), nn.ReLU(), nn.Linear(2 * DIM, DIM)
        return nn.Sequential(nn.Embedding(rows, DIM), *hidden)

    modules = nn.ModuleList([tower(USERS), tower(ITEMS)])
    users, items = torch.randint(USERS, (ROWS,)), torch.randint(ITEMS, (ROWS,))
    log_q = torch.full((ROWS,), 1 / ITEMS).log()

    def inputs() -> tuple[Tensor, ...]:
        return modules[0](users), modules[1](items), items, log_q

    def ours(query: Tensor, positive: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
        return in_batch_softmax_loss(query, positive, ids=ids, log_q=log_q)

    name = f"two towers, {ROWS:,} in-batch candidates"
    return Model(name, modules, inputs, {"pytorch": in_batch, "package": ours})


def sequence_model() -> Model:
    """The model of the quality benchmark; every step predicts among all items."""
    model = Transformer(ITEMS, Config(steps=1, max_length=LENGTH, dim=DIM))
    items, targets = torch.randint(ITEMS, (2, SEQUENCES, LENGTH))

    def inputs() -> tuple[Tensor, ...]:
        return model(items), model.items.weight, targets

    def plain(query: Tensor, table: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy((query @ table.T).flatten(0, 1), target.flatten())

    name = f"SASRec, {SEQUENCES * LENGTH:,} steps over {ITEMS:,} items"
    return Model(name, model, inputs, {"pytorch": plain, "package": full_softmax_loss})


def measured(model: Model, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step and of the loss alone, medians over rounds in turn."""
    optimizer = torch.optim.Adam(model.modules.parameters(), lr=1e-3)
    with torch.no_grad():
        leaves = [t.clone() for t in model.inputs()]

    def step(loss: Loss) -> None:
        optimizer.zero_grad()
        loss(*model.inputs()).backward()
        optimizer.step()

    def alone(loss: Loss) -> None:
        given = [t.detach().requires_grad_(t.is_floating_point() and t.dim() > 1) for t in leaves]
        loss(*given).backward()

    times: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        for version, loss in model.losses.items():
            for what, run in (("step_ms", step), ("loss_ms", alone)):
                started = time.perf_counter()
                run(loss)
                if number:  # the first warms up
                    took = 1e3 * (time.perf_counter() - started)
                    times.setdefault((version, what), []).append(took)
    return {
        version: {what: round(median(times[version, what]), 3) for what in ("step_ms", "loss_ms")}
        for version in model.losses
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    found = []
    for model in (two_towers(), sequence_model()):
        with Progress() as progress:
            progress(model.name)
            figures = measured(model, options.rounds)
        found.append({"model": model.name, **figures})
        print(f"{model.name}\n{'ms':<20}{'step':>8}{'its loss':>10}")
        for name, version in (("plain PyTorch", "pytorch"), ("this package", "package")):
            step, loss = figures[version]["step_ms"], figures[version]["loss_ms"]
            print(f"{name:<20}{step:>8.1f}{loss:>10.1f}")
        ratio = figures["pytorch"]["step_ms"] / figures["package"]["step_ms"]
        print(f"a step is {ratio:.2f} times as fast\n", flush=True)
    command = "python -m benchmarks.training_step"
    write_json(options.out, record(command=command, rounds=options.rounds, models=found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
