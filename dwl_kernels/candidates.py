"""Where candidates come from and how likely each one was: samplers and stream estimates of log-Q.

Samplers draw ids with replacement, and their log-Q is the log of the probability of one draw.
Stream estimates learn log-Q from the ids that pass by, for in-batch candidates. All of them are
modules whose state lives in buffers; drawing, updating and looking up never wait for the device.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "CountMinSketch",
    "LogUniformSampler",
    "StreamingFrequency",
    "UniformSampler",
    "UnigramSampler",
]

_ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Beyond this, float64 no longer tells the log-uniform borders of neighbouring ids apart, and the
# remainder of a 62-bit random number is no longer uniform to 2^-14.
_MAX_ITEMS = 2**48


class _Tables(nn.Module):
    """Module whose buffers change device but keep their dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Tables:
        # `model.half()` or `model.to(torch.bfloat16)` would round probabilities to three digits.
        def keep_dtype(buffer: Tensor) -> Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self


class _Sampler(_Tables):
    """Draws ids from a fixed distribution over `[0, num_items)`."""

    device_marker: Tensor

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.num_items = _positive_int("num_items", num_items)
        if self.num_items > _MAX_ITEMS:
            raise ValueError(f"num_items is {num_items}, at most 2**48 items can be told apart")
        # Without state of its own a sampler still follows `.to(device)`.
        self.register_buffer("device_marker", torch.empty(0), persistent=False)

    def sample(
        self, n: int | Sequence[int], *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw ids with replacement, with the log-probability of one draw of each.

        Args:
            n: number of draws, or a shape such as `(B, K)`.
            generator: source of randomness on the sampler's device; the global one if None.

        Returns:
            `ids` int64 `[n]` and `log_q` float32 `[n]`, or both of the shape that was asked for.

        Raises:
            TypeError: `n` is neither an integer nor a shape.
            ValueError: a negative size, or a generator of another device.
        """
        device = self.device_marker.device
        if generator is not None and generator.device.type != device.type:
            raise ValueError(
                f"generator is on {generator.device}, the sampler on {device}; "
                f"make it with torch.Generator({str(device)!r})"
            )
        ids = self._draw(_shape(n), device, generator)
        return ids, self._log_probability(ids)

    def log_q(self, ids: Tensor) -> Tensor:
        """Log-probability of one draw of each id.

        Args:
            ids: integer ids in `[0, num_items)`, any shape.

        Returns:
            float32 of the shape of `ids`; -inf for an id that is never drawn. An id out of range
            gives NaN on CUDA and in compiled code, where a check would wait for the device.

        Raises:
            TypeError: `ids` is no integer tensor.
            ValueError: `ids` is on another device than the sampler.
            IndexError: an id is out of range, on CPU.
        """
        ids = _int64_ids(ids, self.device_marker.device)
        inside = (ids >= 0) & (ids < self.num_items)
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and not inside.all():
            raise IndexError(
                f"ids holds {ids[~inside][0].item()}, wanted ids in [0, {self.num_items})"
            )
        log_q = self._log_probability(ids.clamp(0, self.num_items - 1))
        return torch.where(inside, log_q, math.nan)

    def extra_repr(self) -> str:
        return f"num_items={self.num_items}"

    def _draw(
        self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
    ) -> Tensor:
        raise NotImplementedError

    def _log_probability(self, ids: Tensor) -> Tensor:
        raise NotImplementedError


class UniformSampler(_Sampler):
    """Draws every id with the same probability, `Q = 1 / num_items`.

    Args:
        num_items: size of the catalogue, at most 2^48.

    Raises:
        TypeError, ValueError: `num_items` is no integer, or not in `[1, 2^48]`.

    Example:
        >>> from dwl_kernels.candidates import UniformSampler
        >>> ids, log_q = UniformSampler(4).sample(1024)
        >>> round(log_q[0].exp().item(), 4)
        0.25
    """

    def _draw(
        self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
    ) -> Tensor:
        return _uniform_ids(self.num_items, shape, device, generator)

    def _log_probability(self, ids: Tensor) -> Tensor:
        return torch.full_like(ids, -math.log(self.num_items), dtype=torch.float32)


class LogUniformSampler(_Sampler):
    """Draws ids sorted by decreasing frequency from Zipf's law, without a table.

    `Q_k = log((k + 2) / (k + 1)) / log(num_items + 1)`, so id 0 must be the most frequent item.
    The inverse of the cumulative distribution is taken in float64.

    Args:
        num_items: size of the catalogue, at most 2^48.

    Raises:
        TypeError, ValueError: `num_items` is no integer, or not in `[1, 2^48]`.

    Example:
        >>> from dwl_kernels.candidates import LogUniformSampler
        >>> sampler = LogUniformSampler(3)
        >>> sampler.log_q(torch.arange(3)).exp()  # log 2, log 3/2 and log 4/3 over log 4
        tensor([0.5000, 0.2925, 0.2075])
    """

    def _draw(
        self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
    ) -> Tensor:
        uniform = torch.rand(shape, dtype=torch.float64, device=device, generator=generator)
        return _log_uniform_ids(uniform, self.num_items)

    def _log_probability(self, ids: Tensor) -> Tensor:
        # log1p keeps its digits where (k + 2) / (k + 1) rounds to one.
        share = torch.log1p((ids + 1).double().reciprocal())
        return (share.log() - math.log(math.log1p(self.num_items))).float()


class UnigramSampler(_Sampler):
    """Draws ids in proportion to a power of their counts, by Walker's alias method.

    `Q_k = counts_k^power / sum_j counts_j^power`. An item with count zero is never drawn and has
    log-Q -inf, whatever the power: power 0 is uniform over the items that were counted at all.

    The table takes 16 bytes per item: the probability in float64, the alias in int32 (int64 from
    2^31 items on), log-Q in float32. Float32 probabilities would do for most counts,
    but near-uniform ones send many surpluses below 2^-24 to one item, which would lose them all.

    Args:
        counts: `[num_items]` occurrences of each item, non-negative, integer or floating.
        power: exponent of the counts, at least 0; word2vec takes 0.75.

    Raises:
        TypeError: `counts` is neither integer nor floating.
        ValueError: `counts` is not one-dimensional, is empty, all zero, holds a negative, NaN or
            infinite value; or `power` is negative or not finite.

    Source: Vose 1991; prefix sums in place of its loop as in arXiv 1903.00227.

    Example:
        >>> from dwl_kernels.candidates import UnigramSampler
        >>> sampler = UnigramSampler(torch.tensor([6, 0, 2]))
        >>> sampler.log_q(torch.arange(3)).exp()
        tensor([0.7500, 0.0000, 0.2500])
    """

    probability: Tensor
    alias: Tensor
    log_probability: Tensor

    def __init__(self, counts: Tensor, power: float = 1.0) -> None:
        counts = _checked_counts(counts)
        if not (math.isfinite(power) and power >= 0):
            raise ValueError(f"power is {power}, wanted a finite number of at least 0")
        super().__init__(counts.numel())
        # Relative to the largest count no power overflows. 0 ** 0 is 1 in PyTorch, hence `where`.
        relative = counts / counts.max()
        weights = torch.where(counts > 0, relative**power, 0.0)
        probability, alias = _alias_table(weights)
        log_weights = torch.where(counts > 0, power * relative.log(), -math.inf)
        self.register_buffer("probability", probability)  # [V] of keeping a cell's own id
        self.register_buffer("alias", alias)  # [V] the cell's other id
        self.register_buffer("log_probability", (log_weights - weights.sum().log()).float())  # [V]
        self.device_marker = self.device_marker.to(counts.device)

    def _draw(
        self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
    ) -> Tensor:
        cell = _uniform_ids(self.num_items, shape, device, generator)
        coin = torch.rand(shape, dtype=torch.float64, device=device, generator=generator)
        return torch.where(coin < self.probability[cell], cell, self.alias[cell].long())

    def _log_probability(self, ids: Tensor) -> Tensor:
        return self.log_probability[ids]


class StreamingFrequency(_Tables):
    """Estimates how often an id occurs from the gaps between the batches that hold it.

    For every hash function, array A holds the step at which a bucket was last seen and array B
    the average gap. A batch seen at step t moves the buckets of its ids, each of them once:

        B <- (1 - rate) B + rate (t - A),    A <- t,    P(id in a batch) = 1 / max over hashes of B

    Ids that share a bucket shorten its gap, hence the largest of the B (algorithm 3).

    `1 / B` is the probability that a batch holds the id, not that of one draw. While the batches
    are small, `P = batch_size Q`, and the constant cancels in the standard correction if all the
    log-Q come from here. Where it does not cancel (the refined correction, or sampled candidates
    beside the in-batch ones), give `batch_size`: log-Q is then that of one draw,

        Q = 1 - (1 - P)^(1 / batch_size),    P at most 1 / (1 + learning_rate)

    An id that is in nearly every batch has no gaps to measure, so its Q is underestimated there;
    `CountMinSketch` counts duplicates and has no such limit.

    Args:
        num_buckets: length of A and B, several times the number of distinct ids.
        num_hashes: 1 is algorithm 2, more are algorithm 3.
        learning_rate: rate of the moving average, in (0, 1]; smaller is smoother and slower.
        initial_gap: B of every bucket at the start, at least 1, in batches: the algorithm to the
            letter. If None, the first `1 / learning_rate` gaps of a bucket are averaged evenly, so
            a rare id is not held at a guess: `1 / B` starts as its share of the batches so far.
        batch_size: ids in a batch, to get log-Q of one draw; if None, that of a batch.
        seed: chooses the hash functions.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.

    Source: Yi et al. 2019, "Sampling-bias-corrected neural modeling for large corpus item
    recommendations", algorithms 2 and 3.

    Example:
        >>> from dwl_kernels.candidates import StreamingFrequency
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
    ) -> None:
        super().__init__()
        self.num_buckets = _positive_int("num_buckets", num_buckets)
        size = self.num_buckets * _positive_int("num_hashes", num_hashes)
        if not 0 < learning_rate <= 1:
            raise ValueError(f"learning_rate is {learning_rate}, wanted a number in (0, 1]")
        if initial_gap is not None and not (math.isfinite(initial_gap) and initial_gap >= 1):
            raise ValueError(f"initial_gap is {initial_gap}, wanted None or at least 1 batch")
        self.learning_rate = learning_rate
        self.initial_gap = initial_gap
        self.batch_size = None if batch_size is None else _positive_int("batch_size", batch_size)
        # The rows of all H hashes lie end to end: one flat index reads and writes them at once.
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))  # t, batches so far
        self.register_buffer("last_step", torch.zeros(size, dtype=torch.int64))  # A, 0 = never
        gap = torch.full((size,), initial_gap or 1, dtype=torch.float32)
        self.register_buffer("gap", gap)  # B, in batches
        self.register_buffer("sightings", torch.zeros(size, dtype=torch.int32))
        self.register_buffer("seeds", _hash_seeds(num_hashes, seed))

    @torch.no_grad()
    def update(self, ids: Tensor) -> None:
        """Take one step with the ids of a batch; an id that occurs twice counts once.

        Args:
            ids: the ids of one batch, any int64 values, any shape.

        Raises:
            TypeError, ValueError: `ids` is no integer tensor, or on another device.
        """
        bucket = self._buckets(ids).flatten()  # [H n]
        self.step += 1
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
        """Log-probability of each id in a batch, or in one draw if `batch_size` was given.

        Args:
            ids: any int64 values, any shape.

        Returns:
            float32 of the shape of `ids`, finite. An id never seen in t batches has a gap of
            `t + 1` batches, or of `initial_gap` if that is more.

        Raises:
            TypeError, ValueError: `ids` is no integer tensor, or on another device.
        """
        bucket = self._buckets(ids)  # [H, ...]
        gap = self.gap[bucket]
        never = self.last_step[bucket] == 0
        gap = torch.where(never, gap.clamp(min=self.step + 1), gap).amax(0)
        if self.batch_size is None:
            return -gap.log()
        # Q = 1 - (1 - P)^(1 / n) through expm1 and log1p: P and Q are tiny for most ids.
        share = gap.double().clamp(min=1 + self.learning_rate).reciprocal()
        return (-torch.expm1(torch.log1p(-share) / self.batch_size)).log().float()

    def extra_repr(self) -> str:
        return (
            f"num_buckets={self.num_buckets}, num_hashes={self.seeds.numel()}, "
            f"learning_rate={self.learning_rate}, initial_gap={self.initial_gap}, "
            f"batch_size={self.batch_size}"
        )

    def _buckets(self, ids: Tensor) -> Tensor:  # [...] -> [H, ...]
        return _flat_buckets(_int64_ids(ids, self.seeds.device), self.seeds, self.num_buckets)


