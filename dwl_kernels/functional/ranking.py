"""What the losses know and throw away: the rank of a positive, its probability. No gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dwl_kernels import ops
from dwl_kernels.backends import Backend, check_name
from dwl_kernels.core.build import dual_problem, full_problem, in_batch_problem, sampled_problem
from dwl_kernels.core.checks import either
from dwl_kernels.core.problem import Problem, SoftmaxStatistics
from dwl_kernels.core.ranking import rank_problem
from dwl_kernels.functional.dual_scale import dual_scale_softmax_loss
from dwl_kernels.functional.sampled import in_batch_softmax_loss, sampled_softmax_loss
from dwl_kernels.functional.table import (
    full_softmax_loss,
    indexed_problem,
    indexed_sampled_softmax_loss,
)


def rank_targets(
    query: Tensor,
    table: Tensor,
    target: Tensor,
    *,
    seen: tuple[Tensor, Tensor] | Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> Tensor:
    r"""The rank of every target among all items that its row has not seen, 1 the best.

    .. math::
        rank_i = 1 + \#\{v \ne y_i, \; v \notin seen_i : \;
            \mathrm{not} \; \langle q_i, c_v \rangle + b_v <
            \langle q_i, c_{y_i} \rangle + b_{y_i}\}

    Ties come before the target, so that a model that gives all items one score looks as bad as it
    is. No matrix ``[B, V]`` is made, the items pass once, and there are no gradients.

    Scores that differ by less than the rounding of a product are compared in float64: the rank is
    that of exact scores, and items of the same embedding and bias tie wherever they stand in the
    table. ``triton`` alone compares what its products give, in which they tie as well.

    Args:
        query: ``[B, D]``, or ``[..., D]``, the embeddings of the users, sequences or time steps.
        table: ``[V, D]``, the embeddings of all items, of the same dtype.
        target: ``[B]`` (``[...]``) integers, the row of the table to be ranked for each query.
        seen: the items that each row has seen and that are not ranked: offsets ``[B + 1]`` and ids
            ``[nnz]``, integers, of which row ``i`` has ``ids[offsets[i]:offsets[i + 1]]`` (of a
            SciPy matrix ``m`` that is ``(m.indptr, m.indices)``), or a sparse CSR tensor ``[B, V]``
            whose values do not matter. Leading dimensions of ``query`` are flattened. An id may
            come twice in a row, and -1 is no item. A target that was seen is ranked among the
            unseen.
        bias: ``[V]``, added to the score of every item; ``-inf`` puts an item last.
        ignore_index: the target that marks a padded row, whose rank is 0.
        backend: as for :func:`sampled_softmax_loss`; ``"cuda"`` has no kernel of its own for this
            and does what ``"chunked"`` does.

    Returns:
        ``[B]`` (``[...]``) int64, from 1 to the number of unseen items. A score of NaN is ahead of
        the target, and a target whose own score is NaN has the worst rank of its row: a broken
        model does not look good. Autocast changes nothing but the dtype of ``query``, which follows
        that of the table.

    Raises:
        IndexError: a target or a seen id that is no row of the table, on a CPU. On CUDA such a
            target has the worst rank, and such an id is no item.
        ValueError: a wrong shape or device, an empty table, or offsets that are none.
        TypeError: a wrong type or dtype, or a sparse, nested, quantised or distributed tensor.
        RuntimeError: the backend asked for by name cannot run; the message says why and the mend.

    Source: this package's.

    Example:
        >>> import torch
        >>> from dwl_kernels import rank_targets
        >>> query, table = torch.eye(2), torch.tensor([[3.0, 0.0], [2.0, 2.0], [1.0, 2.0]])
        >>> target = torch.tensor([2, 2])
        >>> rank_targets(query, table, target)  # item 1 ties with the target of the second row
        tensor([3, 2])
        >>> seen = torch.tensor([0, 1, 2]), torch.tensor([0, 1])  # one item each
        >>> rank_targets(query, table, target, seen=seen)
        tensor([2, 1])
    """
    check_name(backend)
    problem = rank_problem(query, table, target, seen=seen, bias=bias, ignore_index=ignore_index)
    return ops.rank_targets(problem, backend).reshape(query.shape[:-1])


def softmax_statistics(
    loss: Callable[..., Any], *arguments: Any, **options: Any
) -> SoftmaxStatistics:
    r"""What a loss knows of every row: log-sum-exp, log-probability and rank of the positive.

    .. math::
        lse_i = \log\Big(e^{z_i^+} + \sum_j e^{z_{ij}}\Big), \qquad
        \log p_i^+ = z_i^+ - lse_i, \qquad
        rank_i = 1 + \#\{j : \; \mathrm{not} \; z_{ij} < z_i^+\}

    ``z`` are the logits of the loss, with its temperature, log-Q and ``log kappa``, and ``j`` are
    the candidates that the row competes with: no hits, no padding, nothing that a log-Q of ``+inf``
    takes out. So rank 1 means that the positive is the most likely of all under the distribution
    that is trained. Items are served by scores without log-Q: leave it out of this call for their
    rank. Ties come before the positive, as for :func:`rank_targets`, and nothing of the size
    ``[B, N]`` is in memory.

    The refined correction takes the positive out of the denominator, ``lse_i = log sum_j exp z_ij +
    log(1 - Q+_i)``: its log-probability may exceed 0.

    Args:
        loss: one of the loss functions of this package, such as :func:`full_softmax_loss`.
        arguments: those of the loss.
        options: likewise. Weights do not change what is known of a row, ``example_weights`` of 0
            mark padding, and ``reduction`` has no meaning here.

    Returns:
        Log-sum-exp, log-probability and rank, each ``[B]``, or ``[...]`` for ``query`` of leading
        dimensions, without gradients: two of the dtype of the loss, the rank int64. Padded rows
        have zeros. A positive whose logit is NaN has the worst rank.

    Raises:
        TypeError: ``loss`` is none of the losses, or as it raises.
        ValueError, IndexError, RuntimeError: as ``loss`` raises.

    Source: this package's.

    Example:
        >>> import torch
        >>> from dwl_kernels import full_softmax_loss, softmax_statistics
        >>> query, table = torch.eye(2), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> found = softmax_statistics(full_softmax_loss, query, table, torch.tensor([1, 0]))
        >>> found.rank, found.log_sum_exp
        (tensor([1, 3]), tensor([1.5514, 1.5514]))
    """
    build = _PROBLEMS.get(loss)
    if build is None:
        known = ", ".join(one.__name__ for one in _PROBLEMS)
        name = getattr(loss, "__name__", type(loss).__name__)
        raise TypeError(f"loss is {name}; wanted one of the loss functions: {known}")
    bound = inspect.signature(loss).bind(*arguments, **options)
    bound.apply_defaults()
    given = bound.arguments
    check_name(given["backend"])
    # Statistics are of one process: what other ranks hold is not looked at.
    if given.pop("process_group") is not None:
        raise ValueError(
            "softmax_statistics takes no process_group; leave it out for the statistics of the "
            "rows among the candidates of this rank"
        )
    for name in ("ring", "replicated_negatives", "replicated_rows"):
        given.pop(name, None)
    with torch.no_grad():
        found = ops.softmax_statistics(build(**given), given["backend"])
    leading = given["query"].shape[:-1]
    return SoftmaxStatistics(*(one.reshape(leading) for one in found))


def _sampled(*, backend: str, **given: Any) -> Problem:
    return sampled_problem(**given)


def _in_batch(*, backend: str, positive_log_q: Any, positive_ids: Any, **given: Any) -> Problem:
    given["log_q"] = either("log_q", given["log_q"], "positive_log_q", positive_log_q)
    given["ids"] = either("ids", given["ids"], "positive_ids", positive_ids)
    return in_batch_problem(**given)


def _dual(*, backend: str, **given: Any) -> Problem:
    return dual_problem(**given)


def _full(*, backend: str, **given: Any) -> Problem:
    return full_problem(**given)


_PROBLEMS: dict[Any, Callable[..., Problem]] = {
    sampled_softmax_loss: _sampled,
    in_batch_softmax_loss: _in_batch,
    full_softmax_loss: _full,
    indexed_sampled_softmax_loss: indexed_problem,
    dual_scale_softmax_loss: _dual,
}
