"""Counts that the ranks of a process group sum: domains, frequencies, sketches.

What a rank sees goes to `pending` until the next exchange, so what is counted, and what follows
from it, is the same on all ranks at all times.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from dwl_kernels.core.arguments import integer
from dwl_kernels.core.buffers import Tables, on_host
from dwl_kernels.core.untraced import untraced
from dwl_kernels.core.values import checks_values

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from dwl_kernels.distributed.group import Group

_warned: list[bool] = []
# What stands in `pending` in place of the first count where an update was refused: no sum over
# ranks of counts, and no maximum of 0 and 1.
_REFUSED = {torch.int64: -(2**40), torch.uint8: 2}

Update = TypeVar("Update", bound=Callable[..., None])


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
        self._refused: Exception | None = None  # why, of the first since the last exchange
        self._agreed = False  # whether the ranks are known to count the same

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if "pending" in self._constants:  # what was seen before is no part of what was loaded
            self.pending.zero_()
        self.since_sync, self._refused = 0, None

    def sync(self) -> None:
        """Exchange now what the ranks have seen since the last exchange. All ranks must call it.

        Before a checkpoint in the middle of an interval, for example: what is pending is in none.

        An update that is wrong on one rank raises on all, at the next exchange, which drops what
        was pending. On a GPU, without ``DWL_KERNELS_CHECK=1``, it raises on its rank alone.

        Raises:
            RuntimeError: there is no process group, or an update of another rank was wrong.
            TypeError, ValueError, IndexError: an update of this rank was.
        """
        if self.process_group is None:
            raise RuntimeError(
                f"sync of {type(self).__name__} needs a process group; pass process_group="
            )
        self._exchange()

    @untraced
    def _update_in_group(self, update: Callable[[], None]) -> None:
        """An update of this rank, and an exchange where it is time for one.

        A rank whose update is refused takes part in the exchange before it raises. Without, the
        others would wait for it.
        """
        assert self.process_group is not None
        _ = self.process_group.process_group  # raises where a pickle has left it behind
        try:
            update()
        except (TypeError, ValueError, IndexError) as error:
            self._refused = self._refused or error
        self.since_sync += 1
        if self.since_sync >= self.sync_every:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        import torch.distributed as dist

        from dwl_kernels.distributed.exchange import agree

        assert self.process_group is not None
        pending, refused, updates = self._pending(), self._refused, self.since_sync
        self.since_sync, self._refused = 0, None

        def alike() -> tuple[bool, dict[str, Any], tuple[()]]:
            if refused is not None:
                raise refused
            same = {"counts": repr(self), "sync_every": self.sync_every, "size": pending.numel()}
            return True, same, ()

        try:
            if not self._agreed:
                agree(self.process_group, pending, alike)
                self._agreed = True
            # On a device the others would have to wait for it to find out.
            looks = checks_values(pending)
            if refused is not None and looks:
                pending.view(-1)[0] = _REFUSED[pending.dtype]
            op = dist.ReduceOp.SUM if pending.dtype == torch.int64 else dist.ReduceOp.MAX
            dist.all_reduce(pending, op=op, group=self.process_group.process_group)
            if looks and _any_refused(pending):
                agree(self.process_group, pending, alike)  # raises on all ranks
            self._apply_pending(pending, updates)
            if refused is not None:
                raise refused
        finally:
            pending.zero_()

    def _pending(self) -> Tensor:
        if "pending" not in self._constants:
            # Also for updates outside of the `torch.inference_mode` that the first may be in.
            with on_host(), torch.inference_mode(False):
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


def for_all_ranks(update: Update) -> Update:
    """The `update` of counts, which in a process group raises on all ranks what one raises."""

    @functools.wraps(update)
    def of_rank(self: Counts, *args: Any, **named: Any) -> None:
        with torch.no_grad():
            if self.process_group is None:
                update(self, *args, **named)
            else:
                self._update_in_group(lambda: update(self, *args, **named))

    return cast("Update", of_rank)


def _any_refused(pending: Tensor) -> bool:
    """Whether an update of some rank was refused, by the sum or the maximum over ranks."""
    first = int(pending.view(-1)[0])
    return first < 0 if pending.dtype == torch.int64 else first > 1


def _other_ranks() -> bool:
    dist: Any = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
