"""Accuracy, mean reciprocal rank and NDCG of ranks, over all rows or by domain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dwl_kernels.core.arguments import integer, integers
from dwl_kernels.core.values import check_distinct, checks_values


def accuracy_at(
    rank: Tensor, k: int, *, domain_ids: Tensor | None = None, num_domains: int | None = None
) -> Tensor:
    """The share of rows whose rank is at most ``k``, the recall of one relevant item.

    Args:
        rank: ``[B]``, or of any shape, integers, 1 the best, as :func:`rank_targets` and
            :func:`softmax_statistics` give them; rows of rank 0 are left out.
        k: how many items are shown.
        domain_ids: ``[B]`` or ``[B, G]`` integers, the domain, or the domains, of each row, each
            named once; -1 means none. The result is then one of each domain.
        num_domains: how many domains there are; None: as many as the largest id says.

    Returns:
        ``[]``, or ``[num_domains]``, float64; NaN where no row has a rank.

    Raises:
        TypeError, ValueError: no integers, a wrong shape, ``k`` below 1, or, on a CPU, a domain
            named twice in a row (flags taken for ids).
        IndexError: a domain id out of range, on a CPU.

    Example:
        >>> import torch
        >>> from dwl_kernels import accuracy_at
        >>> rank = torch.tensor([1, 3, 2, 0])
        >>> accuracy_at(rank, 2).item()
        0.6666666666666666
        >>> accuracy_at(rank, 2, domain_ids=torch.tensor([0, 0, 1, 1])).tolist()
        [0.5, 1.0]
    """
    rank, k = integers("rank", rank), integer("k", k, least=1)
    return _mean((rank <= k).double(), rank, domain_ids, num_domains)


def mrr(
    rank: Tensor, *, domain_ids: Tensor | None = None, num_domains: int | None = None
) -> Tensor:
    """The mean of ``1 / rank``.

    Args:
        rank: ``[B]``, or of any shape, integers, 1 the best; rows of rank 0 are left out.
        domain_ids, num_domains: ``[B]`` or ``[B, G]``, and a number, as for :func:`accuracy_at`.

    Returns:
        ``[]``, or ``[num_domains]``, float64; NaN where no row has a rank.

    Raises:
        TypeError, ValueError, IndexError: as :func:`accuracy_at`.

    Example:
        >>> import torch
        >>> from dwl_kernels import mrr
        >>> mrr(torch.tensor([1, 2, 0])).item()
        0.75
    """
    rank = integers("rank", rank)
    return _mean(1 / rank.clamp(min=1).double(), rank, domain_ids, num_domains)


def ndcg_at(
    rank: Tensor, k: int, *, domain_ids: Tensor | None = None, num_domains: int | None = None
) -> Tensor:
    """The mean of ``1 / log2(rank + 1)`` where the rank is at most ``k``, else 0.

    Args:
        rank: ``[B]``, or of any shape, integers, 1 the best; rows of rank 0 are left out.
        k: how many items are shown.
        domain_ids, num_domains: ``[B]`` or ``[B, G]``, and a number, as for :func:`accuracy_at`.

    Returns:
        ``[]``, or ``[num_domains]``, float64; NaN where no row has a rank.

    Raises:
        TypeError, ValueError, IndexError: as :func:`accuracy_at`.

    Example:
        >>> import torch
        >>> from dwl_kernels import ndcg_at
        >>> ndcg_at(torch.tensor([1, 3, 9]), 8).item()
        0.5
    """
    rank, k = integers("rank", rank), integer("k", k, least=1)
    gain = 1 / torch.log2(rank.clamp(min=1).double() + 1)
    return _mean(gain.masked_fill(rank > k, 0), rank, domain_ids, num_domains)


def _mean(
    gain: Tensor,  # [...]
    rank: Tensor,  # [...]
    domain_ids: Any,  # [...] or [..., G]
    num_domains: int | None,
) -> Tensor:  # [] or [num_domains]
    """The mean over the rows that have a rank, or over those of each domain."""
    ranked = rank > 0
    if domain_ids is None:
        if num_domains is not None:
            raise ValueError("num_domains is given without domain_ids; pass both, or neither")
        return gain.masked_fill(~ranked, 0).sum() / ranked.sum()
    ids = integers("domain_ids", domain_ids, rank.device)
    if ids.shape != rank.shape and ids.shape[:-1] != rank.shape:
        raise ValueError(
            f"domain_ids has shape {list(ids.shape)}; wanted {list(rank.shape)}, a domain per "
            f"rank, or {[*rank.shape, 'G']}, several"
        )
    ids = ids.reshape(rank.numel(), ids.numel() // max(rank.numel(), 1))
    largest = int(ids.max()) if ids.numel() and (num_domains is None or checks_values(ids)) else -1
    least = int(ids.min()) if ids.numel() and checks_values(ids) else -1
    if num_domains is None:
        num_domains = max(largest + 1, 0)
    num_domains = integer("num_domains", num_domains, least=0)
    if largest >= num_domains or least < -1:
        raise IndexError(
            f"domain_ids holds {largest if largest >= num_domains else least}, but num_domains is "
            f"{num_domains}: ids must be in [0, {num_domains}), or -1 for none"
        )
    if checks_values(ids):
        check_distinct("domain_ids", ids)
    counts = ranked.reshape(-1, 1) & (ids >= 0) & (ids < num_domains)
    slots = torch.where(counts, ids, num_domains).flatten().long()  # the last is nobody's
    weights = counts.double()
    sums = gain.new_zeros(2, num_domains + 1)
    sums[0].index_add_(0, slots, (gain.reshape(-1, 1) * weights).flatten())
    sums[1].index_add_(0, slots, weights.flatten())
    return sums[0, :num_domains] / sums[1, :num_domains]
