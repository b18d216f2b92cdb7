"""Counts over several processes are those of one process that saw all rows."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dwl_kernels import (
    CountMinSketch,
    DomainWeights,
    DynamicWeightedSampledSoftmax,
    StreamingFrequency,
)

STEPS = 6
MAKERS: dict[str, Any] = {
    "domains": lambda **group: DomainWeights(5, momentum=0.9, start=1, full=4, **group),
    "constant": lambda **group: DomainWeights.constant([1.0, 2.0, 3.0, 4.0, 5.0], **group),
    "sketch": lambda **group: CountMinSketch(64, **group),
    "frequency": lambda **group: StreamingFrequency(16, num_hashes=2, **group),
    "frequency, a guess": lambda **group: StreamingFrequency(16, initial_gap=5.0, **group),
}


def batch(rank: int, step: int) -> torch.Tensor:
    """Of uneven sizes; that of the first rank is empty in one step."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    size = 0 if (rank, step) == (0, 2) else 3 + rank + step
    return torch.randint(0, 5, (size,), generator=generator)


def counted(kind: str, sync_every: int) -> dict[str, torch.Tensor]:
    counts = MAKERS[kind](process_group=dist.group.WORLD, sync_every=sync_every)
    for step in range(STEPS):
        counts.update(batch(dist.get_rank(), step))
    return counts.state_dict()


@pytest.mark.parametrize("sync_every", [1, 3])
@pytest.mark.parametrize("kind", [*MAKERS])
def test_counts_of_ranks_are_those_of_one_process(ranks, kind, sync_every):
    found = ranks(counted, kind, sync_every)
    alone = MAKERS[kind]()
    for first in range(0, STEPS, sync_every):
        steps = range(first, first + sync_every)
        batches = [torch.cat([batch(r, step) for r in range(len(found))]) for step in steps]
        if kind.startswith("frequency"):
            for one in batches:
                alone.update(one)
        else:  # what is exchanged is counted at once
            alone.update(torch.cat(batches))
            if hasattr(alone, "steps"):
                alone.steps += sync_every - 1
    for state in found:
        for name, value in alone.state_dict().items():
            assert torch.equal(state[name], value), name


def interval() -> list[torch.Tensor]:
    weights = DomainWeights(3, process_group=dist.group.WORLD, sync_every=3)
    seen = []
    for ids in ([0, 0], [1], [2, 2, 2]):
        weights.update(torch.tensor(ids))
        seen.append(weights.interactions.clone())
    weights.update(torch.tensor([0]))
    twin = copy.deepcopy(weights)
    weights.sync()
    with pytest.raises(RuntimeError, match="needs a process group"):
        DomainWeights(3).sync()
    lone = pickle.loads(pickle.dumps(twin))
    with pytest.raises(RuntimeError, match="process_group is missing"):
        lone.sync()
    return [*seen, weights.interactions, twin.interactions]


def test_counts_stand_still_until_an_exchange(two_ranks):
    for found in two_ranks(interval):
        assert [f.tolist() for f in found] == [
            *([0, 0, 0], [0, 0, 0], [4, 2, 6]),
            *([6, 2, 6], [4, 2, 6]),
        ]


def in_a_loss() -> tuple[torch.Tensor, torch.Tensor]:
    loss_fn = DynamicWeightedSampledSoftmax(4, process_group=dist.group.WORLD)
    model = torch.nn.ModuleDict({"tower": torch.nn.Linear(3, 3), "loss": loss_fn})
    parallel = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=True)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(dist.get_rank()))

    def step(inputs: torch.Tensor) -> torch.Tensor:
        embedded = model["tower"](inputs)
        return loss_fn(embedded, embedded, domain_ids=torch.arange(4) % (dist.get_rank() + 2))

    model.forward = step
    for _ in range(2):
        parallel(x).backward()
    return loss_fn.domain_weights.interactions, loss_fn.domain_weights.weights


