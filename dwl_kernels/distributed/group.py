"""The process group that a module or a function was given, checked, as modules keep it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dwl_kernels.core.arguments import wrong_type

_WANTED = "None, a torch.distributed.ProcessGroup such as dist.group.WORLD, or a 1-D DeviceMesh"


class Group:
    """A process group in a module that is copied and pickled, which no process group can be.

    A copy shares it. A pickle leaves it behind, and what is unpickled raises where it needs one,
    so that it does not go on alone in silence.

    Before ``init_process_group``, ``dist.group.WORLD`` is None, and so is an argument that is it.

    Args:
        process_group: A ``ProcessGroup``, or a ``DeviceMesh`` of one dimension.
        name: The argument that errors name.

    Raises:
        TypeError: it is neither.
        ValueError: the mesh has several dimensions, or this process is no member of the group.
        RuntimeError: ``torch.distributed`` is not initialised.
    """

    def __init__(self, process_group: Any, name: str = "process_group") -> None:
        self.name = name
        self._group = _checked(name, process_group)

    @property
    def process_group(self) -> Any:
        """The ``ProcessGroup``; RuntimeError where a pickle has left it behind."""
        if self._group is None:
            raise RuntimeError(
                f"{self.name} is missing in a module that was unpickled, since process groups "
                f"cannot be pickled; set {self.name} of the module again, to None if this process "
                "is to go on alone"
            )
        return self._group

    @property
    def rank(self) -> int:
        """Place of this process in the group."""
        return dist.get_rank(self.process_group)

    @property
    def size(self) -> int:
        """Processes in the group."""
        return dist.get_world_size(self.process_group)

    def __copy__(self) -> Group:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "_group": None}

    def __repr__(self) -> str:
        known = "missing" if self._group is None else f"rank {self.rank} of {self.size}"
        return f"Group({known})"


def group_of(process_group: Any, name: str = "process_group") -> Group | None:
    """An argument as modules keep it: None stays None, and what is a `Group` is one."""
    if process_group is None or isinstance(process_group, Group):
        return process_group
    return Group(process_group, name)


def _checked(name: str, process_group: Any) -> Any:
    """The ``ProcessGroup`` of an argument."""
    available = dist.is_available()
    mesh = isinstance(process_group, DeviceMesh)
    if not mesh and not (available and isinstance(process_group, dist.ProcessGroup)):
        # `new_group` returns this integer to those that are not in the group.
        if available and process_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{name} is a group that this process is no member of")
        raise wrong_type(name, process_group, _WANTED)
    if mesh and process_group.ndim != 1:
        names = process_group.mesh_dim_names
        one = "with mesh_dim_names" if names is None else f"such as {name}[{names[0]!r}]"
        raise ValueError(
            f"{name} is a DeviceMesh of {process_group.ndim} dimensions; pass one of them, {one}"
        )
    if not dist.is_initialized():
        raise RuntimeError(
            f"{name} needs torch.distributed; call torch.distributed.init_process_group first"
        )
    return process_group.get_group() if mesh else process_group
