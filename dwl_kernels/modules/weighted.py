"""What the loss modules share: domain weights, calibration, temperature, unit length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from dwl_kernels.backends import Backend, check_name
from dwl_kernels.core.arguments import check_order, flag, integer, integers, number
from dwl_kernels.core.buffers import on_host
from dwl_kernels.core.checks import check_choice, either
from dwl_kernels.core.problem import Reduction
from dwl_kernels.core.rows import mean_domain_weight
from dwl_kernels.core.values import check_distinct, checks_values, has_values
from dwl_kernels.counts import InGroup
from dwl_kernels.domains import DomainWeights
from dwl_kernels.domains.ids import check_range
from dwl_kernels.modules.checks import check_rows
from dwl_kernels.modules.repeats import Runs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from dwl_kernels.distributed.group import Group

Checked = TypeVar("Checked")

# A learned temperature stays in here: below, float16 logits overflow; above, all scores are alike.
TEMPERATURE_RANGE = (0.005, 50.0)


class WeightedLoss(InGroup):
    """A loss whose rows weigh what their domains need. The modules say what the options mean."""

    item_domains: Tensor | None  # [V, G] int64

    def __init__(
        self,
        num_domains: int | None,
        *,
        weights: DomainWeights | Tensor | Sequence[float] | None,
        domain_weights: DomainWeights | Tensor | Sequence[float] | None,
        item_domains: Any,
        calibration: float,
        temperature: float | Tensor | None,
        learn_temperature: bool,
        normalize: bool,
        reduction: Reduction,
        backend: Backend,
        process_group: ProcessGroup | None,
    ) -> None:
        super().__init__(process_group)
        learn_temperature = flag("learn_temperature", learn_temperature)
        normalize = flag("normalize", normalize)
        calibration = number("calibration", calibration, "a number in [0, 1]")
        with on_host():
            table = None if item_domains is None else _item_domains(item_domains)
            if weights is None and num_domains is None and table is not None:
                num_domains = _num_domains(table)
        weights = either("weights", weights, "domain_weights", domain_weights)
        self.domain_weights = _domain_weights(num_domains, weights)
        if self.domain_weights is not None and self.domain_weights.process_group is None:
            self.domain_weights.process_group = self.process_group
        if table is None:
            self.item_domains = None
        else:
            if self.domain_weights is not None and has_values(table):
                num_domains = self.domain_weights.num_domains
                with on_host():
                    check_range("item_domains", table, num_domains, "domains", always=True)
            self._register_constant("item_domains", table)
        if not 0 <= calibration <= 1:
            raise ValueError(f"calibration is {calibration}; wanted a number in [0, 1]")
        if calibration and self.domain_weights is None:
            raise ValueError(
                "calibration needs domain weights to calibrate for; pass num_domains or weights"
            )
        check_choice("reduction", reduction, Reduction)
        check_name(backend)
        self.calibration = calibration
        self.normalize = normalize
        self.reduction: Reduction = reduction
        self.backend: Backend = backend
        self.runs = Runs()
        if temperature is None:
            temperature = 0.05 if normalize else 1.0
        self._temperature = _positive("temperature", temperature)
        self.temperature_logit: nn.Parameter | None = None
        if learn_temperature:
            low, high = (math.log(bound) for bound in TEMPERATURE_RANGE)
            place = (math.log(self._temperature) - low) / (high - low)
            if not 0 < place < 1:
                raise ValueError(
                    f"temperature is {temperature}; a learned one must start strictly within "
                    f"{TEMPERATURE_RANGE}"
                )
            # [1] and not []: sharding over devices wants a dimension.
            with on_host():
                logit = torch.tensor([math.log(place / (1 - place))], dtype=torch.float32)
                self.temperature_logit = nn.Parameter(logit)
            self._settle()
        given = item_domains if isinstance(item_domains, Tensor) else self.device_marker
        if has_values(given) and has_values(self.device_marker):
            self.device_marker = self.device_marker.to(given.device)

    def _set_group(self, group: Group | None) -> None:
        """Domains are counted over the ranks of the loss, unless their weights have others."""
        weights = getattr(self, "domain_weights", None)
        replicated = getattr(self, "replicated_rows", False)
        if weights is not None and weights.process_group is self._group and not replicated:
            weights.process_group = group
        super()._set_group(group)

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use: a number, or a 0-d tensor with gradient where it is learned.

        ``log temperature`` runs between the bounds as a sigmoid of the parameter does, so it stays
        positive and bounded under any optimiser, and a bound, unlike that of a clamp, lets go.

        A number may be set at any time, ``loss_fn.temperature = 0.1``.
        """
        if self.temperature_logit is None:
            return self._temperature
        low, high = (math.log(bound) for bound in TEMPERATURE_RANGE)
        return (low + (high - low) * self.temperature_logit[0].float().sigmoid()).exp()

    @temperature.setter
    def temperature(self, value: float | Tensor) -> None:
        if self.temperature_logit is not None:
            raise AttributeError(
                f"temperature cannot be set to {value}, because this module learns it; build the "
                "module with it and learn_temperature=True to start there, or with "
                "learn_temperature=False to set it at any time"
            )
        self._temperature = _positive("temperature", value)

    def no_decay_parameters(self) -> list[nn.Parameter]:
        """The parameters that weight decay must leave alone: the learned temperature, if any.

        Decay would pull it to 0.5, the middle of its range.

        Returns:
            A list of the parameter, ``[1]``, or an empty one.

        Example:
            Two lines make the groups of an optimiser, here of a model that contains the loss.

            >>> import torch
            >>> from dwl_kernels import DynamicWeightedSampledSoftmax
            >>> model = torch.nn.ModuleDict({"tower": torch.nn.Linear(8, 8)})
            >>> model["loss"] = DynamicWeightedSampledSoftmax(learn_temperature=True)
            >>> whole = set(model["loss"].no_decay_parameters())
            >>> groups = [{"params": [*whole], "weight_decay": 0.0},
            ...           {"params": [p for p in model.parameters() if p not in whole]}]
            >>> optimizer = torch.optim.AdamW(groups)
        """
        return [] if self.temperature_logit is None else [self.temperature_logit]

    def _bring_up_to_date(self, state_dict: dict[str, Any], prefix: str) -> None:
        name = prefix + "temperature_logit"
        saved = state_dict.get(name)
        if isinstance(saved, Tensor) and saved.dim() == 0:
            state_dict[name] = saved[None]

    def _on_all_ranks(
        self, group: Group | None, query: Tensor, check: Callable[[], Checked], size: int = 0
    ) -> tuple[Checked, list[int]]:
        """What `check` returns, and the sizes of all ranks.

        In a process group it raises on all ranks what it raises on one, before anything is counted:
        else the others would wait for a rank that has raised.
        """
        if group is None:
            return check(), [size]
        from dwl_kernels.distributed.exchange import agree

        weights = self.domain_weights
        same = self._choices() | {
            "process_group": None,  # each rank has a place of its own
            "training mode": self.training,
            "torch.is_grad_enabled()": torch.is_grad_enabled(),
            "domain weights": None if weights is None else weights.extra_repr(),
        }
        checked, sizes = agree(group, query, lambda: (check(), same, (size,)))
        return checked, [size for size, *_ in sizes]

    def _domains_of_rows(
        self,
        given: tuple[str, Tensor | None],  # [...] or [..., G]
        items: tuple[str, Tensor | None],  # [...]
        query: Tensor,  # [..., D]
        padded: Tensor | None,  # [...] bool
    ) -> Tensor | None:  # [..., G]
        """The domains of the rows, by which they weigh and are counted."""
        if self.domain_weights is None:
            return given[1]
        domain_ids = self._domains_of(given, items, query.shape[:-1], padded)
        if self.process_group is not None:  # `update` would find it, but on this rank alone
            ids = self.domain_weights._checked_ids(_flat(domain_ids))
            if checks_values(ids):
                check_distinct(given[0], ids)
        return domain_ids

    def _weigh(
        self,
        domain_ids: Tensor | None,  # [..., G]
        query: Tensor,  # [..., D]
    ) -> Tensor | None:  # [num_domains]
        """What domains weigh; rows that train are counted."""
        if self.domain_weights is None or domain_ids is None:
            return None
        if not self.training:
            return self.domain_weights()
        return self.runs.weigh(self.domain_weights, _flat(domain_ids), query)

    def _domains_of(
        self,
        given: tuple[str, Tensor | None],  # [...] or [..., G]
        items: tuple[str, Tensor | None],  # [...]
        leading: torch.Size,
        padded: Tensor | None = None,  # bool, broadcast to [...]
    ) -> Tensor:  # [..., G], -1 where padded
        """The domains that were given, or those of the items in ``item_domains``."""
        (name, domains), (item_name, ids) = given, items
        if domains is not None:
            check_rows(name, domains, leading, slots=True)
            domains = domains if domains.dim() > len(leading) else domains[..., None]
            if padded is not None:
                domains = domains.masked_fill(padded[..., None], -1)
            # The loss looks at `domain_ids` itself, and the weights at all by that name.
            if name != "domain_ids" and checks_values(domains):
                check_distinct(name, _flat(domains))
            return domains
        if self.item_domains is None or ids is None:
            raise ValueError(
                f"the domains are unknown: pass {name}, or {item_name} together with item_domains "
                "of the module"
            )
        check_rows(item_name, ids, leading)
        if ids.device != self.item_domains.device:
            raise ValueError(
                f"{item_name} is on {ids.device} but item_domains of the module is on "
                f"{self.item_domains.device}; move the module, loss_fn.to({str(ids.device)!r})"
            )
        ids = ids.long() if padded is None else ids.long().masked_fill(padded, -1)
        num_items = self.item_domains.shape[0]
        check_range(item_name, ids, num_items, "items in item_domains")
        found = self.item_domains[ids.clamp(0, num_items - 1)].masked_fill(
            (ids == -1)[..., None], -1
        )
        # Where values are not looked at, an unknown item gets a domain that does not exist, which
        # makes the row NaN rather than wrong.
        unknown = (ids < -1) | (ids >= num_items)
        return found.masked_fill(unknown[..., None], torch.iinfo(torch.int32).max)

    def _check_items(
        self,
        table: Tensor,  # [V, D]
        rows: int | None = None,  # of the whole table, where only a shard is here
    ) -> None:
        """ValueError unless ``item_domains`` has an entry for every row of the table."""
        rows = len(table) if rows is None and table.dim() else rows
        if self.item_domains is not None and rows not in (None, len(self.item_domains)):
            raise ValueError(
                f"table has {rows} rows but item_domains has {len(self.item_domains)}; both "
                "are to be of the same items: pass the domains of every row, -1 for a row that is "
                "no item"
            )

    def _tilt(
        self,
        domains: Tensor,  # [..., G]
        weights: Tensor,  # [num_domains]
    ) -> Tensor:  # [...]
        """``c log w``, what weighted training adds to a score and calibration takes out again."""
        assert self.domain_weights is not None  # the constructor has looked
        weight = mean_domain_weight(self.domain_weights._checked_ids(_flat(domains)), weights)
        return self.calibration * weight.log().reshape(domains.shape[:-1])

    def _choices(self) -> dict[str, Any]:
        """What was chosen, by the names of the constructor."""
        learns = self.temperature_logit is not None
        items = self.item_domains
        return {
            "temperature": "learned" if learns else self._temperature,
            "normalize": self.normalize,
            "calibration": self.calibration,
            "item_domains": None if items is None else list(items.shape),
            "reduction": self.reduction,
            "backend": self.backend,
            "process_group": self.process_group,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._choices().items())


