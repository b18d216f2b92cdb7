"""`python -m benchmarks.speed.ranks`: ranks of targets, and statistics of rows, against a product.

The product is one ``torch.mm`` into an output that is there, what no implementation can do without.
*Scores* is what one writes without this package: the scores, what was seen left out, and a
comparison; or the logits, their log-softmax and a comparison. Times are taken in turn, and the
memory of each version in a process of its own, above its inputs. Every version is first checked
against the others. Writes ``ranks-cpu.json`` or ``ranks-cuda.json``.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.progress import Progress
from benchmarks.record import ROOT, busy, record, write_json
from benchmarks.speed.measure import Round, Rounds, Timing, in_turn
from benchmarks.speed.memory import resident
from dwl_kernels import full_softmax_loss, rank_targets, softmax_statistics
from dwl_kernels.backends import Backend

VERSIONS = ("scores", "chunked", "cpu")


@dataclass(frozen=True)
class Ranking:
    """``B`` rows, ``V`` items, ``D`` dimensions, and how many items a row has seen."""

    name: str
    rows: int
    items: int
    dim: int
    seen: int = 0
    statistics: bool = False  # of the full softmax

    def __str__(self) -> str:
        seen = f", {self.seen} seen" if self.seen else ""
        return f"{self.name}: B = {self.rows:,}, V = {self.items:,}, D = {self.dim}{seen}, float32"


SHAPES = (
    Ranking("ranks of a catalogue", 4096, 65_536, 64, seen=50),
    Ranking("ranks of a catalogue", 4096, 65_536, 128, seen=50),
    Ranking("ranks of MovieLens 1M", 6040, 3706, 64, seen=165),
    Ranking("statistics of a catalogue", 4096, 65_536, 64, statistics=True),
)


class Inputs:
    """Normal embeddings; targets and what was seen uniform, in no order."""

    def __init__(self, shape: Ranking, device: str) -> None:
        g = torch.Generator(device=device).manual_seed(0)
        options: dict[str, Any] = {"generator": g, "device": device}
        self.query = torch.randn(shape.rows, shape.dim, **options)
        self.table = torch.randn(shape.items, shape.dim, **options)
        self.target = torch.randint(shape.items, (shape.rows,), **options)
        self.offsets = torch.arange(shape.rows + 1, device=device) * shape.seen
        self.ids = torch.randint(shape.items, (shape.rows * shape.seen,), **options)
        self.rows = torch.arange(shape.rows, device=device).repeat_interleave(shape.seen)


def run_of(version: str, shape: Ranking, inputs: Inputs) -> Callable[[], Any]:
    x, backend = inputs, cast("Backend", version)
    seen = (x.offsets, x.ids) if shape.seen else None
    if version == "scores" and shape.statistics:
        return lambda: statistics_of_scores(x)
    if version == "scores":
        return lambda: ranks_of_scores(x)
    if shape.statistics:
        # Logits are of N(0, 1) embeddings divided by 4, as in the suite.
        return lambda: softmax_statistics(
            full_softmax_loss, x.query, x.table, x.target, temperature=4.0, backend=backend
        )
    return lambda: rank_targets(x.query, x.table, x.target, seen=seen, backend=backend)


def ranks_of_scores(x: Inputs) -> Tensor:
    scores = x.query @ x.table.T
    ahead = scores >= scores.gather(1, x.target[:, None])
    ahead[x.rows, x.ids] = False
    ahead.scatter_(1, x.target[:, None], False)
    return ahead.sum(1) + 1


def statistics_of_scores(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    logits = x.query @ x.table.T / 4.0
    own = logits.gather(1, x.target[:, None])
    lse = logits.logsumexp(1)
    return lse, own[:, 0] - lse, (logits >= own).sum(1)


def measured(shape: Ranking, rounds: Rounds, device: str) -> dict[str, Any]:
    inputs = Inputs(shape, device)
    names = ("scores", "chunked", "triton") if device == "cuda" else VERSIONS
    runs = {name: run_of(name, shape, inputs) for name in names}
    ranks = {name: run() for name, run in runs.items()}
    ranks = {n: found if isinstance(found, Tensor) else found[2] for n, found in ranks.items()}
    # Rounded scores may change their order with one of as many others as the items are dense.
    different = {n: int((found != ranks["chunked"]).sum()) for n, found in ranks.items()}
    if max(different.values()) > 0.01 * shape.rows:
        raise RuntimeError(f"versions differ in the ranks of so many rows: {different}")
    steps: dict[str, Round] = {"product": product(inputs)}
    for name, run in runs.items():
        steps[name] = lambda _, run=run: run()  # type: ignore[misc]
    timings = in_turn(steps, rounds, reference="product", device=device)
    del steps  # and the output of the product
    gc.collect()
    peaks = {} if device == "cuda" else {name: peak(name, shape) for name in names}
    return {
        "label": str(shape),
        "shape": asdict(shape),
        "different_ranks": different,
        "scores_bytes": 4 * shape.rows * shape.items,
        "versions": [asdict(timing) for timing in timings],
        "peak_bytes": peaks,
        **against_scores(timings, peaks),
    }


def product(x: Inputs) -> Round:
    out = x.query.new_empty(len(x.query), len(x.table))
    return lambda _: torch.mm(x.query, x.table.T, out=out)


def against_scores(timings: Sequence[Timing], peaks: dict[str, float]) -> dict[str, Any]:
    """What the goals speak of, of the package's own kernel, the last."""
    ratio = {timing.version: timing.ratio for timing in timings}
    own, found = timings[-1].version, {}
    found["times_the_product"] = round(ratio[own], 3)
    found["times_as_fast_as_scores"] = round(ratio["scores"] / ratio[own], 2)
    if peaks:
        found["memory_of_scores"] = round(peaks[own] / peaks["scores"], 4)
    return found


def peak(version: str, shape: Ranking) -> float:
    """Bytes above the inputs, at the peak, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.speed.ranks", "--peak", version]
    place = str(SHAPES.index(shape))
    done = subprocess.run(
        [*command, place], cwd=ROOT, capture_output=True, text=True, timeout=600, check=True
    )
    return float(done.stdout.splitlines()[-1])


def own_peak(version: str, shape: Ranking) -> float:
    small = Ranking(shape.name, 96, 128, shape.dim, min(shape.seen, 3), shape.statistics)
    for _ in range(2):  # loads what the version needs once
        run_of(version, small, Inputs(small, "cpu"))()
    run = run_of(version, shape, Inputs(shape, "cpu"))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.ranks", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="of rounds, for each shape")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--peak", nargs=2, metavar=("VERSION", "SHAPE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peak:
        version, place = options.peak
        print(own_peak(version, SHAPES[int(place)]))
        return 0
    if warning := busy():
        print(warning)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for shape in SHAPES:
        with Progress() as progress:
            progress(str(shape))
            figures = measured(shape, Rounds(options.seconds, least=5, most=30), device)
        found.append(figures)
        print(f"{shape}\n{'':<12}{'ms':>9}{'products':>10}{'MB':>8}")
        for row in figures["versions"]:
            memory = figures["peak_bytes"].get(row["version"])
            size = "" if memory is None else f"{memory / 1e6:.1f}"
            print(f"{row['version']:<12}{row['median_ms']:>9.1f}{row['ratio']:>10.2f}{size:>8}")
        print(flush=True)
    command = "python -m benchmarks.speed.ranks"
    write_json(options.out / f"ranks-{device}.json", record(command=command, shapes=found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
