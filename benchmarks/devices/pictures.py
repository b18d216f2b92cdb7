"""The picture of the plan: time and memory by catalogue, and which way wins where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.devices.plan import WAYS
from benchmarks.record import replacing
from benchmarks.speed.pictures import GRID, INK, MUTED, log_axis

COLOURS = {"gathered": "#1f6fb4", "ring": "#12908e", "sharded": "#d9772b", "indexed": "#8e5bb0"}
NOTHING = "#e3e5e8"


def draw(figures: dict[str, Any], out: Path) -> Path:
    style: dict[Any, Any] = {"font.size": 9, "axes.edgecolor": MUTED, "text.color": INK}
    with plt.rc_context(style), replacing(out / "devices.png") as partial:
        figure = picture(figures)
        figure.savefig(partial, dpi=140, format="png", facecolor="white")
        plt.close(figure)
    return out / "devices.png"


def picture(figures: dict[str, Any]) -> Figure:
    predicted, hardware = figures["predicted"], figures["assumptions"]
    figure, ((time, held), (table, towers)) = plt.subplots(2, 2, figsize=(10.5, 7.6))
    training, contrastive = predicted["training"], predicted["contrastive"]
    curves(time, predicted, "ms", 1)
    curves(held, predicted, "memory_bytes", 1e9)
    time.set_title(f"a step on {training['ranks']} devices, ms")
    time.axhline(predicted["patience_ms"], color=INK, linewidth=0.8, linestyle="--")
    label(time, predicted["patience_ms"], f"{predicted['patience_ms']:.0f} ms")
    held.set_title(f"memory of loss and table on each of {training['ranks']} devices, GB")
    held.axhline(hardware["memory"] / 1e9, color=INK, linewidth=0.8, linestyle="--")
    label(held, hardware["memory"] / 1e9, f"{hardware['memory'] / 1e9:.0f} GB of a device")
    for axis in (time, held):
        axis.set_xlabel("items of the catalogue (log)", fontsize=8)
        log_axis(axis, "y")
        axis.set_xscale("log")
        axis.tick_params(which="minor", length=0)
        axis.grid(color=GRID, linewidth=0.6)
    tiles(table, predicted["winner_by_ranks_and_catalogue"], predicted["catalogues"])
    table.set_title("what to take for a table of so many items")
    table.set_ylabel("items (log)", fontsize=8)
    tiles(towers, predicted["winner_by_ranks_and_rows"], predicted["rows"])
    towers.set_title(f"and for towers without a table, {contrastive['dim']:,} dimensions")
    towers.set_ylabel("rows on each device (log)", fontsize=8)
    handles = [Patch(color=COLOURS[name], label=way.name) for name, way in WAYS.items()]
    handles.append(Patch(color=NOTHING, label="does not fit"))
    figure.legend(
        handles=handles, loc="center", bbox_to_anchor=(0.5, 0.975), ncols=5, frameon=False
    )
    figure.subplots_adjust(
        left=0.07, right=0.985, top=0.915, bottom=0.135, wspace=0.22, hspace=0.38
    )
    figure.text(0.01, 0.012, footer(predicted, hardware), fontsize=7, color=MUTED, va="bottom")
    return figure


def curves(axis: Axes, predicted: dict[str, Any], key: str, unit: float) -> None:
    for name in WAYS:
        points = [row for row in predicted["by_catalogue"] if row["way"] == name]
        x, y = [row["items"] for row in points], [row[key] / unit for row in points]
        line = "--" if name == "ring" else "-"  # it lies on another where the table decides
        axis.plot(x, y, line, color=COLOURS[name], linewidth=2)


def label(axis: Axes, y: float, text: str) -> None:
    axis.annotate(
        text, (0.02, y), xycoords=axis.get_yaxis_transform(), xytext=(0, 3),
        textcoords="offset points", fontsize=8,
    )  # fmt: skip


def tiles(axis: Axes, winners: dict[str, list[str | None]], sizes: list[int]) -> None:
    """A tile for each number of devices and each size, in the colour of the way to take."""
    names: list[str | None] = [*WAYS, None]
    numbers = [[names.index(row[place]) for row in winners.values()] for place in range(len(sizes))]
    colours = ListedColormap([*(COLOURS[name] for name in WAYS), NOTHING])
    axis.imshow(numbers, cmap=colours, vmin=0, vmax=len(names) - 1, origin="lower", aspect="auto")
    axis.set_xticks(range(len(winners)), list(winners))
    axis.set_xlabel("devices", fontsize=8)
    places = range(0, len(sizes), 4 if len(sizes) > 12 else 1)
    axis.set_yticks(places, [in_short(sizes[place]) for place in places])
    for place in range(1, len(winners)):
        axis.axvline(place - 0.5, color="white", linewidth=0.8)
    for place in range(1, len(sizes)):
        axis.axhline(place - 0.5, color="white", linewidth=0.8)


def in_short(count: int) -> str:
    if count >= 10**5 and str(count).strip("0") == "1":
        return f"$10^{len(str(count)) - 1}$"
    return f"{count:,}"


def footer(predicted: dict[str, Any], hardware: dict[str, Any]) -> str:
    s = predicted["training"]
    return (
        f"PREDICTIONS, not measured: H100 at {hardware['operations'] / 1e12:.0f} TFLOP/s, "
        f"{hardware['inside'] / 1e9:.0f} GB/s inside nodes of {hardware['node']} and "
        f"{hardware['between'] / 1e9:.0f} GB/s between them. A device has {s['rows']:,} rows of "
        f"{s['dim']} numbers in bfloat16,\n{s['negatives']:,} sampled ids. Gathered candidates and "
        "the ring: the table on every device, its gradient averaged. To take: the sharded table "
        f"(every item competes) up to\n{predicted['patience_ms']:.0f} ms a step, else the fastest "
        "that fits. Formulas of bytes, memory and products are checked by counters."
    )
