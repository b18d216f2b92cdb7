"""Cross-entropy over a whole table as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from dwl_kernels.backends import Backend
from dwl_kernels.core.arguments import check_dense, flag, ignored_id, is_distributed
from dwl_kernels.core.build import checked_skip_threshold
from dwl_kernels.core.problem import Reduction
from dwl_kernels.domains import DomainWeights
from dwl_kernels.functional import full_softmax_loss
from dwl_kernels.functional.table import shard_of
from dwl_kernels.modules.checks import check_rows, check_tensors, checked_ids, padding
from dwl_kernels.modules.normalize import normalised
from dwl_kernels.modules.weighted import WeightedLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CumulativeCrossEntropy(WeightedLoss):
    r"""Cross-entropy of every time step of every sequence over the whole table of items.

    It is called with the states of the time steps and the table of all items::

        loss = loss_fn(states, table, target)  # [batch, time, D], [V, D], [batch, time]

    ``target`` names the row of the table that follows each step; any leading dimensions ``[...]``
    do. ``bias`` ``[V]``, ``domain_ids`` ``[...]`` or ``[..., G]`` and ``example_weights`` ``[...]``
    go in by name: see :meth:`forward`. It returns the loss, ``[]``, or ``[...]`` for
    ``reduction="none"``.

    .. math::
        z_{iv} = \langle q_i, c_v \rangle / \tau + b_v, \qquad
        L = \frac{1}{norm} \sum_i w_i \Big( \log \sum_v e^{z_{iv}} - z_{i y_i} \Big)

    A row ``i`` is a time step. Nothing is sampled, so there is no log-Q, and the ``[rows, V]``
    matrix of logits is never in memory. Domain weights, what they count in training mode, and their
    tilt are those of :class:`DynamicWeightedSampledSoftmax`; with neither ``num_domains`` nor
    ``weights`` it is the plain loss.

    Args:
        num_domains: Number of domains, for weights that all start at 1 and are measured while
            training.
        weights, domain_weights: Measured :class:`DomainWeights` instead; or ``[num_domains]``
            constant weights. Two names, one argument.
        item_domains: ``[V]`` or ``[V, G]`` integers, the domains of every item, as for
            :class:`DynamicWeightedSampledSoftmax`. Domains then follow from the target.
        calibration: ``c`` in [0, 1]: ``c log w(v)`` is added to the bias of every item. Needs
            ``item_domains``.
        temperature, learn_temperature: A positive number, ``[]`` or ``[1]``, and whether it is
            learned, as for :class:`DynamicWeightedSampledSoftmax`; 1 in the paper.
        normalize: Whether to scale query and table to length 1. An embedding of zeros, a padding
            row say, stays zero and gets no gradient.
        ignore_index: The target that marks a padded step: it gives exact zeros, does not count in
            any norm, nor do its domains, and NaN in its embedding does not leak.
        reduction: ``"mean"`` over the steps that are not padded, ``"weighted_mean"``, ``"sum"`` or
            ``"none"``, as for :func:`full_softmax_loss`.
        skip_threshold: Leaves small probabilities out of the gradients, as for
            :func:`full_softmax_loss`; 0 leaves out none.
        backend: As for :func:`full_softmax_loss`.
        process_group, replicated_rows: A table that is spread over ranks, as for
            :func:`full_softmax_loss`. ``item_domains`` are of the whole table, and domains are
            counted over all ranks, or with ``replicated_rows`` once for all.

    Raises:
        TypeError: if an argument is of another type than named above.
        ValueError: if a number or a choice is not among those named above, if ``weights`` and
            ``num_domains`` disagree, if ``item_domains`` names a domain twice for an item, or if
            ``calibration`` lacks weights or ``item_domains``.

    Source: Li et al. 2023, arXiv 2301.00979; domain weights as in arXiv 2510.04375.

    Example:
        >>> import torch
        >>> loss_fn = CumulativeCrossEntropy(ignore_index=0)  # item 0 is the padding
        >>> states, table = torch.zeros(2, 3, 8), torch.zeros(5, 8)  # two sequences of three steps
        >>> loss_fn(states, table, torch.tensor([[4, 2, 1], [3, 0, 0]]))  # log 5
        tensor(1.6094)
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
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        skip_threshold: float = 0.0,
        backend: Backend = "auto",
        process_group: ProcessGroup | None = None,
        replicated_rows: bool = False,
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
        if calibration and self.item_domains is None:
            raise ValueError(
                "calibration needs the domains of all items, which are the candidates; pass "
                "item_domains"
            )
        self.ignore_index = ignored_id(ignore_index)
        self.skip_threshold = checked_skip_threshold(skip_threshold)
        self.replicated_rows = flag("replicated_rows", replicated_rows)
        if self.replicated_rows and self.domain_weights is not None:
            self.domain_weights.process_group = None  # all ranks count the same rows

    def forward(
        self,
        query: Tensor,
        table: Tensor,
        target: Tensor,
        *,
        bias: Tensor | None = None,
        domain_ids: Tensor | None = None,
        example_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of the time steps.

        Args:
            query: ``[..., D]``, ``[batch, time, D]`` say, the states of the time steps.
            table: ``[V, D]``, the embeddings of all items; in a process group those of this rank's
                shard, or a ``DTensor``.
            target: ``[...]`` integers, the row of the table that follows each step. Ids and domains
                may be NumPy arrays or pandas columns.
            bias: ``[V]``, added to the logit of every item, with a gradient.
            domain_ids: ``[...]`` or ``[..., G]`` integers, -1 = none; by default the domains of
                ``target`` in ``item_domains``.
            example_weights: ``[...]``, 0 marks a padded step.

        Returns:
            ``[]``, or ``[...]`` for ``reduction="none"``; float32, or float64 for float64
            embeddings.

        Raises:
            TypeError: as :func:`full_softmax_loss`.
            ValueError: if domains are needed and not given, if ``table`` and ``item_domains`` are
                not of the same length, or as :func:`full_softmax_loss`.
            IndexError: if a target or a domain is out of range, on a CPU.
        """

        group = self.process_group
        if group is not None or is_distributed(table):
            table, group = shard_of(table, group)

        def check() -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
            check_dense("query", query)
            check_dense("table", table)
            own = bias
            if bias is not None and group is not None:
                own, _ = shard_of(bias, group, "bias")
            check_tensors(bias=own, example_weights=example_weights)
            checked = checked_ids(query, target=target, domain_ids=domain_ids)
            targets, leading = cast("Tensor", checked[0]), query.shape[:-1]
            if group is None:
                self._check_items(table)
            check_rows("target", targets, leading)
            padded = targets == self.ignore_index
            weightless = padding(example_weights, leading)
            padded = padded if weightless is None else padded | weightless
            items = "target", targets
            domains = self._domains_of_rows(("domain_ids", checked[1]), items, query, padded)
            if own is not None:
                check_rows("bias", own, table.shape[:1])
            return targets, domains, padded, own

        num_items = len(table) if isinstance(table, Tensor) and table.dim() else 0
        checked, items = self._on_all_ranks(group, query, check, num_items)
        target, domain_ids, padded, bias = checked
        if group is not None:
            self._check_items(table, sum(items))
        weights = self._weigh(domain_ids, query)
        if weights is not None and self.calibration:
            assert self.item_domains is not None  # the constructor has looked
            first = 0 if group is None else sum(items[: group.rank])
            tilt = self._tilt(self.item_domains[first : first + num_items], weights)
            bias = tilt if bias is None else bias + tilt
        if self.normalize:
            query, table = normalised(query, padded), normalised(table)
        return full_softmax_loss(
            query,
            table,
            target,
            bias=bias,
            ignore_index=self.ignore_index,
            domain_ids=domain_ids,
            domain_weights=weights,
            example_weights=example_weights,
            temperature=self.temperature,
            reduction=self.reduction,
            skip_threshold=self.skip_threshold,
            backend=self.backend,
            process_group=group,
            replicated_rows=self.replicated_rows,
        )

    def _choices(self) -> dict[str, Any]:
        return {
            **super()._choices(),
            "ignore_index": self.ignore_index,
            "skip_threshold": self.skip_threshold,
            "replicated_rows": self.replicated_rows,
        }
