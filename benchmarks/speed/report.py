"""What a run says on the terminal: a table per shape, and a comparison with an older run.

The JSON has short names; here they are in words that need no other page.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

Report = dict[str, Any]

MORE_MEMORY = 1.1  # peaks of resident memory repeat to a few percent

LEGEND = """\
All versions compute the same loss and gradients, and are
timed in turn:
  eager          plain PyTorch, as most people write it
  torch.compile  the same, compiled by PyTorch
  chunked        this package in PyTorch, rows in blocks
  cpu, triton, cuda          this package, its kernels
  others         rivals by the names of their packages
The first row is what no version can do without: its matrix
products, or a copy of the numbers it reads and writes.
  ms     of a step, the median, ± half of what lies between
         the quartiles
  times  the time of the first row, which a kernel that
         keeps its numbers in the cache can beat
  MB     of memory at the peak, beside inputs and gradients
  error  the largest, against the same in float64
"""
IN_WORDS = {
    "plain": "the plain loss",
    "hits": "own item left out of the candidates",
    "operations": "matrix products",
    "gathered_bytes": "memory copy",
    "no padding": "without padding",
    "half padded": "half of the rows padding",
}


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
    """Every version of one shape: its time, memory, and error against float64."""
    table = table_of(heading(figures), ["", "ms", "±", "times", "MB", "error"])
    for row in figures["versions"]:
        errors = figures["errors"].get(row["version"], {})
        table.add_row(
            version_of(row, figures),
            digits(row["median_ms"]) + ("" if row.get("queued", True) else "*"),
            f"{(row['high_ms'] - row['low_ms']) / 2 / row['median_ms']:.0%}",
            f"{row['ratio']:.2f}",
            megabytes(row.get("peak_bytes")),
            f"{max(errors.values()):.0e}" if errors else "",
        )
    lines = [
        f"{kernel}, more time than {in_words(timings[0]['version'])}: "
        + ", and ".join(f"{in_words(t['version'])} {t['ratio'] - 1:+.1%}" for t in timings[1:])
        for kind in ("ladder", "padding")
        for kernel, timings in figures.get(kind, {}).items()
    ]
    for key, what in (("launches", "launches"), ("host_ms", "ms until the call returns")):
        counts = [
            f"{row['version']} {row[key]:.3g}" for row in figures["versions"] if "launches" in row
        ]
        lines += [f"{what}: {', '.join(counts)}"] if counts else []
    if not all(row.get("queued", True) for row in figures["versions"]):
        lines.append("* with time of the host, for which the GPU waits")
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


def table_of(title: str, columns: list[str]) -> Table:
    """Names to the left, figures to the right."""
    table = Table(
        title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), collapse_padding=True
    )
    for number, name in enumerate(columns):
        # The longest name of a version, so that titles have the same room everywhere.
        table.add_column(name, justify="right" if number else "left", min_width=0 if number else 28)
    return table


def in_words(name: str) -> str:
    return IN_WORDS.get(name, name)


def version_of(row: Report, figures: Report) -> str:
    return in_words(next(iter(figures["bound"]))) if row["version"] == "bound" else row["version"]


def heading(figures: Report) -> str:
    """The shape in words."""
    shape = figures["shape"]
    count = f"{shape['candidates']:,}"
    candidates = {
        "shared": f"{count} candidates",
        "in-batch": "each other's items as candidates",
        "full": f"all {count} items",
        "per-example": f"{count} candidates each of {shape['table']:,} items",
    }[shape["kind"]]
    smaller = ", smaller than on a GPU" if shape["twin"] else ""
    on = "the plain loss" if figures["level"] == "plain" else "all corrections on"
    return (
        f"{shape['name']}{smaller}: {shape['rows']:,} queries, {candidates}, {shape['dim']} "
        f"dimensions, {shape['dtype']}, {on}"
    )


def digits(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:,.0f}"


def growth_table(side: str, points: list[Report]) -> Table:
    """Median times in ms along one side."""
    shape, other = points[0]["shape"], {"rows": "candidates", "candidates": "rows"}[side]
    title = f"ms by number of {side}; {shape[other]:,} {other}, {shape['dim']} dimensions"
    names = {row["version"]: version_of(row, p) for p in points for row in p["versions"]}
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in (side, *names.values()):
        table.add_column(heading.replace(" ", "\n").replace(".", ".\n"), justify="right")
    for point in points:
        times = {row["version"]: digits(row["median_ms"]) for row in point["versions"]}
        table.add_row(f"{point['shape'][side]:,}", *(times.get(name, "") for name in names))
    return table


def scale_table(points: list[Report]) -> Table:
    """Times of the bound over the scales of the logits, a row per version and dimension."""
    title = (
        "times the matrix products, by standard deviation of the logits; rising: every candidate "
        "outscores those before it; D: dimensions"
    )
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("")
    for scale in dict.fromkeys(scale_of(p) for p in points):
        table.add_column(scale.replace("± ", "±"), justify="right")
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


def comparison(old: Report, new: Report) -> tuple[list[Table], int]:
    """Ratios of the new run to an old one by shape, and how many got worse beyond the spread.

    Times are taken as multiples of the bound of the same run, so that another machine, or a busy
    one, changes both sides. Slower means that the quartiles do not overlap.
    """
    tables: dict[str, Table] = {}
    before = rows_of(old)
    worse = 0
    for (shape, version), row in rows_of(new).items():
        if (shape, version) not in before or version == "bound":
            continue
        was = before[shape, version]
        verdicts = []
        if row["ratio_low"] > was["ratio_high"]:
            verdicts = ["SLOWER"]
        elif row["ratio_high"] < was["ratio_low"]:
            verdicts = ["faster"]
        memory = ""
        if row.get("peak_bytes") and was.get("peak_bytes"):
            grown = row["peak_bytes"] / was["peak_bytes"]
            memory = f"{grown:.2f}"
            if grown > MORE_MEMORY:
                verdicts.append("MORE MB")
        bad = any(verdict.isupper() for verdict in verdicts)
        worse += bad
        if shape not in tables:
            columns = ["", "old", "new", "new/old", "MB", ""]
            tables[shape] = table_of(f"\n{shape}: times, new and old", columns)
        tables[shape].add_row(
            version.replace("hits", "own item out"),
            f"{was['ratio']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio'] / was['ratio']:.2f}",
            memory,
            Text("\n".join(verdicts), style="bold red" if bad else "green"),
        )
    return list(tables.values()), worse


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
