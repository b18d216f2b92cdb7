"""Two processes of one thread each on this machine, against one that does the same arithmetic.

A rank of two scores the candidates of both, so what one process is compared with has as many rows
and candidates as that rank. It runs twice in every round: alone, and in both processes at once
without a word between them, which leaves what the exchange itself costs. ``benchmarks.devices``
calls `efficiency`, which starts the processes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.progress import in_processes
from dwl_kernels import full_softmax_loss, in_batch_softmax_loss
from dwl_kernels.distributed.exchange import agree
from dwl_kernels.distributed.group import Group

RANKS = 2
ROWS, ITEMS, DIM = 2048, 16_384, 64  # rows of every rank; items of the whole table
CHECKS = 300  # calls that are timed to know what the check of arguments costs

Step = Callable[[], Tensor]


def steps() -> dict[str, tuple[Step, Step]]:
    """For each way a step of this rank, and one of a process alone with the same arithmetic."""
    torch.manual_seed(dist.get_rank())
    query, positive, negative = (torch.randn(ROWS, DIM).requires_grad_() for _ in range(3))
    rows = torch.randn(RANKS * ROWS, DIM).requires_grad_()
    shard = torch.randn(ITEMS // RANKS, DIM).requires_grad_()
    group: dict[str, Any] = {"process_group": dist.group.WORLD}
    ids = torch.randint(ITEMS, (ROWS,))
    own = torch.randint(len(shard), (len(rows),))
    options: dict[str, Any] = {"ids": ids, "log_q": torch.full((ROWS,), -1.0), "temperature": 8.0}
    more = {"negative_ids": torch.randint(ITEMS, (ROWS,)), "negative_log_q": options["log_q"]}

    def in_batch(**given: Any) -> Tensor:
        return in_batch_softmax_loss(query, positive, **options, **given)

    def alone() -> Tensor:
        return in_batch(negative=negative, **more)

    def sharded() -> Tensor:
        return full_softmax_loss(query, shard, ids, temperature=8.0, **group)

    def whole() -> Tensor:
        return full_softmax_loss(rows, shard, own, temperature=8.0)

    return {
        "gathered": (lambda: in_batch(**group), alone),
        "ring": (lambda: in_batch(ring=True, **group), alone),
        "sharded": (sharded, whole),
    }


def timed(step: Step | None) -> float:
    """Milliseconds until all ranks have done it; None does nothing."""
    dist.barrier()
    start = time.perf_counter()
    if step is not None:
        step().backward()
    dist.barrier()
    return 1e3 * (time.perf_counter() - start)


def check_us() -> float:
    """Microseconds of the check of arguments, of which every call of a loss makes one."""
    group, query = Group(dist.group.WORLD), torch.empty(0)
    same = {f"argument {number}": "a tensor" for number in range(16)}

    def check() -> None:
        agree(group, query, lambda: (True, same, [1, 2, 3]))

    taken = []
    for _ in range(CHECKS):
        start = time.perf_counter()
        check()
        taken.append(1e6 * (time.perf_counter() - start))
    return median(taken)


def of_rank(rank: int, store: str, rounds: int) -> dict[str, Any]:
    """What this rank measures; all ranks run the same steps in the same order."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    ways = steps()
    taken: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, (ours, alone) in ways.items():
            found = timed(ours), timed(alone), timed(alone if rank == 0 else None)
            if number:  # the first warms up
                taken[way].append(found)
    figures: dict[str, Any] = {"check_us": round(check_us(), 1)}
    for way, rows in taken.items():
        together, at_once, alone_ms = zip(*rows, strict=True)
        figures[way] = {
            "ms": round(median(together), 2),
            "alone_ms": round(median(alone_ms), 2),
            "at_once_ms": round(median(at_once), 2),
            # Ratios within a round, since other processes disturb whole rounds.
            "efficiency": round(median(b / a for a, b in zip(together, alone_ms, strict=True)), 3),
            "efficiency_at_once": round(
                median(b / a for a, b in zip(together, at_once, strict=True)), 3
            ),
        }
    dist.barrier()
    dist.destroy_process_group()
    return figures


def efficiency(rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        calls = {rank: (rank, store, rounds) for rank in range(RANKS)}
        found = dict(in_processes(of_rank, calls, RANKS))
    sizes = {"ranks": RANKS, "rows": ROWS, "items": ITEMS, "dim": DIM, "threads": 1}
    return {**sizes, "rounds": rounds, **found[0]}
