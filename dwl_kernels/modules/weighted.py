"""What the loss modules share: domain weights, calibration, temperature, unit length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwl_kernels.arguments import check_dense, check_order, flag, integer, integers, number
from dwl_kernels.backends import Backend, check_name
from dwl_kernels.checks import check_choice
from dwl_kernels.domains import DomainWeights, check_range
from dwl_kernels.problem import Reduction, check_distinct, checks_values

# A learned temperature stays in here: below, float16 logits overflow; above, all scores are alike.
TEMPERATURE_RANGE = (0.005, 50.0)


class WeightedLoss(nn.Module):
    """A loss whose rows weigh what their domains need. The modules say what the options mean."""

    item_domains: Tensor | None  # [V, G] int64

    def __init__(
        self,
        num_domains: int | None,
        *,
        weights: DomainWeights | Tensor | Sequence[float] | None,
        item_domains: Any,
        calibration: float,
        temperature: float,
        learn_temperature: bool,
        normalize: bool,
        reduction: Reduction,
        backend: Backend,
    ) -> None:
        super().__init__()
        learn_temperature = flag("learn_temperature", learn_temperature)
        normalize = flag("normalize", normalize)
        calibration = number("calibration", calibration, "a number in [0, 1]")
        table = None if item_domains is None else _item_domains(item_domains)
        if weights is None and num_domains is None and table is not None:
            num_domains = max(int(table.max()) + 1, 1)
        self.domain_weights = _domain_weights(num_domains, weights)
        if table is not None and self.domain_weights is not None:
            check_range(
                "item_domains", table, self.domain_weights.num_domains, "domains", always=True
            )
        self.register_buffer("item_domains", table, persistent=False)
        if not 0 <= calibration <= 1:
            raise ValueError(f"calibration is {calibration}; wanted a number in [0, 1]")
        if calibration and self.domain_weights is None:
            raise ValueError(
                "calibration needs domain weights to calibrate for; pass num_domains or weights"
            )
        temperature = number("temperature", temperature, "a positive finite number")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}; wanted a positive finite number")
        check_choice("reduction", reduction, Reduction)
        check_name(backend)
        self.calibration = calibration
        self.normalize = normalize
        self.reduction: Reduction = reduction
        self.backend: Backend = backend
        self._temperature = temperature
        self.temperature_logit: nn.Parameter | None = None
        if learn_temperature:
            low, high = (math.log(bound) for bound in TEMPERATURE_RANGE)
            place = (math.log(temperature) - low) / (high - low)
            if not 0 < place < 1:
                raise ValueError(
                    f"temperature is {temperature}; a learned one must start strictly within "
                    f"{TEMPERATURE_RANGE}"
                )
            self.temperature_logit = nn.Parameter(torch.tensor(math.log(place / (1 - place))))

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use: a number, or a 0-d tensor with gradient where it is learned.

        ``log temperature`` runs between the bounds as a sigmoid of the parameter does, so it stays
        positive and bounded under any optimiser, and a bound, unlike that of a clamp, lets go.
        """
        if self.temperature_logit is None:
            return self._temperature
        low, high = (math.log(bound) for bound in TEMPERATURE_RANGE)
        return (low + (high - low) * self.temperature_logit.float().sigmoid()).exp()

    def weigh_domains(
        self,
        given: tuple[str, Tensor | None],  # [...] or [..., G]
        items: tuple[str, Tensor | None],  # [...]
        leading: torch.Size,
        padded: Tensor | None,  # [...] bool
    ) -> tuple[Tensor | None, Tensor | None]:  # [..., G], [num_domains]
        """The domains of the rows and what domains weigh; in training mode the rows count."""
        if self.domain_weights is None:
            return given[1], None
        domain_ids = self.domains_of(given, items, leading, padded)
        if self.training:
            self.domain_weights.update(_flat(domain_ids))
        return domain_ids, self.domain_weights()

    def domains_of(
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
            if name != "domain_ids" and checks_values(domains.device):
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

    def check_items(
        self,
        table: Tensor,  # [V, D]
    ) -> None:
        """ValueError unless ``item_domains`` has an entry for every row of the table."""
        if self.item_domains is not None and table.dim() and len(table) != len(self.item_domains):
            raise ValueError(
                f"table has {len(table)} rows but item_domains has {len(self.item_domains)}; both "
                "are to be of the same items: pass the domains of every row, -1 for a row that is "
                "no item"
            )

    def tilt(
        self,
        domains: Tensor,  # [..., G]
    ) -> Tensor:  # [...]
        """``c log w``, what weighted training adds to a score and calibration takes out again."""
        assert self.domain_weights is not None  # the constructor has looked
        log_weight = self.domain_weights.log_weight(_flat(domains))
        return self.calibration * log_weight.reshape(domains.shape[:-1])

    def extra_repr(self) -> str:
        temperature = self._temperature if self.temperature_logit is None else "learned"
        return (
            f"temperature={temperature}, calibration={self.calibration}, "
            f"reduction={self.reduction!r}"
        )


def _flat(domains: Tensor) -> Tensor:  # [..., G] -> [B, G]
    return domains.reshape(domains.shape[:-1].numel(), domains.shape[-1])


def check_tensors(**named: Tensor | None) -> None:
    """TypeError for what is given and no dense tensor."""
    for name, value in named.items():
        if value is not None:
            check_dense(name, value)


def checked_ids(query: Tensor, **named: Tensor | None) -> list[Tensor | None]:
    """Ids and domains as tensors of int64 or int32; those of no tensor go to the query's device."""
    return [
        None if value is None else integers(name, value, query.device)
        for name, value in named.items()
    ]


def check_rows(name: str, value: Tensor, leading: torch.Size, *, slots: bool = False) -> None:
    """One entry per row, or with `slots` several."""
    check_dense(name, value)
    if value.shape == leading or (slots and value.dim() and value.shape[:-1] == leading):
        return
    wanted = f"{list(leading)}" + (f", or {[*leading, 'G']}".replace("'", "") if slots else "")
    raise ValueError(f"{name} has shape {list(value.shape)}; wanted {wanted}")


def padding(example_weights: Tensor | None, leading: torch.Size) -> Tensor | None:  # [...] bool
    """Which rows are padding; None where none can be."""
    if example_weights is None:
        return None
    check_rows("example_weights", example_weights, leading)
    return example_weights == 0


def normalised(
    embedding: Tensor,  # [..., D]
    padded: Tensor | None = None,  # [...] bool
) -> Tensor:  # [..., D]
    """Every embedding scaled to length 1."""
    # What stands in a padded row, NaN say, must not come back through this gradient either. A
    # wrong shape is left to the loss, which names it.
    if padded is not None and padded.shape == embedding.shape[:-1]:
        embedding = embedding.masked_fill(padded[..., None], 0.0)
    return F.normalize(embedding, dim=-1)


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
    check_distinct("item_domains", table)
    return table


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
