"""The losses as modules: what a training loop swaps its loss for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwl_kernels.backends import Backend
from dwl_kernels.domains import DomainWeights, check_range
from dwl_kernels.functional import in_batch_softmax_loss, sampled_softmax_loss
from dwl_kernels.problem import INTEGERS, Correction, Reduction

# A learned temperature stays in here: below, float16 logits overflow; above, all scores are alike.
TEMPERATURE_RANGE = (0.005, 50.0)


class DynamicWeightedSampledSoftmax(nn.Module):
    """Log-Q corrected sampled softmax whose rows weigh what their domains need.

    In training mode every call feeds the domains of its rows to :class:`DomainWeights`, so domains
    that turn out sparse gain weight as training goes; in evaluation mode nothing is counted. With
    neither ``num_domains`` nor ``weights`` it is the plain loss.

    Weighted training also tilts the scores: its optimum is ``p(j|x) w(j)``, normalised, for the
    weight ``w(j)`` that an example with target ``j`` would get. ``calibration`` ``c`` takes the
    tilt out by using ``log Q_j - c log w(j)`` in place of ``log Q_j``, for positive and candidates
    alike: 0 is the paper, 1 estimates ``p(j|x)`` again.

    Args:
        num_domains: Number of domains, for weights that all start at 1 and are measured while
            training.
        weights: Measured :class:`DomainWeights` instead; or ``[num_domains]`` constant weights.
        item_domains: ``[V]`` or ``[V, G]`` integers, the domains of every item, -1 = none. Domains
            then follow from the ids, which index it. Not in ``state_dict``.
        calibration: ``c`` in [0, 1].
        temperature: Positive number that divides the scores; where learned, the one to start from.
        learn_temperature: Whether the temperature is a parameter, kept in ``[0.005, 50]``.
        normalize: Whether to scale query, positive and negative to length 1.
        correction: ``"standard"``, or ``"refined"`` (arXiv 2507.09331).
        reduction: ``"mean"`` over the rows whose example weight is not zero, ``"weighted_mean"``,
            ``"sum"`` or ``"none"``, as for :func:`sampled_softmax_loss`.
        remove_accidental_hits: Whether candidates with the id of a row's positive are left out for
            that row. Needs the ids of both; False compares no ids.
        backend: As for :func:`sampled_softmax_loss`.

    Raises:
        ValueError: if a number is out of range, if ``weights`` and ``num_domains`` disagree, or if
            ``calibration`` is asked for without weights.

    Source: Mittal et al. 2025, arXiv 2510.04375; the calibration is this package's.

    Example:
        >>> loss_fn = DynamicWeightedSampledSoftmax(num_domains=18)
        >>> query, positive, negative = torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(7, 8)
        >>> loss_fn(query, positive, negative, domain_ids=torch.tensor([0, 3, 3, -1]))
        tensor(2.0794)
        >>> loss_fn.domain_weights.interactions[3]
        tensor(2)
    """

    item_domains: Tensor | None  # [V, G] int64

    def __init__(
        self,
        num_domains: int | None = None,
        *,
        weights: DomainWeights | Tensor | Sequence[float] | None = None,
        item_domains: Any = None,
        calibration: float = 0.0,
        temperature: float = 0.05,
        learn_temperature: bool = False,
        normalize: bool = False,
        correction: Correction = "standard",
        reduction: Reduction = "mean",
        remove_accidental_hits: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
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
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}; wanted a positive finite number")
        self.calibration = calibration
        self.normalize = normalize
        self.correction: Correction = correction
        self.reduction: Reduction = reduction
        self.remove_accidental_hits = remove_accidental_hits
        self.backend: Backend = backend
        self._temperature = float(temperature)
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
        positive and bounded under any optimiser and always has a gradient.
        """
        if self.temperature_logit is None:
            return self._temperature
        low, high = (math.log(bound) for bound in TEMPERATURE_RANGE)
        return (low + (high - low) * self.temperature_logit.float().sigmoid()).exp()

    def forward(
        self,
        query: Tensor,  # [B, D], or [..., D] with [...] in place of [B] below
        positive: Tensor,  # [B, D]
        negative: Tensor | None = None,  # [N, D]
        *,
        domain_ids: Tensor | None = None,  # [B] or [B, G]
        negative_domain_ids: Tensor | None = None,  # [N] or [N, G]
        positive_ids: Tensor | None = None,  # [B]
        negative_ids: Tensor | None = None,  # [N]
        positive_log_q: Tensor | None = None,  # [B]
        negative_log_q: Tensor | None = None,  # [N]
        example_weights: Tensor | None = None,  # [B]
    ) -> Tensor:
        """The loss.

        Args:
            query: ``[B, D]``, or ``[..., D]``; what is said to be ``[B]`` then is ``[...]``.
            positive: As ``query``, one positive per row.
            negative: ``[N, D]`` candidates for all rows; without, the other rows' positives.
            domain_ids: ``[B]`` or ``[B, G]`` integers, -1 = none; by default the domains of
                ``positive_ids`` in ``item_domains``.
            negative_domain_ids: ``[N]`` or ``[N, G]``, used by ``calibration``; by default the
                domains of ``negative_ids`` in ``item_domains``.
            positive_ids, negative_ids: ``[B]``, ``[N]`` integers, -1 = no item.
            positive_log_q, negative_log_q: ``[B]``, ``[N]``, log-probability of one draw.
            example_weights: ``[B]``, 0 marks a padded row, whose domain is not counted either.

        Returns:
            ``[]``, or ``[B]`` for ``reduction="none"``.

        Raises:
            ValueError: if domains are needed and not given, or as :func:`sampled_softmax_loss`.
            IndexError: if an id is out of range, on a CPU.
        """
        if self.normalize:
            query = _normalised(query, example_weights)
            positive = _normalised(positive, example_weights)
            negative = None if negative is None else _normalised(negative, None)

        weights: Tensor | None = None
        if self.domain_weights is not None:
            domain_ids = self._domains(
                ("domain_ids", domain_ids),
                ("positive_ids", positive_ids),
                query.shape[:-1],
                example_weights,
            )
            rows = domain_ids.reshape(query.shape[:-1].numel(), domain_ids.shape[-1])  # [B, G]
            if self.training:
                self.domain_weights.update(rows)
            weights = self.domain_weights()
            if self.calibration:
                positive_log_q = self._calibrated(positive_log_q, rows, query.shape[:-1])
                if negative is not None:
                    candidate_domains = self._domains(
                        ("negative_domain_ids", negative_domain_ids),
                        ("negative_ids", negative_ids),
                        negative.shape[:1],
                    )
                    negative_log_q = self._calibrated(
                        negative_log_q, candidate_domains, negative.shape[:1]
                    )
        if not self.remove_accidental_hits:
            positive_ids = negative_ids = None

        rows_arguments: dict[str, Any] = {
            "domain_ids": domain_ids,
            "domain_weights": weights,
            "example_weights": example_weights,
            "temperature": self.temperature,
            "correction": self.correction,
            "reduction": self.reduction,
            "backend": self.backend,
        }
        if negative is None:
            return in_batch_softmax_loss(
                query,
                positive,
                log_q=positive_log_q,
                ids=positive_ids,
                negative_log_q=negative_log_q,
                negative_ids=negative_ids,
                **rows_arguments,
            )
        return sampled_softmax_loss(
            query,
            positive,
            negative,
            positive_log_q=positive_log_q,
            negative_log_q=negative_log_q,
            positive_ids=positive_ids,
            negative_ids=negative_ids,
            **rows_arguments,
        )

    def _domains(
        self,
        given: tuple[str, Tensor | None],  # [...] or [..., G]
        items: tuple[str, Tensor | None],  # [...]
        leading: torch.Size,
        example_weights: Tensor | None = None,  # [...]
    ) -> Tensor:  # [..., G], -1 in padded rows
        """The domains that were given, or those of the items in ``item_domains``."""
        (name, domains), (item_name, ids) = given, items
        padded: Tensor | None = None
        if example_weights is not None:
            _check_rows("example_weights", example_weights, leading)
            padded = example_weights == 0
        if domains is not None:
            _check_rows(name, domains, leading, slots=True)
            domains = domains if domains.dim() > len(leading) else domains[..., None]
            return domains if padded is None else domains.masked_fill(padded[..., None], -1)
        if self.item_domains is None or ids is None:
            raise ValueError(
                f"the domains are unknown: pass {name}, or {item_name} together with item_domains "
                "of the module"
            )
        _check_rows(item_name, ids, leading)
        if ids.dtype not in INTEGERS:
            raise TypeError(f"{item_name} has dtype {ids.dtype}; wanted integers, int64 or int32")
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

    def _calibrated(
        self,
        log_q: Tensor | None,  # [...]
        domains: Tensor,  # [..., G] or flattened
        shape: torch.Size,
    ) -> Tensor:  # [...]
        """``log Q - c log w``."""
        assert self.domain_weights is not None  # callers have looked
        tilt = self.calibration * self.domain_weights.log_weight(domains).reshape(shape)
        if log_q is None:
            return -tilt
        _check_rows("log_q", log_q, shape)
        return log_q - tilt

    def extra_repr(self) -> str:
        temperature = self._temperature if self.temperature_logit is None else "learned"
        return (
            f"temperature={temperature}, calibration={self.calibration}, "
            f"correction={self.correction!r}, reduction={self.reduction!r}"
        )


