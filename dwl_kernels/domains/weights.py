"""`DomainWeights`, which the loss modules hold and users build."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dwl_kernels.core.arguments import (
    integer,
    integers,
    number,
    several_numbers,
)
from dwl_kernels.core.batching import counting
from dwl_kernels.core.buffers import on_host
from dwl_kernels.core.rows import mean_domain_weight
from dwl_kernels.core.values import check_distinct, checks_values, has_values
from dwl_kernels.counts import for_all_ranks
from dwl_kernels.domains.ids import check_range, constant_weights, names_of, slots_of
from dwl_kernels.domains.state import DomainState
from dwl_kernels.domains.table import table_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DomainWeights(DomainState):
    r"""The weight of every domain, from the sparsity that is measured in the data.

    The loss modules hold one and call it; by hand it is::

        weights = DomainWeights.from_interactions(users, items, domains)  # [M], [M], [M] or [M, G]
        weights.update(domain_ids)                    # counts a batch, [B] or [B, G]
        weights()                                     # [num_domains], for the loss
        scores + c * weights.sparsest(item_domains)   # [..., V] and [V], when serving

    All domains start at weight 1. :meth:`from_interactions` measures all three parts of the
    sparsity at once; :meth:`update` streams domain ids during training and refreshes the counts
    and with them ``idf`` alone (users and entropy stay as measured offline, and have no say where
    they never were). ``state_dict`` carries the state: averages stay float32 under ``.half()``,
    counts are int64. Constant weights follow from their argument and are
    not in it. A checkpoint of another ``weight_range``, of other ``measures`` or of the other kind
    of weights raises.

    An average of models holds no average of counts: they are not among ``model.buffers()``, so
    ``AveragedModel`` keeps those of the moment when it copied the model, with ``use_buffers=True``
    too, and ``DistributedDataParallel`` broadcasts none. For those of today, copy the state,
    ``averaged.module.loss_fn.domain_weights.load_state_dict(model.loss_fn.domain_weights.state_dict())``.
    ``torch.func.functional_call`` takes them from ``state_dict()``, else the module's own count.

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
        process_group, sync_every: Ranks whose counts are summed, in one exchange of
            ``16 num_domains + 8`` bytes at every ``sync_every``-th update, without a wait for the
            device. All ranks must update equally often, if with no rows. Until an exchange the
            counts and weights are those of the one before, so they are the same on all ranks; see
            :meth:`sync`. The module of a loss with a process group passes its own on.

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
        process_group: ProcessGroup | None = None,
        sync_every: int = 1,
    ) -> None:
        super().__init__(process_group, sync_every)
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
        self.names = None if names is None else names_of(names, num_domains)
        self.measures = parts
        self.weight_range = bounds
        self.momentum = momentum
        self.start = start
        self.full = full
        self.fixed = False
        self._register()

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
        process_group: ProcessGroup | None = None,
        sync_every: int = 1,
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
            process_group, sync_every: Likewise; all ranks pass the same interactions.

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
        options |= {"process_group": process_group, "sync_every": sync_every}
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
        slots = slots_of("domains", columns.pop("domains"))  # [M, G]
        check_distinct("domains", slots)
        for name, value in columns.items():
            if value.shape != slots.shape[:1]:
                raise ValueError(
                    f"{name} has shape {list(value.shape)}; wanted [{slots.shape[0]}], one per "
                    "row of domains"
                )
            if value.device != slots.device:
                raise ValueError(f"{name} is on {value.device} but domains is on {slots.device}")
        names = None if names is None else names_of(names, num_domains)
        if num_domains is None:
            largest = int(slots.max()) if slots.numel() else -1
            num_domains = max(largest + 1, 1) if names is None else len(names)
        measured = cls(num_domains, names=names, **options).to(slots.device)
        check_range("domains", slots, num_domains, "domains", always=True)
        labelled = (slots >= 0).any(1)
        slots = slots[labelled]
        measured._count(slots, slots >= 0, measured.interactions, measured.shares)
        measured._measure(slots, *(columns[name][labelled] for name in ("users", "items")))
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
        process_group: ProcessGroup | None = None,
        sync_every: int = 1,
    ) -> DomainWeights:
        """Weights that are given and not measured; :meth:`update` then only counts.

        Args:
            weights: ``[num_domains]`` numbers, finite and not negative, used as they are.
            names: Names for the printed table, one per domain.
            start, full, process_group, sync_every: As for the class.

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
        values = constant_weights(weights)
        groups: dict[str, Any] = {"process_group": process_group, "sync_every": sync_every}
        built = cls(values.shape[0], names=names, start=start, full=full, **groups)
        if isinstance(weights, Tensor) and has_values(values) and has_values(built.weights):
            built.to(values.device)
        built.fixed = True
        built._forget_counts("weights", "average", "arguments")
        with on_host():
            for name in ("weights", "average"):
                built._register_constant(name, values.clone())
        return built

    @for_all_ranks
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
        ids, where = counting(ids, self.interactions, mend)
        with where:
            self._update(ids)

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
        To raise the sparsest domains alone, :meth:`sparsest` buys more for the same price.

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
            ``[V]`` bools: the bonus of the dial, whose strength :func:`choose_bonus` finds.

        Raises:
            TypeError, ValueError, IndexError: As for :meth:`update`, or if ``part`` is no number in
                (0, 1], or on a CPU, if nothing was counted.

        Example:
            >>> weights = DomainWeights(3)
            >>> weights.update(torch.tensor([0, 0, 0, 1, 1, 2]))
            >>> weights.sparsest(torch.tensor([[0, -1], [1, 2], [2, -1]]))
            tensor([False,  True,  True])
        """
        part = number("part", part, "a number in (0, 1]")
        if not 0 < part <= 1:
            raise ValueError(f"part is {part}; wanted a number in (0, 1]")
        if checks_values(self.interactions) and not self.interactions.any():
            raise ValueError("nothing was counted; measure by from_interactions, or update")
        by_count = self.interactions.argsort(descending=True, stable=True)
        sparse = torch.zeros(self.num_domains + 1, dtype=torch.bool, device=by_count.device)
        sparse[by_count[self.num_domains - math.ceil(part * self.num_domains) :]] = True
        ids = self._checked_ids(domain_ids)
        if checks_values(ids):
            check_distinct("domain_ids", ids)
        return sparse[torch.where(ids >= 0, ids, self.num_domains)].any(1)

    def __str__(self) -> str:
        """A table of the measured domains, dense to sparse."""
        names = self.names or [str(d) for d in range(self.num_domains)]
        return "\n".join([repr(self), *table_of(self, names)])
