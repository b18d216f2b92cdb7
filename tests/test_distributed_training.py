"""Modules, trainers and samplers over ranks do what one process does."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dwl_kernels
from dwl_kernels import CumulativeCrossEntropy, DynamicWeightedSampledSoftmax


def batch_of(step: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    features = torch.randn(rows, 6, generator=generator)
    items = torch.randint(0, 12, (rows,), generator=generator)
    return features, items, items % 3


class Model(torch.nn.Module):
    def __init__(self, group: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.tower, self.items = torch.nn.Linear(6, 8), torch.nn.Embedding(12, 8)
        self.unused = torch.nn.Linear(2, 2)
        self.loss_fn = DynamicWeightedSampledSoftmax(
            item_domains=torch.arange(12) % 3,
            calibration=0.5,
            normalize=True,
            learn_temperature=True,
            process_group=group,
        )

    def forward(self, features: Tensor, items: Tensor) -> Tensor:
        return self.loss_fn(self.tower(features), self.items(items), positive_ids=items)


def trained(
    group: Any, micro: int, compiled: bool = False, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The losses of a training, in which every step accumulates the gradients of `micro` parts."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if group is not None else (0, 1)
    model = Model(group).to(dtype)
    run: Any = model
    if group is not None:
        run = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    call = torch.compile(run, backend="aot_eager") if compiled else run
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        for part in range(micro):
            features, items, _ = batch_of(step * micro + part, 12)
            own = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
            last = part == micro - 1
            with run.no_sync() if group is not None and not last else nullcontext():
                loss = call(features[own].to(dtype), items[own]) / micro
                loss.backward()
            losses.append(loss.detach())
        optimizer.step()
    return [*losses, model.items.weight.detach(), model.loss_fn.domain_weights.weights]


def trained_here(*options: Any) -> list[Tensor]:
    return trained(dist.group.WORLD, *options)


@pytest.mark.parametrize(("micro", "compiled"), [(1, False), (2, False), (1, True)])
def test_training_of_ranks_follows_that_of_one_process(ranks, micro, compiled):
    alone = trained(None, micro)
    for found in ranks(trained_here, micro, compiled):
        for mine, whole in zip(found, alone, strict=True):
            torch.testing.assert_close(mine, whole, rtol=1e-5, atol=1e-6)


def test_loss_curve_of_four_ranks_is_that_of_one_process(four_ranks):
    alone = trained(None, 1, False, torch.float64)
    assert len({round(float(loss), 3) for loss in alone[:4]}) == 4  # it does learn
    for found in four_ranks(trained_here, 1, False, torch.float64):
        torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-12)


def sharded_module(calibration: float) -> tuple[Tensor, Tensor, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    states, table, target, options = sequence()
    shard = distribute_tensor(table, mesh, [Shard(0)]).requires_grad_()
    loss_fn = CumulativeCrossEntropy(
        **options, calibration=calibration, process_group=dist.group.WORLD
    )
    own = slice(dist.get_rank(), None, dist.get_world_size())
    states = states[own].clone().requires_grad_()
    loss = loss_fn(states, shard, target[own])
    loss.backward()
    assert isinstance(shard.grad, DTensor)
    return loss.detach(), states.grad / dist.get_world_size(), shard.grad.full_tensor()


def sequence() -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(6, 4, 8, generator=generator, dtype=torch.float64)
    table = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 11, (6, 4), generator=generator)
    target[:, -1] = -100
    return states, table, target, {"item_domains": torch.arange(11) % 3, "temperature": 0.7}


def with_dtensor() -> list[Tensor]:
    """Losses of a table that is a DTensor, and its gradients, whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    states, table, target, _ = sequence()
    found = []
    for per_row in (False, True):
        shard = distribute_tensor(table, mesh, [Shard(0)]).requires_grad_()
        loss = loss_of_table(states[:, 0], shard, target[:, 0], per_row)
        loss.backward()
        found += [loss.detach(), shard.grad.full_tensor()]
    whole = distribute_tensor(table, mesh, [Replicate()])
    with pytest.raises(TypeError, match=r"table is a DTensor; pass all of it, table\.full_tensor"):
        loss_of_table(states[:, 0], whole, target[:, 0], False)
    return found


def loss_of_table(query: Tensor, table: Tensor, target: Tensor, per_row: bool) -> Tensor:
    if not per_row:
        return dwl_kernels.full_softmax_loss(query, table, target)
    negative = (target[:, None] + torch.arange(1, 4)) % 11
    return dwl_kernels.indexed_sampled_softmax_loss(query, table, target, negative)


def test_functions_take_a_dtensor(two_ranks):
    states, table, target, _ = sequence()
    wanted = []
    for per_row in (False, True):
        leaf = table.clone().requires_grad_()
        loss = loss_of_table(states[:, 0], leaf, target[:, 0], per_row)
        loss.backward()
        wanted += [loss.detach(), leaf.grad]
    for found in two_ranks(with_dtensor):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("calibration", [0.0, 1.0])
def test_cumulative_cross_entropy_takes_a_table_in_shards(ranks, calibration):
    states, table, target, options = sequence()
    states.requires_grad_(), table.requires_grad_()
    loss = CumulativeCrossEntropy(**options, calibration=calibration)(states, table, target)
    loss.backward()
    for rank, (mine, of_states, of_table) in enumerate(ranks(sharded_module, calibration)):
        torch.testing.assert_close(mine, loss.detach())
        torch.testing.assert_close(of_states, states.grad[rank :: ranks.size])
        torch.testing.assert_close(of_table, table.grad)


def whole_table() -> str:
    """The error of ranks that all pass the whole table as their shard."""
    states, table, target, options = sequence()
    try:
        CumulativeCrossEntropy(**options, process_group=dist.group.WORLD)(states, table, target)
    except ValueError as problem:
        return str(problem)
    return "nothing"


def test_whole_table_is_no_shard_of_known_items(two_ranks):
    for message in two_ranks(whole_table):
        assert "table has 22 rows but item_domains has 11" in message


def streams() -> list[Tensor]:
    sampler = dwl_kernels.UniformSampler(1000)
    group = dist.group.WORLD
    own = sampler.generator(3, process_group=group)
    same = sampler.generator(3, process_group=group, same_on_all_ranks=True)
    return [sampler.sample(64, generator=g)[0] for g in (own, same)]


def test_samplers_draw_apart_or_alike(three_ranks):
    found, again = three_ranks(streams), three_ranks(streams)
    assert len({tuple(own.tolist()) for own, _ in found}) == 3
    assert len({tuple(same.tolist()) for _, same in found}) == 1
    for one, other in zip(found, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
