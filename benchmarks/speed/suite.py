"""What one run measures: check, times, overhead ladder and memory of every shape, growth, and the
times over the scales of the logits.

The outcome is one dict of plain numbers, which the JSON file holds and tables and pictures read.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Literal

import torch

from benchmarks.record import record
from benchmarks.speed import peers, shapes
from benchmarks.speed.accuracy import check
from benchmarks.speed.baselines import Loss, kernels, losses
from benchmarks.speed.measure import (
    Rounds,
    compare_levels,
    compare_padding,
    compare_versions,
    launches_on_gpu,
    machine_bytes,
    peak_memories,
    peak_on_gpu,
)
from benchmarks.speed.planted import FAULTS
from benchmarks.speed.report import Report
from benchmarks.speed.shapes import SIDES, Shape, Side

FORMAT = 2  # of the JSON file
SCALED = "cpu"  # the shapes of this name in float32 are measured with logits of every scale
CHECKED_ROWS = 256  # of these
QUICK = ("two-tower", "catalogue", "per-example")  # and the first
SHARE_OF_MEMORY = 0.8  # a version that needs more of the machine is not run

Mode = Literal["full", "quick", "dry"]


@dataclass(frozen=True)
class Plan:
    """The shapes of a run and its time for each."""

    device: str
    mode: Mode
    shapes: tuple[Shape, ...]
    growth: dict[Side, list[Shape]]
    versions: Rounds  # per shape
    ladder: Rounds
    along: Rounds  # per point of the growth, and per scale
    scales: list[Shape] = field(default_factory=list)
    only: tuple[str, ...] = ()  # versions, whatever their settings; none: all
    fault: str = ""  # a version of `planted` beside them
    note: Callable[..., object] = lambda **_: None  # keeps every figure as it comes

    @property
    def steps(self) -> int:
        """For the progress line: check, times, ladder and memory; points of the growth; scales."""
        return 4 * len(self.shapes) + sum(map(len, self.growth.values())) + len(self.scales)


def plan(device: str, mode: Mode, names: Sequence[str] = ()) -> Plan:
    """The full run, a quick look at smaller shapes, or a dry run of the GPU's on a CPU.

    With ``names`` only these shapes are measured, their scales, and no growth.
    """
    chosen: tuple[Shape, ...] = shapes.GPU if device == "cuda" or mode == "dry" else shapes.CPU
    growth: dict[Side, list[Shape]] = {side: shapes.growth(side, device) for side in SIDES}
    rounds = (Rounds(14, most=30), Rounds(5, least=9, most=60), Rounds(3, most=30))
    if device == "cuda":
        rounds = (Rounds(3, most=50), Rounds(2, least=9, most=50), Rounds(1, most=20))
    if mode == "quick":
        few = (chosen[0], *(s for s in chosen if s.name in QUICK))
        chosen = tuple(
            s.shrunk(s.rows // 4, max(128, s.candidates // 4), s.table // 4) for s in few
        )
        growth = {}
        rounds = (Rounds(1.5), Rounds(1), Rounds(0.5))
    if mode == "dry":
        chosen = tuple(s.shrunk(48, 40, 97, dim=16) for s in chosen)
        growth = {side: [s.shrunk(48, 40, 0, dim=16) for s in growth[side][:1]] for side in SIDES}
        rounds = (Rounds(0, 1), Rounds(0, 1), Rounds(0, 1))
    if names:
        chosen, growth = tuple(s for s in chosen if s.name in names), {}
    scaled = [s for s in chosen if s.name == SCALED and s.dtype == torch.float32]
    scales = [scale for s in scaled for scale in shapes.scales(s)]
    return Plan(device, mode, chosen, growth, *rounds, scales)


def measure(
    todo: Plan, advance: Callable[[str], object], show: Callable[[Report], object]
) -> Report:
    """Run the plan; `advance` hears of every step, `show` gets the report after every shape."""
    begun = time.monotonic()
    report = record(
        format=FORMAT,
        device=todo.device,
        mode=todo.mode,
        memory_bytes=machine_bytes(todo.device),
        shapes=[],
        growth={side: [] for side in todo.growth},
        scales=[],
    )
    todo.note(record=report)
    for shape in todo.shapes:
        report["shapes"].append(measure_shape(shape, todo, advance))
        show(report)
    forget_compiled()
    for side, points in todo.growth.items():
        for shape in points:
            advance(f"growth: {getattr(shape, side):,} {side}")
            report["growth"][side].append(measure_point(shape, todo))
    for shape in todo.scales:
        advance(f"size of the logits of {shape.name}")
        report["scales"].append(measure_scale(shape, todo))
    report["wall_seconds"] = round(time.monotonic() - begun)
    return report


def measure_shape(shape: Shape, todo: Plan, advance: Callable[[str], object]) -> Report:
    """Check every version, time what passed, then the overhead ladder and memory."""
    forget_compiled()
    advance(f"check {shape.name}")
    found, figures = admit(shape, shape, todo)
    if figures["checked"] != figures["shape"]:
        forget_compiled()
    advance(f"time {shape.name}")
    add_times(figures, shape, found, todo.versions, todo)
    advance(f"corrections of {shape.name}")
    own = [name for name in kernels(todo.device, todo.mode == "dry") if name in found]
    figures["ladder"] = {
        kernel: [asdict(t) for t in compare_levels(shape, kernel, todo.ladder, todo.device)]
        for kernel in own
    }
    if shape.name == "sequence":
        figures["padding"] = {
            kernel: [asdict(t) for t in compare_padding(shape, kernel, todo.ladder, todo.device)]
            for kernel in own
        }
    advance(f"memory of {shape.name}")
    add_memory(figures, shape, found, todo)
    todo.note(figures=figures)
    return figures


def measure_point(shape: Shape, todo: Plan) -> Report:
    """One point of the growth; the versions are checked on few rows of it."""
    found, figures = admit(shape, shape.shrunk(512, 512, 0), todo)
    add_times(figures, shape, found, todo.along, todo)
    add_memory(figures, shape, found, todo)
    return figures


def measure_scale(shape: Shape, todo: Plan) -> Report:
    """The package's own versions at one scale; they are checked on some rows, all candidates."""
    own = ("chunked", *kernels(todo.device, todo.mode == "dry"))
    found, figures = admit(shape, shape.shrunk(CHECKED_ROWS, shape.candidates, 0), todo, own)
    add_times(figures, shape, found, todo.along, todo)
    return figures


