"""Domain weights: how sparse each domain is, measured, and what its examples should weigh.

Stage one measures the sparsity ``s_d`` of every domain, stage two turns it into a weight and moves
a bounded average towards it (after arXiv 2510.04375; the form of the measures is this package's).
With ``N`` interactions of ``U`` users with ``I`` items, of which ``n_d``, by ``u_d`` users and with
item entropy ``H_d``, belong to domain ``d``:

    idf_d = log(N / n_d) / max_e log(N / n_e)
    users_d = 1 - u_d / U
    entropy_d = 1 - H_d / log I
    s_d = (alpha idf_d + beta users_d + gamma entropy_d) / (alpha + beta + gamma)     in [0, 1]
    w*_d = w_min + (w_max - w_min) s_d
    average <- m^(n/1024) average + (1 - m^(n/1024)) w*     for n rows      in [w_min, w_max]
    weights = average / (mean of `average` over all interactions seen)      in (0, w_max / w_min]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from dwl_kernels.core.arguments import (
    check_order,
    flags_of,
    integer,
    integers,
    number,
    real_numbers,
    several_numbers,
    wrong_type,
)
from dwl_kernels.core.batching import refuse_to_count
from dwl_kernels.core.buffers import Tables, difference, on_host
from dwl_kernels.core.rows import mean_domain_weight
from dwl_kernels.core.values import check_distinct, checks_values, has_values

# An interaction with an item of G domains counts 1/G for each of them. Kept as integers in units
# that every G up to 16 divides: exact, the same in every run on a GPU, and safe from `.half()`.
_WHOLE = 720_720
_LONGEST_TABLE = 40  # rows; longer tables leave out their middle
MOMENTUM_ROWS = 1024  # rows after which `momentum` of the old average is left


class DomainWeights(Tables):
    r"""The weight of every domain, from the sparsity that is measured in the data.

    The loss modules hold one and call it; by hand it is::

        weights = DomainWeights.from_interactions(users, items, domains)  # [M], [M], [M] or [M, G]
        weights.update(domain_ids)                    # counts a batch, [B] or [B, G]
        weights()                                     # [num_domains], for the loss
        scores + weights.log_weight(item_domains)     # [..., V] and [V], when serving

    All domains start at weight 1. :meth:`from_interactions` measures all three parts of the
    sparsity at once; :meth:`update` streams domain ids during training and refreshes the counts
    and with them ``idf`` alone (users and entropy stay as measured offline, and have no say where
    they never were). The state lives in buffers, so ``state_dict`` carries it: float buffers stay
    float32 under ``.half()``, counts are int64. Constant weights follow from their argument and are
    not in it. A checkpoint of another ``weight_range``, of other ``measures`` or of the other kind
    of weights raises.

    An average of models must not hold an average of counts, rounded down at every update.
    ``AveragedModel(model)`` copies them. With ``use_buffers=True`` it averages them and cannot be
    told otherwise, so copy the state after every update::

        averaged.update_parameters(model)
        averaged.module.loss_fn.domain_weights.load_state_dict(
            model.loss_fn.domain_weights.state_dict()
        )

    ``average`` is the moving average, exactly within ``weight_range``. ``weights`` is ``average``
    divided by its mean over all interactions seen, so that the average example weighs 1 and the
    learning rate keeps its meaning. Only the ratio ``w_max / w_min`` of the range therefore
    matters: no example, and no gradient, is scaled by more than ``w_max / mean(average)``.

    .. math::
        s_d = \frac{\alpha \, idf_d + \beta \, users_d + \gamma \, entropy_d}
            {\alpha + \beta + \gamma}, \qquad
        w^*_d = w_{min} + (w_{max} - w_{min}) s_d

        idf_d = \frac{\log(N / n_d)}{\max_e \log(N / n_e)}, \qquad
        users_d = 1 - u_d / U, \qquad entropy_d = 1 - H_d / \log I

    of ``N`` interactions of ``U`` users with ``I`` items, of which ``n_d``, by ``u_d`` users and
    with item entropy ``H_d``, belong to domain ``d``. The form is this package's own.

    Args:
        num_domains: Number of domains; ids are in ``[0, num_domains)``, -1 means none.
        names: Names for the printed table, one per domain.
        measures: ``(alpha, beta, gamma)``, the say of idf, users and entropy in the sparsity.
        weight_range: ``(w_min, w_max)`` with ``0 < w_min <= w_max``, for the densest and the
            sparsest domain there could be. A domain never seen gets ``w_max``.
        momentum: ``m`` in [0, 1), the share of the old average that survives 1,024 counted rows;
            ``n`` rows leave ``m ** (n / 1024)`` of it, in one update or in many. With 0 the weights
            follow the counts at once.
        start, full: Steps, of which every :meth:`update` (a forward in training mode) is one. Up to
            ``start`` all domains weigh 1, from ``full`` on what is measured, and between them the
            weights go from one to the other in equal steps; ``full`` is ``start`` by default.
            ``(0, 0)`` weighs from the beginning, ``(0, n)`` ramps up, ``(n, n)`` is deferred: what
            is sparse is learned from all data first.

    Raises:
        TypeError: if a size is no integer, a number none, or ``names`` no list.
        ValueError: if a size is not positive, a range is reversed or holds a number that is not
            finite and positive, ``names`` has the wrong length, or ``full`` comes before ``start``.

    Source: Mittal et al. 2025, arXiv 2510.04375; deferred weights: Cao et al. 2019, arXiv
    1906.07413.

    Example:
        >>> weights = DomainWeights(3, names=["drama", "comedy", "noir"], momentum=0.0)
        >>> weights.update(torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, -1]))
        >>> weights()
        tensor([0.8314, 1.0039, 1.6628])
        >>> weights.example_weight(torch.tensor([[0, 2], [1, -1], [-1, -1]]))
        tensor([1.2471, 1.0039, 1.0000])
    """

    weights: Tensor  # [num_domains] float32, what goes to the loss
    average: Tensor  # [num_domains] float32, moving average before normalisation
    interactions: Tensor  # [num_domains] int64, n_d
    shares: Tensor  # [num_domains] int64, interactions split over their domains, in 1/_WHOLE
    users: Tensor  # [num_domains] int64, u_d
    entropy: Tensor  # [num_domains] float32, H_d in nats
    num_users: Tensor  # [] int64, U; 0 while users and entropy are not measured
    num_items: Tensor  # [] int64, I
    steps: Tensor  # [] int64, updates so far
    arguments: Tensor  # [5] float32, what the average depends on; for checkpoints to be compared

    def __init__(
        self,
        num_domains: int,
        *,
        names: Sequence[str] | None = None,
        measures: tuple[float, float, float] = (1.0, 1.0, 1.0),
        weight_range: tuple[float, float] = (1.0, 4.0),
        momentum: float = 0.99,
        start: int = 0,
        full: int | None = None,
    ) -> None:
        super().__init__()
        num_domains = integer("num_domains", num_domains, least=1)
        wanted = (
            "three finite numbers (idf, users, entropy), none negative and at least one positive"
        )
        parts = several_numbers("measures", measures, wanted)
        if len(parts) != 3 or not all(0 <= m < float("inf") for m in parts) or not any(parts):
            raise ValueError(f"measures is {measures}; wanted {wanted}")
        wanted = "finite (w_min, w_max) with 0 < w_min <= w_max"
        bounds = several_numbers("weight_range", weight_range, wanted)
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] < float("inf"):
            raise ValueError(f"weight_range is {weight_range}; wanted {wanted}")
        momentum = number("momentum", momentum)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; wanted a number in [0, 1)")
        start = integer("start", start, least=0)
        full = start if full is None else integer("full", full)
        if full < start:
            raise ValueError(f"full is {full}; wanted at least start, which is {start}")
        self.num_domains = num_domains
        self.names = None if names is None else _names(names, num_domains)
        self.measures = parts
        self.weight_range = bounds
        self.momentum = momentum
        self.start = start
        self.full = full
        self.fixed = False
        with on_host():
            # Nothing seen yet: every domain is as sparse as can be, and all weigh the same.
            self.register_buffer("weights", torch.ones(num_domains, dtype=torch.float32))
            average = torch.full((num_domains,), bounds[1], dtype=torch.float32)
            self.register_buffer("average", average)
            for name in ("interactions", "shares", "users"):
                self.register_buffer(name, torch.zeros(num_domains, dtype=torch.int64))
            self.register_buffer("entropy", torch.zeros(num_domains, dtype=torch.float32))
            for name in ("num_users", "num_items", "steps"):
                self.register_buffer(name, torch.zeros((), dtype=torch.int64))
            self.register_buffer("arguments", self._arguments())
        self._settle()

    @classmethod
    def from_interactions(
        cls,
        users: Any,
        items: Any,
        domains: Any,
        *,
        num_domains: int | None = None,
        names: Sequence[str] | None = None,
        measures: tuple[float, float, float] = (1.0, 1.0, 1.0),
        weight_range: tuple[float, float] = (1.0, 4.0),
        momentum: float = 0.99,
        start: int = 0,
        full: int | None = None,
    ) -> DomainWeights:
        """Measure interactions, users and item entropy of every domain, and set the weights.

        Interactions without any domain are left out. The weights are set to what was measured;
        the moving average starts from there.

        Args:
            users: ``[M]`` integers, a tensor, NumPy array, pandas column or list, of which an
                index is not looked at; any ids, they need not be dense.
            items: ``[M]`` integers, likewise.
            domains: ``[M]`` or ``[M, G]`` integers, the domains of each interaction's item, each
                named once per row, -1 = no domain in that slot. :func:`domains_from_multi_hot`
                makes them of flags.
            num_domains: Number of domains; by default ``len(names)``, else the largest id plus 1.
            names, measures, weight_range, momentum, start, full: As for the class.

        Returns:
            The weights, ``[num_domains]`` when called, on the device of the first tensor given.

        Raises:
            TypeError: if ids are not integers.
            ValueError: if lengths differ, or if a row names a domain twice, as flags do.
            IndexError: if a domain id is outside ``[-1, num_domains)``.

        Example:
            >>> weights = DomainWeights.from_interactions(
            ...     users=[1, 1, 2, 3], items=[10, 11, 10, 12], domains=[0, 0, 0, 1]
            ... )
            >>> weights.users.tolist(), weights.entropy.tolist()
            ([2, 1], [0.6365141868591309, 0.0])
        """
        given = {"users": users, "items": items, "domains": domains}
        device = next((v.device for v in given.values() if isinstance(v, Tensor)), None)
        options: dict[str, Any] = {"measures": measures, "weight_range": weight_range}
        options |= {"momentum": momentum, "start": start, "full": full}
        with on_host():
            measured = cls._measured(given, device, num_domains, names, options)
        if device is None or not has_values(torch.empty(0)):
            measured._settle()
        return measured

    @classmethod
    def _measured(
        cls,
        given: dict[str, Any],
        device: torch.device | None,
        num_domains: int | None,
        names: Sequence[str] | None,
        options: dict[str, Any],
    ) -> DomainWeights:
        columns = {name: integers(name, value, device, lists=True) for name, value in given.items()}
        slots = _slots("domains", columns.pop("domains"))  # [M, G]
        check_distinct("domains", slots)
        for name, value in columns.items():
            if value.shape != slots.shape[:1]:
                raise ValueError(
                    f"{name} has shape {list(value.shape)}; wanted [{slots.shape[0]}], one per "
                    "row of domains"
                )
            if value.device != slots.device:
                raise ValueError(f"{name} is on {value.device} but domains is on {slots.device}")
        names = None if names is None else _names(names, num_domains)
        if num_domains is None:
            largest = int(slots.max()) if slots.numel() else -1
            num_domains = max(largest + 1, 1) if names is None else len(names)
        measured = cls(num_domains, names=names, **options).to(slots.device)
        check_range("domains", slots, num_domains, "domains", always=True)
        labelled = (slots >= 0).any(1)
        slots = slots[labelled]
        measured._count(slots, slots >= 0)

        row, slot = (slots >= 0).nonzero(as_tuple=True)
        domain = slots[row, slot]  # [P], one entry per pair of interaction and domain
        num_users, user_of = _dense(columns["users"][labelled])
        num_items, item_of = _dense(columns["items"][labelled])
        measured.num_users.fill_(num_users)
        measured.num_items.fill_(num_items)
        pairs = torch.unique(domain * num_users + user_of[row])
        if num_users:
            measured.users.copy_(torch.bincount(pairs // num_users, minlength=num_domains))
        if num_items:
            pairs, times = torch.unique(domain * num_items + item_of[row], return_counts=True)
            # H_d = log n_d - sum_items c log c / n_d, for item counts c
            surprise = torch.bincount(
                pairs // num_items, weights=times.double() * times.log(), minlength=num_domains
            )
            n = measured.interactions.clamp(min=1).double()
            measured.entropy.copy_((n.log() - surprise / n).clamp(min=0))
        measured._move(1.0)
        return measured

    @classmethod
    def constant(
        cls,
        weights: Tensor | Sequence[float],
        *,
        names: Sequence[str] | None = None,
        start: int = 0,
        full: int | None = None,
    ) -> DomainWeights:
        """Weights that are given and not measured; :meth:`update` then only counts.

        Args:
            weights: ``[num_domains]`` numbers, finite and not negative, used as they are.
            names: Names for the printed table, one per domain.
            start, full: As for the class.

        Returns:
            The weights, ``[num_domains]`` when called.

        Raises:
            TypeError: if they are no numbers.
            ValueError: if a weight is negative or not finite, if they require a gradient, or if
                they are a pandas Series whose index is not that of the domains.

        Source: the loss weights of PinnerFormer, arXiv 2205.04507.

        Example:
            >>> DomainWeights.constant([1.0, 2.0])()
            tensor([1., 2.])
        """
        if isinstance(weights, Tensor) and weights.requires_grad:
            raise ValueError(
                "weights requires a gradient, but constant weights are not trained: detach it, or "
                "pass it as domain_weights to sampled_softmax_loss"
            )
        check_order("weights", weights, "domain", "weights.reindex(range(num_domains))")
        with on_host():
            values = real_numbers("weights", weights).to(torch.float32)
        if values.dim() != 1 or not len(values):
            raise ValueError(
                f"weights has shape {list(values.shape)}; wanted [num_domains] with at least one "
                "domain"
            )
        if has_values(values):
            with on_host():
                wrong = not bool((values.isfinite() & (values >= 0)).all())
            if wrong:
                raise ValueError(
                    f"weights is {values.tolist()}; wanted finite numbers that are not negative"
                )
        built = cls(values.shape[0], names=names, start=start, full=full)
        if isinstance(weights, Tensor) and has_values(values) and has_values(built.weights):
            built.to(values.device)
        built.fixed = True
        del built.weights, built.average, built.arguments
        with on_host():
            for name in ("weights", "average"):
                built._register_constant(name, values.clone())
        return built

    @torch.no_grad()
    def update(self, domain_ids: Tensor) -> None:
        """Count the domains of a batch and move the weights; no wait for the device.

        Args:
            domain_ids: ``[B]`` or ``[B, G]`` integers, a tensor, NumPy array or pandas column, each
                domain named once per row, -1 = none. A row of -1 alone, such as padding, does not
                count.

        Raises:
            TypeError: if ids are not integers.
            ValueError: if the shape or the device does not fit, or on a CPU, if a row names a
                domain twice.
            IndexError: if an id is outside ``[-1, num_domains)``, on a CPU. On other devices, and
                under ``torch.compile``, such an id is not counted, unless ``DWL_KERNELS_CHECK=1``.
            RuntimeError: if ``torch.func.vmap`` made a batch of the ids, but not of the weights.
        """
        ids = self._checked_ids(domain_ids)  # [B, G]
        mend = "call loss_fn.eval() and, outside of vmap, loss_fn.domain_weights.update(ids)"
        refuse_to_count(ids, self.interactions, mend)
        if checks_values(ids):
            check_distinct("domain_ids", ids)
        rows = self._count(ids, (ids >= 0) & (ids < self.num_domains))
        self.steps.add_(1)
        if self.fixed:
            return
        if self.momentum:
            # 1 - m^(rows / 1024); a few rows change so little that float32 needs expm1 for it.
            self._move(-torch.expm1(rows.float() * (math.log(self.momentum) / MOMENTUM_ROWS)))
        else:
            self._move((rows > 0).float())

    def forward(self) -> Tensor:
        """The weights of this step.

        By the schedule they lie between 1 and ``weights``, which :meth:`example_weight` and
        :meth:`log_weight` take.

        Returns:
            ``[num_domains]`` float32, a copy: updates leave what a backward needs.
        """
        if self.full == 0:
            return self.weights.clone()
        share = (self.steps - self.start).float() / max(self.full - self.start, 1)
        return torch.lerp(torch.ones_like(self.weights), self.weights, share.clamp(0.0, 1.0))

    def sparsity(self) -> Tensor:
        """How sparse each domain is by what was measured.

        Returns:
            ``s_d``, ``[num_domains]`` float32 in [0, 1]; 1 for a domain never seen.
        """
        n = self.interactions
        total = torch.div(self.shares.sum(), _WHOLE, rounding_mode="floor")
        rarity = (total.float() / n.clamp(min=1).float()).log().clamp(min=0)
        rarity = torch.where(n > 0, rarity, 0.0)
        largest = rarity.max()
        # A domain that every interaction has is not sparse: 0, not 0/0.
        idf = torch.where(largest > 0, rarity / largest, 0.0)
        alpha, beta, gamma = self.measures
        users = 1 - self.users.float() / self.num_users.clamp(min=1).float()
        entropy = 1 - self.entropy / self.num_items.clamp(min=2).float().log()
        mixed = (alpha * idf + beta * users + gamma * entropy) / (alpha + beta + gamma)
        measured = torch.where(self.num_users > 0, mixed, idf)
        return torch.where(n > 0, measured, 1.0).clamp(0.0, 1.0)

    def example_weight(self, domain_ids: Tensor) -> Tensor:
        """Mean weight of each row's domains.

        Args:
            domain_ids: ``[B]`` or ``[B, G]`` integers, as for :meth:`update`.

        Returns:
            ``[B]`` float32; 1 for a row that has no domain.

        Raises:
            TypeError, ValueError: As for :meth:`update`.
            IndexError: if an id is outside ``[-1, num_domains)``, on a CPU. On other devices, and
                under ``torch.compile``, such a row gets NaN, unless ``DWL_KERNELS_CHECK=1``.
        """
        return mean_domain_weight(self._checked_ids(domain_ids), self.weights)

    def log_weight(self, domain_ids: Tensor) -> Tensor:
        """Log of :meth:`example_weight`: the tilt that weighted training gives an item's score.

        Add ``c * log_weight(item_domains)`` to the scores of a plain or calibrated model to favour
        sparse domains when serving, or subtract it to take the tilt of an uncalibrated one back.
        :func:`choose_bonus` finds a good ``c``.

        Args:
            domain_ids: ``[V]`` or ``[V, G]`` integers, the domains of every item, -1 = none.

        Returns:
            ``[V]`` float32, nats; 0 for an item that has no domain.

        Raises:
            TypeError, ValueError, IndexError: As for :meth:`example_weight`.

        Example:
            >>> weights = DomainWeights.constant([1.0, 2.0])
            >>> scores = torch.tensor([[0.3, 0.1]]) + weights.log_weight(torch.tensor([0, 1]))
            >>> scores
            tensor([[0.3000, 0.7931]])
        """
        return self.example_weight(domain_ids).log()

    def sparsest(self, domain_ids: Tensor, part: float = 0.25) -> Tensor:
        """Which items belong to one of the sparsest domains, by their counts.

        Args:
            domain_ids: ``[V]`` or ``[V, G]`` integers, the domains of every item, -1 = none.
            part: What part of the domains, in (0, 1], rounded up; a quarter by default.

        Returns:
            ``[V]`` bools.

        Raises:
            TypeError, ValueError, IndexError: As for :meth:`update`, or if ``part`` is no number in
                (0, 1].

        Example:
            >>> weights = DomainWeights(3)
            >>> weights.update(torch.tensor([0, 0, 0, 1, 1, 2]))
            >>> weights.sparsest(torch.tensor([[0, -1], [1, 2], [2, -1]]))
            tensor([False,  True,  True])
        """
        part = number("part", part, "a number in (0, 1]")
        if not 0 < part <= 1:
            raise ValueError(f"part is {part}; wanted a number in (0, 1]")
        by_count = self.interactions.argsort(descending=True, stable=True)
        sparse = torch.zeros(self.num_domains + 1, dtype=torch.bool, device=by_count.device)
        sparse[by_count[self.num_domains - math.ceil(part * self.num_domains) :]] = True
        ids = self._checked_ids(domain_ids)
        if checks_values(ids):
            check_distinct("domain_ids", ids)
        return sparse[torch.where(ids >= 0, ids, self.num_domains)].any(1)

    def _checked_ids(
        self,
        domain_ids: Tensor,  # [B] or [B, G]
    ) -> Tensor:  # [B, G] int64
        """The ids, checked."""
        ids = _slots("domain_ids", integers("domain_ids", domain_ids, self.weights.device))
        if ids.device != self.weights.device:
            raise ValueError(
                f"domain_ids is on {ids.device} but the domain weights are on "
                f"{self.weights.device}; move one of them"
            )
        check_range("domain_ids", ids, self.num_domains, "domains")
        return ids

    def _count(
        self,
        ids: Tensor,  # [B, G] int64
        counted: Tensor,  # [B, G] bool, within [0, num_domains)
    ) -> Tensor:  # [] rows with a domain
        # One bin more takes what is not counted: no shape depends on the data, hence no sync.
        bins = torch.where(counted, ids, self.num_domains).flatten()
        per_slot = torch.div(
            _WHOLE, counted.sum(1, keepdim=True).clamp(min=1), rounding_mode="floor"
        )
        for total, amount in (
            (self.interactions, torch.ones_like(ids)),
            (self.shares, per_slot.expand_as(ids)),
        ):
            new = total.new_zeros(self.num_domains + 1)
            total.add_(new.index_add_(0, bins, amount.flatten())[:-1])
        return counted.any(1).sum()

    def _move(self, share: float | Tensor) -> None:
        """The average goes this share of its way."""
        low, high = self.weight_range
        target = low + (high - low) * self.sparsity()
        moved = torch.lerp(self.average, target, share)
        self.average.copy_(moved.clamp(low, high))  # the clamp only removes rounding
        self.weights.copy_(_of_mean_one(self.average, self.shares))

    def _arguments(self) -> Tensor:  # [5]
        shares = [measure / sum(self.measures) for measure in self.measures]
        with on_host():
            return torch.tensor([*self.weight_range, *shares], dtype=torch.float32)

    def _contradiction(self, saved: dict[str, Tensor]) -> str | None:
        if self.fixed:
            text = difference("weights", saved, self.weights)
            text = text or difference("average", saved, self.average)
            return text and (
                f"{text}, where weights are constant; build the module with the weights of the "
                "checkpoint, or, to go on with these, delete weights and average from it"
            )
        if "interactions" in saved and "average" not in saved:
            return (
                "the checkpoint was written with constant weights, but those of this module are "
                f"measured, with weight_range={self.weight_range}; give the module the constant "
                "weights, or load the checkpoint without this part"
            )
        own = self._arguments()
        if "arguments" in saved:
            if difference("arguments", saved, own) is None:
                return None
            theirs = [float(f"{number:.6g}") for number in saved["arguments"].tolist()]
            return (
                f"weight_range is {tuple(theirs[:2])} and measures is in proportion to "
                f"{tuple(theirs[2:])} in the checkpoint, but {self.weight_range} and "
                f"{self.measures} here; build the module with those of the checkpoint"
            )
        # Earlier versions saved no arguments, but an average that lies within its range, and
        # weights that follow from it, unlike constant ones.
        average, shares = saved.get("average"), saved.get("shares")
        if average is None or shares is None or average.shape != shares.shape:
            return None
        low, high = own[:2].tolist()
        rounding = torch.finfo(average.dtype).eps
        if bool(((average < low * (1 - rounding)) | (average > high * (1 + rounding))).any()):
            extremes = f"[{average.min().item():.6g}, {average.max().item():.6g}]"
            return (
                f"average lies within {extremes} in the checkpoint, but weight_range is "
                f"{self.weight_range} here; build the module with that of the checkpoint"
            )
        text = difference("weights", saved, _of_mean_one(average, shares))
        return text and (
            f"{text} by its average and shares: the checkpoint was written with constant weights, "
            "but those of this module are measured; give the module the constant weights"
        )

    def _bring_up_to_date(self, state_dict: dict[str, Any], prefix: str) -> None:
        if not self.fixed and prefix + "average" in state_dict:
            # Anew, because a module that was made on `meta` holds anything before it is loaded.
            state_dict.setdefault(prefix + "arguments", self._arguments())
        if prefix + "interactions" in state_dict:
            state_dict.setdefault(prefix + "steps", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        if self.fixed:
            text = f"{self.num_domains}, constant"
        else:
            text = (
                f"{self.num_domains}, measures={self.measures}, weight_range={self.weight_range}, "
                f"momentum={self.momentum}"
            )
        return f"{text}, start={self.start}, full={self.full}" if self.full else text

    def __str__(self) -> str:
        """A table of the measured domains, dense to sparse."""
        names = self.names or [str(d) for d in range(self.num_domains)]
        known = bool(self.num_users > 0)
        share = (self.shares.double() / self.shares.sum().clamp(min=1)).tolist()
        sparsity, weights = self.sparsity().tolist(), self.weights.tolist()
        counts, users = self.interactions.tolist(), self.users.tolist()
        entropy = self.entropy.tolist()
        header = ["domain", "interactions", "share", "users", "entropy", "sparsity", "weight"]
        rows = [
            [
                names[d],
                f"{counts[d]:,}",
                f"{share[d]:.2%}",
                f"{users[d]:,}" if known else "-",
                f"{entropy[d]:.2f}" if known else "-",
                f"{sparsity[d]:.3f}",
                f"{weights[d]:.3f}",
            ]
            for d in sorted(range(self.num_domains), key=lambda d: -counts[d])
        ]
        if len(rows) > _LONGEST_TABLE:
            half = _LONGEST_TABLE // 2
            rows = [*rows[:half], ["..."] * len(header), *rows[-half:]]
        widths = [max(len(row[c]) for row in [header, *rows]) for c in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in [header, ["-" * width for width in widths], *rows]
        ]
        return "\n".join([repr(self), *lines])


def _of_mean_one(
    average: Tensor,  # [num_domains]
    shares: Tensor,  # [num_domains]
) -> Tensor:  # [num_domains]
    """The average over its mean, in which a domain has the share of its interactions."""
    seen = shares.float()
    seen = torch.where(seen.sum() > 0, seen, 1.0)
    return average / (seen / seen.sum() * average).sum()


def domains_from_multi_hot(flags: Any) -> Tensor:
    """The domains of each row, from one flag of 0 or 1 per domain.

    Genres often come this way, one column for each. Losses and :class:`DomainWeights` take ids.

    Args:
        flags: ``[..., C]`` of 0 and 1, for ``C`` domains: bool, integers or floats; a tensor, NumPy
            array, pandas DataFrame or lists. Row ``k`` of a DataFrame is row ``k`` of the result,
            whatever its index says.

    Returns:
        ``[..., G]`` int64, the ids of each row's domains in increasing order, then -1. ``G`` is the
        most that a row has, at least 1.

    Raises:
        TypeError: if they are no numbers.
        ValueError: if one is neither 0 nor 1.

    Example:
        >>> domains_from_multi_hot([[1, 0, 1], [0, 1, 0], [0, 0, 0]])
        tensor([[ 0,  2],
                [ 1, -1],
                [-1, -1]])
    """
    on = flags_of("flags", flags)
    if on.dim() == 0:
        raise ValueError("flags has shape []; wanted [..., C], a flag per domain")
    per_row = on.reshape(math.prod(on.shape[:-1]), on.shape[-1])
    row, domain = per_row.nonzero(as_tuple=True)  # row by row
    count = per_row.sum(1)
    slot = torch.arange(len(row), device=on.device) - (count.cumsum(0) - count)[row]
    slots = max(int(slot.max()) + 1, 1) if len(slot) else 1
    ids = torch.full((len(per_row), slots), -1, device=on.device)
    ids[row, slot] = domain
    return ids.reshape(*on.shape[:-1], slots)


def _names(names: Any, num_domains: int | None) -> list[str]:
    """One name per domain."""
    if isinstance(names, (str, bytes, Mapping, Set)) or not hasattr(names, "__iter__"):
        raise wrong_type("names", names, "a list with a name per domain")
    named = [str(name) for name in names]
    if num_domains is not None and len(named) != num_domains:
        raise ValueError(
            f"names has {len(named)} entries for {num_domains} domains; wanted one per domain"
        )
    return named


def _slots(name: str, ids: Tensor) -> Tensor:
    """Ids as ``[B, G]`` int64."""
    if ids.dim() not in (1, 2):
        raise ValueError(
            f"{name} has shape {list(ids.shape)}; wanted [B], or [B, G] with several domains per "
            "row; flatten leading dimensions"
        )
    return (ids if ids.dim() == 2 else ids[:, None]).to(torch.int64)


def check_range(name: str, ids: Tensor, bound: int, what: str, *, always: bool = False) -> None:
    """IndexError for an id outside ``[-1, bound)``, where looking at the ids is free."""
    if (always or checks_values(ids)) and ids.numel():
        low, high = (int(extreme) for extreme in ids.aminmax())
        if low < -1 or high >= bound:
            raise IndexError(
                f"{name} holds {low if low < -1 else high}, but there are {bound} {what}: ids must "
                f"be in [0, {bound}), or -1 for none"
            )


def _dense(ids: Tensor) -> tuple[int, Tensor]:
    """The number of distinct ids, and each id's place among them."""
    distinct, place = torch.unique(ids, return_inverse=True)
    return len(distinct), place
