"""`python -m benchmarks.readme`: write the figures of the committed results into the README.

The tables stand between comments, so that no figure is typed by hand; a test compares.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.record import ROOT

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    README.write_text(filled(README.read_text("utf-8")), "utf-8")


def filled(text: str) -> str:
    """The README with the tables of the committed results."""
    speed = json.loads((RESULTS / "speed-cpu.json").read_text("utf-8"))
    quality = json.loads((RESULTS / "quality-ml-1m.json").read_text("utf-8"))
    for name, content in (
        ("result", result(speed)),
        ("speed", speed_table(speed)),
        ("quality", quality_table(quality)),
    ):
        before, rest = text.split(f"<!-- {name} -->\n")
        _, after = rest.split(f"<!-- /{name} -->\n")
        text = f"{before}<!-- {name} -->\n{content}<!-- /{name} -->\n{after}"
    return text


def ratios(comparison: dict[str, Any]) -> dict[str, float]:
    """How long each version takes, in times of the bound."""
    return {t["version"]: t["ratio"] for t in comparison["versions"]}


def result(speed: dict[str, Any]) -> str:
    """The first line that a reader sees."""
    eager = min(ratios(c)["eager"] / ratios(c)["cpu"] for c in speed["comparisons"])
    compiled = min(ratios(c)["torch.compile"] / ratios(c)["cpu"] for c in speed["comparisons"])
    bound = max(ratios(c)["cpu"] for c in speed["comparisons"])
    memory = speed["memory"]["bytes"]
    return (
        f"On a CPU, with log-Q, hit removal and domain weights on: **{eager:.1f} times as fast as "
        f"eager PyTorch**, {compiled:.1f} times as fast as `torch.compile`, {bound:.2f} times the "
        f"three matrix products that no implementation can avoid, and "
        f"**{memory['cpu'] / 1e6:.0f} MB instead of {memory['eager'] / 1e6:,.0f} MB** of memory. "
        "On a GPU: not measured yet.\n"
    )


def speed_table(speed: dict[str, Any]) -> str:
    memory = speed["memory"]
    shapes = [c["shape"] for c in speed["comparisons"]]
    lines = [
        "| forward and backward, float32 | "
        + " | ".join(f"B = {s['rows']:,}, N = {s['candidates']:,}, D = {s['dim']}" for s in shapes)
        + f" | memory, B = N = {memory['shape']['rows']:,}, D = {memory['shape']['dim']} |",
        "|---|" + "---:|" * (len(shapes) + 1),
    ]
    for version in ratios(speed["comparisons"][0]):
        cells = [f"{ratios(c)[version]:.2f}" for c in speed["comparisons"]]
        peak = memory["bytes"].get(version)
        cells.append("" if peak is None else f"{peak / 1e6:,.0f} MB")
        lines.append(f"| {version} | " + " | ".join(cells) + " |")
    for comparison in speed["comparisons"]:
        steps = ", ".join(f"{t['version']} {t['ratio']:.2f}" for t in comparison["levels"])
        lines.append(f"\nOver the plain loss, D = {comparison['shape']['dim']}: {steps}.")
    machine = speed["machine"]
    lines.append(
        f"\nTimes of the three products, medians of {speed['comparisons'][0]['runs']} rounds in "
        f"turn; memory above inputs and gradients. {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['capability']}, torch {speed['versions']['torch']}."
    )
    return "\n".join(lines) + "\n"


def quality_table(quality: dict[str, Any]) -> str:
    """Groups of test users: all, the sparsest quarter, and the smallest and largest domains."""
    named = {g["group"]: g for g in quality["results"]}
    domains = [g for g in quality["results"] if g["group"] in quality["data"]["domains"]]
    domains.sort(key=lambda g: g["interactions"])
    groups = [quality["results"][0], quality["results"][1], *domains[:4], *domains[-2:]]
    lines = [
        "| NDCG@10 | interactions | test users | plain | dynamic | bonus |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for group in groups:
        losses = named[group["group"]]["losses"]
        cells = [f"{losses['plain']['NDCG@10']['mean']:.3f}"]
        for loss in ("dynamic", "bonus"):
            figures = losses[loss]["NDCG@10"]
            cells.append(
                f"{figures['mean']:.3f} ({figures['change']:+.3f} ± "
                f"{figures['standard_error']:.3f})"
            )
        lines.append(
            f"| {group['group']} | {group['interactions']:,} | {group['test_users']:,} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
