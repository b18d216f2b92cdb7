"""Compare losses on one data set: `python -m benchmarks.quality --data path/to/ml-1m`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from benchmarks.progress import WIDTH, Progress
from benchmarks.record import record, replacing, write_json
from dwl_kernels import backends
from dwl_kernels.examples.data import DataError, Interactions, load
from dwl_kernels.examples.synthetic import synthetic

from . import report
from .metrics import LeaveOneOut, ndcg, recall
from .train import LOSSES, Config, Loss, Run, steps_per_epoch, train, with_bonus

SYNTHETIC_EPOCHS, REAL_STEPS = 10, 3000  # enough for NDCG@10 on the validation items to level off


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.weight_range[0] > options.weight_range[1]:
        parser.error("--weight-range: wanted 0 < LOW <= HIGH")
    console = Console(width=WIDTH, highlight=False)
    try:
        paths = compare_losses(options, console)
    except (DataError, FloatingPointError) as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return 1
    console.print("wrote", *paths, soft_wrap=True)
    return 0


def compare_losses(options: argparse.Namespace, console: Console) -> list[Path]:
    """Train every loss with every seed, print the tables, write the picture and the JSON."""
    data = load_data(options.data)
    split = LeaveOneOut(data)
    config = make_config(options, split)
    backend = backend_name()
    console.print(
        f"[bold]{data.name}[/]: {data.num_users:,} users, {data.num_items:,} items, "
        f"{len(data.items):,} interactions, {len(data.domain_names)} domains; "
        f"loss backend [bold]{backend}[/]"
    )
    runs = train_all(options.losses, split, config, options.seeds, console)

    groups = report.make_groups(split)
    seeds = f"{options.seeds} seed{'s' if options.seeds > 1 else ''}"
    for loss in report.compared_losses(runs):
        title = f"{data.name}: {loss} against plain, {seeds}, metrics at 10"
        console.print()
        console.print(report.table(runs, loss, groups, title))
    document = record(
        command=" ".join(["python -m benchmarks.quality", *sys.argv[1:]]),
        backend=backend,
        dtype="float32",
        data={
            "name": data.name,
            "users": data.num_users,
            "items": data.num_items,
            "interactions": len(data.items),
            "domains": data.domain_names,
        },
        config=asdict(config),
        seeds=list(range(options.seeds)),
        **report.results(runs, groups),
    )
    picture, text = (options.out / f"quality-{data.name}{end}" for end in (".png", ".json"))
    with replacing(picture) as partial:
        report.plot(partial, runs, groups, f"{data.name}: change against the plain loss, {seeds}")
    write_json(text, document)
    return [picture, text]


def load_data(name: str) -> Interactions:
    """The data set in a folder, or the synthetic one."""
    return synthetic() if name == "synthetic" else load(name)


def train_all(
    losses: Sequence[Loss], split: LeaveOneOut, config: Config, seeds: int, console: Console
) -> list[Run]:
    """One run per seed and loss, with a line when it is done."""
    runs: list[Run] = []
    with Progress() as progress:
        for seed in range(seeds):
            for loss in losses:
                name = f"{loss}, seed {seed}"
                if loss == "bonus":
                    progress(name)
                    plain = next(run for run in reversed(runs) if run.loss == "plain")
                    run = with_bonus(plain, split, config)
                else:
                    run = train(loss, split, config, seed, progress.of(name))
                runs.append(run)
                progress("")
                console.print(
                    f"{name}: NDCG@10 {ndcg(run.ranks).mean():.4f}, "
                    f"Recall@10 {recall(run.ranks).mean():.4f},\n  epoch {run.best_epoch}, "
                    f"{run.seconds:.0f} s, loss {run.loss_share:.0%} of a step"
                )
    return runs


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    add = parser.add_argument
    add("--data", default="synthetic", help="folder of a data set, or synthetic (default)")
    add(
        "--losses",
        type=loss_names,
        default=loss_names("dynamic"),
        help=f"to compare with plain, of {','.join(LOSSES)} (default dynamic)",
    )
    add("--epochs", type=positive, help=f"default {SYNTHETIC_EPOCHS}, or {REAL_STEPS} steps")
    add("--seeds", type=positive, default=1, help="runs per loss (default 1)")
    add("--out", type=folder, default=Path("results"), help="folder of PNG and JSON")
    add(
        "--weight-range",
        type=positive_float,
        nargs=2,
        default=Config.weight_range,
        metavar=("LOW", "HIGH"),
        help="weights of the densest and the sparsest domain there could be (default 1 4)",
    )
    add("--calibration", type=unit_interval, default=Config.calibration, help="0 (default) to 1")
    add(
        "--max-length", type=positive, help="items of a sequence (default the longest, at most 100)"
    )
    add("--negatives", type=positive, default=Config.negatives, help="candidates of a batch")
    add("--learning-rate", type=positive_float, default=Config.learning_rate)
    return parser


def make_config(options: argparse.Namespace, split: LeaveOneOut) -> Config:
    """Settle what depends on the data: the longest sequence and the number of epochs."""
    longest = int(split.data.lengths.max())
    epochs = options.epochs
    if epochs is None:
        real = -(-REAL_STEPS // steps_per_epoch(split, Config.batch_size))
        epochs = SYNTHETIC_EPOCHS if options.data == "synthetic" else real
    return Config(
        epochs=epochs,
        max_length=options.max_length or min(longest, 100),
        learning_rate=options.learning_rate,
        negatives=options.negatives,
        weight_range=tuple(options.weight_range),
        calibration=options.calibration,
    )


def loss_names(text: str) -> list[Loss]:
    """The losses in their order, plain first because all others are compared with it."""
    names = text.split(",")
    unknown = sorted(set(names) - set(LOSSES))
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {','.join(LOSSES)}")
    return [loss for loss in LOSSES if loss == "plain" or loss in names]


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def positive_float(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return float(text)


def unit_interval(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return float(text)


def folder(text: str) -> Path:
    """Refuse now what could not be written after an hour of training."""
    path = Path(text)
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{there} is no folder that can be written to")
    return path


def backend_name() -> str:
    """What `backend="auto"` takes on a CPU; compiles the kernel if that was not done yet."""
    name = os.environ.get("DWL_KERNELS_BACKEND", "auto")
    if name != "auto":
        return name
    return "cpu" if backends.unavailable_reason("cpu", "cpu") is None else "chunked"


if __name__ == "__main__":
    sys.exit(main())
