"""Pictures of a run: time and memory by shape, growth, scales, overhead, launches on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.record import replacing
from benchmarks.speed.report import Report, in_words, scale_lines, scale_of
from benchmarks.speed.shapes import MATRICES

INK, MUTED, GRID = "#222222", "#80868b", "#e3e5e8"
COLOURS = {
    "cpu": "#1f6fb4",
    "triton": "#1f6fb4",
    "cuda": "#12908e",
    "chunked": "#8db8dc",
    "eager": "#4d5156",
    "torch.compile": "#d9772b",
    "linear_cross_entropy": "#6b9b37",
    "liger-kernel": "#8e5bb0",
    "liger-kernel, float32 sums": "#c3a3d6",
    "cut-cross-entropy": "#b5476b",
    "cut-cross-entropy, no filter": "#dda2b5",
}
LADDER = {"log-Q": "#9cc3e4", "hits": "#5398cf", "domain weights": "#1f6fb4"}
OURS = ("cpu", "triton", "cuda")
PACKAGE = (*OURS, "chunked")
GOAL = {"cpu": 0.05, "cuda": 0.03}  # of the overhead ladder
AT_MOST = 1.1  # times the bound, for logits of a standard deviation up to 30


def draw(report: Report, out: Path) -> list[Path]:
    """Write the pictures that the figures give, and return their paths."""
    drawings: dict[str, Callable[[Report], Figure]] = {"": overview, "-ladder": ladder}
    if any(report["growth"].values()):
        drawings["-growth"] = growth
    if report.get("scales"):
        drawings["-scales"] = scales
    if report["device"] == "cuda":
        drawings["-launches"] = launches
    paths = []
    style: dict[Any, Any] = {"font.size": 9, "axes.edgecolor": MUTED, "text.color": INK}
    with plt.rc_context(style):
        for suffix, make in drawings.items():
            path = out / f"speed-{report['device']}{suffix}.png"
            figure = make(report)
            figure.text(0.01, 0.01, footer(report), fontsize=7, color=MUTED, va="bottom")
            with replacing(path) as partial:
                figure.savefig(partial, dpi=140, format="png", facecolor="white")
            plt.close(figure)
            paths.append(path)
    return paths


def footer(report: Report) -> str:
    machine, versions = report["machine"], report["versions"]
    if report["device"] == "cuda":
        where = f"{machine['gpu']}"
    else:
        where = f"{machine['cpu']}, {machine['threads']} threads. No GPU in this run"
    mode = {"quick": ". QUICK RUN: small shapes, few rounds", "dry": ". DRY RUN: no figures"}
    return (
        f"{where}. torch {versions['torch']}, commit {(report['commit'] or 'unknown')[:9]}"
        f"{mode.get(report['mode'], '')}. (twin): scaled down to fit a CPU."
    )


def overview(report: Report) -> Figure:
    """A row per shape: time in multiples of the bound, and memory, both on log axes."""
    points = report["shapes"]
    tall = 1.5 + 0.52 * len(points)
    figure, (time, memory) = plt.subplots(1, 2, figsize=(10.5, tall), sharey=True)
    for y, point in enumerate(points):
        rows = [row for row in point["versions"] if row["version"] != "bound"]
        peaks = {row["version"]: row.get("peak_bytes") for row in rows}
        mark(time, y, {row["version"]: row["ratio"] for row in rows}, "{:.2f}×")
        # Below a megabyte lies the noise of a resident size.
        mark(
            memory, y, {k: max(v / 1e6, 1.0) for k, v in peaks.items() if v is not None}, "{:,.0f}"
        )
        for axis in (time, memory):
            axis.axhline(y, color=GRID, linewidth=0.8, zorder=0)
    time.axvline(1, color=INK, linewidth=1, zorder=1)
    time.text(1, 1.01, "bound", transform=time.get_xaxis_transform(), ha="center", fontsize=8)
    time.set_xlabel("forward and backward, times the bound (log); left is better", fontsize=8)
    memory.set_xlabel("peak memory above inputs and gradients, MB (log; ≤ 1 as 1)", fontsize=8)
    time.set_yticks(range(len(points)), [axis_label(p, points) for p in points])
    time.set_ylim(len(points) - 0.5, -0.6)
    for axis in (time, memory):
        log_axis(axis, "x", (1, 2, 5) if axis is time else (1,))
        axis.margins(x=0.17)
    figure.subplots_adjust(
        left=0.27, right=0.985, top=1 - 0.62 / tall, bottom=0.82 / tall, wspace=0.08
    )
    legend(figure, versions_of(points), 1 - 0.2 / tall)
    return figure


def mark(axis: Axes, y: float, values: dict[str, float], form: str) -> None:
    """A dot per version, with numbers above the package's kernels and beside the largest."""
    for name, value in values.items():
        own = name in OURS
        colour = COLOURS.get(name, MUTED)
        axis.plot(value, y, "o", color=colour, markersize=8 if own else 6, zorder=4 if own else 3)
    label: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}
    for name in OURS:
        if name in values:
            axis.annotate(
                form.format(values[name]), (values[name], y), xytext=(0, 6), ha="center",
                va="bottom", color=COLOURS[name], **label,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
    worst = max(values, key=lambda name: values[name], default=None)
    if worst is not None and worst not in OURS and values[worst] > 1:
        axis.annotate(
            form.format(values[worst]), (values[worst], y), xytext=(6, 0), ha="left", va="center",
            color=INK, **label, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip


def axis_label(point: Report, points: list[Report]) -> str:
    """The shape of a point, with its dtype where the points differ in it."""
    name, _, sizes = point["label"].partition(": ")
    dtypes = {p["shape"]["dtype"] for p in points}
    own = f", {point['shape']['dtype']}"
    return f"{name}{own if len(dtypes) > 1 else ''}\n{sizes.replace(own, '')}"


def versions_of(points: list[Report]) -> list[str]:
    names = dict.fromkeys(row["version"] for point in points for row in point["versions"])
    return [name for name in names if name != "bound"]


def legend(figure: Figure, names: list[str], y: float) -> None:
    handles = [
        Line2D([], [], marker="o", linestyle="", color=COLOURS.get(name, MUTED), label=label)
        for name, label in ((n, f"{n} (dwl_kernels)" if n in PACKAGE else n) for n in names)
    ]
    figure.legend(
        handles=handles, loc="center", bbox_to_anchor=(0.5, y), ncols=5, frameon=False,
        handletextpad=0.1, columnspacing=1.4,
    )  # fmt: skip


def growth(report: Report) -> Figure:
    """Time and memory along either side, and where a rival runs out of memory."""
    sides = [side for side, points in report["growth"].items() if points]
    machine = report["memory_bytes"] / 1e6
    figure, axes = plt.subplots(
        2, len(sides), figsize=(5.2 * len(sides), 6.8), squeeze=False, sharey="row", sharex="col"
    )
    for column, side in enumerate(sides):
        time, memory = axes[0][column], axes[1][column]
        points = report["growth"][side]
        for name in ("bound", *versions_of(points)):
            line(time, name, [(size, row["median_ms"]) for size, row in along(points, side, name)])
            peaks = [
                (size, max(row["peak_bytes"] / 1e6, 1.0))
                for size, row in along(points, side, name)
                if row.get("peak_bytes") is not None
            ]
            if peaks:
                line(memory, name, peaks)
            if peaks and name in MATRICES:
                out_of_memory(time, memory, name, peaks[-1], machine)
        memory.axhline(machine, color=INK, linewidth=0.8)
        memory.annotate(
            f"memory of this machine, {machine / 1e3:.0f} GB", (0.02, machine),
            xycoords=memory.get_yaxis_transform(), xytext=(0, 3), textcoords="offset points",
            fontsize=8,
        )  # fmt: skip
        grows, fixed = ("N", "B") if side == "candidates" else ("B", "N")
        size = points[0]["shape"]["rows" if side == "candidates" else "candidates"]
        dim = points[0]["shape"]["dim"]
        memory.set_xlabel(f"{grows} {side} (log); {fixed} = {size:,}, D = {dim}")
        for axis in (time, memory):
            log_axis(axis, "x")
            log_axis(axis, "y", (1, 2, 5) if axis is time else (1,))
            axis.grid(color=GRID, linewidth=0.6)
        memory.set_ylim(top=machine * 4)
    axes[0][0].set_ylabel("forward and backward, ms (log)")
    axes[1][0].set_ylabel("peak memory above inputs\nand gradients, MB (log)")
    everything = [point for points in report["growth"].values() for point in points]
    figure.subplots_adjust(left=0.09, right=0.98, top=0.92, bottom=0.11, wspace=0.06, hspace=0.06)
    legend(figure, versions_of(everything), 0.96)
    return figure


def along(points: list[Report], side: str, name: str) -> list[tuple[int, Report]]:
    """One version's rows with the size that grows."""
    return [
        (point["shape"][side], row)
        for point in points
        for row in point["versions"]
        if row["version"] == name
    ]


def line(axis: Axes, name: str, curve: list[tuple[int, float]]) -> None:
    x, y = zip(*curve, strict=True)
    if name != "bound":
        width = 2.2 if name in OURS else 1.5
        axis.plot(x, y, "o-", color=COLOURS.get(name, MUTED), markersize=4, linewidth=width)
        return
    axis.plot(x, y, "--", color=INK, linewidth=1.2, zorder=5)
    axis.annotate(
        "bound", (x[-1], y[-1]), xytext=(6, -3), textcoords="offset points", fontsize=8, va="top"
    )


def out_of_memory(
    time: Axes, memory: Axes, name: str, last: tuple[int, float], machine: float
) -> None:
    """Extend the memory of a rival, which grows in proportion, to all that the machine has."""
    size, peak = last
    end, colour = size * machine / peak, COLOURS[name]
    memory.plot([size, end], [peak, machine], color=colour, linewidth=1.2, linestyle=":")
    memory.plot(end, machine, "X", color=colour, markersize=9, zorder=5)
    time.axvline(end, color=colour, linewidth=1.2, linestyle=":")
    time.annotate(
        f"{name} is out of memory (computed)", (end, 0.98), rotation=90, ha="right", va="top",
        xycoords=time.get_xaxis_transform(), xytext=(-2, 0), textcoords="offset points",
        fontsize=8, color=colour,
    )  # fmt: skip


def scales(report: Report) -> Figure:
    """Times of the bound over the standard deviation of the logits, with quartiles."""
    points = report["scales"]
    names = list(dict.fromkeys(scale_of(point) for point in points))
    figure, axis = plt.subplots(figsize=(7.5, 3.9))
    styles = dict(zip(dict.fromkeys(p["shape"]["dim"] for p in points), ("-", "--"), strict=False))
    for label, rows in scale_lines(points).items():
        version, dim = label.split(", D = ")
        x = [names.index(scale) for scale, _ in rows]
        low, mid, high = ([row[k] for _, row in rows] for k in ("ratio_low", "ratio", "ratio_high"))
        colour = COLOURS.get(version, MUTED)
        width = 2.2 if version in OURS else 1.5
        axis.plot(x, mid, styles.get(int(dim), ":"), color=colour, linewidth=width, label=label)
        axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        if version in OURS:
            axis.plot(x, mid, "o", color=colour, markersize=4)
    axis.axhline(1, color=INK, linewidth=1)
    axis.text(1.01, 1, "bound", transform=axis.get_yaxis_transform(), va="center", fontsize=8)
    up_to = sum(name != "rising" for name in names) - 1.5  # 100 has no goal
    axis.plot([-0.3, up_to], [AT_MOST] * 2, "--", color="#b5476b", linewidth=1)
    axis.text(-0.3, AT_MOST, "goal", fontsize=8, color="#b5476b", va="bottom")
    log_axis(axis, "y", (1, 2, 5))
    axis.set_ylim(bottom=0.5)
    axis.grid(color=GRID, linewidth=0.6, axis="y")
    axis.set_xticks(range(len(names)), names)
    axis.set_xlabel("logits: standard deviation, or every tile of candidates above all before it")
    axis.set_ylabel("times the bound (log)")
    figure.subplots_adjust(left=0.09, right=0.92, top=0.9, bottom=0.2)
    figure.legend(loc="center", bbox_to_anchor=(0.5, 0.95), ncols=4, frameon=False)
    return figure


def ladder(report: Report) -> Figure:
    """What log-Q, hits and domain weights cost over the plain loss, with quartiles."""
    bars = [(p, kernel, rungs) for p in report["shapes"] for kernel, rungs in p["ladder"].items()]
    figure, axis = plt.subplots(figsize=(9, 1.4 + 0.62 * len(bars)))
    several = len({kernel for _, kernel, _ in bars}) > 1
    for y, (_, _, rungs) in enumerate(bars):
        height = 0.8 / max(len(rungs) - 1, 1)
        for position, rung in enumerate(rungs[1:]):
            at = y + (position + 0.5) * height - 0.4
            low, mid, high = (100 * (rung[k] - 1) for k in ("ratio_low", "ratio", "ratio_high"))
            axis.barh(at, mid, height * 0.85, color=LADDER[rung["version"]], zorder=2)
            axis.plot([low, high], [at, at], color=INK, linewidth=1, zorder=3)
            axis.annotate(
                f"{mid:+.1f}%", (max(high, 0), at), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=7.5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
    goal = 100 * GOAL[report["device"]]
    axis.axvline(0, color=INK, linewidth=1)
    axis.axvline(goal, color="#b5476b", linewidth=1, linestyle="--")
    axis.text(
        goal, 1.01, f"goal, {goal:.0f}%", transform=axis.get_xaxis_transform(), ha="center",
        fontsize=8, color="#b5476b",
    )  # fmt: skip
    names = [
        axis_label(p, report["shapes"]) + (f"\n{kernel}" if several else "")
        for p, kernel, _ in bars
    ]
    axis.set_yticks(range(len(bars)), names)
    axis.set_ylim(len(bars) - 0.5, -0.5)
    axis.set_xlabel("time over the plain loss, %; line: quartiles of the rounds")
    axis.margins(x=0.15)
    tidy(axis)
    for level, colour in LADDER.items():
        axis.barh([0], [0], color=colour, label=f"+ {in_words(level)}")
    tall = figure.get_figheight()
    figure.subplots_adjust(left=0.3, right=0.98, top=1 - 0.62 / tall, bottom=0.75 / tall)
    figure.legend(loc="center", bbox_to_anchor=(0.6, 1 - 0.2 / tall), ncols=3, frameon=False)
    return figure


def launches(report: Report) -> Figure:
    """Kernels, copies and fills of one forward and backward, by the profiler."""
    points = report["shapes"]
    figure, axes = plt.subplots(
        1, len(points), figsize=(2.2 * len(points) + 1.6, 3.4), sharey=True, squeeze=False
    )
    names = list(dict.fromkeys(r["version"] for p in points for r in p["versions"][1:]))
    for axis, point in zip(axes[0], points, strict=True):
        for row in point["versions"][1:]:
            y = names.index(row["version"])
            axis.barh(y, row["launches"], color=COLOURS.get(row["version"], MUTED))
            axis.annotate(
                str(row["launches"]), (row["launches"], y), xytext=(3, 0),
                textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
        axis.set_title(point["shape"]["name"], fontsize=9)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.margins(x=0.25)
        tidy(axis)
    figure.supxlabel("launches per forward and backward", fontsize=9, y=0.06)
    figure.subplots_adjust(left=0.19, right=0.98, top=0.91, bottom=0.2, wspace=0.15)
    return figure


def log_axis(axis: Axes, which: Literal["x", "y"], steps: tuple[int, ...] = (1,)) -> None:
    """Ticks at `steps` times the powers of ten, as plain numbers."""
    scale = axis.xaxis if which == "x" else axis.yaxis
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    scale.set_major_locator(LogLocator(subs=steps))
    scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    scale.set_minor_locator(NullLocator())
    tidy(axis)


def tidy(axis: Axes) -> None:
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(length=0)