class CountMinSketch(_Tables):
    """Counts the ids of a stream in bounded memory.

    Every id adds one to a counter in each of `depth` rows, and its count is read from the smallest
    of them. Other ids only ever add to these counters, so a count is never too low. It is too high
    by more than `e / width` of all ids seen with probability at most `exp(-depth)`.

    Args:
        width: counters per row.
        depth: rows, each with a hash function of its own.
        seed: chooses the hash functions.

    Raises:
        TypeError, ValueError: `width` or `depth` is no positive integer, or `seed` no integer.

    Source: Cormode and Muthukrishnan 2005, "An improved data stream summary: the count-min sketch
    and its applications".

    Example:
        >>> from dwl_kernels.candidates import CountMinSketch
        >>> sketch = CountMinSketch(width=1024)
        >>> sketch.update(torch.tensor([3, -8, 3, 3]))
        >>> sketch.count(torch.tensor([3, -8, 5]))
        tensor([3, 1, 0])
    """

    counts: Tensor
    total: Tensor
    seeds: Tensor

    def __init__(self, width: int, depth: int = 4, *, seed: int = 0) -> None:
        super().__init__()
        self.width = _positive_int("width", width)
        size = self.width * _positive_int("depth", depth)
        self.register_buffer("counts", torch.zeros(size, dtype=torch.int64))  # rows end to end
        self.register_buffer("total", torch.zeros((), dtype=torch.int64))  # ids seen
        self.register_buffer("seeds", _hash_seeds(depth, seed))

    @torch.no_grad()
    def update(self, ids: Tensor) -> None:
        """Count ids, duplicates included.

        Args:
            ids: any int64 values, any shape.

        Raises:
            TypeError, ValueError: `ids` is no integer tensor, or on another device.
        """
        bucket = self._buckets(ids).flatten()  # [depth n]
        self.counts.index_add_(0, bucket, torch.ones_like(bucket))
        self.total += ids.numel()

    def count(self, ids: Tensor) -> Tensor:
        """Estimated occurrences of each id, int64 of the shape of `ids`, never too low.

        Args:
            ids: any int64 values, any shape.

        Raises:
            TypeError, ValueError: `ids` is no integer tensor, or on another device.
        """
        return self.counts[self._buckets(ids)].amin(0)

    def log_q(self, ids: Tensor) -> Tensor:
        """Log-probability of one draw, `log(max(count, 1) / max(total, 1))`.

        Args:
            ids: any int64 values, any shape.

        Returns:
            float32 of the shape of `ids`, finite: an id never seen counts as seen once.

        Raises:
            TypeError, ValueError: `ids` is no integer tensor, or on another device.
        """
        count = self.count(ids).clamp(min=1).double()
        return (count.log() - self.total.clamp(min=1).double().log()).float()

    def extra_repr(self) -> str:
        return f"width={self.width}, depth={self.seeds.numel()}"

    def _buckets(self, ids: Tensor) -> Tensor:  # [...] -> [depth, ...]
        return _flat_buckets(_int64_ids(ids, self.seeds.device), self.seeds, self.width)


