"""`python -m benchmarks.devices`: the plan of several devices, counted, and two processes here.

Writes ``devices.json`` and ``devices.png``. ``--rounds`` is how often the two processes take their
steps in turn; on a machine that other processes use, times and efficiencies say little.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.devices import measured, pictures
from benchmarks.devices.plan import (
    CATALOGUES,
    CONTRASTIVE,
    H100,
    PATIENCE,
    RANKS,
    ROWS,
    TRAINING,
    WAYS,
    Setting,
    memory,
    seconds,
    winner,
)
from benchmarks.devices.simulated import Counted
from benchmarks.progress import Progress
from benchmarks.record import ROOT, busy, record, write_json

SMALL = Setting(8, 64, 64, element=4, items=64 * 512, negatives=192, different=256)
# With few rows and dimensions, so that a CPU has room and time for it.
LARGEST = Setting(64, 1, 4, element=4, items=10**9, negatives=63, different=64)
COUNTED = {
    SMALL: [*WAYS],
    replace(SMALL, ranks=64): [*WAYS],
    LARGEST: ["sharded", "indexed"],
}


def predictions() -> dict[str, Any]:
    """Curves of the picture; all are predictions."""
    curves = [
        {"way": name, "items": items, **predicted(name, replace(TRAINING, items=items))}
        for name in WAYS
        for items in CATALOGUES
    ]
    table = {
        str(ranks): [winner(replace(TRAINING, ranks=ranks, items=items)) for items in CATALOGUES]
        for ranks in RANKS
    }
    towers = {
        str(ranks): [winner(replace(CONTRASTIVE, ranks=ranks, rows=rows)) for rows in ROWS]
        for ranks in RANKS
    }
    return {
        "training": asdict(TRAINING),
        "contrastive": asdict(CONTRASTIVE),
        "patience_ms": 1e3 * PATIENCE,
        "by_catalogue": curves,
        "catalogues": CATALOGUES,
        "winner_by_ranks_and_catalogue": table,
        "rows": ROWS,
        "winner_by_ranks_and_rows": towers,
    }


def predicted(name: str, s: Setting) -> dict[str, float]:
    way = WAYS[name]
    return {
        "sent_bytes": round(way.sent(s).total()),
        "memory_bytes": round(memory(way, s)),
        "ms": round(1e3 * seconds(way, s), 4),
    }


def counted(name: str, s: Setting) -> dict[str, Any]:
    """What a simulated rank did, beside the plan."""
    found, way = Counted(name, s), WAYS[name]
    sent = sum(found.forward) + sum(found.backward)
    return {
        "way": name,
        **asdict(s),
        "sent_bytes": [sent, round(way.sent(s).total())],
        "held_bytes": [found.peak, round(way.held(s))],
        "operations": [found.operations, round(way.operations(s))],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.devices", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    warning = busy()
    if warning:
        print(warning)
    rows = []
    with Progress() as progress:
        for s, names in COUNTED.items():
            for name in names:
                progress(f"counting {name}, {s.ranks} ranks, {s.items:,} items")
                rows.append(counted(name, s))
        progress("two processes")
        here = measured.efficiency(options.rounds)
    figures = record(
        command="python -m benchmarks.devices",
        assumptions=asdict(H100),
        predicted=predictions(),
        counted=rows,
        measured={"busy": bool(warning), **here},
    )
    write_json(options.out / "devices.json", figures)
    pictures.draw(figures, options.out)
    print(f"{'two processes':<14}{'ms':>9}{'alone':>9}{'of it':>7}{'at once':>9}{'of it':>7}")
    for name in ("gathered", "ring", "sharded"):
        row = here[name]
        print(
            f"{name:<14}{row['ms']:>9.1f}{row['alone_ms']:>9.1f}{row['efficiency']:>7.0%}"
            f"{row['at_once_ms']:>9.1f}{row['efficiency_at_once']:>7.0%}"
        )
    print(f"the check of arguments takes {here['check_us']:.0f} µs a call")
    return 0


if __name__ == "__main__":
    sys.exit(main())
