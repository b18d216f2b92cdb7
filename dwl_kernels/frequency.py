"""Log-Q of ids seen in a stream, for in-batch candidates.

Both estimates are modules that keep their counts; updating and looking up never wait for the
device. What was counted with some hash functions means nothing to others, so a `state_dict` names
them, and loading it into a module of another `seed` raises.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dwl_kernels.core.arguments import ids_on, integer, number
from dwl_kernels.core.batching import counting
from dwl_kernels.core.buffers import difference, on_host
from dwl_kernels.counts import Counts, for_all_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_MEND = "call update outside of vmap, with the ids of all slices or of one after the other"


class StreamingFrequency(Counts):
    """Estimates how often an id occurs from the gaps between the batches that hold it.

    For every hash function, array A holds the step at which a bucket was last seen and array B
    the average gap. A batch seen at step t moves the buckets of its ids, each of them once:

        B <- (1 - rate) B + rate (t - A),    A <- t,    P(id in a batch) = 1 / max over hashes of B

    Ids that share a bucket shorten its gap, hence the largest of the B (algorithm 3).

    ``1 / B`` is the probability that a batch holds the id, not that of one draw. While the batches
    are small, ``P = batch_size Q``, and the constant cancels in the standard correction if all the
    log-Q come from here. Where it does not cancel (the refined correction, or sampled candidates
    beside the in-batch ones), give ``batch_size``: log-Q is then that of one draw,

        Q = 1 - (1 - P)^(1 / batch_size),    P at most 1 / (1 + learning_rate)

    An id that is in nearly every batch has no gaps to measure, so its Q is underestimated there;
    ``CountMinSketch`` counts duplicates and has no such limit.

    An average of models holds no average of steps: they are not among ``model.buffers()``, so
    ``AveragedModel`` keeps those of the moment when it copied the model, with ``use_buffers=True``
    too. For those of today, copy the state,
    ``averaged.module.frequency.load_state_dict(model.frequency.state_dict())``.

    Args:
        num_buckets: length of A and B, several times the number of distinct ids.
        num_hashes: 1 is algorithm 2, more are algorithm 3.
        learning_rate: rate of the moving average, in (0, 1]; smaller is smoother and slower.
        initial_gap: B of every bucket at the start, at least 1, in batches: the algorithm to the
            letter. If None, the first ``1 / learning_rate`` gaps of a bucket are averaged evenly,
            so a rare id is not held at a guess: ``1 / B`` starts as its share of the batches so
            far.
        batch_size: ids in a batch, to get log-Q of one draw; if None, that of a batch.
        seed: chooses the hash functions.
        process_group, sync_every: ranks whose batches of one step are one batch, exchanged at every
            ``sync_every``-th update, ``sync_every`` bytes for each bucket of each hash, without a
            wait for the device. All ranks must update equally often, if with no ids. Until an
            exchange the estimates are those of the one before; see :meth:`sync`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.

    Source: Yi et al. 2019, "Sampling-bias-corrected neural modeling for large corpus item
    recommendations", algorithms 2 and 3.

    Example:
        >>> from dwl_kernels import StreamingFrequency
        >>> frequency = StreamingFrequency(1024)
        >>> for step in range(12):  # id 7 is in every batch, id 5 in every fourth
        ...     frequency.update(torch.tensor([7, 5 if step % 4 == 3 else 7]))
        >>> frequency.log_q(torch.tensor([7, 5])).exp()
        tensor([1.0000, 0.2500])
    """

    step: Tensor
    last_step: Tensor
    gap: Tensor
    sightings: Tensor
    seeds: Tensor

    def __init__(
        self,
        num_buckets: int,
        *,
        num_hashes: int = 1,
        learning_rate: float = 0.01,
        initial_gap: float | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        process_group: ProcessGroup | None = None,
        sync_every: int = 1,
    ) -> None:
        super().__init__(process_group, sync_every)
        self.num_buckets = integer("num_buckets", num_buckets, least=1)
        num_hashes = integer("num_hashes", num_hashes, least=1)
        size = self.num_buckets * num_hashes
        learning_rate = number("learning_rate", learning_rate)
        if not 0 < learning_rate <= 1:
            raise ValueError(f"learning_rate is {learning_rate}, wanted a number in (0, 1]")
        if initial_gap is not None:
            initial_gap = number("initial_gap", initial_gap, "None or a number")
            if not 1 <= initial_gap < math.inf:
                raise ValueError(f"initial_gap is {initial_gap}, wanted None or at least 1 batch")
        self.learning_rate = learning_rate
        self.initial_gap = initial_gap
        self.batch_size = None if batch_size is None else integer("batch_size", batch_size, least=1)
        self.seed = integer("seed", seed)
        with on_host():
            # The rows of all H hashes lie end to end: one flat index reads and writes them at once.
            self._register_count("step", torch.zeros((), dtype=torch.int64))  # t, batches so far
            self._register_count("last_step", torch.zeros(size, dtype=torch.int64))  # A, 0 = never
            gap = torch.full((size,), initial_gap or 1, dtype=torch.float32)
            self._register_count("gap", gap)  # B, in batches
            self._register_count("sightings", torch.zeros(size, dtype=torch.int32))
            self._register_constant("seeds", _hash_seeds(num_hashes, seed), saved=True)
        self._settle()

    @for_all_ranks
    def update(self, ids: Tensor) -> None:
        """Take one step with the ids of a batch; an id that occurs twice counts once.

        Args:
            ids: ``[...]`` integers of any size, the ids of one batch in any shape; a tensor, array
                or pandas column.

        Raises:
            TypeError, ValueError: ``ids`` is no tensor or array of integers, or on another device.
            RuntimeError: if ``torch.func.vmap`` made a batch of the ids, but not of the counts.
        """
        bucket = self._buckets(ids).flatten()  # [H n]
        bucket, where = counting(bucket, self.gap, _MEND)
        with where:
            self._update(bucket)

    def _update(
        self,
        bucket: Tensor,  # [H n]
    ) -> None:
        if not self._alone():
            self._keep(bucket)
            return
        # From `bucket`: what depends on no input would run while `torch.export` traces, and count.
        self.step.add_(bucket.new_ones(()))
        self._step(bucket)

    def _nothing_pending(self) -> Tensor:
        return torch.zeros(self.sync_every, self.gap.numel(), dtype=torch.uint8)

    def _keep(self, *seen: Tensor) -> None:
        self._pending()[self.since_sync, seen[0]] = 1

    def _apply_pending(self, pending: Tensor, updates: int) -> None:
        before = self.gap, self.sightings, self.last_step
        every = torch.arange(self.gap.numel(), device=pending.device)
        for seen in pending[:updates].bool():
            self.step += 1
            kept = [tensor.clone() for tensor in before]
            self._step(every)
            for tensor, old in zip(before, kept, strict=True):
                tensor.copy_(torch.where(seen, tensor, old))

    def _step(
        self,
        bucket: Tensor,  # [n], those that were seen in this step
    ) -> None:
        gap = self.gap[bucket]
        sightings = self.sightings[bucket] + 1
        rate: float | Tensor = self.learning_rate
        if self.initial_gap is None:
            rate = sightings.float().reciprocal().clamp(min=self.learning_rate)
        # Duplicates, and ids that share a bucket, all write the same value: any order will do.
        self.gap[bucket] = gap + rate * ((self.step - self.last_step[bucket]).float() - gap)
        self.sightings[bucket] = sightings
        self.last_step[bucket] = self.step

    def log_q(self, ids: Tensor) -> Tensor:
        """Log-probability of each id in a batch, or in one draw if ``batch_size`` was given.

        Args:
            ids: ``[...]`` integers of any size, any shape; a tensor, array or pandas column.

        Returns:
            ``[...]`` float32, nats, finite. An id never seen in t batches has a gap of
            ``t + 1`` batches, or of ``initial_gap`` if that is more.

        Raises:
            TypeError, ValueError: ``ids`` is no tensor or array of integers, or on another device.
        """
        bucket = self._buckets(ids)  # [H, ...]
        gap = self.gap[bucket]
        never = self.last_step[bucket] == 0
        # A gap is one batch or more, but rounding may leave less in an average.
        gap = torch.where(never, gap.clamp(min=self.step + 1), gap).amax(0).clamp(min=1)
        if self.batch_size is None:
            return -gap.log()
        # Q = 1 - (1 - P)^(1 / n) through expm1 and log1p: P and Q are tiny for most ids.
        share = gap.double().clamp(min=1 + self.learning_rate).reciprocal()
        return (-torch.expm1(torch.log1p(-share) / self.batch_size)).log().float()

    def _contradiction(self, saved: dict[str, Tensor]) -> str | None:
        text = _other_hashes(saved, self.seeds.numel(), self.seed)
        if text is None and saved.keys() >= {"gap", "last_step"}:
            start = saved["gap"].new_tensor(self.initial_gap or 1)
            untouched = saved["gap"][saved["last_step"] == 0]
            if bool((untouched != start).any()):
                got = untouched[untouched != start][0].item()
                text = (
                    f"initial_gap is {got:g} in the checkpoint but {start.item():g} here; build "
                    "the module with that of the checkpoint"
                )
        return text

    def extra_repr(self) -> str:
        return (
            f"num_buckets={self.num_buckets}, num_hashes={self.seeds.numel()}, "
            f"learning_rate={self.learning_rate}, initial_gap={self.initial_gap}, "
            f"batch_size={self.batch_size}, seed={self.seed}"
        )

    def _buckets(self, ids: Tensor) -> Tensor:  # [...] -> [H, ...]
        return _flat_buckets(ids_on(self.seeds.device, ids), self.seeds, self.num_buckets)


class CountMinSketch(Counts):
    """Counts the ids of a stream in bounded memory.

    Every id adds one to a counter in each of ``depth`` rows, and its count is read from the
    smallest of them. Other ids only ever add to these counters, so a count is never too low. It is
    too high by more than ``e / width`` of all ids seen with probability at most ``exp(-depth)``.

    An average of models holds no average of counts: they are not among ``model.buffers()``, so
    ``AveragedModel`` keeps those of the moment when it copied the model, with ``use_buffers=True``
    too. For those of today, copy the state,
    ``averaged.module.sketch.load_state_dict(model.sketch.state_dict())``.

    Args:
        width: counters per row.
        depth: rows, each with a hash function of its own.
        seed: chooses the hash functions.
        process_group, sync_every: ranks whose counts are summed, exchanged at every
            ``sync_every``-th update, ``8 (width depth + 1)`` bytes, without a wait for the device.
            All ranks must update equally often, if with no ids. Until an exchange the counts are
            those of the one before; see :meth:`sync`.

    Raises:
        TypeError, ValueError: ``width`` or ``depth`` is no positive integer, ``seed`` no integer.

    Source: Cormode and Muthukrishnan 2005, "An improved data stream summary: the count-min sketch
    and its applications".

    Example:
        >>> from dwl_kernels import CountMinSketch
        >>> sketch = CountMinSketch(width=1024)
        >>> sketch.update(torch.tensor([3, -8, 3, 3]))
        >>> sketch.count(torch.tensor([3, -8, 5]))
        tensor([3, 1, 0])
    """

    counts: Tensor
    total: Tensor
    seeds: Tensor

    def __init__(
        self,
        width: int,
        depth: int = 4,
        *,
        seed: int = 0,
        process_group: ProcessGroup | None = None,
        sync_every: int = 1,
    ) -> None:
        super().__init__(process_group, sync_every)
        self.width = integer("width", width, least=1)
        depth = integer("depth", depth, least=1)
        size = self.width * depth
        self.seed = integer("seed", seed)
        with on_host():
            self._register_count("counts", torch.zeros(size, dtype=torch.int64))  # rows end to end
            self._register_count("total", torch.zeros((), dtype=torch.int64))  # ids seen
            self._register_constant("seeds", _hash_seeds(depth, seed), saved=True)
        self._settle()

    @for_all_ranks
    def update(self, ids: Tensor) -> None:
        """Count ids, duplicates included.

        Args:
            ids: ``[...]`` integers of any size, any shape; a tensor, array or pandas column.

        Raises:
            TypeError, ValueError: ``ids`` is no tensor or array of integers, or on another device.
            RuntimeError: if ``torch.func.vmap`` made a batch of the ids, but not of the counts.
        """
        bucket = self._buckets(ids)  # [depth, ...]
        bucket, where = counting(bucket, self.counts, _MEND)
        with where:
            self._update(bucket)

    def _update(
        self,
        bucket: Tensor,  # [depth, ...]
    ) -> None:
        if not self._alone():
            self._keep(bucket)
            return
        self.total.add_(bucket.new_full((), bucket[0].numel()))  # from `bucket`, as above
        bucket = bucket.flatten()
        self.counts.index_add_(0, bucket, torch.ones_like(bucket))

    def _nothing_pending(self) -> Tensor:
        return torch.zeros(self.counts.numel() + 1, dtype=torch.int64)

    def _keep(self, *seen: Tensor) -> None:
        (bucket,), pending = seen, self._pending()
        pending[-1] += bucket[0].numel()
        bucket = bucket.flatten()
        pending.index_add_(0, bucket, torch.ones_like(bucket))

    def _apply_pending(self, pending: Tensor, updates: int) -> None:
        self.counts += pending[:-1]
        self.total += pending[-1]

    def count(self, ids: Tensor) -> Tensor:
        """Estimated occurrences of each id, never too low.

        Args:
            ids: ``[...]`` integers of any size, any shape; a tensor, array or pandas column.

        Returns:
            ``[...]`` int64.

        Raises:
            TypeError, ValueError: ``ids`` is no tensor or array of integers, or on another device.
        """
        return self.counts[self._buckets(ids)].amin(0)

    def log_q(self, ids: Tensor) -> Tensor:
        """Log-probability of one draw, ``log(max(count, 1) / max(total, 1))``.

        Args:
            ids: ``[...]`` integers of any size, any shape; a tensor, array or pandas column.

        Returns:
            ``[...]`` float32, nats, finite: an id never seen counts as seen once.

        Raises:
            TypeError, ValueError: ``ids`` is no tensor or array of integers, or on another device.
        """
        count = self.count(ids).clamp(min=1).double()
        return (count.log() - self.total.clamp(min=1).double().log()).float()

    def _contradiction(self, saved: dict[str, Tensor]) -> str | None:
        return _other_hashes(saved, self.seeds.numel(), self.seed)

    def extra_repr(self) -> str:
        return f"width={self.width}, depth={self.seeds.numel()}, seed={self.seed}"

    def _buckets(self, ids: Tensor) -> Tensor:  # [...] -> [depth, ...]
        return _flat_buckets(ids_on(self.seeds.device, ids), self.seeds, self.width)


def _hash_seeds(rows: int, seed: int) -> Tensor:  # [rows]
    start = (integer("seed", seed) + 2**63) % 2**64 - 2**63
    return _mix64(_mix64(torch.tensor(start)) + torch.arange(1, rows + 1))


def _other_hashes(saved: dict[str, Tensor], rows: int, seed: int) -> str | None:
    """That a checkpoint was counted with other hash functions."""
    with on_host():  # the module itself may be on `meta`
        text = difference("seeds", saved, _hash_seeds(rows, seed))
    return text and (
        f"{text}: the checkpoint was counted with other hash functions; build the module with the "
        "seed and the sizes of the checkpoint"
    )


def _flat_buckets(ids: Tensor, seeds: Tensor, width: int) -> Tensor:  # [...], [H] -> [H, ...]
    """Bucket of every id in each row, as an index into the rows laid end to end."""
    rows = seeds.numel()
    column = (rows,) + (1,) * ids.dim()
    hashed = _mix64(_mix64(ids) ^ seeds.view(column)).remainder(width)
    return hashed + torch.arange(0, rows * width, width, device=ids.device).view(column)


def _mix64(x: Tensor) -> Tensor:  # int64
    """Finaliser of SplitMix64: a bijection of 64 bits in which every bit moves every other."""
    # The golden ratio keeps id 0 from staying 0. int64 wraps around when multiplied, and shifts
    # its sign in from the left, so the mask makes the shift a logical one.
    x = x - 0x61C8864680B583EB
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & (2**33 - 1))
