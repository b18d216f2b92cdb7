"""What ranks send, hold and compute is what the plan of `benchmarks.devices` says."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dwl_kernels
from benchmarks import readme
from benchmarks.devices import __main__ as devices
from benchmarks.devices.plan import TRAINING, WAYS, Setting, seconds, sent_fetching, winner
from benchmarks.devices.simulated import Counted, counted_bytes

ROWS, DIM, ITEMS = 6, 8, 10  # of every rank
IDS = [0, 3, 3, 9, 11, 19]


def bytes_of(way: str) -> tuple[list[int], list[int]]:
    """Bytes of the forward and of the backward."""
    query, positive = (torch.randn(ROWS, DIM).requires_grad_() for _ in range(2))
    table = torch.randn(ITEMS, DIM).requires_grad_()
    group: dict[str, Any] = {"process_group": dist.group.WORLD}
    with counted_bytes() as forward:
        if way in ("gathered", "ring"):
            log_q, ids = torch.full((ROWS,), -1.0), torch.arange(ROWS)
            options = {"log_q": log_q, "ids": ids, "ring": way == "ring", **group}
            loss = dwl_kernels.in_batch_softmax_loss(query, positive, **options)
        elif way == "sharded":
            loss = dwl_kernels.full_softmax_loss(query, table, torch.arange(ROWS), **group)
        else:
            ids = torch.tensor(IDS)
            loss = dwl_kernels.indexed_sampled_softmax_loss(query, table, ids, ids[:2], **group)
    with counted_bytes() as backward:
        loss.backward()
    return forward, backward


@pytest.mark.parametrize("way", WAYS)
def test_processes_send_the_bytes_of_the_plan(ranks, way):
    setting = Setting(ranks.size, ROWS, DIM, element=4, items=ITEMS * ranks.size)
    asked = [[ids for ids in {*IDS} if ids // ITEMS == rank] for rank in range(ranks.size)]
    for rank, found in enumerate(ranks(bytes_of, way)):
        plan = WAYS[way].sent(setting)
        if way == "indexed":  # what is asked for lies on the first two ranks
            elsewhere = sum(len(ids) for r, ids in enumerate(asked) if r != rank)
            plan = sent_fetching(setting, elsewhere, len(asked[rank]) * (ranks.size - 1))
        assert found == tuple(plan)


@pytest.mark.parametrize("ranks", [4, 64])
@pytest.mark.parametrize("way", WAYS)
def test_rank_of_many_does_what_the_plan_says(way, ranks):
    rows, negatives, items = 64, 192, 512 * 64
    setting = Setting(ranks, rows, 64, 4, items, negatives, different=rows + negatives)
    counted, plan = Counted(way, setting), WAYS[way]
    assert (counted.forward, counted.backward) == tuple(plan.sent(setting))
    assert counted.operations == plan.operations(setting)
    assert counted.peak == pytest.approx(plan.held(setting), rel=0.01)


def test_committed_predictions_are_those_of_the_formulas():
    predicted = json.loads(json.dumps(devices.predictions()))
    assert readme.read(readme.DEVICES)["predicted"] == predicted, "run python -m benchmarks.devices"


@pytest.mark.parametrize("way", WAYS)
def test_one_rank_sends_nothing_and_a_catalogue_may_be_one_item(way):
    alone = replace(TRAINING, ranks=1, items=1)
    assert WAYS[way].sent(alone).total() == 0
    assert alone.fetched == 1
    assert seconds(WAYS[way], alone) > 0


def test_way_to_take_has_room_and_is_quick():
    assert winner(replace(TRAINING, items=10**5)) == "sharded"  # all items compete
    assert winner(replace(TRAINING, items=10**9)) == "indexed"
    assert winner(replace(TRAINING, ranks=2, items=10**9)) is None
    for items in (10**5, 10**9):
        times = [seconds(WAYS["sharded"], replace(TRAINING, ranks=r, items=items)) for r in (2, 8)]
        assert times[0] == pytest.approx(times[1], rel=0.5)  # more ranks, but as many more rows


def test_command_writes_figures_and_a_picture(monkeypatch, tmp_path, capsys):
    times = {"ms": 1.0, "alone_ms": 1.0, "at_once_ms": 1.0}
    times |= {"efficiency": 1.0, "efficiency_at_once": 1.0}
    here = {"check_us": 1.0, **dict.fromkeys(("gathered", "ring", "sharded"), times)}
    monkeypatch.setattr(devices.measured, "efficiency", lambda rounds: here)
    monkeypatch.setattr(devices, "COUNTED", {replace(devices.LARGEST, items=64): ["indexed"]})
    assert devices.main(["--out", str(tmp_path)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines()[-5:])) <= 60
    assert {path.name for path in tmp_path.iterdir()} == {"devices.json", "devices.png"}
    (row,) = readme.read(tmp_path / "devices.json")["counted"]
    assert row["sent_bytes"][0] == row["sent_bytes"][1]
