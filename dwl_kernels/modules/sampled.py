"""Sampled and in-batch softmax as a module, of embeddings or of rows of a table."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from dwl_kernels.autograd import loss_of
from dwl_kernels.backends import Backend
from dwl_kernels.core.arguments import check_dense, flag
from dwl_kernels.core.build import (
    in_batch_problem,
    per_row_problem,
    sampled_problem,
    table_ids,
    takes_batch,
)
from dwl_kernels.core.checks import Calibrated, both_or_none, check_choice
from dwl_kernels.core.problem import Correction, DualScale, Problem, Reduction
from dwl_kernels.domains import DomainWeights
from dwl_kernels.modules.calls import Call, Given, rows_of_table
from dwl_kernels.modules.checks import check_candidates, check_tensors, checked_ids, padding
from dwl_kernels.modules.normalize import normalised
from dwl_kernels.modules.weighted import WeightedLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DynamicWeightedSampledSoftmax(WeightedLoss):
    r"""Log-Q corrected sampled softmax whose rows weigh what their domains need.

    It is called with embeddings, or with ids that name rows of a table::

        loss = loss_fn(query, positive)            # the other rows' positives are the negatives
        loss = loss_fn(query, positive, negative)  # negatives that all rows share
        loss = loss_fn(query, table=table, positive_ids=positive_ids, negative_ids=negative_ids)

    with ``query`` and ``positive`` ``[B, D]`` (or ``[..., D]``), ``negative`` ``[N, D]``, ``table``
    ``[V, D]``, ``positive_ids`` ``[B]`` and ``negative_ids`` ``[N]``, or of a table ``[B, K]``,
    every row's own. ``domain_ids`` ``[B]`` or ``[B, G]``, ids and log-Q of either side and
    ``example_weights`` ``[B]`` go in by name: see :meth:`forward`. It returns the loss, ``[]``, or
    ``[B]`` for ``reduction="none"``.

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

    _takes_negatives_per_row = True
    _dual: DualScale | None = None

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
            negative: ``[N, D]`` candidates for all rows; without, the other rows' positives.
            table: ``[V, D]`` in place of both: ``positive_ids`` and ``negative_ids`` name its rows,
                and negatives ``[B, K]`` are ``K`` of every row's own.
            domain_ids: ``[B]`` or ``[B, G]`` integers, -1 = none; by default the domains of
                ``positive_ids`` in ``item_domains``.
            negative_domain_ids: ``[N]`` or ``[N, G]``, or ``[B, K]`` or ``[B, K, G]`` for negatives
                per row, used by ``calibration``; by default the domains of ``negative_ids`` in
                ``item_domains``.
            positive_ids, negative_ids: ``[B]`` and ``[N]`` integers, or of a ``table`` ``[B, K]``
                negatives, -1 = no item: nobody's hit, not even another -1's. A negative of id -1
                given by its embedding stays a candidate, one to be read from a ``table`` is left
                out. Every other integer is an id; a ``table`` and ``item_domains`` take ids that
                index them. Ids and domains may be
                NumPy arrays or pandas columns.
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

    def _checked(self, embeddings: tuple[Any, ...], given: Given) -> Call:
        """What the arguments of `forward` ask for."""
        query, positive, negative, table = embeddings
        example_weights = given.example_weights
        check_dense("query", query)
        check_tensors(
            positive=positive,
            negative=negative,
            table=table,
            positive_log_q=given.positive_log_q,
            negative_log_q=given.negative_log_q,
            example_weights=example_weights,
        )
        names = "positive_ids", "negative_ids", "domain_ids", "negative_domain_ids"
        ids = checked_ids(query, **{name: getattr(given, name) for name in names})
        given = given._replace(**dict(zip(names, ids, strict=True)))
        positive_ids, negative_ids = given.positive_ids, given.negative_ids
        log_q = given.positive_log_q, given.negative_log_q
        check_candidates(positive, negative, table, positive_ids, negative_ids, log_q[1])
        if table is not None:
            self._check_items(table)
        padded = padding(example_weights, query.shape[:-1])
        negatives = None if negative is None else negative.shape[:1]  # [N] or [B, K]
        if table is not None and negative_ids is not None:
            negatives = negative_ids.shape
        in_batch = takes_batch(self.in_batch, negatives is not None)
        per_row = negatives is not None and len(negatives) != 1
        if per_row:
            self._check_per_row()
        if negatives is not None:  # before calibration, which makes both
            both_or_none("positive_log_q", log_q[0], "negative_log_q", log_q[1])
        items = "positive_ids", positive_ids
        domains = self._domains_of_rows(("domain_ids", given.domain_ids), items, query, padded)
        return Call(given._replace(domain_ids=domains), padded, negatives, in_batch, per_row)

    def _problem(
        self,
        embeddings: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
        call: Call,
        weights: Tensor | None,  # [num_domains]
    ) -> Problem:
        """The problem of the rows that were given."""
        query, positive, negative, table = embeddings
        given, padded = call.given, call.padded
        draws: dict[str, Any] = {
            "positive_ids": given.positive_ids,
            "negative_ids": given.negative_ids,
            "positive_log_q": given.positive_log_q,
            "negative_log_q": given.negative_log_q,
        }
        if given.domain_ids is not None and weights is not None and self.calibration:
            tilt = self._tilt(given.domain_ids, weights)
            if not call.in_batch:
                # A row of weight 0 is nobody's candidate, and needs no correction.
                tilt = tilt.masked_fill(tilt == -math.inf, 0.0)
            draws["positive_log_q"] = Calibrated(given.positive_log_q, tilt)
            if call.negatives is not None:
                candidate_domains = self._domains_of(
                    ("negative_domain_ids", given.negative_domain_ids),
                    ("negative_ids", given.negative_ids),
                    call.negatives,
                    padded[..., None] if call.per_row and padded is not None else None,
                )
                tilt = self._tilt(candidate_domains, weights)
                draws["negative_log_q"] = Calibrated(given.negative_log_q, tilt)
        rows: dict[str, Any] = {
            "domain_ids": given.domain_ids,
            "domain_weights": weights,
            "example_weights": given.example_weights,
            "temperature": self.temperature,
            "correction": self.correction,
            "reduction": self.reduction,
        }
        if call.per_row:
            assert table is not None  # only ids of a table are per row
            if self.normalize:
                query, table = normalised(query, padded), normalised(table, drawn=True)
            ids = draws.pop("positive_ids"), draws.pop("negative_ids")
            positive_ids, negative_ids = table_ids(query, table, *ids, given.example_weights)
            draws |= {"positive_ids": positive_ids, "negative_ids": negative_ids}
            return per_row_problem(query, table, **draws, **rows)
        if table is not None:
            options = self.sparse_grad, self.backend
            read = rows_of_table(query, table, given.example_weights, draws, *options)
            positive, negative = read
        assert positive is not None  # `check_candidates` has looked
        if self.normalize:
            query, positive = normalised(query, padded), normalised(positive, padded)
            negative = None if negative is None else normalised(negative)
        if not self.remove_accidental_hits:
            draws |= {"positive_ids": None, "negative_ids": None}
        elif negative is not None and (given.positive_ids is None) != (given.negative_ids is None):
            raise ValueError(
                "hits are found by the ids of both sides, and one of positive_ids and negative_ids "
                "is missing; pass both, or remove_accidental_hits=False to the module"
            )
        if not call.in_batch:
            candidates = cast("Tensor", negative)
            return sampled_problem(query, positive, candidates, dual=self._dual, **draws, **rows)
        return in_batch_problem(
            query,
            positive,
            log_q=draws.pop("positive_log_q"),
            ids=draws.pop("positive_ids"),
            negative=negative,
            prefix="positive_",
            dual=self._dual,
            **draws,
            **rows,
        )

    def _check_per_row(self) -> None:
        """ValueError where an option does not go with negatives of every row's own."""
        for conflict, reason in (
            (
                not self._takes_negatives_per_row,
                f"{type(self).__name__} takes negatives that all rows share: pass [N]",
            ),
            (
                self.in_batch,
                "in_batch=True goes with negatives that all rows share: pass [N], or leave "
                "in_batch out",
            ),
            (
                not self.remove_accidental_hits,
                "hits among them are always removed: pass [N], or leave remove_accidental_hits out",
            ),
            (
                self.normalize and self.sparse_grad,
                "normalize makes the gradient of their table dense: pass [N], or sparse_grad=False",
            ),
        ):
            if conflict:
                raise ValueError(f"negative_ids names negatives per row, but {reason}")

    def _choices(self) -> dict[str, Any]:
        return {
            **super()._choices(),
            "correction": self.correction,
            "remove_accidental_hits": self.remove_accidental_hits,
            "in_batch": self.in_batch,
            "sparse_grad": self.sparse_grad,
            "ring": self.ring,
            "replicated_negatives": self.replicated_negatives,
        }
