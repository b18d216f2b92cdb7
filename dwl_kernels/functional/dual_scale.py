"""The loss of two scales: dual-scale softmax."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from torch import Tensor

from dwl_kernels.autograd import loss_of
from dwl_kernels.backends import Backend
from dwl_kernels.core.build import dual_problem
from dwl_kernels.core.problem import Correction, Reduction
from dwl_kernels.functional.sampled import loss_over_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def dual_scale_softmax_loss(
    query: Tensor,
    positive: Tensor,
    negative: Tensor | None = None,
    *,
    hardness: float = 0.0,
    similarity: float = 0.0,
    slate_size: int = 16,
    competition: float = 1.0,
    in_batch: bool | None = None,
    positive_log_q: Tensor | None = None,
    negative_log_q: Tensor | None = None,
    positive_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    ignore_index: int | None = None,
    domain_ids: Tensor | None = None,
    domain_weights: Tensor | None = None,
    example_weights: Tensor | None = None,
    temperature: float | Tensor | None = None,
    correction: Correction = "standard",
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    process_group: ProcessGroup | None = None,
    replicated_negatives: bool = False,
) -> Tensor:
    r"""Sampled softmax on two scales: candidates weighed by hardness, rows by their competition.

    .. math::
        \kappa_{ij} = n_i \, \mathrm{softmax}_j\big((h \langle q_i, c_j \rangle
            + s \langle p_i, c_j \rangle) / \tau\big), \qquad
        z_{ij} = \langle q_i, c_j \rangle / \tau_i + \log \kappa_{ij} - \log Q_j

        \tau_i \propto \tau \, \mathrm{clip}(1 + k (g_i - \bar g), 1/2, 2), \qquad
        g_i = \mathrm{mean}_{j \in slate_i} \, \sigma(z_{ij} - z_i^+)

    The weights have mean one over the ``n_i`` candidates of a row that are no hits and not taken
    out by a log-Q of ``+inf``, the temperatures have mean ``tau`` over the batch, and both are
    detached. With all strengths 0 it is :func:`sampled_softmax_loss`, exactly.

    The form is this package's own. It has every property that the abstract of the paper names, and
    claims no reproduction of the paper's equations. By default competition alone is on, best on
    average on validation items of MovieLens 1M, Amazon Beauty and Last.fm, by matrix factorisation
    on cosines.

    Args:
        query: ``[B, D]``, or ``[..., D]``, the embeddings of the queries or time steps.
        positive: ``[B, D]``, the embedding each query should score highest.
        negative: ``[N, D]``, the embeddings of the sampled negatives; without, the positives of the
            other rows are the candidates, as for :func:`in_batch_softmax_loss`.
        hardness: ``h``, how much more a candidate weighs that the query itself scores high; below
            0, how much less, like the other two strengths: any finite number keeps the loss finite.
        similarity: ``s``, how much more a candidate weighs that is like the positive. Where ``s
            <positive, candidate> / temperature`` is in the thousands, logits are small differences
            of large numbers, and lose digits short of float64.
        slate_size: candidates fall, in their order, into so many equal groups; the strongest of
            each make the slate of a row. Candidates drawn at random make this a stochastic top-K.
        competition: ``k``, how much warmer a row gets whose slate competes harder than others'.
        in_batch: True takes the positives of the other rows as candidates next to ``negative``.
            ``positive_log_q`` and ``positive_ids`` then describe their two roles. None does so
            where there is no ``negative``.
        positive_log_q, negative_log_q: ``[B]`` and ``[N]``, log-probability (nats) of one draw, as
            for :func:`sampled_softmax_loss`.
        positive_ids, negative_ids: ``[B]`` and ``[N]`` integers, the item ids, likewise.
        query_ids: ``[B]`` integers, the query of every row, as for :func:`in_batch_softmax_loss`;
            in a batch only.
        ignore_index: the id that marks padding, as for :func:`sampled_softmax_loss`.
        domain_ids, domain_weights: ``[B]`` or ``[B, G]`` integers, and ``[num_domains]``, the
            domains of the rows and what they weigh, as for :func:`sampled_softmax_loss`.
        example_weights, temperature: ``[B]``, and a number, ``[]`` or ``[B]``, likewise.
        correction, reduction, backend: as for :func:`sampled_softmax_loss`.
        process_group, replicated_negatives: candidates of all ranks, as for
            :func:`in_batch_softmax_loss`; the means are over the rows of all ranks.

    Returns:
        The loss, ``[]``, or ``[B]`` for ``"none"``, of the dtype that :func:`sampled_softmax_loss`
        gives.

    Raises:
        ValueError: an infinite strength, an empty slate, or as :func:`sampled_softmax_loss`.
        TypeError, IndexError, RuntimeError: as :func:`sampled_softmax_loss`.

    Source: after Sahyouni et al. 2026, arXiv 2602.07206.

    Example:
        >>> import torch
        >>> from dwl_kernels import dual_scale_softmax_loss
        >>> query, negative = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> strengths = {"hardness": 1.0, "similarity": 1.0, "slate_size": 1}
        >>> dual_scale_softmax_loss(query, query, negative, reduction="none", **strengths)
        tensor([1.0504, 0.4981])
    """
    build = functools.partial(
        dual_problem,
        query,
        positive,
        negative,
        hardness=hardness,
        similarity=similarity,
        slate_size=slate_size,
        competition=competition,
        in_batch=in_batch,
        positive_log_q=positive_log_q,
        negative_log_q=negative_log_q,
        positive_ids=positive_ids,
        negative_ids=negative_ids,
        query_ids=query_ids,
        ignore_index=ignore_index,
        domain_ids=domain_ids,
        domain_weights=domain_weights,
        example_weights=example_weights,
        temperature=temperature,
        correction=correction,
        reduction=reduction,
    )
    if process_group is None:
        return loss_of(build(), query, backend)
    options = {"replicated_negatives": replicated_negatives}
    return loss_over_ranks(
        "dual_scale_softmax_loss", build, query, process_group, backend, ring=False, **options
    )
