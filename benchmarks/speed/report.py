"""What a run says on the terminal: a table per shape, and a comparison with an older run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

Report = dict[str, Any]

MORE_MEMORY = 1.1  # peaks of resident memory repeat to a few percent


def collected(paths: Sequence[Path]) -> Report:
    """One report of lines that processes wrote with ``--log``: a process for each shape, perhaps
    others for some versions of it. Times are of the bound of their own process."""
    lines = [json.loads(line) for path in paths for line in path.read_text("utf-8").splitlines()]
    records = [line["record"] for line in lines if "record" in line]
    if not records or len({line["gpu"] for line in lines}) > 1:
        devices = sorted({str(line["gpu"]) for line in lines})
        raise SystemExit(f"no figures of one device in {paths}: {devices}")
    found: dict[str, Report] = {}
    for figures in (line["figures"] for line in lines if "figures" in line):
        kept = found.setdefault(figures["label"], figures)
        if kept is not figures:
            names = {row["version"] for row in kept["versions"]}
            kept["versions"] += [r for r in figures["versions"] if r["version"] not in names]
            for key in ("errors", "refused", "failed", "too_large", "ladder"):
                kept[key] = {**figures[key], **kept[key]}
    return {**records[-1], "shapes": list(found.values())}


def shape_table(figures: Report) -> Table:
    """Every version of one shape: time against the bound, memory, and error against float64."""
    table = Table(title=figures["label"], title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column(f"all with: {figures['level']}")
    counted = any("launches" in row for row in figures["versions"])
    columns = ["median ms", "quartiles", "times bound", "of bound", "memory MB", "of logits"]
    on_gpu = ["host ms", "launches"] if counted else []
    for name in [*columns, "error loss", "gradient", *on_gpu]:
        table.add_column(name, justify="right")
    for row in figures["versions"]:
        error = figures["errors"].get(row["version"], {})
        cells = [
            row["version"],
            digits(row["median_ms"]) + ("" if row.get("queued", True) else " with host"),
            f"{digits(row['low_ms'])} to {digits(row['high_ms'])}",
            f"{row['ratio']:.2f}",
            f"{1 / row['ratio']:.0%}",
            megabytes(row.get("peak_bytes")),
            share(row.get("peak_bytes"), figures["logits_bytes"]),
            *(f"{error[k]:.1e}" if error else "" for k in ("loss", "gradient")),
        ]
        if counted:
            cells += [digits(row["host_ms"]), str(row.get("launches", ""))]
        table.add_row(*cells)
    lines = [
        f"{kernel}, over {timings[0]['version']}: "
        + ", ".join(f"{t['version']} {t['ratio']:.3f}" for t in timings[1:])
        for kind in ("ladder", "padding")
        for kernel, timings in figures.get(kind, {}).items()
    ]
    lines += [f"{name} not run: {reason}" for name, reason in figures["failed"].items()]
    lines += [
        f"{name} not run: it would need {needed / 1e9:.1f} GB (computed)"
        for name, needed in figures["too_large"].items()
    ]
    caption = Text("\n".join(lines), style="dim")
    for name, reason in figures["refused"].items():
        caption.append(f"\n{name} REFUSED, {reason}", style="bold red")
    table.caption, table.caption_justify = caption.append("\n"), "left"
    return table


def digits(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:,.0f}"


def share(value: float | None, whole: float) -> str:
    return "" if value is None else f"{value / whole:.1%}"


def growth_table(side: str, points: list[Report]) -> Table:
    """Median times in ms along one side."""
    table = Table(title=f"growth with {side}, ms", title_justify="left", box=None)
    table.add_column("")
    names = list(dict.fromkeys(row["version"] for p in points for row in p["versions"]))
    for name in names:
        table.add_column(name, justify="right")
    for point in points:
        times = {row["version"]: digits(row["median_ms"]) for row in point["versions"]}
        table.add_row(point["label"], *(times.get(name, "") for name in names))
    return table


def scale_table(points: list[Report]) -> Table:
    """Times of the bound over the scales of the logits, a row per version and dimension."""
    table = Table(
        title="times of the bound, by scale of the logits", title_justify="left", box=None
    )
    table.add_column("")
    for scale in dict.fromkeys(scale_of(p) for p in points):
        table.add_column(scale, justify="right")
    for version, rows in scale_lines(points).items():
        table.add_row(version, *(f"{row['ratio']:.2f}" for _, row in rows))
    return table


def scale_of(point: Report) -> str:
    return "rising" if point["shape"]["rising"] else f"± {point['shape']['spread']:g}"


def scale_lines(points: list[Report]) -> dict[str, list[tuple[str, Report]]]:
    """By version and dimension the scales and their timings."""
    lines: dict[str, list[tuple[str, Report]]] = {}
    for point in points:
        for row in point["versions"][1:]:  # the first is the bound
            name = f"{row['version']}, D = {point['shape']['dim']}"
            lines.setdefault(name, []).append((scale_of(point), row))
    return lines


def comparison(old: Report, new: Report) -> tuple[Table, int]:
    """Ratios of the new run to an old one, and how many got worse beyond the spread.

    Times are taken as multiples of the bound of the same run, so that another machine, or a busy
    one, changes both sides. Slower means that the quartiles do not overlap.
    """
    table = Table(title="new / old, in times of the bound", title_justify="left", box=None)
    for name in ("shape", "version", "old", "new", "new/old", "memory", ""):
        table.add_column(name, justify="left" if name in ("shape", "version", "") else "right")
    before = rows_of(old)
    worse = 0
    for key, row in rows_of(new).items():
        if key not in before or row["version"] == "bound":
            continue
        was = before[key]
        verdict = ""
        if row["ratio_low"] > was["ratio_high"]:
            verdict = "SLOWER"
        elif row["ratio_high"] < was["ratio_low"]:
            verdict = "faster"
        memory = ""
        if row.get("peak_bytes") and was.get("peak_bytes"):
            grown = row["peak_bytes"] / was["peak_bytes"]
            memory = f"{grown:.2f}"
            if grown > MORE_MEMORY:
                verdict = f"{verdict} MORE MEMORY".strip()
        bad = verdict.isupper()
        worse += bad
        table.add_row(
            *key,
            f"{was['ratio']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio'] / was['ratio']:.2f}",
            memory,
            Text(verdict, style="bold red" if bad else "green"),
        )
    return table, worse


def rows_of(report: Report) -> dict[tuple[str, str], Report]:
    """Every timing of a report by shape and version."""
    points = all_points(report)
    rows = {(p["label"], row["version"]): row for p in points for row in p["versions"]}
    for figures in report["shapes"]:
        for kernel, ladder in figures["ladder"].items():
            rows.update({(figures["label"], f"{kernel}: {t['version']}"): t for t in ladder[1:]})
    return rows


def all_points(report: Report) -> list[Report]:
    """What was checked and timed: shapes, points of the growth, scales."""
    growth = [point for side in report["growth"].values() for point in side]
    return [*report["shapes"], *growth, *report.get("scales", [])]