def admit(
    shape: Shape, checked: Shape, todo: Plan, only: Sequence[str] = ()
) -> tuple[dict[str, Loss], Report]:
    """The versions that fit into memory and are right, and a report that says why others not."""
    gc.collect()
    torch.cuda.empty_cache()  # shapes differ by orders of magnitude; nothing without a GPU
    found, left_out = losses(shape, todo.device, todo.mode == "dry"), dict[str, str]()
    if todo.device == "cuda" or todo.mode == "dry":
        others, left_out = peers.losses(shape, todo.device)
        found = {**others, **found}
    wanted = only or todo.only
    found = {name: loss for name, loss in found.items() if chosen(name, wanted)}
    left_out = {name: reason for name, reason in left_out.items() if chosen(name, wanted)}
    if todo.fault:
        found[f"planted {todo.fault}"] = FAULTS[todo.fault]
    most = SHARE_OF_MEMORY * machine_bytes(todo.device)
    too_large = {n: shape.needed_bytes(n) for n in found if shape.needed_bytes(n) > most}
    fitting = {name: loss for name, loss in found.items() if name not in too_large}
    verdict = check(checked, fitting, todo.device, partial(todo.note, shape=str(shape)))
    work = "gathered_bytes" if shape.kind == "per-example" else "operations"
    return {name: fitting[name] for name in verdict.passed}, {
        "shape": shape.as_dict(),
        "label": str(shape),
        "bound": {work: getattr(shape, work)},
        "logits_bytes": shape.logits_bytes,
        "gradient_bytes": shape.gradient_bytes,
        "level": shape.compared_at,
        "checked": verdict.shape.as_dict(),
        "errors": {
            name: {"loss": e.loss, "gradient": e.gradient} for name, e in verdict.errors.items()
        },
        "refused": verdict.refused,
        "failed": {**verdict.failed, **left_out},
        "too_large": too_large,  # bytes that they would need, computed
    }


def chosen(name: str, wanted: Sequence[str]) -> bool:
    """A version is named with its settings, or without."""
    return not wanted or name in wanted or name.split(",")[0] in wanted


def add_times(
    figures: Report, shape: Shape, found: dict[str, Loss], rounds: Rounds, todo: Plan
) -> None:
    timings = compare_versions(shape, found, rounds, todo.device)
    figures["versions"] = [asdict(t) for t in timings]
    for row in figures["versions"]:
        todo.note(shape=str(shape), timing=row)
    if todo.device == "cuda":
        for row in figures["versions"][1:]:  # the first is the bound
            launches, kernels_ms = launches_on_gpu(found[row["version"]], shape)
            row.update(launches=launches, kernels_ms=kernels_ms)


def add_memory(figures: Report, shape: Shape, found: dict[str, Loss], todo: Plan) -> None:
    """Peaks above inputs and gradients; on a CPU each in a process of its own."""
    if todo.mode == "dry":
        return
    if todo.device == "cuda":
        peaks: dict[str, float | None] = {n: peak_on_gpu(loss, shape) for n, loss in found.items()}
    else:
        peaks = peak_memories(list(found), shape)
    for row in figures["versions"][1:]:
        row["peak_bytes"] = peaks[row["version"]]


def forget_compiled() -> None:
    """Let `torch.compile` make code for the next shape alone, the fastest that it makes."""
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and this would take seconds
        torch.compiler.reset()