def _flat(domains: Tensor) -> Tensor:  # [..., G] -> [B, G]
    return domains.reshape(math.prod(domains.shape[:-1]), domains.shape[-1])


def _item_domains(item_domains: Any) -> Tensor:
    """``item_domains`` as ``[V, G]`` int64."""
    check_order(
        "item_domains",
        item_domains,
        "item",
        "item_domains.reindex(range(num_items), fill_value=-1)",
    )
    table = integers("item_domains", item_domains, lists=True)
    if table.dim() not in (1, 2) or not table.numel():
        raise ValueError(
            f"item_domains has shape {list(table.shape)}; wanted [V], or [V, G] with several "
            "domains per item"
        )
    table = table.reshape(table.shape[0], -1).long()
    if has_values(table):
        check_distinct("item_domains", table)
    return table


def _num_domains(
    item_domains: Tensor,  # [V, G]
) -> int:
    """The largest domain and those below it."""
    if not has_values(item_domains):
        raise ValueError(
            "item_domains is on the meta device and has no values to count domains by; pass "
            "num_domains, and item_domains as a list, an array or a tensor of the CPU"
        )
    return max(int(item_domains.max()) + 1, 1)


def _positive(name: str, value: float | Tensor) -> float:
    """A positive number, also from a tensor of one element that is no part of a graph."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"{name} requires a gradient, which a module does not give; pass "
            f"learn_{name}=True, or the tensor to the function of the loss"
        )
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    found = number(name, value, "a positive finite number")
    if not 0 < found < math.inf:
        raise ValueError(f"{name} is {value}; wanted a positive finite number")
    return found


def _domain_weights(
    num_domains: int | None, weights: DomainWeights | Tensor | Sequence[float] | None
) -> DomainWeights | None:
    if num_domains is not None:
        wanted = "an integer (weights go in by name, weights=)"
        num_domains = integer("num_domains", num_domains, wanted, least=1)
    if weights is None:
        return None if num_domains is None else DomainWeights(num_domains)
    built = weights if isinstance(weights, DomainWeights) else DomainWeights.constant(weights)
    if num_domains is not None and num_domains != built.num_domains:
        raise ValueError(
            f"num_domains is {num_domains} but weights has {built.num_domains} domains; leave "
            "num_domains out"
        )
    return built