def test_broadcast_of_buffers_leaves_counts_alone(two_ranks):
    first, second = two_ranks(in_a_loss)
    assert first[0].tolist() == [8, 6, 2, 0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def warned() -> list[str]:
    import warnings

    from dwl_kernels import counts

    counts._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            DomainWeights(3).update(torch.tensor([0]))
    return [str(one.message) for one in caught if "process_group" in str(one.message)]


def test_counting_alone_among_others_warns_once(two_ranks):
    for messages in two_ranks(warned):
        assert len(messages) == 1
        assert "DomainWeights counts what this rank sees alone" in messages[0]


def set_later() -> list[Any]:
    loss_fn = DynamicWeightedSampledSoftmax(3)
    loss_fn.process_group = dist.group.WORLD
    query = torch.eye(4)
    loss_fn(query, query, domain_ids=torch.arange(4) % (dist.get_rank() + 2))
    counted = loss_fn.domain_weights.interactions.tolist()
    own = DomainWeights(3, process_group=dist.group.WORLD)
    kept = DynamicWeightedSampledSoftmax(weights=own)
    kept.process_group = dist.group.WORLD
    return [counted, kept.domain_weights.process_group is own.process_group]


def test_group_of_a_loss_may_be_set_later(two_ranks):
    for counted, kept in two_ranks(set_later):
        assert counted == [4, 3, 1]
        assert kept


def resumed() -> list[int]:
    weights = DomainWeights(3, process_group=dist.group.WORLD, sync_every=2)
    state = weights.state_dict()
    weights.update(torch.tensor([0]))
    weights.load_state_dict(state)
    for _ in range(2):
        weights.update(torch.tensor([1]))
    return weights.interactions.tolist()


def test_loading_forgets_what_was_pending(two_ranks):
    assert two_ranks(resumed) == [[0, 4, 0], [0, 4, 0]]


def unlike() -> str:
    counts = CountMinSketch(64 + dist.get_rank(), process_group=dist.group.WORLD)
    try:
        counts.update(torch.tensor([1]))
    except ValueError as problem:
        return str(problem)
    return "nothing"


def test_counts_of_other_sizes_raise_on_all_ranks(two_ranks):
    for message in two_ranks(unlike, seconds=20.0):
        assert "width=64" in message
        assert "width=65" in message


def other_seed(kind: str) -> str:
    counts = MAKERS[kind](process_group=dist.group.WORLD, seed=dist.get_rank())
    try:
        counts.update(torch.tensor([1]))
    except ValueError as problem:
        return str(problem)
    return "nothing"


@pytest.mark.parametrize("kind", ["frequency", "sketch"])
def test_counts_of_other_hashes_raise_on_all_ranks(two_ranks, kind):
    for message in two_ranks(other_seed, kind, seconds=20.0):
        assert "seed=0" in message
        assert "seed=1" in message


def refused(kind: str, sync_every: int) -> tuple[str, bool]:
    """The error of an interval with a wrong update on one rank, and whether it left no trace."""
    counts = MAKERS[kind](process_group=dist.group.WORLD, sync_every=sync_every)
    twin = MAKERS[kind]()
    good = torch.tensor([0, 1])
    message = "nothing"
    try:
        counts.update(good.float() if dist.get_rank() else good)
        for _ in range(sync_every - 1):
            counts.update(good)
    except (TypeError, RuntimeError) as problem:
        message = str(problem)
    for _ in range(sync_every):
        counts.update(good[dist.get_rank() :][:1])
        if kind.startswith("frequency"):
            twin.update(good)
    if not kind.startswith("frequency"):
        twin.update(good.repeat(sync_every))
        if hasattr(twin, "steps"):
            twin.steps += sync_every - 1
    state = counts.state_dict()
    same = [torch.equal(state[name], value) for name, value in twin.state_dict().items()]
    return message, all(same)


@pytest.mark.parametrize("sync_every", [1, 2])
@pytest.mark.parametrize("kind", [*MAKERS])
def test_update_that_is_wrong_on_one_rank_raises_on_all(two_ranks, kind, sync_every):
    (there, untouched), (here, too) = two_ranks(refused, kind, sync_every, seconds=20.0)
    assert re.search("rank 1 of the process group raised TypeError: .*float32", there)
    assert re.search("^(domain_)?ids has dtype torch.float32", here)
    assert untouched
    assert too


def inferred() -> list[int]:
    weights = DomainWeights(2, process_group=dist.group.WORLD)
    with torch.inference_mode():
        weights.update(torch.tensor([0]))
    weights.update(torch.tensor([1]))
    return weights.interactions.tolist()


def test_first_update_may_be_in_inference_mode(two_ranks):
    assert two_ranks(inferred) == [[2, 2], [2, 2]]
