"""Races between the programs of the Triton kernels, found in the interpreter.

There one program plays all workers, one after another, so that nothing goes wrong that would on a
GPU, where each worker is a program of its own. Here every load and store is written down with its
worker and with the number of grid barriers before it. Between two barriers no worker may touch what
another one writes; what no worker does alone, all of them do.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any

import cases
import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from dwl_kernels import backends
from dwl_kernels.backends.triton import solve as host
from dwl_kernels.backends.triton.kernels import per_row_candidates as triton_indexed
from dwl_kernels.backends.triton.kernels import prologue as triton_prologue
from dwl_kernels.backends.triton.kernels import shared_candidates as triton_kernels
from dwl_kernels.backends.triton.tiles import Tiles

REASON = backends.unavailable_reason("triton", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
BY_NAME = {case.name: case for case in cases.CASES}
EVERYONE = -1


class Recorder:
    """Addresses that workers read and wrote since the last barrier of the grid."""

    def __init__(self) -> None:
        self.worker = EVERYONE
        self.touched: dict[bool, list[np.ndarray]] = {False: [], True: []}  # by "written"
        self.barriers = self.accesses = 0

    def touch(self, pointers: Any, mask: Any, written: bool) -> None:
        addresses = pointers.data[mask.data.astype(bool)].reshape(-1).astype(np.int64)
        pairs = np.stack([addresses, np.full_like(addresses, self.worker)], 1)
        self.touched[written].append(pairs)
        self.accesses += len(pairs)

    def barrier(self) -> None:
        """Check what came before it."""
        empty = np.empty((0, 2), dtype=np.int64)
        writes = np.unique(np.concatenate([empty, *self.touched[True]]), axis=0)
        reads = np.unique(np.concatenate([empty, *self.touched[False]]), axis=0)
        self.touched = {False: [], True: []}
        self.barriers += 1
        assert (writes[:, 1] != EVERYONE).all(), "all programs write the same numbers"
        owners, first = np.unique(writes[:, 0], return_index=True)
        assert len(owners) == len(writes), "two programs write the same number"
        place = np.searchsorted(owners, reads[:, 0])
        shared = np.flatnonzero(place < len(owners))
        shared = shared[owners[place[shared]] == reads[shared, 0]]
        writer = writes[first[place[shared]], 1]
        assert (writer == reads[shared, 1]).all(), "a program reads what another one writes"


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    from triton.runtime import interpreter

    found = Recorder()
    builder = interpreter.interpreter_builder
    load, store, atomic = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_atomic_rmw,
    )

    def watched_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        found.touch(pointers, mask, False)
        return load(pointers, mask, *rest)

    def watched_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        found.touch(pointers, mask, True)
        return store(pointers, value, mask, *rest)

    def watched_atomic(*arguments: Any) -> Any:  # `grid_barrier` has two, one releases
        if "RELEASE" in str(arguments[4]).upper():
            found.barrier()
        return atomic(*arguments)

    def watched_range(*limits: Any) -> Iterator[int]:
        numbers = builtins.range(*limits)
        if len(limits) < 3 or numbers.step != 1:
            yield from numbers
            return
        for found.worker in numbers:  # for worker in range(program, workers, programs)
            yield found.worker
        found.worker = EVERYONE

    launch = host.launch

    def watched_launch(*arguments: Any) -> None:
        found.touched = {False: [], True: []}  # what other kernels did
        launch(*arguments)
        found.barrier()

    monkeypatch.setattr(builder, "create_masked_load", watched_load)
    monkeypatch.setattr(builder, "create_masked_store", watched_store)
    monkeypatch.setattr(builder, "create_atomic_rmw", watched_atomic)
    for module in (triton_kernels, triton_indexed, triton_prologue):
        monkeypatch.setattr(module, "range", watched_range, raising=False)
    monkeypatch.setattr(host, "launch", watched_launch)
    monkeypatch.setattr(host, "INTERPRETER", host.Interpreter(Tiles(16, 16, 16, 16, 1, 1, 4, 1), 7))
    return found


@pytest.mark.parametrize(
    "name",
    [
        *("plain", "mixed, everything", "in-batch, NaN in the padding", "refined, everything"),
        *("everything, none", "everything, weighted_mean", "full softmax, NaN in the padding"),
        *("dual scale, everything", "by row, everything"),
    ],
)
def test_no_program_touches_what_another_one_writes(recorder: Recorder, name: str) -> None:
    cases.loss_and_gradients(BY_NAME[name], "triton", torch.float32)
    assert recorder.barriers >= 2
    assert recorder.accesses > 1000


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        *(("dual scale, everything", missing) for missing in range(6)),
        *(("by row, everything", missing) for missing in range(4)),
    ],
)
def test_no_barrier_can_go(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, name: str, missing: int
) -> None:
    """Each of those that a problem with padding and split tiles has."""
    barrier, seen = triton_kernels.grid_barrier, []

    def all_but_one(until: Any, ctx: Any) -> Any:
        seen.append(until)
        return until if len(seen) - 1 == missing else barrier(until, ctx)

    for module in (triton_kernels, triton_indexed, triton_prologue):
        monkeypatch.setattr(module, "grid_barrier", all_but_one)
    with pytest.raises(Exception, match=r"two programs write|reads what another"):
        cases.loss_and_gradients(BY_NAME[name], "triton", torch.float32)
