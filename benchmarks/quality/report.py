"""What the kept runs say: gains of sparse domains at a price over all, tables and a picture.

`__main__` prints it, `benchmarks.readme` writes it into the README; both from the JSON alone.

Every method is served with every strength of the dial, which makes a curve for each seed. At a
price, what NDCG@10 over all may lose against the plain model without the dial, the gain is the
highest point of the curve between the strengths, against the same model of the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from benchmarks.record import replacing

from .metrics import SPARSEST

PRICES = (0.0, 0.01, 0.03, 0.06, 0.1)
FINE = 20  # points between two strengths
INK, MUTED = "#222222", "#9aa0a6"
COLOURS = ("#222222", "#c8661c", "#1f6fb4", "#6b9b37", "#8457a5", "#b8860b", "#c2456d", "#2a8c82")
Document = dict[str, Any]


class Mean(NamedTuple):
    """A mean over seeds and its standard error, nan for one seed."""

    value: float
    error: float
    seeds: int

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "–"
        error = "" if np.isnan(self.error) else f" ± {100 * self.error:.1f}"
        return f"{100 * self.value:+.1f}{error}"


def mean(values: Sequence[float] | np.ndarray) -> Mean:
    """Nan where it is nan for a seed: a price that a method cannot keep with every seed."""
    many, count = np.asarray(values, float), len(values)
    error = many.std(ddof=1) / count**0.5 if count > 1 else float("nan")
    return Mean(float(many.mean()) if count else float("nan"), float(error), count)


def p_value(differences: Sequence[float] | np.ndarray) -> float:
    """Of Student's test of paired differences, two-sided: that their mean is 0; nan for one.

    With ``x = sqrt(n - 1) tan(a)`` the density is that of ``cos(a)^(n - 2)``.
    """
    found = mean(differences)
    if not found.error > 0:
        return float("nan")
    angles = np.linspace(0, np.pi / 2, 10_001)
    density = np.cos(angles) ** (found.seeds - 2)
    beyond = np.tan(angles) * (found.seeds - 1) ** 0.5 >= abs(found.value) / found.error
    return float(density[beyond].sum() / density.sum())


def methods(document: Document) -> list[str]:
    return list(dict.fromkeys(run["method"] for run in document["runs"]))


def both(document: Document, method: str) -> list[tuple[Document, Document]]:
    """The runs of a method, each with the plain run of its seed."""
    found = {(run["method"], run["seed"]): run for run in document["runs"]}
    first = document["runs"][0]["method"]
    seeds = sorted(seed for name, seed in found if name == method and (first, seed) in found)
    return [(found[method, seed], found[first, seed]) for seed in seeds]


def curve(
    run: Document, part: str, group: str, metric: str = "NDCG@10", dial: str = SPARSEST
) -> np.ndarray:  # [strengths]
    served = run if dial == SPARSEST else run["dials"][dial]
    return np.array(served[part][group][metric])


def changes(
    document: Document,
    pair: tuple[Document, Document],
    part: str,
    group: str,
    metric: str,
    dial: str = SPARSEST,
) -> tuple[np.ndarray, np.ndarray]:
    """Of all and of a group at every strength, against the plain model without the dial.

    In parts of what plain has, of a group on average over the seeds: a group of few users may have
    next to nothing with one of them.
    """
    run, plain = pair
    still = document["strengths"].index(0.0)
    of_seed = curve(plain, part, "all", dial=dial)[still]
    every = [one for _, one in both(document, plain["method"])]
    usual = np.mean([curve(one, part, group, metric, dial)[still] for one in every])
    change = curve(run, part, group, metric, dial) - curve(plain, part, group, metric, dial)[still]
    return curve(run, part, "all", dial=dial) / of_seed - 1, change / (usual or float("nan"))


def gains(
    document: Document,
    method: str,
    group: str = SPARSEST,
    *,
    part: str = "test",
    metric: str = "NDCG@10",
    prices: Sequence[float] = PRICES,
    dial: str = SPARSEST,
) -> np.ndarray:  # [seeds, prices]
    """The gain of a group at every price, along the curve of every seed."""
    found = []
    for pair in both(document, method):
        overall, inside = changes(document, pair, part, group, metric, dial)
        places = np.linspace(0, len(overall) - 1, FINE * (len(overall) - 1) + 1)
        strengths = np.arange(len(overall))
        along, gained = (np.interp(places, strengths, one) for one in (overall, inside))
        paid = [gained[along >= -price - 1e-12] for price in prices]
        found.append([one.max() if len(one) else float("nan") for one in paid])
    return np.array(found).reshape(-1, len(prices))


class Chosen(NamedTuple):
    """What a dial that was chosen on validation items does to the test items."""

    strength: float
    overall: Mean
    gain: Mean
    validated: float  # the mean gain on validation items; nan where these do not keep the price


def chosen(
    document: Document,
    method: str,
    price: float,
    group: str = SPARSEST,
    metric: str = "NDCG@10",
    dial: str = SPARSEST,
) -> Chosen:
    """At the strength of the largest gain on the validation items of all seeds at the price."""
    pairs = both(document, method)

    def found(part: str, group: str, metric: str) -> np.ndarray:  # [2, seeds, strengths]
        every = [changes(document, pair, part, group, metric, dial) for pair in pairs]
        return np.array(every).swapaxes(0, 1)

    overall, inside = found("validation", group if dial == group else SPARSEST, "NDCG@10").mean(1)
    allowed = np.flatnonzero(overall >= -price)
    # A method that cannot keep the price on validation items is served where it costs least.
    best = allowed[inside[allowed].argmax()] if len(allowed) else overall.argmax()
    validated = float(inside[best]) if len(allowed) else float("nan")
    overall, inside = found("test", group, metric)[:, :, best]
    return Chosen(document["strengths"][best], mean(overall), mean(inside), validated)


def best_method(
    document: Document, group: str, metric: str, price: float, dial: str = SPARSEST
) -> str:
    """The one with the largest mean gain on validation items."""

    def gain(method: str) -> float:
        options: dict[str, Any] = {"part": "validation", "metric": metric, "prices": [price]}
        options["dial"] = dial
        return mean(gains(document, method, group, **options)[:, 0]).value

    return max(methods(document), key=lambda method: np.nan_to_num(gain(method), nan=-1.0))


# ---------------------------------------------------------------- tables


def table(document: Document) -> Table:
    """The table of a setting, for a terminal."""
    domains = document["setting"] == "domains"
    header, rows = gain_lines(document, PRICES[::2]) if domains else metric_lines(document)
    result = Table(box=None, padding=(0, 1, 0, 0))
    for number, name in enumerate(header):
        result.add_column(name, justify="right" if number else "left")
    for row in rows:
        result.add_row(*(cell.replace(" ± ", "±") for cell in row))
    return result


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def title(document: Document) -> str:
    seeds = len({run["seed"] for run in document["runs"]})
    counted = f"{document['data']['name']}, {seeds} seed{'s' if seeds > 1 else ''}"
    if document["setting"] == "domains":
        return f"{counted}: gain of the sparsest quarter, %, at a price of"
    return f"{counted}: test items"


def gain_lines(
    document: Document, prices: Sequence[float] = PRICES
) -> tuple[list[str], list[list[str]]]:
    """A line per method: the gain of the sparsest quarter at every price, in percent."""
    rows = []
    for method in methods(document):
        found = gains(document, method, prices=prices)
        rows.append([method, *(str(mean(column)) for column in found.T)])
    return ["", *(f"{price:.0%}" for price in prices)], rows


def metric_lines(document: Document) -> tuple[list[str], list[list[str]]]:
    """A line per method: every metric, its standard error over seeds."""
    names = list(document["runs"][0]["test"]["all"])
    rows = []
    for method in methods(document):
        found = [run["test"]["all"] for run in document["runs"] if run["method"] == method]
        cells = [mean([one[name][0] for one in found]) for name in names]
        rows.append([method, *(str(cell).removeprefix("+") for cell in cells)])
    return ["in %", *names], rows


# ---------------------------------------------------------------- the picture


def plot(path: Path, document: Document, shown: Sequence[str] | None = None) -> None:
    """The gain of the sparsest quarter over the price, a band of one standard error over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    seeds = len({run["seed"] for run in document["runs"]})
    prices = np.linspace(0, 0.12, 61)
    with plt.rc_context({"font.size": 9, "text.color": INK, "axes.edgecolor": MUTED}):
        figure, axes = plt.subplots(figsize=(7.6, 4.4), layout="constrained")
        for place, method in enumerate(shown or methods(document)):
            colour = COLOURS[place % len(COLOURS)]
            style = ("-", "--", ":")[place // len(COLOURS) % 3]
            found = gains(document, method, prices=tuple(prices))
            if not len(found):
                continue
            middle = found.mean(0)
            label = method if method != "plain" else "plain: the dial alone"
            if np.isnan(middle).all():
                label += ": costs more"
            if len(found) < seeds:
                label += f" ({len(found)} of {seeds} seeds)"
            axes.plot(prices, middle, style, color=colour, linewidth=1.8, label=label)
            if len(found) > 1:
                error = found.std(0, ddof=1) / len(found) ** 0.5
                axes.fill_between(
                    prices, middle - error, middle + error, color=colour, alpha=0.12, linewidth=0
                )
        axes.set_xlabel("price: what NDCG@10 over all loses")
        axes.set_ylabel("gain of the sparsest quarter, NDCG@10")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.tick_params(length=0)
        axes.grid(color=MUTED, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right", fontsize=8)
        axes.set_title(
            f"{document['data']['name']}: every model with the dial, mean of {seeds} "
            f"seed{'s' if seeds > 1 else ''}, band: one standard error",
            loc="left",
            fontsize=10,
        )
        with replacing(path) as partial:
            figure.savefig(partial, format="png", dpi=150)
        plt.close(figure)
