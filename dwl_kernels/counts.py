"""Counts that the ranks of a process group sum: domains, frequencies, sketches.

What a rank sees goes to `pending` until the next exchange, so what is counted, and what follows
from it, is the same on all ranks at all times.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dwl_kernels.core.arguments import integer
from dwl_kernels.core.buffers import Tables, on_host
from dwl_kernels.core.untraced import untraced

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from dwl_kernels.distributed.group import Group

_warned: list[bool] = []


class InGroup(Tables):
    """A module that may lie on the ranks of a process group, and whose state has a version.

    PyTorch writes ``_version`` into the metadata of a checkpoint. A class whose state changes, in
    its names or in what they mean, raises its own. A checkpoint without metadata (safetensors, a
    plain dict) or of version 1, which is what modules have that name none, is read by its keys.

    Version 2 always has the ``arguments`` and ``steps`` of domain weights and a learned temperature
    of shape ``[1]``: what is missing there was taken out, and is not made up.
    """

    _version = 2
    _loaded_version = 1  # of the checkpoint that is being loaded

    def __init__(self, process_group: ProcessGroup | Group | None) -> None:
        super().__init__()
        self._group: Group | None = None
        self.process_group = process_group

    @property
    def process_group(self) -> Group | None:
        """The ranks that share a batch, a table or counts; it may be set at any time."""
        return self._group

    @process_group.setter
    def process_group(self, process_group: ProcessGroup | Group | None) -> None:
        if process_group is not None:
            from dwl_kernels.distributed.group import group_of

            process_group = group_of(process_group)
        self._set_group(process_group)

    def _set_group(self, group: Group | None) -> None:
        self._group = group

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *more: Any
    ) -> None:
        self._loaded_version = local_metadata.get("version") or 1
        if self._loaded_version > self._version:
            # With other names or meanings, of which a load that is not strict would be silent.
            errors: list[str] = more[-1]
            errors.append(
                f"{prefix.removesuffix('.') or type(self).__name__}: the checkpoint is of a newer "
                f"version of dwl_kernels, version {self._loaded_version} of the state of "
                f"{type(self).__name__}, and this one reads up to {self._version}; update "
                "dwl_kernels."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *more)


class Counts(InGroup):
    """Counts that are exchanged every `sync_every` updates where there is a process group."""

    pending: Tensor  # of the subclass's own shape; what this rank saw since the last exchange

    def __init__(self, process_group: ProcessGroup | Group | None, sync_every: int) -> None:
        super().__init__(process_group)
        self.sync_every = integer("sync_every", sync_every, least=1)
        self.since_sync = 0  # updates

    def _set_group(self, group: Group | None) -> None:
        super()._set_group(group)
        self._agreed = False  # whether the ranks are known to count the same

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if "pending" in self._constants:  # what was seen before is no part of what was loaded
            self.pending.zero_()
        self.since_sync = 0

    def sync(self) -> None:
        """Exchange now what the ranks have seen since the last exchange. All ranks must call it.

        Before a checkpoint in the middle of an interval, for example: what is pending is in none.

        Raises:
            RuntimeError: there is no process group.
        """
        if self.process_group is None:
            raise RuntimeError(
                f"sync of {type(self).__name__} needs a process group; pass process_group="
            )
        self._exchange()

    @untraced
    def _see(self, *seen: Tensor) -> None:
        """An update in a process group."""
        assert self.process_group is not None
        _ = self.process_group.process_group  # raises where a pickle has left it behind
        self._keep(*seen)
        self.since_sync += 1
        if self.since_sync >= self.sync_every:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        import torch.distributed as dist

        assert self.process_group is not None
        pending = self._pending()
        if not self._agreed:
            from dwl_kernels.distributed.exchange import agree

            same = {"counts": repr(self), "sync_every": self.sync_every, "size": pending.numel()}
            agree(self.process_group, pending, lambda: (True, same, ()))
            self._agreed = True
        op = dist.ReduceOp.SUM if pending.dtype == torch.int64 else dist.ReduceOp.MAX
        dist.all_reduce(pending, op=op, group=self.process_group.process_group)
        self._apply_pending(pending, self.since_sync)
        pending.zero_()
        self.since_sync = 0

    def _pending(self) -> Tensor:
        if "pending" not in self._constants:
            with on_host():
                self._register_constant("pending", self._nothing_pending())
        return self.pending

    def _nothing_pending(self) -> Tensor:
        """Zeros: int64 to be summed over the ranks, or uint8 of which the maximum counts."""
        raise NotImplementedError

    def _keep(self, *seen: Tensor) -> None:
        """Adds what this rank has seen to `pending`."""
        raise NotImplementedError

    def _apply_pending(self, pending: Tensor, updates: int) -> None:
        """Counts what all ranks have seen in so many updates."""
        raise NotImplementedError

    def _alone(self) -> bool:
        """Whether there is no process group. Warns once where there are other ranks."""
        if self.process_group is not None:
            return False
        if not (_warned or torch.compiler.is_compiling()) and _other_ranks():
            _warned.append(True)
            warnings.warn(
                f"{type(self).__name__} counts what this rank sees alone, and other ranks count "
                "something else; pass process_group=torch.distributed.group.WORLD to it, or to the "
                "loss module that holds it, for the sum over all ranks",
                stacklevel=4,
            )
        return True


def _other_ranks() -> bool:
    dist: Any = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