def _normalised(
    embedding: Tensor,  # [..., D]
    example_weights: Tensor | None,  # [...]
) -> Tensor:  # [..., D]
    if example_weights is not None:
        # What stands in a padded row, NaN say, must not come back through this gradient either.
        _check_rows("example_weights", example_weights, embedding.shape[:-1])
        embedding = embedding.masked_fill((example_weights == 0)[..., None], 0.0)
    return F.normalize(embedding, dim=-1)


def _check_rows(name: str, value: Tensor, leading: torch.Size, *, slots: bool = False) -> None:
    """One entry per row, or with `slots` several."""
    if value.shape == leading or (slots and value.dim() and value.shape[:-1] == leading):
        return
    wanted = f"{list(leading)}" + (f", or {[*leading, 'G']}".replace("'", "") if slots else "")
    raise ValueError(f"{name} has shape {list(value.shape)}; wanted {wanted}")


def _item_domains(item_domains: Any) -> Tensor:
    """``item_domains`` as ``[V, G]`` int64."""
    table = torch.as_tensor(item_domains)
    if table.dtype not in INTEGERS:
        raise TypeError(f"item_domains has dtype {table.dtype}; wanted integers, int64 or int32")
    if table.dim() not in (1, 2) or not table.numel():
        raise ValueError(
            f"item_domains has shape {list(table.shape)}; wanted [V], or [V, G] with several "
            "domains per item"
        )
    return table.reshape(table.shape[0], -1).long()


def _domain_weights(
    num_domains: int | None, weights: DomainWeights | Tensor | Sequence[float] | None
) -> DomainWeights | None:
    if weights is None:
        return None if num_domains is None else DomainWeights(num_domains)
    built = weights if isinstance(weights, DomainWeights) else DomainWeights.constant(weights)
    if num_domains is not None and num_domains != built.num_domains:
        raise ValueError(
            f"num_domains is {num_domains} but weights has {built.num_domains} domains; leave "
            "num_domains out"
        )
    return built
