"""Samplers: where candidates come from and how likely each one was.

They draw ids with replacement, and their log-Q is the log of the probability of one draw. All of
them are modules that follow their model to its device. They follow from their arguments alone, so
a `state_dict` holds nothing of them. Drawing and looking up never wait for the device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dwl_kernels.core.arguments import (
    check_order,
    flag,
    ids_on,
    integer,
    number,
    real_numbers,
    wrong_type,
)
from dwl_kernels.core.buffers import Tables, difference, on_host
from dwl_kernels.core.values import checks_values, has_values

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Beyond this, float64 no longer tells the log-uniform borders of neighbouring ids apart, and the
# remainder of a 62-bit random number is no longer uniform to 2^-14.
_MAX_ITEMS = 2**48


class _Sampler(Tables):
    """Draws ids from a fixed distribution over ``[0, num_items)``."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        wanted = "an integer, the size of the catalogue (UnigramSampler takes counts)"
        self.num_items = integer("num_items", num_items, wanted, least=1)
        if self.num_items > _MAX_ITEMS:
            raise ValueError(f"num_items is {num_items}, at most 2**48 items can be told apart")

    def sample(
        self, n: int | Sequence[int], *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw ids with replacement, with the log-probability of one draw of each.

        Args:
            n: number of draws, or a shape such as ``(B, K)``, ``K`` for each of ``B`` rows.
            generator: source of randomness on the sampler's device; the global one if None.

        Returns:
            ``ids`` ``[n]`` int64 and ``log_q`` ``[n]`` float32, nats, or both of the shape that was
            asked for.

        Raises:
            TypeError: ``n`` is neither an integer nor a shape, or ``generator`` is none.
            ValueError: a negative size, or a generator of another device.
        """
        device = self.device_marker.device
        if generator is not None and not isinstance(generator, torch.Generator):
            raise wrong_type("generator", generator, "a torch.Generator")
        if generator is not None and generator.device.type != device.type:
            raise ValueError(
                f"generator is on {generator.device}, the sampler on {device}; "
                f"make it with torch.Generator({str(device)!r})"
            )
        ids = self._draw(_shape(n), device, generator)
        return ids, self._log_probability(ids)

    def generator(
        self,
        seed: int,
        *,
        process_group: ProcessGroup | None = None,
        same_on_all_ranks: bool = False,
    ) -> torch.Generator:
        """A source of randomness for :meth:`sample`, on the sampler's device.

        Args:
            seed: any integer, the same on all ranks.
            process_group: ranks that draw, each from a stream of its own.
            same_on_all_ranks: whether all ranks draw the same instead, as the losses take it with
                ``replicated_negatives=True``.

        Returns:
            A new generator; its ``get_state()`` goes into a checkpoint of its rank.

        Raises:
            TypeError: an argument of another type than named above.

        Example:
            >>> from dwl_kernels import UniformSampler
            >>> sampler = UniformSampler(1000)
            >>> generator = sampler.generator(seed=0)
            >>> ids, log_q = sampler.sample(8, generator=generator)
        """
        seed, same, rank = integer("seed", seed), flag("same_on_all_ranks", same_on_all_ranks), 0
        if process_group is not None:
            from dwl_kernels.distributed.group import group_of

            group = group_of(process_group)
            assert group is not None
            rank = 0 if same else group.rank + 1
        # Hashed, because generators of neighbouring seeds and ranks must have nothing in common.
        digest = hashlib.blake2b(f"{seed} {rank}".encode(), digest_size=8).digest()
        source = torch.Generator(self.device_marker.device)
        return source.manual_seed(int.from_bytes(digest, "little") >> 1)

    def log_q(self, ids: Tensor) -> Tensor:
        """Log-probability of one draw of each id.

        Args:
            ids: ``[...]`` integers in ``[0, num_items)``, any shape; a tensor, NumPy array or
                pandas column.

        Returns:
            ``[...]`` float32, nats; -inf for an id that is never drawn. An id out of range gives
            NaN on CUDA and in compiled code, where a check would wait for the device.

        Raises:
            TypeError: ``ids`` is no tensor or array of integers.
            ValueError: ``ids`` is on another device than the sampler.
            IndexError: an id is out of range, on CPU or with ``DWL_KERNELS_CHECK=1``.
        """
        ids = ids_on(self.device_marker.device, ids)
        inside = (ids >= 0) & (ids < self.num_items)
        if checks_values(ids) and not inside.all():
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
    """Draws every id with the same probability, ``Q = 1 / num_items``.

    Args:
        num_items: size of the catalogue, at most 2^48.

    Raises:
        TypeError, ValueError: ``num_items`` is no integer, or not in ``[1, 2^48]``.

    Example:
        >>> from dwl_kernels import UniformSampler
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

    ``Q_k = log((k + 2) / (k + 1)) / log(num_items + 1)``, so id 0 must be the most frequent item.
    The inverse of the cumulative distribution is taken in float64.

    Args:
        num_items: size of the catalogue, at most 2^48.

    Raises:
        TypeError, ValueError: ``num_items`` is no integer, or not in ``[1, 2^48]``.

    Example:
        >>> from dwl_kernels import LogUniformSampler
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

    ``Q_k = w_k counts_k^power / sum_j w_j counts_j^power``. An item with count or weight zero is
    never drawn and has log-Q -inf: power 0 is uniform over the items that were counted at all.

    Weights that draw items of sparse domains more often, :meth:`DomainWeights.example_weight`, let
    the loss learn more of them and tilt no score, because log-Q takes the weights back. On the test
    items of MovieLens 1M that added to the dial (:func:`choose_bonus`).

    The table takes 16 bytes per item: the probability in float64, the alias in int32 (int64 from
    2^31 items on), log-Q in float32. Float32 probabilities would do for most counts,
    but near-uniform ones send many surpluses below 2^-24 to one item, which would lose them all.

    Args:
        counts: ``[num_items]`` occurrences of each item, non-negative, integer or floating, such as
            ``numpy.bincount(items, minlength=num_items)``; a tensor, array, or list.
        power: exponent of the counts, at least 0; word2vec takes 0.75.
        weights: ``[num_items]``, ``w``, such as ``domain_weights.example_weight(item_domains)``.

    Raises:
        TypeError: ``counts`` is neither integer nor floating, or ``power`` is no number.
        ValueError: ``counts`` is not one-dimensional, is empty, all zero, holds a negative, NaN or
            infinite value, or is a pandas Series whose index is not 0, 1, 2 and so on, such as
            ``value_counts()`` returns; ``power`` is negative or not finite; or ``weights`` are not
            what counts have to be, are of another length, or leave no item.

    Source: Vose 1991; prefix sums in place of its loop as in arXiv 1903.00227. The use of weights
    is this package's.

    Example:
        >>> from dwl_kernels import UnigramSampler
        >>> sampler = UnigramSampler(torch.tensor([6, 0, 2]))
        >>> sampler.log_q(torch.arange(3)).exp()
        tensor([0.7500, 0.0000, 0.2500])
        >>> sampler = UnigramSampler(torch.tensor([6, 0, 2]), weights=torch.tensor([1.0, 1.0, 3.0]))
        >>> sampler.log_q(torch.arange(3)).exp()
        tensor([0.5000, 0.0000, 0.5000])
    """

    probability: Tensor
    alias: Tensor
    log_probability: Tensor

    def __init__(
        self, counts: Tensor, power: float = 1.0, *, weights: Tensor | None = None
    ) -> None:
        with on_host():
            given, counts = counts, _checked_counts("counts", counts)
            weights = _checked_weights(weights, counts)
        power = number("power", power)
        if not (math.isfinite(power) and power >= 0):
            raise ValueError(f"power is {power}, wanted a finite number of at least 0")
        super().__init__(counts.numel())
        with on_host():
            if has_values(counts):
                tables = _tables(counts, power, weights)
            else:
                dtypes = torch.float64, torch.int32, torch.float32
                tables = tuple(counts.to(dtype) for dtype in dtypes)
        for name, table in zip(("probability", "alias", "log_probability"), tables, strict=True):
            self._register_constant(name, table)
        if isinstance(given, Tensor) and has_values(self.device_marker) and has_values(given):
            self.device_marker = self.device_marker.to(given.device)

    def _contradiction(self, saved: dict[str, Tensor]) -> str | None:
        text = difference("log_probability", saved, self.log_probability)
        return text and (
            f"{text}, since the checkpoint holds the tables of other counts; give the sampler "
            "those counts, or, to go on with these, delete probability, alias and log_probability "
            "from the checkpoint"
        )

    def _draw(
        self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
    ) -> Tensor:
        cell = _uniform_ids(self.num_items, shape, device, generator)
        coin = torch.rand(shape, dtype=torch.float64, device=device, generator=generator)
        return torch.where(coin < self.probability[cell], cell, self.alias[cell].long())

    def _log_probability(self, ids: Tensor) -> Tensor:
        return self.log_probability[ids]


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


def _tables(
    counts: Tensor,  # [V] float64
    power: float,
    factors: Tensor | None,  # [V] float64, at most 1
) -> tuple[Tensor, ...]:  # each [V]
    """The probability of keeping a cell's own id, the cell's other id, and log-Q."""
    # Relative to the largest count no power overflows. 0 ** 0 is 1 in PyTorch, hence `where`.
    relative = counts / counts.max()
    weights = torch.where(counts > 0, relative**power, 0.0)
    log_weights = torch.where(counts > 0, power * relative.log(), -math.inf)
    if factors is not None:
        weights, log_weights = weights * factors, log_weights + factors.log()
    return *_alias_table(weights), (log_weights - weights.sum().log()).float()


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


def _checked_weights(weights: Any, counts: Tensor) -> Tensor | None:  # [V] -> float64 [V]
    """Relative to the largest, so that nothing overflows."""
    if weights is None:
        return None
    weights = _checked_counts("weights", weights).to(counts.device)
    if weights.shape != counts.shape:
        raise ValueError(f"weights is {tuple(weights.shape)}, wanted {tuple(counts.shape)}")
    if has_values(weights) and has_values(counts) and not bool((weights * counts > 0).any()):
        raise ValueError("weights is zero for every item that was counted")
    return weights / weights.max()


def _checked_counts(name: str, counts: Any) -> Tensor:  # [V] -> float64 [V]
    check_order(name, counts, "item", "numpy.bincount(items, minlength=num_items)")
    counts = real_numbers(name, counts)
    if counts.dim() != 1 or counts.numel() == 0:
        raise ValueError(f"{name} is {(*counts.shape,)}, wanted [num_items] with an item or more")
    counts = counts.detach().double()
    if not has_values(counts):
        return counts
    if not bool(((counts >= 0) & counts.isfinite()).all()):
        raise ValueError(f"{name} holds a negative, NaN or infinite value, wanted finite ones >= 0")
    if not bool((counts > 0).any()):
        raise ValueError(f"{name} is zero everywhere, wanted a positive one for some item")
    return counts


def _shape(n: int | Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(n) if isinstance(n, (tuple, list)) else (n,)
    try:
        shape = tuple(integer("n", size) for size in sizes)
    except TypeError:
        raise TypeError(f"n is {n!r}, wanted an integer or a tuple of integers") from None
    if any(size < 0 for size in shape):
        raise ValueError(f"n is {n!r}, wanted no negative size")
    return shape
