"""Sampled and in-batch softmax as a module, of embeddings or of rows of a table."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dwl_kernels.autograd import loss_of
from dwl_kernels.backends import Backend
from dwl_kernels.core.arguments import flag, ignored_id
from dwl_kernels.core.checks import check_choice
from dwl_kernels.core.problem import Correction, Problem, Reduction
from dwl_kernels.domains import DomainWeights
from dwl_kernels.modules.calls import Given
from dwl_kernels.modules.candidates import CandidateLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DynamicWeightedSampledSoftmax(CandidateLoss):
    r"""Log-Q corrected sampled softmax whose rows weigh what their domains need.

    It is called with embeddings, or with ids that name rows of a table::

        loss = loss_fn(query, positive)            # the other rows' positives are the negatives
        loss = loss_fn(query, positive, negative)  # negatives that all rows share, or per row
        loss = loss_fn(query, table=table, positive_ids=positive_ids, negative_ids=negative_ids)

    with ``query`` and ``positive`` ``[B, D]`` (or ``[..., D]``), ``negative`` ``[N, D]``, or
    ``[B, K, D]``, every row's own, ``table`` ``[V, D]``, ``positive_ids`` ``[B]`` and
    ``negative_ids`` ``[N]``, or per row ``[B, K]``. ``domain_ids`` ``[B]`` or ``[B, G]``, ids and
    log-Q of either side and ``example_weights`` ``[B]`` go in by name: see :meth:`forward`. It
    returns the loss, ``[]``, or ``[B]`` for ``reduction="none"``.

    .. math::
        z_{ij} = \langle q_i, c_j \rangle / \tau - \log Q_j, \qquad
        z_i^+ = \langle q_i, p_i \rangle / \tau - \log Q_i^+

        L = \frac{1}{norm} \sum_i w_i \Big(
            \log\big(e^{z_i^+} + \sum_j e^{z_{ij}}\big) - z_i^+ \Big)

    In training mode, with gradients enabled, every call feeds the domains of its rows to
    :class:`DomainWeights`, so domains that turn out sparse gain weight as training goes; in
    evaluation mode or under ``torch.no_grad()`` nothing is counted. A forward in the middle of a
    backward, which activation checkpointing runs again, is not counted again and keeps the weights
    of its first run, found by the likeness of query and domains. With neither ``num_domains`` nor
    ``weights`` it is the plain loss.

    Weighted training also tilts the scores: its optimum is ``p(j|x) w(j)``, normalised, for the
    weight ``w(j)`` that an example with target ``j`` would get. ``calibration`` ``c`` takes the
    tilt out by using ``log Q_j - c log w(j)`` in place of ``log Q_j``, for positive and candidates
    alike: 0 is the paper, 1 estimates ``p(j|x)`` again.

    Args:
        num_domains: Number of domains, for weights that all start at 1 and are measured while
            training.
        weights, domain_weights: Measured :class:`DomainWeights` instead; or ``[num_domains]``
            constant weights. Two names, one argument: the functions call it by the second.
        item_domains: ``[V]`` or ``[V, G]`` integers, the domains of every item, each named once, -1
            = none; a tensor, array, pandas object or list. :func:`domains_from_multi_hot` makes
            them of flags. Domains then follow from the ids, which index it. Not in ``state_dict``.
        calibration: ``c`` in [0, 1]. A candidate whose domains weigh 0 is then left out.
        temperature: Positive number, or ``[]`` or ``[1]`` without a gradient, that divides the
            scores; where learned, the one to start from. By default 1, and 0.05 with ``normalize``:
            a low temperature belongs to cosines.
        learn_temperature: Whether the temperature is a parameter, kept in ``[0.005, 50]``: float32,
            ``[1]``, whatever the model is cast to, and no candidate for weight decay; see
            :meth:`no_decay_parameters`.
        normalize: Whether to scale query, positive and negative to length 1. An embedding of zeros,
            a padding row say, stays zero and gets no gradient. Negatives per row of a ``table``
            take a scaled copy of all of it.
        correction: ``"standard"``, or ``"refined"`` (arXiv 2507.09331).
        reduction: ``"mean"`` over the rows whose example weight is not zero, ``"weighted_mean"``,
            ``"sum"`` or ``"none"``, as for :func:`sampled_softmax_loss`.
        remove_accidental_hits: Whether candidates with the id of a row's positive are left out for
            that row. Needs the ids of both; False compares no ids.
        ignore_index: The id that marks padding: a row with that positive is padded, as by
            ``example_weights`` 0, and a negative of that id is left out. None marks nothing.
        in_batch: Whether the positives of the other rows are candidates: True next to the negatives
            (mixed negatives), None where no negatives are given, False never.
        sparse_grad: Whether the gradient of a ``table`` is sparse, as for
            :func:`indexed_sampled_softmax_loss`.
        backend: As for :func:`sampled_softmax_loss`.
        process_group, ring, replicated_negatives: Candidates of all ranks, as for
            :func:`in_batch_softmax_loss`; a ``table`` is then whole on every rank, and negatives
            per row stay those of their row. Domains are counted over all ranks.

    Raises:
        TypeError: if an argument is of another type than named above.
        ValueError: if a number or a choice is not among those named above, if ``weights`` and
            ``num_domains`` disagree, if ``item_domains`` names a domain twice for an item, as flags
            do, or if ``calibration`` is asked for without weights or with the refined correction,
            which does not correct the positive.

    Source: Mittal et al. 2025, arXiv 2510.04375, in this package's form; the calibration is this
    package's.

    Example:
        >>> import torch
        >>> loss_fn = DynamicWeightedSampledSoftmax(num_domains=18)
        >>> query, positive, negative = torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(7, 8)
        >>> loss_fn(query, positive, negative, domain_ids=torch.tensor([0, 3, 3, -1]))
        tensor(2.0794)
        >>> loss_fn.domain_weights.interactions[3]
        tensor(2)
        >>> table = torch.nn.Embedding(50, 8)
        >>> ids = {"positive_ids": torch.arange(4), "negative_ids": torch.randint(50, (4, 7))}
        >>> loss = DynamicWeightedSampledSoftmax()(query, table=table.weight, **ids)
    """

    def __init__(
        self,
        num_domains: int | None = None,
        *,
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
            reduction=reduction,
            backend=backend,
            process_group=process_group,
        )
        check_choice("correction", correction, Correction)
        if calibration and correction == "refined":
            raise ValueError(
                "calibration corrects the positive too, and correction='refined' does not; "
                "pass correction='standard', or calibration=0"
            )
        self.correction: Correction = correction
        self.remove_accidental_hits = flag("remove_accidental_hits", remove_accidental_hits)
        self.ignore_index = None
        if ignore_index is not None:
            self.ignore_index = ignored_id(ignore_index)
        self.in_batch = None if in_batch is None else flag("in_batch", in_batch)
        self.sparse_grad = flag("sparse_grad", sparse_grad)
        self.ring = flag("ring", ring)
        self.replicated_negatives = flag("replicated_negatives", replicated_negatives)

    def forward(
        self,
        query: Tensor,
        positive: Tensor | None = None,
        negative: Tensor | None = None,
        *,
        table: Tensor | None = None,
        table_ids: Tensor | None = None,
        query_ids: Tensor | None = None,
        domain_ids: Tensor | None = None,
        negative_domain_ids: Tensor | None = None,
        positive_ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        positive_log_q: Tensor | None = None,
        negative_log_q: Tensor | None = None,
        example_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of embeddings, or of rows of a table.

        Args:
            query: ``[B, D]``, or ``[..., D]``; what is said to be ``[B]`` then is ``[...]``.
            positive: ``[B, D]``, one positive per row.
            negative: ``[N, D]`` candidates for all rows, or ``[B, K, D]``, every row's own;
                without, the other rows' positives.
            table: ``[V, D]`` in place of both: ``positive_ids`` and ``negative_ids`` name its rows,
                and negatives ``[B, K]`` are ``K`` of every row's own.
            table_ids: ``[V]`` integers, the item ids of the rows of the ``table``, where an item
                may stand in several: hits are found, and ``item_domains`` indexed, by them. -1
                marks a row that is no item.
            query_ids: ``[B]`` integers, the user or query of every row, -1 for none: in a batch
                positives of the same query are no candidates of the row.
            domain_ids: ``[B]`` or ``[B, G]`` integers, -1 = none; by default the domains of
                ``positive_ids`` in ``item_domains``.
            negative_domain_ids: ``[N]`` or ``[N, G]``, or ``[B, K]`` or ``[B, K, G]`` for negatives
                per row, used by ``calibration``; by default the domains of ``negative_ids`` in
                ``item_domains``.
            positive_ids, negative_ids: ``[B]`` and ``[N]`` integers, per row ``[B, K]`` negatives,
                -1 = no item: nobody's hit, not even another -1's. A negative of id -1 given by its
                embedding stays a candidate, one to be read from a ``table`` is left out. Every
                other integer is an id; a ``table`` and ``item_domains`` take ids that index them.
                Ids and domains may be NumPy arrays or pandas columns.
            positive_log_q, negative_log_q: ``[B]`` and ``[N]``, or ``[B, K]`` as the ids,
                log-probability (nats) of one draw, before ``calibration``; both or neither, where
                there are negatives. In a batch ``positive_log_q`` also corrects the positives as
                candidates.
            example_weights: ``[B]``, 0 marks a padded row, whose domain is not counted either.

        Returns:
            ``[]``, or ``[B]`` (``[...]``) for ``reduction="none"``; float32, or float64 for
            float64 embeddings.

        Raises:
            TypeError: as :func:`sampled_softmax_loss`.
            ValueError: if domains are needed and not given, if embeddings and a table are given
                together, if ``table`` and ``item_domains`` are not of the same length, if the
                options do not go with negatives per row, or as :func:`sampled_softmax_loss`.
            IndexError: if an id is out of range, on a CPU.
        """
        given = Given(
            table_ids=table_ids,
            query_ids=query_ids,
            positive_ids=positive_ids,
            negative_ids=negative_ids,
            domain_ids=domain_ids,
            negative_domain_ids=negative_domain_ids,
            positive_log_q=positive_log_q,
            negative_log_q=negative_log_q,
            example_weights=example_weights,
        )
        embeddings = query, positive, negative, table
        check = functools.partial(self._checked, embeddings, given)
        call, _ = self._on_all_ranks(self.process_group, query, check)
        weights = self._weigh(call.given.domain_ids, query)

        def build() -> Problem:
            return self._problem(embeddings, call, weights)

        if self.process_group is None:
            return loss_of(build(), query, self.backend, self.sparse_grad)
        from dwl_kernels.distributed.candidates import loss_across

        return loss_across(
            type(self).__name__,
            build,
            query,
            self.process_group,
            self.backend,
            ring=self.ring,
            replicated_negatives=self.replicated_negatives,
            sparse_grad=self.sparse_grad,
        )

    def _choices(self) -> dict[str, Any]:
        return {
            **super()._choices(),
            "correction": self.correction,
            "remove_accidental_hits": self.remove_accidental_hits,
            "ignore_index": self.ignore_index,
            "in_batch": self.in_batch,
            "sparse_grad": self.sparse_grad,
            "ring": self.ring,
            "replicated_negatives": self.replicated_negatives,
        }
