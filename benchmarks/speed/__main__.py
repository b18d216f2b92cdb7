"""`python -m benchmarks.speed`: every version in turn, against the bound, and their peak memory."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.record import ROOT, record, write_json
from benchmarks.speed import shapes
from benchmarks.speed.baselines import LOSSES
from benchmarks.speed.measure import (
    Timing,
    as_dict,
    compare_levels,
    compare_versions,
    peak_memory,
)
from benchmarks.speed.shapes import Shape

RESULT = ROOT / "benchmarks" / "results" / "speed-cpu.json"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=(__doc__ or "").split(": ", 1)[1]
    )
    parser.add_argument("--demo", action="store_true", help="a first look, without a JSON")
    parser.add_argument("--runs", type=int, default=15, help="rounds per comparison (default 15)")
    parser.add_argument("--json", type=Path, default=RESULT, help=f"default {RESULT.name}")
    options = parser.parse_args(arguments)
    if options.runs < 1:
        parser.error(f"--runs is {options.runs}; wanted 1 or more")
    if options.demo:
        demo()
    else:
        full(options.runs, options.json)
    return 0


def demo() -> None:
    """A smaller shape and no compilation by PyTorch, so that it ends within half a minute."""
    versions = ["eager", "chunked", "cpu"]
    timings = time_versions(shapes.DEMO, versions, runs=7)
    peaks = measure_memory(shapes.DEMO_MEMORY, versions)
    medians = {t.version: t.median_ms for t in timings}
    faster, smaller = medians["eager"] / medians["cpu"], peaks["eager"] / max(peaks["cpu"], 1e6)
    print(f"the kernel is {faster:.1f} times as fast as eager, in 1/{smaller:.0f} of its memory")


def full(runs: int, path: Path) -> None:
    comparisons = []
    for shape in shapes.CPU:
        timings = time_versions(shape, list(LOSSES), runs)
        print("the kernel with one correction after the other")
        levels = compare_levels(shape, runs)
        print_timings(levels, "plain")
        comparisons.append(
            {
                "shape": as_dict(shape),
                "operations": shape.operations,
                "runs": runs,
                "versions": [asdict(t) for t in timings],
                "levels": [asdict(t) for t in levels],
            }
        )
    peaks = measure_memory(shapes.MEMORY, list(LOSSES))
    memory = {"shape": as_dict(shapes.MEMORY), "runs": 1, "bytes": peaks}
    write_json(path, record(comparisons=comparisons, memory=memory))
    print(f"written to {path}")


def time_versions(shape: Shape, versions: Sequence[str], runs: int) -> list[Timing]:
    print(f"{shape}; forward and backward, all corrections on, {runs} rounds in turn")
    timings = compare_versions(shape, versions, runs)
    print_timings(timings, "bound")
    return timings


def measure_memory(shape: Shape, versions: Sequence[str]) -> dict[str, float]:
    """Peak above inputs and gradients, each version in a process of its own."""
    print(f"{shape}; peak memory above inputs and gradients")
    peaks: dict[str, float] = {}
    for name in versions:
        peaks[name] = peak_memory(name, shape)
        share = peaks[name] / shape.logits_bytes
        print(f"  {name:<22}{peaks[name] / 1e6:>9.0f} MB {share:>8.1%} of one logits matrix")
    print()
    return peaks


def print_timings(timings: Sequence[Timing], reference: str) -> None:
    print(f"  {'':<22}{'median':>9}    {'quartiles':<15}   times {reference}")
    for t in timings:
        spread = f"{t.low_ms:.1f} to {t.high_ms:.1f}"
        print(
            f"  {t.version:<22}{t.median_ms:>6.1f} ms    {spread:<15}   "
            f"{t.ratio:.2f} ({t.ratio_low:.2f} to {t.ratio_high:.2f})"
        )
    print(flush=True)


if __name__ == "__main__":
    # torch.compile warns about what it does, not about what is measured.
    warnings.filterwarnings("ignore", module="torch")
    sys.exit(main())