def _uniform_ids(
    num_items: int,
    shape: tuple[int, ...],
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    # torch.randint(num_items) takes the remainder of 32 random bits below 2^28 items: with 200
    # million items a third of the ids would come up 5% too often. 62 bits are enough.
    random = torch.randint(2**62, shape, device=device, generator=generator)
    return random.remainder_(num_items)


def _log_uniform_ids(uniform: Tensor, num_items: int) -> Tensor:  # float64 in [0, 1)
    """Invert `CDF(k) = log(k + 2) / log(num_items + 1)`."""
    target = uniform * math.log1p(num_items)
    ids = target.exp().floor_() - 1
    # At the border of the next id exp may fall just short of an integer; the logarithm decides.
    ids += (target >= torch.log1p(ids + 1)).double()
    return ids.clamp_(0, num_items - 1).long()


def _alias_table(weights: Tensor) -> tuple[Tensor, Tensor]:  # [V] float64, sum > 0
    """Fill V cells of mass one, each with one item's own mass and the rest from one other item.

    A sweep hands the light items (mass below one), in order, to the first heavy item that has
    surplus left. The one that this leaves with less than its own cell takes from the next heavy
    one. So a light item belongs to the heavy one whose range of cumulated surplus holds the light
    items' deficit so far, which a search in prefix sums finds for all items at once. The sums are
    fixed-point integers: exact, so deficits and surpluses match to the last unit.
    """
    num_items = weights.numel()
    unit = 2 ** min(52, 62 - num_items.bit_length())
    mass = weights * (num_items / weights.sum())
    fixed = (mass * unit).round_().long()
    missing, first = divmod(num_items * unit - int(fixed.sum()), num_items)
    fixed += missing
    fixed[:first] += 1

    light = (fixed < unit).nonzero().squeeze(1)
    heavy = (fixed >= unit).nonzero().squeeze(1)
    surplus = (fixed[heavy] - unit).cumsum(0)
    deficit = torch.zeros(light.numel() + 1, dtype=torch.int64, device=weights.device)
    torch.cumsum(unit - fixed[light], 0, out=deficit[1:])
    alias = torch.arange(
        num_items, dtype=torch.int32 if num_items < 2**31 else torch.int64, device=weights.device
    )
    heavy_id = heavy.to(alias.dtype)
    alias[light] = heavy_id[torch.searchsorted(surplus, deficit[:-1], right=True)]
    alias[heavy[:-1]] = heavy_id[1:]
    overdrawn = deficit[torch.searchsorted(deficit, surplus)] - surplus
    # Below half a cell the weight itself is kept: as an integer a tiny one would become zero. From
    # there on the integer is, or its rounding would pile up in a heavy item. So every item is drawn
    # with its probability to about one unit, relatively: 2^-37 at 2^24 items, 2^-52 below 2^10.
    probability = torch.where(fixed < unit // 2, mass, fixed.double() / unit)
    probability[heavy] = 1 - overdrawn.double() / unit
    return probability, alias


def _hash_seeds(rows: int, seed: int) -> Tensor:  # [rows]
    start = (operator.index(seed) + 2**63) % 2**64 - 2**63
    return _mix64(_mix64(torch.tensor(start)) + torch.arange(1, rows + 1))


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


def _int64_ids(ids: Tensor, device: torch.device) -> Tensor:
    if not isinstance(ids, Tensor) or ids.dtype not in _ID_DTYPES:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids is {got}, wanted an integer tensor such as torch.int64")
    if ids.device != device:
        raise ValueError(f"ids is on {ids.device}, wanted {device}; move one with .to(device)")
    return ids.long()


def _checked_counts(counts: Tensor) -> Tensor:  # [V] -> float64 [V]
    counts = torch.as_tensor(counts)
    if counts.dtype not in _ID_DTYPES and not counts.is_floating_point():
        raise TypeError(f"counts is {counts.dtype}, wanted an integer or floating tensor")
    if counts.dim() != 1 or counts.numel() == 0:
        raise ValueError(
            f"counts is {tuple(counts.shape)}, wanted [num_items] with an item or more"
        )
    counts = counts.detach().double()
    if not bool(((counts >= 0) & counts.isfinite()).all()):
        raise ValueError(
            "counts holds a negative, NaN or infinite value, wanted finite counts >= 0"
        )
    if not bool((counts > 0).any()):
        raise ValueError("counts is zero everywhere, wanted a positive count for some item")
    return counts


def _positive_int(name: str, value: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {type(value).__name__}, wanted an integer")
    if value <= 0:
        raise ValueError(f"{name} is {value}, wanted at least 1")
    return operator.index(value)


def _shape(n: int | Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(n) if isinstance(n, (tuple, list)) else (n,)
    for size in sizes:
        if isinstance(size, bool) or not hasattr(size, "__index__"):
            raise TypeError(f"n is {n!r}, wanted an integer or a tuple of integers")
        if size < 0:
            raise ValueError(f"n is {n!r}, wanted no negative size")
    return tuple(operator.index(size) for size in sizes)
