"""The dial: how much the scores of sparse domains are raised when a trained model is served.

A model that is served with ``score + strength * weights.sparsest(item_domains)`` shows more of the
sparse domains the larger the strength, and less the smaller, with no training at all. Too much
costs everybody. The strength is chosen on validation items: the one that lifts the sparse domains
most at a price over all items that one is ready to pay.

The bonus may be any number per item. 1 for the items that are to be raised and 0 for the others
buys more for the same price than `DomainWeights.log_weight`, which is the tilt that weighted
training gives: that also pays for domains in the middle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwl_kernels.core.arguments import (
    check_dense,
    flags_of,
    integer,
    integers,
    number,
    several_numbers,
)
from dwl_kernels.core.values import ids_outside

STRENGTHS = (-1.0, -0.5, 0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


_MANY = "several numbers"


class Dial(NamedTuple):
    """What every strength does on the validation items, and the one that was chosen.

    Changes are relative to strength 0: 0.1 is 10% more NDCG.
    """

    strength: float  # the one chosen
    price: float  # what NDCG over all may lose, relative
    strengths: tuple[float, ...]  # rising, 0 among them
    overall: tuple[float, ...]  # change of NDCG@k over all targets
    sparse: tuple[float, ...]  # change of NDCG@k over the targets of sparse domains
    k: int

    @property
    def gain(self) -> float:
        """What the sparse domains gain at the chosen strength."""
        return self.sparse[self.strengths.index(self.strength)]

    def plot(self, path: str | PathLike[str], **options: Any) -> None:
        """Draw both changes over the strength, with the one chosen. Needs matplotlib.

        Args:
            path: where the picture goes; its ending says in what format.
            options: for ``savefig`` of matplotlib.
        """
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
        from matplotlib.ticker import PercentFormatter

        ink, muted, blue, orange = "#222222", "#9aa0a6", "#1f6fb4", "#c8661c"
        with plt.rc_context({"font.size": 9, "text.color": ink, "axes.edgecolor": muted}):
            figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
            axes.axhline(0, color=muted, linewidth=0.8)
            axes.axhline(-self.price, color=muted, linewidth=0.8, linestyle=":")
            axes.axvline(self.strength, color=ink, linewidth=0.8)
            axes.plot(self.strengths, self.sparse, "o-", color=orange, label="sparse domains")
            axes.plot(self.strengths, self.overall, "o-", color=blue, label="all items")
            axes.set_title(
                f"chosen at a price of {self.price:.0%}: {self.strength:g}, which gives sparse "
                f"domains {self.gain:+.0%}",
                *({"fontsize": 10}, "left"),
            )
            axes.set_xlabel("strength of the bonus, 0 = as trained")
            axes.set_ylabel(f"change of NDCG@{self.k}")
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.tick_params(length=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, loc="lower right")
            figure.savefig(path, **{"dpi": 150, **options})
            plt.close(figure)

    def __str__(self) -> str:
        """A table, the chosen strength marked."""
        lines = [f"strength  sparse domains  all items   (NDCG@{self.k})"]
        for strength, sparse, overall in zip(
            self.strengths, self.sparse, self.overall, strict=True
        ):
            mark = " <- chosen" if strength == self.strength else ""
            lines.append(f"{strength:8g}  {sparse:+14.1%}  {overall:+9.1%}{mark}")
        return "\n".join(lines)


def _finite(name: str, strengths: Sequence[float]) -> tuple[float, ...]:
    if not all(map(math.isfinite, strengths)):
        raise ValueError(f"{name} are {list(strengths)}; wanted finite numbers")
    return tuple(strengths)


def choose_bonus(
    ranks: Mapping[float, Tensor],
    sparse: Any,
    *,
    price: float = 0.0,
    k: int = 10,
) -> Dial:
    r"""The strength of the bonus that lifts sparse domains most at a given price over all.

    .. math::
        s^* = \arg\max_s \mathrm{NDCG}_{sparse}(s) \quad \text{where} \quad
        \mathrm{NDCG}_{all}(s) \ge (1 - price) \, \mathrm{NDCG}_{all}(0)

    Args:
        ranks: for every strength of a grid, 0 among them, ``[E]`` integers: the rank of each
            validation target among the items that its user has not seen, 0 the best, as
            :func:`ranks_with_bonus` gives it, or for a large table
            ``rank_targets(..., bias=strength * sparse) - 1``.
        sparse: ``[E]`` flags, whether the target is of a sparse domain:
            ``weights.sparsest(item_domains)[targets]``.
        price: the part of NDCG over all targets that may be lost, in [0, 1); 0.03 is 3%.
        k: how many items are shown, at least 1.

    Returns:
        The chosen strength, and the changes at all of them: ``print`` shows a table, and
        ``.plot(path)`` draws them. Ranks of several seeds are joined by ``torch.cat``.

    Raises:
        TypeError: ranks or ``k`` are no integers, ``sparse`` no flags, ``price`` or a strength no
            number.
        ValueError: no strength 0, or one that is not finite, other numbers of targets, a rank below
            0, no target of a sparse domain, NDCG 0 at strength 0, or ``price`` or ``k`` out of
            range.

    Source: this package's.

    Example:
        >>> import torch
        >>> ranks = {0.0: torch.tensor([0, 0, 9, 9]), 1.0: torch.tensor([0, 0, 9, 2])}
        >>> choose_bonus(ranks, torch.tensor([False, False, True, True])).strength
        1.0
    """
    price = number("price", price, "a number in [0, 1)")
    if not 0 <= price < 1:
        raise ValueError(f"price is {price}; wanted a number in [0, 1)")
    k = integer("k", k, least=1)
    strengths = _finite("the strengths of ranks", sorted(several_numbers("ranks", [*ranks], _MANY)))
    if 0.0 not in strengths:
        raise ValueError(
            f"ranks has the strengths {list(strengths)}; wanted 0 among them, with which the "
            "others are compared"
        )
    of_sparse = flags_of("sparse", sparse)
    overall, inside = [], []
    for strength in strengths:
        rank = integers(f"ranks[{strength:g}]", ranks[strength]).cpu()
        if rank.shape != of_sparse.shape or rank.dim() != 1:
            raise ValueError(
                f"ranks[{strength:g}] has shape {list(rank.shape)} and sparse has "
                f"{list(of_sparse.shape)}; wanted an entry per target in both"
            )
        if rank.numel() and int(rank.min()) < 0:
            raise ValueError(
                f"ranks[{strength:g}] holds {int(rank.min())}; wanted ranks from 0 on, the best"
            )
        gained = torch.where(rank < k, 1 / torch.log2(rank.double() + 2), 0.0)
        overall.append(float(gained.mean()))
        inside.append(float(gained[of_sparse.cpu()].mean()))
    at = strengths.index(0.0)
    if not of_sparse.any():
        raise ValueError("sparse marks no target; wanted validation targets of sparse domains")
    if not overall[at] > 0 or not inside[at] > 0:
        raise ValueError(
            f"no target {'' if not overall[at] > 0 else 'of a sparse domain '}is among the first "
            f"{k} at strength 0, so there is nothing to compare with; pass more targets, or a "
            "larger k"
        )
    changes = tuple(one / overall[at] - 1 for one in overall)
    gains = tuple(one / inside[at] - 1 for one in inside)
    allowed = [n for n, change in enumerate(changes) if change >= -price or n == at]
    best = max(allowed, key=lambda n: (gains[n], -abs(strengths[n])))
    return Dial(strengths[best], price, strengths, changes, gains, k)


def ranks_with_bonus(
    scores: Tensor,
    targets: Tensor,
    bonus: Tensor,
    *,
    strengths: Sequence[float] = STRENGTHS,
    seen: Tensor | None = None,
) -> dict[float, Tensor]:
    """The rank of every target under ``scores + strength * bonus``, for every strength.

    Args:
        scores: ``[E, V]``, what the model gives every item for every validation user.
        targets: ``[E]`` integers, the item that each user took.
        bonus: ``[V]`` numbers or bools: ``weights.sparsest(item_domains)``, or for one domain
            ``item_domains == d``.
        strengths: the grid, 0 among them for :func:`choose_bonus`.
        seen: ``[E, V]`` bools, items that are not shown to a user; the target is.

    Returns:
        For every strength ``[E]`` int64 ranks, 0 the best. Items with the score of the target come
        before it. Large catalogues go in parts, a batch of users at a time.

    Raises:
        TypeError: an argument is no dense tensor, ``targets`` are no integers, ``strengths`` no
            numbers, ``bonus`` no real ones, or ``seen`` no flags.
        ValueError: shapes do not fit, or a strength is not finite.
        IndexError: a target is not in ``[0, V)``.

    Example:
        >>> import torch
        >>> scores, bonus = torch.tensor([[0.3, 0.1, 0.2]]), torch.tensor([0.0, 1.0, 0.0])
        >>> ranks_with_bonus(scores, torch.tensor([1]), bonus, strengths=(0.0, 1.0))
        {0.0: tensor([2]), 1.0: tensor([0])}
    """
    check_dense("scores", scores)
    check_dense("bonus", bonus)
    targets = integers("targets", targets, scores.device).long()
    if scores.dim() != 2 or bonus.shape != scores.shape[1:] or targets.shape != scores.shape[:1]:
        raise ValueError(
            f"scores has shape {list(scores.shape)}, targets {list(targets.shape)} and bonus "
            f"{list(bonus.shape)}; wanted [E, V], [E] and [V]"
        )
    if bonus.is_complex():
        raise TypeError(f"bonus has dtype {bonus.dtype}; wanted real numbers or bools")
    ids_outside("targets", targets, scores.shape[1])
    if seen is not None:
        check_dense("seen", seen)
        seen = flags_of("seen", seen)
        if seen.shape != scores.shape:
            raise ValueError(
                f"seen has shape {list(seen.shape)}; wanted {list(scores.shape)} as scores"
            )
    found = {}
    for strength in _finite("strengths", several_numbers("strengths", strengths, _MANY)):
        served = scores + strength * bonus if strength else scores
        own = served.gather(1, targets[:, None])
        ahead = ~(served < own)
        if seen is not None:
            ahead &= ~seen
        ahead.scatter_(1, targets[:, None], False)
        found[strength] = ahead.sum(1)
    return found
