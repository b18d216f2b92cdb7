"""`python -m benchmarks.readme`: write the figures of the committed results into the README.

The tables stand between comments, so that no figure is typed by hand; a test compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
SPEED_CPU, SPEED_GPU = RESULTS / "speed-cpu.json", RESULTS / "speed-cuda.json"
QUALITY_JSON = RESULTS / "quality-ml-1m.json", RESULTS / "quality-ml-1m-calibrated.json"

STEP = RESULTS / "training-step.json"
# A package index shows the README, so links and pictures are absolute.
RESULTS_PATH = "benchmarks/results"
BLOB = "https://github.com/dwl-kernels/dwl_kernels/blob/main/"
RAW = "https://raw.githubusercontent.com/dwl-kernels/dwl_kernels/main/"

KERNELS = ("cpu", "triton", "cuda")  # of this package

Report = dict[str, Any]


def main() -> None:
    README.write_text(filled(README.read_text("utf-8")), "utf-8")


def filled(text: str) -> str:
    """The README with the tables of the committed results."""
    speed = [read(path) for path in (SPEED_CPU, SPEED_GPU) if path.exists()]
    for name, content in (
        ("result", "".join(map(result, speed)) + gpu_line(speed)),
        ("step", step_table(read(STEP))),
        ("speed", "\n".join(map(speed_table, speed)) + gpu_line(speed)),
        ("quality", quality_table(*map(read, QUALITY_JSON))),
    ):
        before, rest = text.split(f"<!-- {name} -->\n")
        _, after = rest.split(f"<!-- /{name} -->\n")
        text = f"{before}<!-- {name} -->\n{content}<!-- /{name} -->\n{after}"
    return text


def read(path: Path) -> Report:
    report: Report = json.loads(path.read_text("utf-8"))
    return report


def gpu_line(speed: list[Report]) -> str:
    on_gpu = any(report["device"] == "cuda" for report in speed)
    return "" if on_gpu else "\nOn a GPU: not measured.\n"


def by_version(figures: Report) -> dict[str, Report]:
    return {row["version"]: row for row in figures["versions"]}


def kernel_of(figures: Report) -> str | None:
    """The fastest of the package's kernels on a shape."""
    own = [row for row in figures["versions"] if row["version"] in KERNELS]
    return min(own, key=lambda row: row["ratio"])["version"] if own else None


def result(speed: Report) -> str:
    """The first figures that a reader sees: the goals' shapes with everything switched on."""
    on_cpu = speed["device"] == "cpu"
    shapes = [f for f in speed["shapes"] if not on_cpu or f["shape"]["name"] == "cpu"]
    shapes = [f for f in shapes if f["level"] != "plain"]
    where = "CPU" if on_cpu else f"GPU ({speed['machine']['gpu']})"
    lines = [
        f"| loss and gradients on a {where}, everything above switched on | PyTorch as usual | "
        "`torch.compile` | this package |",
        "|---|---:|---:|---:|",
    ]
    for figures in shapes:
        rows, own, shape = by_version(figures), kernel_of(figures), figures["shape"]
        if own is None:
            continue
        cells = [
            f"{rows[name]['ratio'] / rows[own]['ratio']:.1f}, {megabytes(rows[name])}"
            if name in rows
            else "–"
            for name in ("eager", "torch.compile", own)
        ]
        sizes = f"{shape['rows']:,} queries, {shape['candidates']:,} candidates"
        dtype = f", {shape['dtype']}" if on_cpu and shape["dtype"] != "float32" else ""
        lines.append(f"| {sizes}, {shape['dim']} dimensions{dtype} | " + " | ".join(cells) + " |")
    return (
        "\n".join(lines)
        + "\n\nTime in that of this package, and memory beside inputs and gradients.\n"
    )


def step_table(step: Report) -> str:
    """What the loss is of a whole training step, with PyTorch and with this package."""
    lines = [
        "| a training step on a CPU | its loss in PyTorch | in this package | the whole step |",
        "|---|---:|---:|---:|",
    ]
    for figures in step["models"]:
        plain, ours = figures["pytorch"], figures["package"]
        lines.append(
            f"| {figures['model']} | {plain['loss_ms'] / plain['step_ms']:.0%} of it | "
            f"{ours['loss_ms'] / ours['step_ms']:.0%} | "
            f"{plain['step_ms'] / ours['step_ms']:.1f} times as fast |"
        )
    return (
        "\n".join(lines)
        + f"\n\nSizes of MovieLens 1M, 64 dimensions, float32; `{step['command']}`, "
        f"[json]({BLOB}{RESULTS_PATH}/training-step.json).\n"
    )


def megabytes(row: Report) -> str:
    peak = row.get("peak_bytes")
    return "memory not measured" if peak is None else f"{max(peak, 1e6) / 1e6:,.0f} MB"


