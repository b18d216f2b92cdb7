"""What the ranks of a group tell each other: first whether all can go on, then blocks of rows.

`candidates`, `ring`, `sharded` and `lookup` call it. Blocks travel as bytes, whatever their dtypes,
one transfer for all tensors of a block. Sums over ranks are made here, in the order of the ranks
and in the dtype of sums, and not by a collective: so repeats are bitwise the same, and all ranks
hold the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dwl_kernels.core.double_backward import refuse_jit, transforms_active
from dwl_kernels.core.problem import accumulate_dtype
from dwl_kernels.distributed.group import Group

_SIZES = 3  # numbers of a header beside the state and the digest
_ALIGNMENT = 16  # bytes, of every tensor in a block

Built = TypeVar("Built")


def agree(
    group: Group,
    query: Any,
    build: Callable[[], tuple[Built, Mapping[str, Any], Sequence[int]]],
) -> tuple[Built, list[list[int]]]:
    """What `build` makes of this rank's arguments, and the sizes of every rank, ``[ranks][3]``.

    `build` returns it with what must be the same on all ranks, by the names of the arguments, and
    with up to three sizes; `query` says which device it is about. One exchange of 40 bytes a rank,
    which comes before all others, so that no rank waits for one that has raised. It cannot be left
    out where shapes have been seen before: what a rank has seen, the others do not know, and one
    that asks alone waits for ever. And the sizes, which the next exchange needs, change anyway.

    Raises:
        ValueError: on all ranks, where something is not the same, naming the argument and the rank.
        RuntimeError: where another rank could not build, with its error.
        Exception: what `build` raised, on its rank.
    """
    _refuse_records()
    built: Built | None = None
    same: Mapping[str, Any] = {}
    sizes: Sequence[int] = ()
    error: Exception | None = None
    try:
        built, same, sizes = build()
    except Exception as caught:
        error = caught
    device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    digest = hashlib.blake2b(repr(sorted(same.items())).encode(), digest_size=8).digest()
    header = [int(error is not None), int.from_bytes(digest, "little", signed=True), *sizes]
    header += [0] * (2 + _SIZES - len(header))
    headers = _gathered_numbers(header, group, device)
    if any(other[0] for other in headers) or len({other[1] for other in headers}) > 1:
        message = None if error is None else f"{type(error).__name__}: {error}"
        told: list[Any] = [None] * group.size
        dist.all_gather_object(told, (message, dict(same)), group=group.process_group)
        if error is not None:
            raise error
        _raise_difference(told)
    assert built is not None
    return built, [other[2:] for other in headers]


def _refuse_records() -> None:
    """RuntimeError where a call is recorded or transformed, and ranks cannot wait in it."""
    refuse_jit()
    if transforms_active():
        raise RuntimeError(
            "the transforms of torch.func (grad, vmap, jvp) cannot run a loss over a process "
            "group; take the gradients by autograd, or set process_group of the loss to None"
        )
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "torch.export cannot record a loss over a process group; export the model without its "
            "loss, or set process_group of the loss to None"
        )


def _gathered_numbers(numbers: list[int], group: Group, device: torch.device) -> list[list[int]]:
    """The numbers of every rank. Through the host where the group can: no wait for the device."""
    if "cpu" in dist.get_backend_config(group.process_group):
        device = torch.device("cpu")
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    every = own.new_empty(group.size * len(numbers))
    all_gather(every, own, group)
    return every.view(group.size, -1).tolist()


def _raise_difference(told: Sequence[tuple[str | None, Mapping[str, Any]]]) -> None:
    for rank, (message, _) in enumerate(told):
        if message is not None:
            raise RuntimeError(f"rank {rank} of the process group raised {message}")
    first = told[0][1]
    for rank, (_, other) in enumerate(told):
        for name in (*first, *other):
            here, there = (one.get(name, "not given") for one in (first, other))
            if here != there:
                raise ValueError(
                    f"{name}: {here} on rank 0 of the process group but {there} on rank {rank}; "
                    "all ranks must call the same loss with the same options, and with arguments "
                    "of the same kinds"
                )


def all_gather(every: Tensor, own: Tensor, group: Group) -> None:
    """Fill `every` with the tensors of all ranks, which are of one size."""
    # PyTorch 2.13 has another name for it.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(every.view(-1), own.reshape(-1), group=group.process_group)


# ---------------------------------------------------------------- blocks of rows


class Layout:
    """How the tensors of a block lie in its bytes; None where there is no such tensor."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.kinds = [None if t is None else (t.dtype, t.shape[1:]) for t in tensors]

    def _parts(self, rows: int) -> list[tuple[int, int]]:
        """Where each tensor starts and ends, in bytes."""
        parts, start = [], 0
        for kind in self.kinds:
            size = 0 if kind is None else rows * kind[0].itemsize * math.prod(kind[1])
            parts.append((start, start + size))
            start = -(-(start + size) // _ALIGNMENT) * _ALIGNMENT
        return [*parts, (start, start)]

    def num_bytes(self, rows: int) -> int:
        return self._parts(rows)[-1][0]

    def views(self, buffer: Tensor, rows: int) -> list[Tensor | None]:
        """The tensors of a block of so many rows, as views of its bytes."""
        views: list[Tensor | None] = []
        for kind, (start, end) in zip(self.kinds, self._parts(rows), strict=False):
            if kind is None:
                views.append(None)
            elif start == end:
                views.append(buffer.new_empty((rows, *kind[1]), dtype=kind[0]))
            else:
                views.append(buffer[start:end].view(kind[0]).view(rows, *kind[1]))
        return views

    def packed(
        self, tensors: Sequence[Tensor | None], num_bytes: int, device: torch.device
    ) -> Tensor:
        """The bytes of a block, of which there may be more than it fills."""
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        rows = next(len(t) for t in tensors if t is not None)
        for view, tensor in zip(self.views(buffer, rows), tensors, strict=True):
            if view is not None and tensor is not None:
                view.copy_(tensor)
        return buffer


def gathered_blocks(
    tensors: Sequence[Tensor | None],  # each [rows of this rank, ...]
    rows: Sequence[int],  # of every rank
    group: Group,
) -> list[list[Tensor | None]]:  # of every rank
    """The blocks of all ranks, in one collective."""
    device = next(t.device for t in tensors if t is not None)
    layout = Layout(tensors)
    num_bytes = layout.num_bytes(max(rows))
    own = layout.packed(tensors, num_bytes, device)
    every = own.new_empty((group.size, num_bytes))
    if num_bytes:
        all_gather(every, own, group)
    return [layout.views(buffer, count) for buffer, count in zip(every, rows, strict=True)]


def gathered(tensors: Sequence[Tensor | None], rows: Sequence[int], group: Group) -> list[Any]:
    """The tensors with the rows of all ranks, one rank after the other; None stays None."""
    columns = zip(*gathered_blocks(tensors, rows, group), strict=True)
    return [None if column[0] is None else torch.cat(column) for column in columns]


def exchanged(tensor: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """The rows that every rank has sent here; the rows of `tensor` go to the ranks in order."""
    taken = tensor.new_empty((sum(received), *tensor.shape[1:]))
    of_row = tensor.element_size() * math.prod(tensor.shape[1:])
    dist.all_to_all_single(
        _bytes(taken),
        _bytes(tensor.contiguous()),
        [count * of_row for count in received],
        [count * of_row for count in sent],
        group=group.process_group,
    )
    return taken


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor."""
    if not tensor.numel():
        return tensor.new_empty(0, dtype=torch.uint8)
    return tensor.view(-1).view(torch.uint8)


def summed(
    tensor: Tensor,  # [sum of rows, ...], what this rank adds to the rows of every rank
    rows: Sequence[int],  # of every rank
    group: Group,
) -> Tensor:  # [rows of this rank, ...], in the dtype of sums
    """For the rows of this rank, the sum of what all ranks add, in the order of the ranks."""
    own = rows[group.rank]
    parts = exchanged(tensor, rows, [own] * group.size, group)
    return in_order(parts.view(group.size, own, *tensor.shape[1:]), accumulate_dtype(tensor.dtype))


def in_order(parts: Tensor, dtype: torch.dtype) -> Tensor:  # [ranks, ...] -> [...]
    """The sum over the ranks, with no copy of all parts in the dtype of sums."""
    total = parts[0].to(dtype, copy=True)
    for part in parts[1:]:
        total += part
    return total
