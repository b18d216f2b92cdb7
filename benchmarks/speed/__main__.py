"""`python -m benchmarks.speed`: speed, memory and accuracy against what a user would pick instead.

Every version is checked against float64 before it is timed. The outcome is a table on the terminal,
`speed-cpu.json` or `speed-cuda.json`, and pictures beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.progress import WIDTH, Progress
from benchmarks.record import ROOT, append_line, busy, write_json
from benchmarks.speed import shapes
from benchmarks.speed.planted import FAULTS
from benchmarks.speed.report import (
    LEGEND,
    Report,
    all_points,
    collected,
    comparison,
    growth_table,
    scale_table,
    shape_table,
)
from benchmarks.speed.suite import FORMAT, Mode, Plan, measure, plan

RESULTS = ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    console = Console(width=WIDTH, highlight=False)
    out: Path = options.out
    old = None if options.compare is None else read(options.compare)  # this run may replace it
    console.print(LEGEND)
    if options.load:
        logs = [path for path in options.load if path.suffix == ".jsonl"]
        report = collected(logs) if logs else read(options.load[0])
        if logs:
            write_json(out / f"speed-{report['device']}.json", report)
        for figures in report["shapes"]:
            console.print(shape_table(figures))
    else:
        if warning := busy():
            console.print(f"[bold red]{warning}[/]\n")
        device = "cuda" if torch.cuda.is_available() and not options.dry else "cpu"
        mode: Mode = "dry" if options.dry else "quick" if options.quick else "full"
        todo = plan(device, mode, options.shapes)
        todo = replace(todo, only=tuple(options.versions), fault=options.fault)
        if options.log is not None:
            todo = replace(todo, note=partial(append_line, options.log))
        report = run(todo, console, None if options.log else out / f"speed-{device}.json")
    for side, points in report["growth"].items():
        console.print(growth_table(side, points))
    if report.get("scales"):
        console.print(scale_table(report["scales"]))
    if options.log is None:
        from benchmarks.speed import pictures  # matplotlib takes a second, and a demo needs none

        for path in pictures.draw(report, out):
            console.print(f"drawn: {path}", soft_wrap=True)
    if old is not None:
        tables, worse = comparison(old, report)
        console.print(*tables, sep="\n")
        console.print(f"{worse} got worse beyond the spread")
    wrong = [f"{name} on {p['label']}" for p in all_points(report) for name in p["refused"]]
    for name in wrong:
        console.print(f"[bold red]refused:[/] {name}")
    return 1 if wrong else 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=(__doc__ or "").split(": ", 1)[1]
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="smaller shapes, within two minutes")
    add("--dry", action="store_true", help="the GPU's shapes at tiny sizes, to try the suite")
    add("--shapes", default="", metavar="A,B", help="only these shapes, and no growth")
    add("--versions", default="", metavar="A,B", help="only these; a peer stands for its settings")
    add("--log", type=Path, help="add every figure as it comes to these lines of JSON; no pictures")
    add("--fault", default="", choices=["", *FAULTS], help="a version that fails, to try this")
    add("--out", type=Path, help="for JSON and pictures: benchmarks/results, in part .benchmarks")
    add("--compare", type=Path, metavar="OLD.json", help="print ratios to an older run")
    add(
        "--load",
        type=Path,
        nargs="+",
        default=[],
        metavar="NEW.json",
        help="show and draw these figures, measure none; of lines that --log wrote, make the JSON",
    )
    options = parser.parse_args(arguments)
    options.versions = [name for name in options.versions.split(",") if name]
    options.shapes = [name for name in options.shapes.split(",") if name]
    known = {shape.name for shape in (*shapes.GPU, *shapes.CPU)}
    unknown = [name for name in options.shapes if name not in known]
    if unknown:
        parser.error(f"--shapes names {', '.join(unknown)}; wanted some of {sorted(known)}")
    for path in (options.compare, *options.load):
        if path is not None and not path.is_file():
            parser.error(f"{path} is no file")
    if options.out is None:
        some = options.quick or options.dry or options.shapes or options.versions
        options.out = ROOT / ".benchmarks" if some else RESULTS
    return options


def read(path: Path) -> Report:
    report: Report = json.loads(path.read_text("utf-8"))
    if report.get("format") != FORMAT:
        raise SystemExit(f"{path} has format {report.get('format')}; wanted {FORMAT}")
    return report


def run(todo: Plan, console: Console, path: Path | None) -> Report:
    """Measure, with tables as they come. A run that is cut short leaves a `.partial.json`."""
    begun = 0
    with Progress() as progress:

        def advance(step: str) -> None:
            nonlocal begun
            begun += 1
            progress(f"{begun}/{todo.steps} {step}")

        def show(report: Report) -> None:
            progress("")
            console.print(shape_table(report["shapes"][-1]))
            if path is not None:
                write_json(path.with_suffix(".partial.json"), report)

        report = measure(todo, advance, show)
    if path is not None:
        write_json(path, report)
        path.with_suffix(".partial.json").unlink(missing_ok=True)
    return report


if __name__ == "__main__":
    # torch.compile warns about what it does, not about what is measured.
    warnings.filterwarnings("ignore", module="torch")
    sys.exit(main())
