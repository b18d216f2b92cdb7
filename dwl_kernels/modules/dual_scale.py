"""The dual-scale softmax as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dwl_kernels.backends import Backend
from dwl_kernels.core.build import effective_dual
from dwl_kernels.core.problem import Correction, DualScale, Reduction
from dwl_kernels.domains import DomainWeights
from dwl_kernels.modules.sampled import DynamicWeightedSampledSoftmax

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DualScaleSampledSoftmax(DynamicWeightedSampledSoftmax):
    r"""Sampled softmax on two scales, under the log-Q, hits and domain weights of its base class.

    It is called as :class:`DynamicWeightedSampledSoftmax` is, with candidates that all rows share::

        loss = loss_fn(query, positive)            # the other rows' positives are the negatives
        loss = loss_fn(query, positive, negative)  # [B, D], [B, D], [N, D]
        loss = loss_fn(query, table=table, positive_ids=positive_ids, negative_ids=negative_ids)

    with ``table`` ``[V, D]``, ``positive_ids`` ``[B]`` and ``negative_ids`` ``[N]``. Domains, ids
    and log-Q go in by name: see :meth:`forward`. It returns the loss, ``[]``, or ``[B]`` for
    ``reduction="none"``.

    .. math::
        \kappa_{ij} = n_i \, \mathrm{softmax}_j\big((h \langle q_i, c_j \rangle
            + s \langle p_i, c_j \rangle) / \tau\big), \qquad
        z_{ij} = \langle q_i, c_j \rangle / \tau_i + \log \kappa_{ij} - \log Q_j

        \tau_i \propto \tau \, \mathrm{clip}(1 + k (g_i - \bar g), 1/2, 2), \qquad
        g_i = \mathrm{mean}_{j \in slate_i} \, \sigma(z_{ij} - z_i^+)

    Within a row its ``n_i`` candidates, those that are no hits and not taken out by a log-Q of
    ``+inf``, weigh by how hard they are and how like the positive; between rows the temperature
    moves with how hard the strongest candidates, the slate, compete. Both are detached, and with
    all three strengths 0 it is the base class, exactly.

    The form is this package's own. It has every property that the abstract of the paper names, and
    claims no reproduction of the paper's equations. By default competition alone is on, best on
    average on validation items of MovieLens 1M, Amazon Beauty and Last.fm, by matrix factorisation
    on cosines.

    Args:
        num_domains: Number of domains, for weights that are measured while training.
        hardness: ``h``. At 1 a candidate weighs in proportion to the probability that the model
            gives it among the candidates; at 0 all weigh alike, and below 0 easy candidates weigh
            more: at -1 as much more as makes all of them compete alike.
        similarity: ``s``, in the same units: at 1 in proportion to the probability that the
            positive, in the place of the query, would give it; below 0 what is like the positive,
            and may be as good, weighs less.
        slate_size: The strongest of so many equal groups of candidates make the slate. The standard
            error of a mean over 16 numbers in [0, 1] is at most 1/8, and with hundreds of
            candidates each of the 16 is still the strongest of many.
        competition: ``k``. Intensities lie in [0, 1], so that at 1 the upper clip, twice the
            temperature, is just never needed; below 0 a contested row gets colder.
        weights, domain_weights: :class:`DomainWeights`, or ``[num_domains]`` constant weights.
        item_domains: ``[V]`` or ``[V, G]`` integers, the domains of every item.
        temperature, learn_temperature: A positive number, ``[]`` or ``[1]``, and whether it is
            learned.
        calibration, normalize, correction, reduction: These, and what stands above without a
            letter, as for :class:`DynamicWeightedSampledSoftmax`.
        remove_accidental_hits, ignore_index, in_batch, sparse_grad, backend: Likewise.
        process_group, ring, replicated_negatives: Likewise. Means are over the rows of all ranks,
            and a ring raises in :meth:`forward`, unless all strengths are 0.

    Raises:
        ValueError: if a strength is not finite, if the slate is empty, or as
            :class:`DynamicWeightedSampledSoftmax`. Negatives per row raise it in :meth:`forward`.
        TypeError: as :class:`DynamicWeightedSampledSoftmax`.

    Source: after Sahyouni et al. 2026, arXiv 2602.07206.

    Example:
        >>> import torch
        >>> loss_fn = DualScaleSampledSoftmax(2, hardness=1.0, similarity=1.0, slate_size=1)
        >>> query, negative = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> loss_fn(query, query, negative, domain_ids=torch.tensor([0, 1]))
        tensor(0.7743)
    """

    _takes_negatives_per_row = False

    def __init__(
        self,
        num_domains: int | None = None,
        *,
        hardness: float = 0.0,
        similarity: float = 0.0,
        slate_size: int = 16,
        competition: float = 1.0,
        weights: DomainWeights | Tensor | Sequence[float] | None = None,
        domain_weights: DomainWeights | Tensor | Sequence[float] | None = None,
        item_domains: Any = None,
        calibration: float = 0.0,
        temperature: float | Tensor | None = None,
        learn_temperature: bool = False,
        normalize: bool = False,
        correction: Correction = "standard",
        reduction: Reduction = "mean",
        remove_accidental_hits: bool = True,
        ignore_index: int | None = None,
        in_batch: bool | None = None,
        sparse_grad: bool = False,
        backend: Backend = "auto",
        process_group: ProcessGroup | None = None,
        ring: bool = False,
        replicated_negatives: bool = False,
    ) -> None:
        super().__init__(
            num_domains,
            weights=weights,
            domain_weights=domain_weights,
            item_domains=item_domains,
            calibration=calibration,
            temperature=temperature,
            learn_temperature=learn_temperature,
            normalize=normalize,
            correction=correction,
            reduction=reduction,
            remove_accidental_hits=remove_accidental_hits,
            ignore_index=ignore_index,
            in_batch=in_batch,
            sparse_grad=sparse_grad,
            backend=backend,
            process_group=process_group,
            ring=ring,
            replicated_negatives=replicated_negatives,
        )
        self.scales = DualScale(hardness, similarity, slate_size, competition)
        effective_dual(self.scales)  # checks them
        self._dual = self.scales

    def _choices(self) -> dict[str, Any]:
        return {**self.scales._asdict(), **super()._choices()}