def speed_table(speed: Report) -> str:
    """Time in multiples of the bound and memory, a row per shape, and what stands behind them."""
    shapes, machine, on_cpu = speed["shapes"], speed["machine"], speed["device"] == "cpu"
    versions = list(dict.fromkeys(v for f in shapes for v in by_version(f) if v != "bound"))
    lines = [
        "| times the bound, memory | bound | " + " | ".join(versions) + " |",
        "|---|" + "---:|" * (len(versions) + 1),
    ]
    for figures in shapes:
        bound = by_version(figures)["bound"]["median_ms"]
        cells = [f"{bound:.3g} ms", *(cell(figures, name) for name in versions)]
        lines.append(f"| {figures['label']} | " + " | ".join(cells) + " |")
    errors = [
        f"{name} {max(found):.0e}"
        for name in versions
        if (found := [f["errors"][name]["gradient"] for f in shapes if name in f["errors"]])
    ]
    ladders = [
        f"{f['label'].split(':')[0]} D = {f['shape']['dim']}"
        f"{', bfloat16' if on_cpu and f['shape']['dtype'] == 'bfloat16' else ''} "
        f"{100 * (rungs[-1]['ratio'] - 1):+.1f}%"
        for f in shapes
        for rungs in f["ladder"].values()
    ]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    runs = [row["runs"] for f in shapes for row in f["versions"]]
    name = f"{RESULTS_PATH}/speed-{speed['device']}"
    drawn = {"overhead": "ladder"} | ({"growth": "growth"} if any(speed["growth"].values()) else {})
    drawn |= {"scales of logits": "scales"} if speed.get("scales") else {}
    drawn |= {"launches": "launches"} if speed["device"] == "cuda" else {}
    pictures = ", ".join(f"[{what}]({BLOB}{name}-{suffix}.png)" for what, suffix in drawn.items())
    lines += [
        "",
        f"Forward and backward, medians of {min(runs)} to {max(runs)} rounds in turn; memory above "
        "inputs and gradients, each in a fresh process. The bound: the three products, or the copy "
        "of the gathered numbers for candidates per example. A fused kernel can lie below 1: the "
        "products are timed one by one and write their logits to memory. (twin): scaled down to "
        "fit a CPU.",
        "",
        f"Largest gradient error against float64: {', '.join(errors)}.",
        "",
        f"All corrections over the plain loss: {', '.join(ladders)}.",
        "",
        *scales_line(speed.get("scales", [])),
        f"{where}, torch {speed['versions']['torch']}. Figures: [json]({BLOB}{name}.json); "
        f"pictures: {pictures}.",
        "",
        f"![time and memory by shape and version]({RAW}{name}.png)",
    ]
    return "\n".join(lines) + "\n"


def scales_line(points: list[Report]) -> list[str]:
    """How little the time depends on the size of the logits."""
    if not points:
        return []
    ratios = {
        rising: [
            row["ratio"]
            for point in points
            for row in point["versions"]
            if row["version"] in KERNELS and point["shape"]["rising"] == rising
        ]
        for rising in (False, True)
    }
    spreads = [p["shape"]["spread"] for p in points if not p["shape"]["rising"]]
    usual, worst = ratios[False], max(ratios[True])
    line = (
        f"Logits of standard deviation {min(spreads):g} to {max(spreads):g}: {min(usual):.2f} to "
        f"{max(usual):.2f} times the bound; where every tile of candidates outscores all before "
        f"it, {worst:.2f}."
    )
    return [line, ""]


def cell(figures: Report, version: str) -> str:
    row = by_version(figures).get(version)
    if row is None:
        if version in figures["too_large"]:
            return f"needs {figures['too_large'][version] / 1e9:.0f} GB"
        return "refused" if version in figures["refused"] else "–"
    memory = megabytes(row)
    ratio = f"{row['ratio']:.2f}"
    return f"{f'**{ratio}**' if version in KERNELS else ratio}, {memory}"


QUALITY = ("all", "sparsest ¼", "Film-Noir", "Documentary", "Western", "Drama")


def quality_table(quality: dict[str, Any], calibrated: dict[str, Any]) -> str:
    """A line per loss: NDCG@10 and its paired change, for all test users and by domain."""
    named = {group["group"]: group for group in quality["results"]}
    users = (f"{group} ({named[group]['test_users']:,})" for group in QUALITY)
    lines = [f"| NDCG@10 (test users) | {' | '.join(users)} |", "|---|" + "---:|" * len(QUALITY)]
    lines += [quality_line(quality, loss) for loss in named["all"]["losses"]]
    lines.append(quality_line(calibrated, "dynamic", "dynamic, calibrated"))
    return "\n".join(lines) + "\n"


def quality_line(quality: dict[str, Any], loss: str, label: str | None = None) -> str:
    named = {group["group"]: group["losses"][loss]["NDCG@10"] for group in quality["results"]}
    cells = [f"{named[group]['mean']:.3f}" for group in QUALITY]
    if loss != "plain":
        cells = [
            f"{cell} ({named[group]['change']:+.3f} ± {named[group]['standard_error']:.3f})"
            for cell, group in zip(cells, QUALITY, strict=True)
        ]
    return f"| {label or loss} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
