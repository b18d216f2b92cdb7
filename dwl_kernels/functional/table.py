"""The losses over the rows of a table: all of them, or those that are given by id."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from dwl_kernels.autograd import loss_of
from dwl_kernels.backends import Backend, check_name
from dwl_kernels.core.arguments import flag, is_distributed
from dwl_kernels.core.build import full_problem, sampled_problem
from dwl_kernels.core.checks import padded_by_id
from dwl_kernels.core.drawn import (
    checked_table_ids,
    item_ids,
    leave_out_no_items,
    left_out,
    per_row_problem,
    table_rows,
)
from dwl_kernels.core.problem import Correction, Problem, Reduction, SharedProblem
from dwl_kernels.gather import shared_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from dwl_kernels.distributed.group import Group


def full_softmax_loss(
    query: Tensor,
    table: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    table_ids: Tensor | None = None,
    ignore_index: int = -100,
    domain_ids: Tensor | None = None,
    domain_weights: Tensor | None = None,
    example_weights: Tensor | None = None,
    temperature: float | Tensor | None = None,
    reduction: Reduction = "mean",
    skip_threshold: float = 0.0,
    backend: Backend = "auto",
    process_group: ProcessGroup | None = None,
    replicated_rows: bool = False,
) -> Tensor:
    r"""Softmax cross-entropy over a whole table of items, without its logits in memory.

    .. math::
        z_{iv} = \langle q_i, c_v \rangle / \tau_i + b_v, \qquad
        \ell_i = \log \sum_v e^{z_{iv}} - z_{i y_i}

    This is ``torch.nn.functional.cross_entropy(query @ table.T / temperature + bias, target)``, to
    rounding, with weights. Every time step of every sequence may be a row (the cumulative
    cross-entropy): ``query`` ``[batch, time, D]`` with ``target`` ``[batch, time]``.

    Args:
        query: ``[T, D]``, or ``[..., D]``, the embeddings of the queries or hidden states of the
            time steps.
        table: ``[V, D]``, the embeddings of all items.
        target: ``[T]`` integers, the row of the table that each query should score highest.
        bias: ``[V]``, added to the logit of every item, with a gradient.
        table_ids: ``[V]`` integers, the item ids of the rows of the table, where an item may stand
            in several: other rows of the item of a row's target are no candidates of that row. -1
            marks a row that is no item: nobody's candidate, and as a target of infinite loss.
        ignore_index: the target that marks a padded row: it gives exact zeros, does not count in
            any norm, and NaN in its embedding does not leak.
        domain_ids, domain_weights: ``[T]`` or ``[T, G]`` integers, and ``[num_domains]``, the
            domains of the rows and what they weigh, as for :func:`sampled_softmax_loss`.
        example_weights, temperature: ``[T]``, and a number, ``[]`` or ``[T]``, likewise.
        reduction, backend: as for :func:`sampled_softmax_loss`.
        skip_threshold: faster, less exact gradients: a block of (rows x items) may be left out of
            them when ``w_i p_iv < skip_threshold`` for every pair in it, with ``p_iv`` the
            probability of item ``v`` and ``w_i`` the weight of the row before the norm divides it.
            The loss is exact, and the target's own entry always counts. 0 leaves nothing out, as
            does a table in shards.
        process_group: the ranks that the table is spread over. ``table``, and what describes its
            rows, are then the shard of this rank: consecutive rows, in the order of the ranks, as
            many as you like. A ``DTensor`` with ``Shard(0)`` needs no group. ``target`` is a row of
            the whole table. Weights that FSDP2 has gathered are no shard, and with a group every
            item would count once for each rank: pass them as the ``DTensor`` that they are when
            sharded, which the root of ``fully_shard`` is after a forward with
            ``reshard_after_forward=True``.
        replicated_rows: whether all ranks pass the same rows, as in tensor parallelism; else each
            passes rows of its own.

    Of a table in shards no rank ever holds all. Every rank returns the loss of all rows, and the
    gradient of its shard is the whole gradient of that part and needs no further reduction. Those
    of the rows, averaged over ranks, are those of one process that holds all of it; with
    ``replicated_rows`` they are that on every rank. See also :func:`in_batch_softmax_loss`.

    With ``epsilon = skip_threshold``, what is left out of ``dL/dz_iv`` is less than
    ``epsilon / norm`` per pair, hence

    .. math::
        |\delta_{q_i}| \le \frac{\epsilon}{norm \; \tau_i} \sum_v |c_v|, \qquad
        |\delta_{c_v}| \le \frac{\epsilon}{norm} \sum_i \frac{|q_i|}{\tau_i}, \qquad
        |\delta_{b_v}| \le \frac{\epsilon \, T}{norm}, \qquad
        |\delta_{\tau_i}| \le \frac{|q_i| |\delta_{q_i}|}{\tau_i}

    with sums over the rows that are not padding, times the upstream gradient (``"none"``: that of
    each row, inside the sums). Which blocks are left out depends on the backend, so the gradients
    of two backends differ within these bounds; ``"cpu"`` and ``"triton"`` leave blocks out,
    ``"eager"``, ``"chunked"`` and ``"cuda"`` nothing.

    Returns:
        The loss, ``[]``, or ``[T]`` for ``"none"``, of the dtype that :func:`sampled_softmax_loss`
        gives.

    Raises:
        IndexError: a target out of range, on a CPU. On CUDA the row's loss is NaN.
        ValueError: ``skip_threshold`` is negative or infinite, or as :func:`sampled_softmax_loss`.
        TypeError, RuntimeError: as :func:`sampled_softmax_loss`.

    Source: Li et al. 2023, arXiv 2301.00979; leaving out small probabilities: Wijmans et al. 2024,
    arXiv 2411.09009 (by absolute probability, without weights).

    Example:
        >>> import torch
        >>> from dwl_kernels import full_softmax_loss
        >>> query, table = torch.eye(3), torch.eye(3)
        >>> full_softmax_loss(query, table, torch.tensor([0, 1, -100]))  # log(e + 1 + 1) - 1
        tensor(0.5514)
    """
    whole_table = process_group is None and not is_distributed(table)
    group: Any = None
    if not whole_table:
        table, group = shard_of(table, process_group)

    def build() -> SharedProblem:
        here = bias
        if bias is not None and not whole_table:
            here, _ = shard_of(bias, group, "bias")
        return full_problem(
            query,
            table,
            target,
            bias=here,
            table_ids=table_ids,
            ignore_index=ignore_index,
            domain_ids=domain_ids,
            domain_weights=domain_weights,
            example_weights=example_weights,
            temperature=temperature,
            reduction=reduction,
            skip_threshold=skip_threshold,
            whole_table=whole_table,
        )

    if whole_table:
        return loss_of(build(), query, backend)
    from dwl_kernels.distributed.sharded import full_loss

    return full_loss(build, query, group, replicated_rows, backend)


def indexed_sampled_softmax_loss(
    query: Tensor,
    table: Tensor,
    positive_ids: Tensor,
    negative_ids: Tensor,
    *,
    table_ids: Tensor | None = None,
    remove_accidental_hits: bool = True,
    ignore_index: int | None = None,
    sparse_grad: bool = False,
    positive_log_q: Tensor | None = None,
    negative_log_q: Tensor | None = None,
    domain_ids: Tensor | None = None,
    domain_weights: Tensor | None = None,
    example_weights: Tensor | None = None,
    temperature: float | Tensor | None = None,
    correction: Correction = "standard",
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    process_group: ProcessGroup | None = None,
    replicated_rows: bool = False,
) -> Tensor:
    r"""Sampled softmax over rows of an embedding table, shared by all rows or drawn for each.

    .. math::
        z_{ij} = \langle q_i, t_{n_{ij}} \rangle / \tau_i - \log Q_{ij}, \qquad
        z_i^+ = \langle q_i, t_{y_i} \rangle / \tau_i - \log Q_i^+

    The loss is that of :func:`sampled_softmax_loss` of ``table[positive_ids]`` and
    ``table[negative_ids]``. Negatives per row are read where they lie: neither their ``[B, K, D]``
    embeddings nor the gradients of those are ever in memory. The gradient of a table row is summed
    in a fixed order over the places where it was drawn, and written once.

    Args:
        query: ``[B, D]``, or ``[..., D]``, the embeddings of the queries or time steps.
        table: ``[V, D]``, the embeddings of all items, the weight of an ``Embedding`` or
            ``EmbeddingBag``.
        positive_ids: ``[B]`` integers, the row of the table that each query should score highest.
        negative_ids: integers, rows of the table that are negatives: ``[N]`` of all queries, or
            ``[B, K]`` (``[..., K]`` with leading dimensions), ``K`` of every query's own. A
            negative that is the positive of a row (an accidental hit) is removed from that row. A
            negative of id -1 is no item, and left out, as padding of rows of different lengths may
            be; so is one of log-Q ``+inf``.
        table_ids: ``[V]`` integers, the item ids of the rows of the table, where an item may stand
            in several, as in a cache of embeddings: a negative of the item of a row's positive is a
            hit too. -1 marks a row that is no item, and left out as a negative.
        remove_accidental_hits: whether hits are removed; False keeps them as candidates.
        ignore_index: the id that marks padding: a row with that positive is padded, as by
            ``example_weights`` 0, and a negative of that id is left out.
        sparse_grad: whether the gradient of the table is a coalesced sparse COO tensor of the rows
            that were used, as ``torch.optim.SparseAdam`` takes it, or dense. Rows whose gradient is
            zero, as of padding, are not among them. ``torch.compile`` does not trace sparse
            gradients.
        positive_log_q: ``[B]``, log-probability (nats) that one draw gives the positive.
        negative_log_q: ``[N]`` or ``[B, K]``, as ``negative_ids``, the same for every negative;
            pass both log-Q or neither.
        domain_ids, domain_weights: ``[B]`` or ``[B, G]`` integers, and ``[num_domains]``, the
            domains of the rows and what they weigh, as for :func:`sampled_softmax_loss`.
        example_weights, temperature: ``[B]``, and a number, ``[]`` or ``[B]``, likewise.
        correction, reduction, backend: as for :func:`sampled_softmax_loss`.
        process_group, replicated_rows: a table that is spread over ranks, as for
            :func:`full_softmax_loss`. A rank fetches the different rows that its ids name, once
            each, from their owners.

    Returns:
        The loss, ``[]``, or ``[B]`` for ``"none"``, of the dtype that :func:`sampled_softmax_loss`
        gives. Under autocast a table of negatives per row keeps its dtype, as an embedding does.

    Raises:
        IndexError: an id that is no row of the table, on a CPU; those of padded rows are not looked
            at. On CUDA the row's loss is NaN.
        TypeError, ValueError, RuntimeError: as :func:`sampled_softmax_loss`.

    Source: Yi et al. 2019, arXiv 2510.04375.

    Example:
        >>> import torch
        >>> from dwl_kernels import indexed_sampled_softmax_loss
        >>> query, table = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> positive_ids, negative_ids = torch.tensor([0, 1]), torch.tensor([[1, 2], [2, 1]])
        >>> indexed_sampled_softmax_loss(query, table, positive_ids, negative_ids, reduction="none")
        tensor([0.5514, 0.3133])
    """
    arguments: dict[str, Any] = {
        "table_ids": table_ids,
        "remove_accidental_hits": remove_accidental_hits,
        "ignore_index": ignore_index,
        "positive_log_q": positive_log_q,
        "negative_log_q": negative_log_q,
        "domain_ids": domain_ids,
        "domain_weights": domain_weights,
        "example_weights": example_weights,
        "temperature": temperature,
        "correction": correction,
        "reduction": reduction,
        "sparse_grad": sparse_grad,
        "backend": backend,
    }
    ids = positive_ids, negative_ids
    if process_group is None and not is_distributed(table):
        check_name(backend)
        arguments["sparse_grad"] = sparse_grad = flag("sparse_grad", sparse_grad)
        problem = indexed_problem(query, table, *ids, **arguments)
        return loss_of(problem, query, backend, sparse_grad)
    from dwl_kernels.distributed.indexed import indexed_loss

    shard, group = shard_of(table, process_group)
    of_dtensor = is_distributed(table)
    arguments |= {"replicated_rows": replicated_rows, "of_dtensor": of_dtensor}
    return indexed_loss(query, shard, *ids, group, **arguments)


def indexed_problem(
    query: Tensor,
    table: Tensor,
    positive_ids: Tensor,
    negative_ids: Tensor,
    *,
    table_ids: Tensor | None,
    remove_accidental_hits: bool,
    ignore_index: int | None,
    sparse_grad: bool,
    backend: str,
    negative_log_q: Tensor | None,
    **others: Any,
) -> Problem:
    """The problem of ``indexed_sampled_softmax_loss``; negatives that all rows share are read."""
    weights = others["example_weights"]
    weights = padded_by_id("positive_ids", positive_ids, query, ignore_index, weights)
    others["example_weights"] = weights
    ids = table_rows(query, table, positive_ids, negative_ids, weights, ignore_index)
    table_ids = checked_table_ids(table_ids, table, query)
    remove_accidental_hits = flag("remove_accidental_hits", remove_accidental_hits)
    drawn = left_out(*ids, table_ids, remove_accidental_hits)
    if drawn.dim() != 1:
        others["negative_log_q"] = negative_log_q
        return per_row_problem(query, table, ids[0], drawn, **others)
    drawn, others["negative_log_q"] = leave_out_no_items(
        drawn, others["positive_log_q"], negative_log_q
    )
    positive, negative = shared_rows(table, ids[0], drawn, sparse_grad, backend)
    names, rows = ("positive_ids", "negative_ids"), (ids[0], drawn)
    for name, one in zip(names, rows, strict=True):
        others[name] = item_ids(one, table_ids) if remove_accidental_hits else None
    return sampled_problem(query, positive, negative, **others)


def shard_of(
    table: Tensor, process_group: ProcessGroup | Group | None, name: str = "table"
) -> tuple[Tensor, Any]:
    """The rows of the table, or of its bias, that are here, and the group of the others."""
    from dwl_kernels.distributed.table import shard_of

    return shard_of(table, process_group, name)
