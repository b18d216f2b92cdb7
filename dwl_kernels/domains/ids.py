"""What users pass about domains: flags, ids, names and constant weights, checked.

For `weights`, `state` and the loss modules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from dwl_kernels.core.arguments import check_order, flags_of, real_numbers, wrong_type
from dwl_kernels.core.buffers import on_host
from dwl_kernels.core.values import checks_values, has_values


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


def names_of(names: Any, num_domains: int | None) -> list[str]:
    """One name per domain."""
    if isinstance(names, (str, bytes, Mapping, Set)) or not hasattr(names, "__iter__"):
        raise wrong_type("names", names, "a list with a name per domain")
    named = [str(name) for name in names]
    if num_domains is not None and len(named) != num_domains:
        raise ValueError(
            f"names has {len(named)} entries for {num_domains} domains; wanted one per domain"
        )
    return named


def slots_of(name: str, ids: Tensor) -> Tensor:
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


def dense(ids: Tensor) -> tuple[int, Tensor]:
    """The number of distinct ids, and each id's place among them."""
    distinct, place = torch.unique(ids, return_inverse=True)
    return len(distinct), place


def constant_weights(weights: Any) -> Tensor:  # [num_domains] float32
    """Weights that are given, checked."""
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
            f"weights has shape {list(values.shape)}; wanted [num_domains] with at least one domain"
        )
    if has_values(values):
        with on_host():
            wrong = not bool((values.isfinite() & (values >= 0)).all())
        if wrong:
            raise ValueError(
                f"weights is {values.tolist()}; wanted finite numbers that are not negative"
            )
    return values
