"""What the runs say: a comparison with the plain loss as a table, a picture and a JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from .metrics import LeaveOneOut, ndcg, recall
from .train import LOSSES, Run

METRICS = {"NDCG@10": ndcg, "Recall@10": recall}
INK, MUTED = "#222222", "#9aa0a6"
COLOURS = {
    "dynamic": "#1f6fb4",
    "fixed": "#c8661c",
    "refined": "#8457a5",
    "dual": "#b8860b",
    "dual-dynamic": "#c2456d",
    "cross-entropy": "#2a8c82",
    "bonus": "#6b9b37",
}


@dataclass(frozen=True)
class Change:
    """One metric of one loss for a group of test users, next to the plain loss."""

    mean: float  # over users and seeds
    std: float  # over seeds, 0 for one seed
    plain: float  # mean of the plain loss
    change: float  # mean - plain, paired by user and seed
    standard_error: float  # of the change, over users, each user's seeds averaged first


@dataclass(frozen=True)
class Group:
    """Test users that are reported together."""

    name: str
    interactions: int
    members: np.ndarray  # [E] bool
    is_domain: bool = True  # else a summary

    @property
    def users(self) -> int:
        return int(self.members.sum())


def make_groups(split: LeaveOneOut, part: str = "test") -> list[Group]:
    """All test users, those of the sparsest quarter of the domains, then each domain by size.

    A user belongs to every domain of the item of that part; domains without users are left out.
    """
    data, sizes = split.data, split.data.domain_sizes()
    targets = split.target(part)
    domains = data.item_domains[targets]  # [E, G]
    by_size = np.argsort(-sizes, kind="stable")
    sparse = by_size[len(sizes) - -(-len(sizes) // 4) :]
    in_sparse = np.any(np.isin(data.item_domains, sparse), axis=1, keepdims=False)  # [V]
    groups = [
        Group("all", len(data.items), np.ones(len(domains), bool), is_domain=False),
        Group("sparsest ¼", int(in_sparse[data.items].sum()), in_sparse[targets], False),
        *(Group(data.domain_names[d], int(sizes[d]), (domains == d).any(1)) for d in by_size),
    ]
    return [group for group in groups if group.users]


def compare(runs: Sequence[Run], loss: str, metric: str, group: Group) -> Change:
    """Compare a loss with the plain one on the same users and seeds."""
    value, plain = (
        np.stack([METRICS[metric](r.ranks[group.members]) for r in runs if r.loss == name])
        for name in (loss, "plain")
    )
    return paired(value, plain)


def paired(value: np.ndarray, plain: np.ndarray) -> Change:  # both [seeds, users of a group]
    per_user = (value - plain).mean(0)
    return Change(
        mean=float(value.mean()),
        std=float(value.mean(1).std(ddof=1)) if len(value) > 1 else 0.0,
        plain=float(plain.mean()),
        change=float(per_user.mean()),
        standard_error=float(per_user.std() / max(len(per_user) - 1, 1) ** 0.5),
    )


def compared_losses(runs: Sequence[Run]) -> list[str]:
    return [loss for loss in LOSSES if loss != "plain" and any(r.loss == loss for r in runs)]


def table(runs: Sequence[Run], loss: str, groups: Sequence[Group], title: str) -> Table:
    """Plain and the change by the loss with its standard error, a row per group."""
    result = Table(title=title, box=None, padding=(0, 1, 0, 0), title_justify="left")
    result.add_column("")
    result.add_column("size", justify="right", style="dim")
    for metric in METRICS:
        short = metric.split("@")[0]
        result.add_column(f"{short}\nplain", justify="right")
        result.add_column("\nchange", justify="right")
    for group in groups:
        cells: list[str | Text] = [group.name, f"{group.interactions:,}"]
        for metric in METRICS:
            c = compare(runs, loss, metric, group)
            change = Text(f"{_signed(c.change)}±{_short(c.standard_error)}")
            if abs(c.change) > 2 * c.standard_error:
                change.stylize("bold green" if c.change > 0 else "bold red")
            cells += [_short(c.plain), change]
        result.add_row(*cells, style="" if group.is_domain else "bold")
    return result


def _short(number: float) -> str:
    return f"{number:.3f}".removeprefix("0")


def _signed(number: float) -> str:
    return ("-" if number < 0 else "+") + _short(abs(number))


def plot(path: Path, runs: Sequence[Run], groups: Sequence[Group], title: str) -> None:
    """Draw the change of each metric per domain, next to the size of the domain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    losses = compared_losses(runs)
    distance = min(0.26, 0.8 / max(len(losses), 1))  # between the losses of a row
    # A gap between the summary and the domains.
    rows = np.array([n + 0.6 * group.is_domain for n, group in enumerate(groups)])
    with plt.rc_context({"font.size": 9, "text.color": INK, "axes.edgecolor": MUTED}):
        figure, (sizes, *changes) = plt.subplots(
            1,
            3,
            sharey=True,
            figsize=(10, 1.7 + max(0.29, 0.13 * len(losses)) * len(groups)),
            gridspec_kw={"width_ratios": [1, 2, 2]},
            layout="constrained",
        )
        bars = [group.interactions * group.is_domain for group in groups]
        sizes.barh(rows, bars, height=0.6, color=MUTED)
        for y, bar, group in zip(rows, bars, groups, strict=True):
            sizes.text(bar, y, f" {group.interactions:,} ({group.users:,})", va="center")
        sizes.set(xlim=(0, 1.9 * max(bars)), xticks=[], title="interactions (test users)")
        sizes.set_yticks(rows, [group.name for group in groups])
        sizes.set_ylim(rows[-1] + 0.6, -0.6)
        for axes, metric in zip(changes, METRICS, strict=True):
            axes.axvline(0, color=INK, linewidth=0.8)
            axes.set_title(f"change of {metric}")
            for place, loss in enumerate(losses):
                found = [compare(runs, loss, metric, group) for group in groups]
                y = rows + distance * (place - (len(losses) - 1) / 2)
                style = {"color": COLOURS[loss], "fmt": "none"}
                change = np.array([c.change for c in found])
                error = np.array([c.standard_error for c in found])
                axes.errorbar(change, y, xerr=1.96 * error, elinewidth=1, **style)
                axes.errorbar(change, y, xerr=error, elinewidth=3, alpha=0.6, **style)
                axes.plot(change, y, "o", color=COLOURS[loss], markersize=5, label=loss)
            axes.grid(axis="x", color=MUTED, alpha=0.25)
            axes.locator_params(axis="x", nbins=6)
        for axes in (sizes, *changes):
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.supxlabel(
            "thick: one standard error over test users, thin: 95% interval", fontsize=8, color=MUTED
        )
        if len(losses) > 1:
            handles, labels = changes[-1].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False)
        figure.savefig(path, format="png", dpi=150)
        plt.close(figure)


def results(runs: Sequence[Run], groups: Sequence[Group]) -> dict[str, Any]:
    """Every run and every group as JSON objects."""
    losses = ["plain", *compared_losses(runs)]
    return {
        "runs": [
            {
                "loss": run.loss,
                "seed": run.seed,
                "seconds": round(run.seconds, 1),
                "loss_share_of_training_time": round(run.loss_share, 3),
                "best_epoch": run.best_epoch,
                "validation_ndcg@10": [round(v, 5) for v in run.validation],
                "domain_weights": [round(w, 5) for w in run.weights],
            }
            for run in runs
        ],
        "results": [
            {
                "group": group.name,
                "interactions": group.interactions,
                "test_users": group.users,
                "losses": {
                    loss: {metric: asdict(compare(runs, loss, metric, group)) for metric in METRICS}
                    for loss in losses
                },
            }
            for group in groups
        ],
    }
