"""What domain weights gain for sparse domains, and what they cost the others.

``python -m benchmarks.quality.frontier --data path/to/ml-1m`` trains with weights in (1, high), for
several highs, and with each the two rivals that cost less: the same highs by hand, and the plain
model with `DomainWeights.log_weight` added to its scores when serving. A method earns its place
where it lies above both.

The range is chosen on the validation items: of the dynamic weights the one that lifts the sparsest
quarter of the domains most while NDCG@10 over all loses at most `LOSS`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.progress import WIDTH, Progress, in_processes
from benchmarks.record import record, replacing, write_json

from .__main__ import backend_name, folder, load_data, make_config, make_parser, positive
from .metrics import LeaveOneOut, ndcg, rank_targets
from .report import COLOURS, INK, MUTED, Change, Group, make_groups, paired
from .train import Config, TrainedLoss, measure_domains, train

Method = Literal["dynamic", "dynamic, calibrated", "fixed", "bonus"]
TRAINED: dict[Method, tuple[TrainedLoss, float]] = {  # the loss, and its calibration
    "dynamic": ("dynamic", 0.0),
    "dynamic, calibrated": ("dynamic", 1.0),
    "fixed": ("fixed", 0.0),
}
PARTS = ("validation", "test")
LOSS = 0.01  # of NDCG@10 over all, relative
Ranks = dict[str, np.ndarray]  # by part, [E]


@dataclass(frozen=True)
class Point:
    """A method with weights in (1, high)."""

    method: Method
    high: float
    changes: dict[str, dict[str, Change]]  # by part, then by group


def ranks_of_model(
    loss: TrainedLoss, split: LeaveOneOut, config: Config, seed: int, highs: Sequence[float]
) -> tuple[Ranks, dict[float, Ranks]]:
    """The ranks of a trained model and, of the plain one, those with a bonus of every high."""
    torch.set_num_threads(1)
    model = train(loss, split, config, seed).model
    domains = torch.from_numpy(split.data.item_domains)
    served = {}
    for high in highs if loss == "plain" else ():
        weights = measure_domains(split, replace(config, weight_range=(1.0, high)))
        bonus = weights.log_weight(domains)
        served[high] = {part: rank_targets(model, split, part, bonus) for part in PARTS}
    return {part: rank_targets(model, split, part) for part in PARTS}, served


def all_ranks(
    split: LeaveOneOut,
    config: Config,
    highs: Sequence[float],
    seeds: int,
    jobs: int,
    console: Console,
) -> tuple[list[Ranks], dict[tuple[Method, float], list[Ranks]]]:
    """Of the plain loss and of every point the ranks for each seed; `jobs` trainings at once."""
    calls: dict[Any, tuple[Any, ...]] = {}
    for seed in range(seeds):
        calls["plain", 1.0, seed] = ("plain", split, config, seed, highs)
        for (method, (loss, calibration)), high in product(TRAINED.items(), highs):
            changed = replace(config, weight_range=(1.0, high), calibration=calibration)
            calls[method, high, seed] = (loss, split, changed, seed, highs)
    found: dict[Any, tuple[Ranks, dict[float, Ranks]]] = {}
    with Progress() as progress:
        progress(f"trained 0 of {len(calls)}")
        for name, ranks in in_processes(ranks_of_model, calls, jobs):
            found[name] = ranks
            scores = (f"{part} {ndcg(ranks[0][part]).mean():.4f}" for part in PARTS)
            progress("")
            console.print(f"{name[0]}, 1 to {name[1]:g}, seed {name[2]}: {', '.join(scores)}")
            progress(f"trained {len(found)} of {len(calls)}")
    plain = [found["plain", 1.0, seed] for seed in range(seeds)]
    points = {
        (method, high): [found[method, high, seed][0] for seed in range(seeds)]
        for method, high in product(TRAINED, highs)
    }
    for high in highs:
        points["bonus", high] = [served[high] for _, served in plain]
    return [ranks for ranks, _ in plain], points


def compare(
    ranks: Sequence[Ranks], plain: Sequence[Ranks], groups: dict[str, list[Group]]
) -> dict[str, dict[str, Change]]:
    """NDCG@10 of one point, in both parts for every group."""
    changes: dict[str, dict[str, Change]] = {}
    for part in PARTS:
        ours, theirs = (np.stack([ndcg(one[part]) for one in side]) for side in (ranks, plain))
        changes[part] = {
            group.name: paired(ours[:, group.members], theirs[:, group.members])
            for group in groups[part]
        }
    return changes


def relative(change: Change) -> tuple[float, float]:
    """The change and its standard error in parts of the plain one's NDCG@10."""
    plain = change.plain or float("nan")
    return change.change / plain, change.standard_error / plain


def chosen(points: Sequence[Point]) -> Point | None:
    """The best range of the dynamic weights by the validation items; None if all cost too much."""

    def gains(point: Point) -> tuple[float, float]:
        overall, sparse = point.changes["validation"].values()
        return relative(overall)[0], sparse.change

    fit = [p for p in points if p.method == "dynamic" and gains(p)[0] >= -LOSS]
    return max(fit, key=lambda point: gains(point)[1], default=None)


def summaries(split: LeaveOneOut, part: str) -> list[Group]:
    """All users, and those of the sparsest quarter of the domains."""
    return [group for group in make_groups(split, part) if not group.is_domain]


