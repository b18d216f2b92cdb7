"""Processes of a gloo group that are started once and then call functions of the tests.

The fixture `ranks` (2 and 3 processes) and `two_ranks` hand out a `Ranks`. A test writes what a
rank does as a function at the top of its file, whose arguments and result are pickled::

    def total(start):
        counts = torch.tensor([start + dist.get_rank()])
        dist.all_reduce(counts)
        return counts


    def test_sum(two_ranks):
        assert [int(t) for t in two_ranks(total, 5)] == [11, 11]
"""

from __future__ import annotations

import datetime
import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

GRACE = 5.0  # seconds that the others get to answer when one rank has raised


class RankError(AssertionError):
    """A rank raised, died or did not answer."""


class Ranks:
    """Calls a function on every rank and returns what they return, in the order of the ranks.

    Started by the first call, and again by the next one after a call that failed, because a rank
    that waits for others cannot be used any more.
    """

    def __init__(self, size: int, folder: Path, seconds: float = 90.0) -> None:
        self.size, self.folder, self.seconds = size, folder, seconds
        self._running: list[tuple[Any, Connection]] = []
        self._starts = 0

    def __call__(self, function: Callable[..., Any], *args: Any, seconds: float = 0.0) -> list[Any]:
        """`function(*args)` on each rank; RankError if one raises or takes longer."""
        if not self._running:
            self._start()
            self._answers(self.seconds)
        # Not by the pickler of multiprocessing, with which torch shares the memory of tensors.
        call = pickle.dumps((function, args))
        for _, connection in self._running:
            connection.send_bytes(call)
        return self._answers(seconds or self.seconds)

    def close(self) -> None:
        for process, connection in self._running:
            connection.close()
            process.kill()
        for process, _ in self._running:
            process.join()
        self._running = []

    def _answers(self, seconds: float) -> list[Any]:
        answers: dict[int, Any] = {}
        failed: list[str] = []
        end = time.monotonic() + seconds
        while len(answers) < self.size and time.monotonic() < end:
            left = {c: rank for rank, (_, c) in enumerate(self._running) if rank not in answers}
            for connection in wait([*left], timeout=max(end - time.monotonic(), 0)):
                rank = left[connection]
                try:
                    fine, answer = pickle.loads(connection.recv_bytes())
                except EOFError:
                    fine, answer = False, "died"
                answers[rank] = answer
                if not fine:
                    failed.append(f"rank {rank} of {self.size}: {answer}")
                    end = min(end, time.monotonic() + GRACE)
        silent = sorted({*range(self.size)} - answers.keys())
        if failed or silent:
            self.close()
            failed += [f"rank {rank} of {self.size} did not answer" for rank in silent]
            raise RankError("\n".join(failed))
        return [answers[rank] for rank in range(self.size)]

    def _start(self) -> None:
        # One process imports torch, and the ranks are forks of it: 4 s in all and not for each.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "dwl_kernels"])
        self._starts += 1
        store = self.folder / f"store-{self.size}-{self._starts}"
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, store, rank, self.size, self.seconds), daemon=True
            )
            process.start()
            there.close()
            self._running.append((process, here))


def _serve(connection: Connection, store: Path, rank: int, size: int, seconds: float) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=seconds)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout
    )
    connection.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, args = pickle.loads(call)
            torch.manual_seed(0)
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        try:
            sent = pickle.dumps(answer)
        except Exception:
            sent = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(sent)
