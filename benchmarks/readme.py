"""`python -m benchmarks.readme`: write the figures of the committed results into the README.

The tables stand between comments, so that no figure is typed by hand; a test compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.quality import claims, report
from benchmarks.record import ROOT

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
SPEED_CPU, SPEED_GPU = RESULTS / "speed-cpu.json", RESULTS / "speed-cuda.json"
QUALITY = RESULTS / "quality"

STEP = RESULTS / "training-step.json"
DEVICES = RESULTS / "devices.json"
CLIENTS = RESULTS / "clients.json"
# A package index shows the README, so links and pictures are absolute.
RESULTS_PATH = "benchmarks/results"
EXAMPLES = "dwl_kernels/examples/clients"
QUALITY_TABLES = f"{RESULTS_PATH}/quality/tables.md"
BLOB = "https://github.com/dwl-kernels/dwl_kernels/blob/main/"
RAW = "https://raw.githubusercontent.com/dwl-kernels/dwl_kernels/main/"
QUALITY_LINKS = f"{BLOB}{QUALITY_TABLES}", f"{RAW}{RESULTS_PATH}/quality/ml-1m.png"

KERNELS = ("cpu", "triton", "cuda")  # of this package

Report = dict[str, Any]


def main() -> None:
    README.write_text(filled(README.read_text("utf-8")), "utf-8")
    documents = claims.documents_in(QUALITY)
    (ROOT / QUALITY_TABLES).write_text(claims.tables(documents), "utf-8")
    if "ml-1m" in documents:
        report.plot(QUALITY / "ml-1m.png", documents["ml-1m"], claims.DRAWN)


def filled(text: str) -> str:
    """The README with the tables of the committed results."""
    speed = [read(path) for path in (SPEED_CPU, SPEED_GPU) if path.exists()]
    for name, content in (
        ("result", "".join(map(result, speed)) + gpu_line(speed)),
        ("devices", devices_table(read(DEVICES))),
        ("step", step_table(read(STEP))),
        ("speed", "\n".join(map(speed_table, speed)) + gpu_line(speed)),
        ("clients", clients_table(read(CLIENTS))),
        ("quality", claims.section(claims.documents_in(QUALITY), *QUALITY_LINKS)),
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


# Where memory binds, how a loss is called, and what a rank sends.
WAYS = {
    "gathered": (
        "nowhere",
        "positives and negatives of all ranks: `in_batch_softmax_loss`, `sampled_softmax_loss`, "
        "`dual_scale_softmax_loss` and the modules",
        "(R - 1) n (D s + 12) and (R - 1) n D s",
    ),
    "ring": (
        "at the candidates",
        "the same with `ring=True`: a rank holds two blocks of them, and computes the forward "
        "twice; not the dual scale",
        "(R - 1) n (D s + 12) and (R - 1) n (D s + 12) + R n 4 D",
    ),
    "sharded": (
        "at the table",
        "a shard of rows per rank, or a `DTensor` with `Shard(0)`: `full_softmax_loss`, "
        "`CumulativeCrossEntropy`",
        "(R - 1) B (D s + 24) and (R - 1) B (4 D + 16)",
    ),
    "indexed": (
        "at the table, sampled ids",
        "`indexed_sampled_softmax_loss`: the different rows that are drawn are fetched",
        "u (D s + 8) and u D s",
    ),
}


def devices_table(devices: Report) -> str:
    """What each way of several devices sends, and what the plan predicts of it."""
    predicted, room = devices["predicted"], devices["assumptions"]["memory"]
    training, sizes = predicted["training"], (10**6, 10**9)
    by_size = {(row["way"], row["items"]): row for row in predicted["by_catalogue"]}
    lines = [
        "| where memory binds | way | a rank sends, forward and backward | "
        f"{training['ranks']} devices, 10⁶ items | 10⁹ items |",
        "|---|---|---|---:|---:|",
    ]
    for name, words in WAYS.items():
        cells = []
        for size in sizes:
            row = by_size[name, size]
            time = f"{row['ms']:.2g} ms" if row["ms"] < 1e3 else f"{row['ms'] / 1e3:.2g} s"
            fits = row["memory_bytes"] <= room
            cells.append(f"{time}, {row['memory_bytes'] / 1e9:.2g} GB" if fits else "does not fit")
        lines.append("| " + " | ".join([*words, *cells]) + " |")
    name = f"{RESULTS_PATH}/devices"
    return (
        "\n".join(lines)
        + "\n\nBytes, for R ranks of B rows and n candidates each, of D elements of s bytes, u "
        "different ids that other ranks have. Time and memory are predictions for H100s, of loss "
        f"and table, with {training['rows']:,} rows of {training['dim']} bfloat16 numbers on a "
        "device; the first two ways have the table on every device, if there is one. Counters "
        "check the formulas of bytes, memory and products: `python -m benchmarks.devices`, "
        f"[json]({BLOB}{name}.json).\n\n"
        f"![time and memory by catalogue, and which way to take]({RAW}{name}.png)\n\n"
        "On GPUs: not measured.\n"
    )


def clients_table(report: Report) -> str:
    """A line per client: what a swap of its loss changes, and how near the results are."""
    lines = [
        "| inside | instead of | lines changed | loss differs by | gradients by |",
        "|---|---|---:|---:|---:|",
    ]
    for row in report["clients"]:
        version = row.get("version", "–")
        name = f"[{row['client']}]({BLOB}{EXAMPLES}/{row['example']}.py) {version}"
        differs = (
            f"not run: {row['not_run'].replace('|', '/')} | –"
            if "not_run" in row
            else " | ".join(
                f"{row[name]:.0e}" if row[name] else "0" for name in ("loss", "gradient")
            )
        )
        lines.append(f"| {name} | {row['own']} | {row['lines']} | {differs} |")
    return (
        "\n".join(lines)
        + "\n\nThe largest relative difference of loss and of gradients, on the same "
        f"batches in float32; `make clients`, {report['time'][:10]}, torch "
        f"{report['versions']['torch']}, [json]({BLOB}{RESULTS_PATH}/clients.json).\n"
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
        f"it, {worst:.2f} at most."
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


if __name__ == "__main__":
    main()