def table(points: Sequence[Point], title: str) -> Table:
    """A line per point: change of NDCG@10 and its standard error, of the plain one in percent."""
    title = f"{title}, change in %; validation, then test items"
    result = Table(title=title, box=None, padding=(0, 1, 0, 0), title_justify="left")
    result.add_column("weights\n1 to ...")
    for part in PARTS:
        for group in points[0].changes[part]:
            result.add_column(group.replace(" ", "\n"), justify="right")
    for point in points:
        cells = [
            "{:+.1f}±{:.1f}".format(*(100 * part for part in relative(change)))
            for part in PARTS
            for change in point.changes[part].values()
        ]
        result.add_row(f"{point.method}, {point.high:g}".replace(", c", ",\nc"), *cells)
    return result


def plot(path: Path, points: Sequence[Point], title: str) -> None:
    """Sparse domains against all, on the test items; a line per method, a point per range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    colours = {**COLOURS, "dynamic, calibrated": "#8ab8de"}
    with plt.rc_context({"font.size": 9, "text.color": INK, "axes.edgecolor": MUTED}):
        figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.axvline(-LOSS, color=MUTED, linewidth=0.8, linestyle=":")
        for method in dict.fromkeys(point.method for point in points):
            own = [point for point in points if point.method == method]
            pairs = [tuple(point.changes["test"].values()) for point in own]
            (x, x_error), (y, y_error) = (
                np.array([relative(change) for change in side]).T
                for side in zip(*pairs, strict=True)
            )
            colour = colours[method]
            axes.plot([0, *x], [0, *y], color=colour, alpha=0.5)
            axes.errorbar(
                *(x, y, y_error, x_error, "o"),
                color=colour,
                elinewidth=0.6,
                markersize=5,
                label=method,
            )
            for point, at in zip(own, zip(x, y, strict=True), strict=True):
                annotate(axes, f"1 to {point.high:g}", at, colour)
        axes.plot(0, 0, "o", color=INK, markersize=5)
        annotate(axes, "plain", (0.0, 0.0), INK)
        overall, sparse = points[0].changes["test"]
        axes.set_xlabel(f"change of NDCG@10, {overall} users")
        axes.set_ylabel(f"change of NDCG@10, {sparse} of the domains")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.tick_params(length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper right")
        axes.set_title(title, loc="left", fontsize=11)
        figure.supxlabel(
            f"bars: one standard error over test users; dotted: {LOSS:.0%} lost over all",
            fontsize=8,
            color=MUTED,
        )
        figure.savefig(path, format="png", dpi=150)
        plt.close(figure)


def annotate(axes: Any, text: str, at: tuple[float, float], colour: str) -> None:
    axes.annotate(text, at, (5, 5), textcoords="offset points", fontsize=8, color=colour)


def highs_of(text: str) -> list[float]:
    highs = sorted({float(one) for one in text.split(",")})
    if not highs or not 1 < highs[0] <= highs[-1] < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted finite numbers above 1, as in 2,4,8")
    return highs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.frontier")
    parser.add_argument("--data", default="synthetic", help="folder of a data set, or synthetic")
    parser.add_argument("--highs", type=highs_of, default=[2.0, 4.0, 8.0], help="default 2,4,8")
    parser.add_argument("--epochs", type=positive, help="as for benchmarks.quality")
    parser.add_argument("--seeds", type=positive, default=1, help="runs per point (default 1)")
    parser.add_argument("--jobs", type=positive, default=1, help="trainings at once (default 1)")
    parser.add_argument("--out", type=folder, default=Path("results"), help="folder of the results")
    options = parser.parse_args(arguments)
    console = Console(width=WIDTH, highlight=False)
    data = load_data(options.data)
    split = LeaveOneOut(data)
    more = [] if options.epochs is None else ["--epochs", str(options.epochs)]
    config = make_config(make_parser().parse_args(["--data", options.data, *more]), split)
    backend = backend_name()
    plain, found = all_ranks(split, config, options.highs, options.seeds, options.jobs, console)
    groups = {part: summaries(split, part) for part in PARTS}
    points = [Point(*name, compare(ranks, plain, groups)) for name, ranks in found.items()]
    best = chosen(points)
    seeds = f"{options.seeds} seed{'s' if options.seeds > 1 else ''}"
    console.print(table(points, f"{data.name}: NDCG@10 against the plain loss, {seeds}"))
    said = "no range" if best is None else f"weights of 1 to {best.high:g}"
    console.print(f"chosen on the validation items, with at most {LOSS:.0%} lost over all: {said}")
    document = record(
        command=" ".join(["python -m benchmarks.quality.frontier", *sys.argv[1:]]),
        backend=backend,
        config={**asdict(config), "weight_range": None, "calibration": None},
        seeds=list(range(options.seeds)),
        users={part: {g.name: g.users for g in groups[part]} for part in PARTS},
        chosen=None if best is None else {"weight_range": [1.0, best.high]},
        points=[asdict(point) for point in points],
    )
    picture, text = (options.out / f"frontier-{data.name}{end}" for end in (".png", ".json"))
    with replacing(picture) as partial:
        plot(partial, points, f"{data.name}: sparse domains against all, {seeds}")
    write_json(text, document)
    console.print("wrote", picture, text, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
