"""The five losses as formulas, differentiated by autograd; `solve` calls them.

For row ``i`` of ``B`` queries ``q``, its positive ``p_i`` and candidate ``j`` of ``N``, ``c_j``, or
``c_ij`` where every row has candidates of its own::

    z_ij  = <q_i, c_j> / tau_i - log Q_j       -inf where j has the id, or query, of row i
    z_i+  = <q_i, p_i> / tau_i - log Q+_i
    lse_i = log(exp z_i+ + sum_j exp z_ij)
    l_i   = lse_i - z_i+
    L     = sum_i w_i r_i l_i / norm           r_i = 1

Domain weights (arXiv 2510.04375): ``w_i`` is the example weight times the mean of ``W[d]`` over the
row's domains. Cumulative cross-entropy (arXiv 2301.00979): every item is a candidate, without
log-Q. A bias of an item stands in the place of ``-log Q_j``.

Refined correction (arXiv 2507.09331): the positive leaves the denominator and is not corrected, and
``r_i``, detached, weighs the row by how wrong it still is; ``n_i`` counts the row's candidates,
those that are no hits and not taken out by a log-Q of +inf::

    lse_i = log sum_j exp z_ij + log(1 - Q+_i)       r_i = sigmoid(lse_i - log n_i - z_i+)

Dual scale (after arXiv 2602.07206, in this package's form): the strengths h, s and k weigh the
candidates of a row and move its temperature, both detached::

    kappa_ij = n_i softmax_j(h <q_i, c_j> / tau + s <p_i, c_j> / tau)     over the row's candidates
    g_i      = mean over the slate of sigmoid(z_ij - z_i+)
    tau_i    = tau f_i / mean f,  f_i = clip(1 + k (g_i - mean g), 1/2, 2)
    z_ij     = <q_i, c_j> / tau_i - log Q_j + log kappa_ij

The slate has the strongest candidate of each of ``slate_size`` equal groups of candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwl_kernels.core.problem import Correction, Reduction

INF = torch.inf


def products(query: Tensor, positive: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """``<q_i, p_i>``, ``[B]``, and ``<q_i, c_j>`` or ``<q_i, c_ij>``, ``[B, N]``."""
    if candidates.dim() == 3:
        return (query * positive).sum(1), (candidates * query[:, None]).sum(2)
    return (query * positive).sum(1), query @ candidates.T


def log_sum_exp(z: Tensor) -> Tensor:  # [B, N] -> [B]
    """``log sum_j exp z_ij``; -inf, without a gradient, where all logits are."""
    largest = z.detach().amax(1) if z.shape[1] else z.new_full((len(z),), -INF)
    largest = largest.masked_fill(largest.isinf(), 0)  # inf - inf is NaN
    total = (z - largest[:, None]).exp().sum(1)
    nothing = total == 0
    return torch.where(nothing, -INF, largest + torch.where(nothing, 1.0, total).log())


def standard_loss(lse: Tensor, z_positive: Tensor) -> Tensor:  # [B], lse over the candidates
    """``l_i = log(1 + exp(lse_i - z_i+))``, which keeps the digits of a small loss."""
    nobody = (lse == -INF) & (z_positive == -INF)
    odds = torch.where(nobody, -INF, lse - z_positive)
    return torch.logaddexp(odds, torch.zeros_like(odds))


def row_losses(correction: Correction, lse: Tensor, z_positive: Tensor, r: Tensor) -> Tensor:  # [B]
    """``r_i l_i``, of ``lse_i`` over the candidates."""
    if correction == "standard":
        return standard_loss(lse, z_positive)
    return torch.where(r == 0, 0.0, r * (lse - z_positive))


def refined_factor(lse: Tensor, z_positive: Tensor, count: Tensor) -> Tensor:  # [B]
    """``r_i`` of the refined correction, 0 where a row has no candidates, ``count`` of them."""
    r = torch.sigmoid(lse - count.log() - z_positive)
    return torch.where(lse == -INF, 0.0, r)


def norm(reduction: Reduction, weight: Tensor, active: Tensor) -> Tensor:  # [B], [B] -> []
    """What the sum of rows is divided by: "mean" counts rows that are no padding."""
    if reduction == "mean":
        return active.sum().to(weight.dtype)
    return weight.sum() if reduction == "weighted_mean" else weight.new_ones(())


def log_kappa(x: Tensor, count: Tensor) -> Tensor:  # [B, N], [B]
    """``log kappa_ij`` of ``h <q_i, c_j> / tau + s <p_i, c_j> / tau``, -inf for no candidate."""
    return x.log_softmax(1) + count[:, None].log()


def competition(z: Tensor, z_positive: Tensor, slate_size: int) -> Tensor:  # [B, N], [B] -> [B]
    """``g_i``, from the strongest candidate of each group that has one."""
    n = z.shape[1]
    slate_size = min(slate_size, n)  # more groups than candidates: each is alone
    wins, size = torch.zeros_like(z_positive), torch.zeros_like(z_positive)
    for group in range(slate_size):
        start, stop = -(-group * n // slate_size), -(-(group + 1) * n // slate_size)
        best = z[:, start:stop].amax(1)
        there = best != -INF
        wins = wins + torch.where(there, torch.sigmoid(best - z_positive), 0.0)
        size = size + there
    return wins / size.clamp(min=1)


def temperature_factor(strength: float, g: Tensor, counts: Tensor) -> Tensor:  # [B]
    """``f_i / mean f``, means over the rows that count; 1 for the others."""
    n = counts.sum().clamp(min=1)
    f = (1 + strength * (g - torch.where(counts, g, 0.0).sum() / n)).clamp(0.5, 2.0)
    return torch.where(counts, f / (torch.where(counts, f, 0.0).sum() / n), 1.0)
