"""One process that runs as rank 0 of many, whose other ranks are copies of it, and is counted.

No collective is called: what the others would send is what this rank sends. Sizes are those of a
real run, and so are bytes sent, products of matrices and the memory of tensors; what is computed
is right only where the tests with processes say so. The tests and ``python -m benchmarks.devices``
call it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import PropertyMock, patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.devices.plan import Setting
from dwl_kernels import (
    full_softmax_loss,
    in_batch_softmax_loss,
    indexed_sampled_softmax_loss,
    ops,
)
from dwl_kernels.core.problem import GradMask, Output, SharedProblem
from dwl_kernels.distributed.group import Group


class Sent:
    """Bytes that a rank hands to the collectives for other ranks, a number for each collective."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def all_gather(self, every: Tensor, own: Tensor, ranks: int) -> None:
        self.sent.append(own.nbytes * (ranks - 1))

    def all_to_all(self, sent: Sequence[int], rank: int) -> None:
        """`sent` in bytes for each rank."""
        self.sent.append(sum(sent) - sent[rank])

    def passed_on(self, moves: Sequence[Any]) -> None:
        self.sent += [move.tensor.nbytes for move in moves if move.op is dist.isend]


# PyTorch 2.13 has another name for it.
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Counts what the collectives of this process send, which stay as they are."""
    counter, rank, ranks = Sent(), dist.get_rank(), dist.get_world_size()
    gather, exchange, move = (
        getattr(dist, name) for name in (GATHER, "all_to_all_single", "batch_isend_irecv")
    )

    def gathered(every: Tensor, own: Tensor, **more: Any) -> Any:
        counter.all_gather(every, own, ranks)
        return gather(every, own, **more)

    def exchanged(taken: Tensor, given: Tensor, received: Any, sent: Any, **more: Any) -> Any:
        counter.all_to_all(sent, rank)
        return exchange(taken, given, received, sent, **more)

    def passed_on(moves: list[Any]) -> Any:
        counter.passed_on(moves)
        return move(moves)

    with patched(gathered, exchanged, passed_on):
        yield counter.sent


@contextmanager
def patched(
    gather: Callable[..., Any], exchange: Callable[..., Any], move: Callable[..., Any]
) -> Iterator[None]:
    with (
        patch.object(dist, GATHER, gather),
        patch.object(dist, "all_to_all_single", exchange),
        patch.object(dist, "batch_isend_irecv", move),
    ):
        yield


@contextmanager
def rank_of_many(ranks: int) -> Iterator[list[int]]:
    """This process is rank 0 of so many; gives the list of what it sends."""
    counter = Sent()

    def gathered(every: Tensor, own: Tensor, **_: Any) -> None:
        counter.all_gather(every, own, ranks)
        every.view(ranks, -1).copy_(own.expand(ranks, -1))

    def exchanged(taken: Tensor, given: Tensor, received: Any, sent: Any, **_: Any) -> None:
        counter.all_to_all(sent, 0)
        fill(taken, given[: sent[0]])

    def passed_on(moves: list[Any]) -> list[Any]:
        counter.passed_on(moves)
        source = next(move.tensor for move in moves if move.op is dist.isend)
        target = next(move.tensor for move in moves if move.op is dist.irecv)
        fill(target, source)
        return []

    started = not dist.is_initialized()
    if started:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        size = patch.object(Group, "size", PropertyMock(return_value=ranks))
        with size, patched(gathered, exchanged, passed_on):
            yield counter.sent
    finally:
        if started:
            dist.destroy_process_group()


def fill(target: Tensor, source: Tensor) -> None:
    """Repeat the source, without a copy of all repetitions."""
    target, source = target.view(-1), source.reshape(-1)
    for start in range(0, len(target), max(len(source), 1)):
        part = target[start : start + len(source)]
        part.copy_(source[: len(part)])


class Held(TorchDispatchMode):
    """The largest size that the tensors made under it had together, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id_of(tensor) not in inputs | self._seen:
                self._add(tensor)
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), id_of(tensor)
        size = storage.nbytes()
        self._seen.add(key)
        self.now += size

        def gone() -> None:
            self._seen.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Operations:
    """The products that backends are asked for: one for the logits, one for each gradient."""

    def __init__(self) -> None:
        self.total = 0
        self._solve = ops.solve

    def __call__(
        self, problem: SharedProblem, row_grad: Tensor | None, wanted: GradMask, backend: str
    ) -> Output:
        count = 1 + wanted.query + wanted.candidates
        self.total += 2 * count * problem.query.numel() * problem.num_candidates
        return self._solve(problem, row_grad, wanted, backend)


# ---------------------------------------------------------------- a step of each way


class Counted:
    """What one step did on rank 0."""

    def __init__(self, way: str, s: Setting) -> None:
        operations = Operations()
        solving = patch.object(ops, "solve", operations)
        with rank_of_many(s.ranks) as sent, solving, Held() as held:
            leaves = inputs(way, s)
            held.peak = before = held.now
            loss = loss_of(way, s, leaves)
            forward = len(sent)
            loss.backward()
        self.forward, self.backward = sent[:forward], sent[forward:]
        self.peak = held.peak - before  # beside what the C++ kernel allocates for itself
        self.operations = operations.total


def inputs(way: str, s: Setting) -> list[Tensor]:
    """Leaves and ids: the different ids of a rank are as many on every shard."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[s.element]
    query = torch.randn(s.rows, s.dim, dtype=dtype).requires_grad_()
    if way in ("gathered", "ring"):
        positive = torch.randn_like(query).requires_grad_()
        return [query, positive, torch.arange(s.rows), torch.full((s.rows,), -1.0)]
    shard = torch.randn(s.shard, s.dim, dtype=dtype).requires_grad_()
    count = s.rows + (s.negatives if way == "indexed" else 0)
    return [query, shard, torch.arange(count) * s.items // count]


def loss_of(way: str, s: Setting, leaves: Sequence[Tensor]) -> Tensor:
    query, other, ids = leaves[:3]
    options: dict[str, Any] = {"process_group": dist.group.WORLD, "backend": "cpu"}
    if way == "sharded":
        return full_softmax_loss(query, other, ids, **options)
    if way == "indexed":
        return indexed_sampled_softmax_loss(query, other, ids[: s.rows], ids[s.rows :], **options)
    options |= {"ids": ids, "log_q": leaves[3], "ring": way == "ring"}
    return in_batch_softmax_loss(query, other, **options)
