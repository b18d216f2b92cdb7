"""The part of a table that is on this rank, from what a user passes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from dwl_kernels.core.arguments import check_dense
from dwl_kernels.distributed.group import Group, group_of


def shard_of(
    table: Tensor,  # [V, D], or of the bias [V]
    process_group: Any,
    name: str = "table",
) -> tuple[Tensor, Group]:
    """The rows of the table that are here, and the group over which the others are.

    A DTensor says itself how it is spread; its gradient is one that is spread in the same way.

    Raises:
        TypeError: a DTensor that is not split by rows over one dimension of a mesh.
        ValueError: a DTensor of another group than `process_group`.
    """
    group = group_of(process_group)
    if not isinstance(table, DTensor):
        assert group is not None  # or this would be the loss of one process
        return table, group
    mesh = table.device_mesh
    if mesh.ndim != 1 or not table.placements[0].is_shard(0):
        if mesh.ndim == 1 and (group is not None or name != "table"):  # all of it would be no shard
            raise TypeError(
                f"{name} is a DTensor that is not split by rows; pass "
                f"{name}.redistribute(placements=[Shard(0)]) with Shard of torch.distributed.tensor"
            )
        check_dense(name, table)  # raises and says what to do
    own = Group(mesh.get_group(), name)
    if group is not None and group.process_group is not own.process_group:
        raise ValueError(
            f"{name} is a DTensor over another group than "
            + ("process_group; leave process_group out" if name == "table" else "the table")
        )
    return table.to_local(grad_placements=[Shard(0)]), own
