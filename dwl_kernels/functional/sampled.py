"""The losses of embeddings: sampled and in-batch softmax."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from dwl_kernels.autograd import loss_of
from dwl_kernels.backends import Backend
from dwl_kernels.core.build import in_batch_problem, sampled_problem
from dwl_kernels.core.checks import either
from dwl_kernels.core.problem import Correction, Problem, Reduction, SharedProblem

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def sampled_softmax_loss(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    positive_log_q: Tensor | None = None,
    negative_log_q: Tensor | None = None,
    positive_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    ignore_index: int | None = None,
    domain_ids: Tensor | None = None,
    domain_weights: Tensor | None = None,
    example_weights: Tensor | None = None,
    temperature: float | Tensor | None = None,
    correction: Correction = "standard",
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    process_group: ProcessGroup | None = None,
    ring: bool = False,
    replicated_negatives: bool = False,
) -> Tensor:
    r"""Log-Q corrected sampled softmax over sampled negatives, weighted by domain.

    .. math::
        z_{ij} = \langle q_i, c_j \rangle / \tau_i - \log Q_j, \qquad
        z_i^+ = \langle q_i, p_i \rangle / \tau_i - \log Q_i^+

        \ell_i = \log\Big(e^{z_i^+} + \sum_j e^{z_{ij}}\Big) - z_i^+, \qquad
        L = \frac{1}{norm} \sum_i w_i r_i \ell_i

    Log-Q is subtracted *after* the division by the temperature. Gradients flow to ``query``,
    ``positive``, ``negative``, ``temperature`` and ``domain_weights``, each only where it is
    required; they are computed together with the loss, without a ``[B, N]`` matrix in memory.
    Double backward raises.

    Args:
        query: ``[B, D]``, the embeddings of the queries or time steps; float32, float64, bfloat16
            or float16. With ``[..., D]``, what is ``[B]`` below is ``[...]``.
        positive: ``[B, D]``, the embedding each query should score highest, of the same dtype.
        negative: ``[N, D]``, the embeddings of the sampled negatives, of the same dtype, shared by
            all rows; or ``[B, K, D]`` (``[..., K, D]`` with leading dimensions), ``K`` of every
            row's own, to which ``[N]`` below is ``[B, K]``. No copy of them is made. Those that are
            rows of a table :func:`indexed_sampled_softmax_loss` reads by id, in less memory.
        positive_log_q: ``[B]``, log-probability (nats) that one draw of the sampler gives the
            positive; with ``negative_log_q``, pass both or neither. From the log of an expected
            count subtract the log of the number of draws.
        negative_log_q: ``[N]``, the same for every negative; ``+inf`` takes a negative out.
        positive_ids: ``[B]`` integers, the item ids of the positives. A negative with the id of a
            row's positive (an accidental hit) is removed from that row.
        negative_ids: ``[N]`` integers, the item ids of the negatives. -1 is no item: nobody's hit.
        ignore_index: the id that marks padding: a row with that positive is padded, as by
            ``example_weights`` 0, and a negative of that id is left out. Needs the ids.
        domain_ids: ``[B]`` or ``[B, G]`` integers, the domain, or the ``G`` domains, of each row,
            each named once; -1 means none. :func:`domains_from_multi_hot` makes them of flags. Ids
            and domains may be NumPy arrays or pandas columns.
        domain_weights: ``[num_domains]``, the weight of each domain, not negative. A row weighs the
            mean over its domains, and 1 if it has none.
        example_weights: ``[B]``, further weights, not negative. 0 marks a padded row: it gives
            exact zeros, does not count in any norm, and NaN in its embeddings does not leak. A bool
            mask works.
        temperature: a positive number that divides the scores, or a tensor, ``[]`` or ``[1]`` for
            all rows, ``[B]`` per row; None is 1.
        correction: ``"standard"``, or ``"refined"`` (arXiv 2507.09331): the positive leaves the
            denominator, is not corrected itself, and the row weighs
            ``r_i = sigmoid(lse_i - log n_i - z_i+)``, detached, with ``lse_i = log sum_j exp z_ij +
            log(1 - Q+_i)`` and ``n_i`` the number of negatives that are no hits and not taken out
            by a log-Q of ``+inf``. Otherwise ``r_i = 1``. A row with nothing left in its
            denominator gives zeros.
        reduction: the norm. ``"mean"`` divides by the number of rows whose example weight is not
            zero, ``"weighted_mean"`` by the sum of ``w_i``, ``"sum"`` by 1; ``"none"`` returns
            ``w_i r_i l_i``. 0/0 is 0.
        backend: ``"auto"``, ``"triton"``, ``"cuda"``, ``"cpu"``, ``"chunked"`` or ``"eager"``;
            which of them work here, ``python -m dwl_kernels`` says.
        process_group, ring, replicated_negatives: candidates of all ranks, as for
            :func:`in_batch_softmax_loss`: here the negatives of all ranks, or with
            ``replicated_negatives=True`` those that all ranks hold; negatives per row stay those of
            their row.

    Returns:
        The loss, ``[]``, or ``[B]`` (``[...]``) for ``"none"``: float32, or float64 for float64
        inputs. Under autocast the products run in its dtype.

    Raises:
        TypeError: a wrong type or dtype, mixed dtypes, or a sparse, nested, quantised or
            distributed tensor.
        ValueError: a wrong shape, device, choice, or combination of arguments. On a CPU, or with
            ``DWL_KERNELS_CHECK=1``: a negative weight, a log-Q above 0 (a probability, a count, or
            minus the log), a domain named twice in a row (flags taken for ids).
        IndexError: a domain id out of range, on a CPU. On CUDA the row's loss is NaN, or the error
            comes with ``DWL_KERNELS_CHECK=1``.
        RuntimeError: the backend asked for by name cannot run; the message says why and the mend.

    Source: Yi et al. 2019 (log-Q), arXiv 2510.04375 (domain weights), arXiv 2507.09331 (refined).

    Example:
        >>> import torch
        >>> from dwl_kernels import sampled_softmax_loss
        >>> query, positive = torch.eye(2), torch.eye(2)
        >>> negative = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> loss = sampled_softmax_loss(query, positive, negative, reduction="none")
        >>> loss  # log(e + 1 + e) - 1 and log(e + 1 + 1) - 1
        tensor([0.8620, 0.5514])
        >>> ids = {"positive_ids": torch.tensor([7, 8]), "negative_ids": torch.tensor([5, 7])}
        >>> sampled_softmax_loss(query, positive, negative, reduction="none", **ids)
        tensor([0.3133, 0.5514])
    """
    build = functools.partial(
        sampled_problem,
        query,
        positive,
        negative,
        positive_log_q=positive_log_q,
        negative_log_q=negative_log_q,
        positive_ids=positive_ids,
        negative_ids=negative_ids,
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
        "sampled_softmax_loss", build, query, process_group, backend, ring=ring, **options
    )


def in_batch_softmax_loss(
    query: Tensor,
    positive: Tensor,
    *,
    log_q: Tensor | None = None,
    ids: Tensor | None = None,
    negative: Tensor | None = None,
    negative_log_q: Tensor | None = None,
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
    positive_log_q: Tensor | None = None,
    positive_ids: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    ring: bool = False,
    replicated_negatives: bool = False,
) -> Tensor:
    r"""The same loss with the positives of the other rows as candidates, and ``negative`` if given.

    .. math::
        z_{ik} = \langle q_i, p_k \rangle / \tau_i - \log Q_k^+, \qquad
        \ell_i = \log\Big(\sum_k e^{z_{ik}} + \sum_j e^{z_{ij}}\Big) - z_{ii}

    Row ``i`` competes with ``positive[k]`` for all ``k != i``, and with the negatives ``j``, whose
    ``z_ij`` is that of :func:`sampled_softmax_loss`. With ``ids``, rows of the same id as
    row ``i`` are no candidates of it; without, only its own positive is removed, as are with
    ``query_ids`` those of its query. The positives of padded rows (``example_weights`` 0) are
    nobody's candidates.

    Args:
        query: ``[B, D]``, or ``[..., D]``, the embeddings of the queries.
        positive: ``[B, D]``, the embedding each query should score highest, and candidate of the
            other rows.
        log_q: ``[B]``, log-probability (nats) of each positive in one place of the batch, for its
            two roles, as positive and as candidate.
        ids: ``[B]`` integers, the item ids of the positives.
        negative: ``[N, D]``, further candidates, shared by all rows (mixed negatives).
        negative_log_q: ``[N]``, their log-Q; with ``negative``, pass both this and ``log_q``, or
            neither.
        negative_ids: ``[N]`` integers, their ids; with ``negative``, pass both this and ``ids``, or
            neither.
        query_ids: ``[B]`` integers, the user or query of every row, -1 for none. Positives of the
            same query, another click of the same user say, are no candidates of the row.
        ignore_index: the id that marks padding, as for :func:`sampled_softmax_loss`; needs ``ids``.
        positive_log_q, positive_ids: ``[B]``, ``log_q`` and ``ids`` under the names that they have
            in the other losses.
        domain_ids, domain_weights: ``[B]`` or ``[B, G]`` integers, and ``[num_domains]``, the
            domains of the rows and what they weigh, as for :func:`sampled_softmax_loss`.
        example_weights, temperature: ``[B]``, and a number, ``[]`` or ``[B]``, likewise.
        correction, reduction, backend: as for :func:`sampled_softmax_loss`.
        process_group: the ranks that the batch is spread over, a ``torch.distributed.ProcessGroup``
            or a ``DeviceMesh`` of one dimension. The positives and negatives of all ranks are
            candidates of every row, with their ids, log-Q and padding.
        ring: whether candidates go round from rank to rank, so that no rank holds more than two
            blocks of them: less memory, and the forward computed twice. Not for the dual scale.
        replicated_negatives: whether all ranks pass the same ``negative``, which then counts once.

    In a process group every rank returns the loss of all rows (for ``"none"`` its own rows), and
    gradients are the number of ranks times those of one process that holds the whole batch, so
    that the average over ranks, as ``DistributedDataParallel`` makes it, is exactly those. Ranks
    may have different numbers of rows, or none. All ranks must call the loss, and its backward,
    alike; what differs or is wrong raises on all of them. Compiled graphs break here. Every call
    exchanges 40 bytes a rank before it begins.

    Returns:
        The loss, ``[]``, or ``[B]`` for ``"none"``, of the dtype that :func:`sampled_softmax_loss`
        gives.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`sampled_softmax_loss`; in a
            process group RuntimeError too where another rank has raised, with its message.

    Source: Yi et al. 2019; mixed negatives as in arXiv 2205.04507.

    Example:
        >>> import torch
        >>> from dwl_kernels import in_batch_softmax_loss
        >>> query = torch.eye(3)
        >>> in_batch_softmax_loss(query, query, reduction="none")  # log(e + 1 + 1) - 1
        tensor([0.5514, 0.5514, 0.5514])
        >>> in_batch_softmax_loss(query, query, ids=torch.tensor([4, 4, 9]), reduction="none")
        tensor([0.3133, 0.3133, 0.5514])
    """

    def build() -> SharedProblem:
        return in_batch_problem(
            query,
            positive,
            log_q=either("log_q", log_q, "positive_log_q", positive_log_q),
            ids=either("ids", ids, "positive_ids", positive_ids),
            negative=negative,
            negative_log_q=negative_log_q,
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
        "in_batch_softmax_loss", build, query, process_group, backend, ring=ring, **options
    )


def loss_over_ranks(
    name: str,
    build: Callable[[], Problem],
    query: Tensor,
    process_group: ProcessGroup,
    backend: Backend,
    **how: bool,
) -> Tensor:
    """The loss over the candidates of all ranks."""
    from dwl_kernels.distributed.candidates import loss_across

    return loss_across(name, build, query, process_group, backend, **how)
