"""What the refusal of a DTensor tells to do gives the loss and the gradient of the whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from dwl_kernels import DynamicWeightedSampledSoftmax, full_softmax_loss

V, D, B, RANKS = 7, 4, 6, 2


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, table = (torch.randn(n, D, generator=generator) for n in (B, V))
    return query, table, torch.tensor([0, 6, 3, 1, 5, 2])


def mended(name: str, tensor: torch.Tensor, call: Any) -> Any:
    """`tensor` after what the error of `call` says to do with it."""
    from torch.distributed.tensor import Partial

    with pytest.raises(TypeError, match=rf"^{name} is a DTensor; pass") as caught:
        call()
    found = re.search(rf"{name}\.\w+\(.*?\)(?=$| with)", str(caught.value))
    assert found is not None
    return eval(found[0], {name: tensor, "Partial": Partial})


def run(rank: int, store: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    query, table, target = inputs()
    whole = [query.requires_grad_(), table.requires_grad_()]
    wanted = full_softmax_loss(*whole, target)
    wanted_gradients = torch.autograd.grad(wanted, whole)

    leaves = [distribute_tensor(leaf.detach(), mesh, [Shard(0)]).requires_grad_() for leaf in whole]
    rows = mended("query", leaves[0], lambda: full_softmax_loss(leaves[0], table, target))
    own = target.chunk(RANKS)[rank]
    loss_fn = DynamicWeightedSampledSoftmax()
    items = mended("table", leaves[1], lambda: loss_fn(rows, table=leaves[1], positive_ids=own))
    assert items.shape == table.shape

    loss = full_softmax_loss(rows, items, own)
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / RANKS, wanted.detach())
    gradients = [leaf.grad.full_tensor() for leaf in leaves]
    # Rows of one rank have the gradient of its own loss, of which the whole is the mean.
    torch.testing.assert_close(gradients[0] / RANKS, wanted_gradients[0])
    torch.testing.assert_close(gradients[1], wanted_gradients[1])
    dist.barrier()  # a rank that leaves while others talk to it may abort
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
def test_mend_of_a_sharded_table_and_of_sharded_rows_gives_the_loss_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(run, (str(tmp_path / "store"),), nprocs=RANKS)
