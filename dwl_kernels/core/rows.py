"""What is linear in the rows: their weights before a kernel, the reduction after it.

For the backends that do not fuse this into their kernel. Such a backend calls :func:`prepare`,
makes the row losses and the gradients of the embeddings, and gives them to :func:`finish`::

    w_i = example weight times the mean weight of the row's domains
    a_i = w_i r_i / norm                        what the gradient of row loss l_i is multiplied by
    L   = sum_i w_i r_i l_i / norm
    dL/dW_d = sum_i a_i l_i / w_i / (domains of row i)      over the rows of domain d
    dL/dtau_i = -<q_i, dL/dq_i> / tau_i
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dwl_kernels.core.checks import cast_to
from dwl_kernels.core.problem import GradMask, Output, Problem, RowOptions, SharedProblem
from dwl_kernels.core.values import checks_values, not_negative, wrong_domains, wrong_rows


class Prepared(NamedTuple):
    """What a kernel needs to know of each row."""

    weight: Tensor  # [B] w_i
    active: Tensor | None  # [B] bool, False for padding; None where no row can be padding
    norm: Tensor | None  # [] divisor of the reduction; None for "sum" and "none"
    coefficient: Tensor  # [B] a_i / r_i
    tau: Tensor  # [B], 1 where a row is padding


class Gradients(NamedTuple):
    """What a kernel gives beside the row losses; None where not wanted."""

    query: Tensor | None  # [B, D]
    positive: Tensor | None  # [B, D]; per row dL/d<q_i, p_i> [B]
    candidates: Tensor | None  # [N, D]; per row dL/d<q_i, c_ij> [B, K]
    candidate_log_q: Tensor | None = None  # [N]
    tau: Tensor | None = None  # [B], for kernels that make it themselves


def prepare(
    problem: Problem,
    row_grad: Tensor | None,  # [B], gradient of the row losses of reduction "none"
) -> Prepared:
    """Weights, padding, the norm and the temperature of each row.

    Raises:
        IndexError: a domain id, a target or an id of a table out of range, on a CPU. On other
            devices such a row weighs NaN instead, unless ``DWL_KERNELS_CHECK=1`` asks for the
            error.
        ValueError: a negative weight, or a tensor of temperatures that are not positive and
            finite, under the same conditions.
    """
    rows, num_rows = problem.rows, problem.query.shape[0]
    weight, active = rows.example_weights, active_rows(problem)
    if rows.domain_ids is not None:
        assert rows.domain_weights is not None  # `build` checks
        of_domains = mean_domain_weight(rows.domain_ids, rows.domain_weights, active)
        weight = of_domains if weight is None else weight * of_domains
    given = weight is not None
    if weight is None:
        weight = problem.query.new_ones(num_rows, dtype=problem.dtypes.accumulate)
    wrong = wrong_rows(problem, active)
    if wrong is not None:
        weight = weight.masked_fill(wrong, torch.nan)
    if active is not None:
        weight = torch.where(active, weight, 0.0)
    if given:
        weight = not_negative(weight)
    norm: Tensor | None = None
    if rows.reduction == "weighted_mean":
        norm = weight.sum()
    elif rows.reduction == "mean":
        norm = weight.new_full((), num_rows) if active is None else active.sum().to(weight.dtype)
    if row_grad is not None:
        coefficient = weight * row_grad
    elif rows.reduction == "mean" and active is None:
        coefficient = weight / num_rows  # which is not 0, or there is no weight
    else:
        coefficient = weight if norm is None else divide(weight, norm)
    return Prepared(weight, active, norm, coefficient, temperatures(problem, active))


def active_rows(problem: Problem) -> Tensor | None:  # [B] bool
    """Which rows are not padding; None where all are."""
    rows = problem.rows
    active = None if rows.example_weights is None else rows.example_weights != 0
    if isinstance(problem, SharedProblem) and problem.target is not None:
        kept = problem.target != rows.ignore_index
        active = kept if active is None else active & kept
    return active


def mean_domain_weight(
    domain_ids: Tensor,  # [B, G], -1 = none
    domain_weights: Tensor,  # [num_domains]
    active: Tensor | None = None,  # [B] bool, ids of other rows are not looked at
) -> Tensor:  # [B]
    """Mean of ``W[d]`` over the domains of each row; 1 for a row that has none.

    Raises:
        IndexError: an id out of range, where values are looked at; elsewhere the row gets NaN.
        ValueError: a domain twice in a row, where values are looked at.
    """
    slots = domain_ids.shape[1]
    if active is not None:
        domain_ids = domain_ids.masked_fill(~active[:, None], -1)
    elif slots == 1 and checks_values(domain_ids) and domain_ids.device.type == "cpu":
        try:  # no look at the ids before: this one looks
            return domain_weights.index_select(0, domain_ids.view(-1))
        except IndexError:  # -1, or one that is wrong
            pass
    outside, complete = wrong_domains(domain_ids, domain_weights.shape[0])
    if complete:  # in a fifth of the time
        weights = domain_weights.index_select(0, domain_ids.reshape(-1))
        return weights if slots == 1 else weights.view(-1, slots).sum(1) / slots
    present = domain_ids >= 0
    if outside is not None:
        domain_ids = domain_ids.clamp(0, domain_weights.shape[0] - 1)
    gathered = domain_weights[domain_ids.long()]  # -1 reads the last, which then does not count
    gathered = torch.where(present, gathered, 0.0)
    count = present.sum(1)
    known = count > 0
    if outside is not None:
        gathered, known = gathered.masked_fill(outside, torch.nan), known | outside.any(1)
    return torch.where(known, gathered.sum(1) / count.clamp(min=1), 1.0)


def temperatures(problem: Problem, active: Tensor | None) -> Tensor:  # [B]
    """``tau_i`` for every row; 1 where it is not `active`: padding holds anything."""
    given, num_rows = problem.rows.temperature, problem.query.shape[0]
    if given is None:
        dtype = problem.dtypes.accumulate
        return problem.query.new_full((num_rows,), problem.rows.tau, dtype=dtype)
    tau = (given * problem.rows.tau).expand(num_rows)
    if active is None or given.dim() == 0:
        return tau
    return torch.where(active, tau, 1.0)


def skippable_below(problem: SharedProblem, weight: Tensor) -> Tensor | None:
    """The probability ``p_ij`` under which the gradient of a pair may be left out, ``[B]``.

    ``w_i r_i p_ij < skip_threshold``, with ``r_i = 1``: only the full softmax has a threshold.
    A backend leaves out blocks of (rows x candidates) in which every pair is below, or nothing,
    never the row's positive. None where everything counts.
    """
    return problem.skip_threshold / weight if problem.skip_threshold > 0 else None


def embeddings(
    problem: Problem, active: Tensor | None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, positive and candidates in `dtype`, or that of sums, padded rows set to zero.

    A table from which every row draws its own stays as it is, to be read by `row_candidates`.
    """
    dtype, query = dtype or problem.dtypes.accumulate, problem.query
    if not isinstance(problem, SharedProblem):
        candidates, positive = problem.item_table, problem.positives().to(dtype)
    else:
        candidates = problem.candidates.to(dtype)
        if problem.positive is None:
            positive = candidates[problem.own_columns()]
        else:
            positive = problem.positive.to(dtype)
    query = query.to(dtype)
    if active is not None:
        padded = ~active[:, None]
        query, positive = query.masked_fill(padded, 0), positive.masked_fill(padded, 0)
        if problem.in_batch:
            candidates = torch.cat((positive, candidates[len(query) :]))
    return query, positive, candidates


def finish(
    problem: Problem,
    wanted: GradMask,
    prepared: Prepared,
    row_grad: Tensor | None,  # [B]
    row_loss: Tensor,  # [B] r_i l_i
    gradients: Gradients,
    query: Tensor | None = None,  # [B, D] padded rows zero; not needed with `Gradients.tau`
) -> Output:
    """The loss and the wanted gradients in their dtypes; the last two follow from the others."""
    d_temperature = d_weights = None

    def to(dtype: torch.dtype, gradient: Tensor | None, want: bool) -> Tensor | None:
        return cast_to(dtype, gradient) if want and gradient is not None else None

    if wanted.temperature:
        d_temperature = gradients.tau
        if d_temperature is None:
            assert query is not None
            assert gradients.query is not None
            tau = temperatures(problem, prepared.active)
            # A row without a gradient may hold NaN.
            products = (query * gradients.query).masked_fill_(gradients.query == 0, 0)
            d_temperature = -products.sum(1) / tau
        d_temperature = torch.where(prepared.coefficient == 0, 0.0, d_temperature)
        assert problem.rows.temperature is not None
        if problem.rows.temperature.dim() == 0:
            d_temperature = d_temperature.sum()
    if wanted.domain_weights:
        d_weights = domain_weights_gradient(problem.rows, prepared, row_loss, row_grad)
    return Output(
        loss=reduce_rows(row_loss, prepared, problem.rows.reduction),
        query=to(problem.dtypes.gradient, gradients.query, wanted.query),
        positive=to(problem.candidate_gradient, gradients.positive, wanted.positive),
        candidates=to(problem.candidate_gradient, gradients.candidates, wanted.candidates),
        candidate_log_q=gradients.candidate_log_q if wanted.candidate_log_q else None,
        temperature=d_temperature,
        domain_weights=d_weights,
    )


def clear_padding(problem: Problem, active: Tensor | None, d_candidates: Tensor) -> None:
    """Zeros for the positives of padded rows of a batch, also where another row made NaN of all."""
    if problem.in_batch and active is not None:
        d_candidates[: len(active)].masked_fill_(~active[:, None], 0)


def reduce_rows(row_loss: Tensor, prepared: Prepared, reduction: str) -> Tensor:
    """``sum_i w_i r_i l_i / norm``, or the rows themselves for "none"."""
    weight, norm = prepared.weight, prepared.norm
    rows = (weight * row_loss).masked_fill_(weight == 0, 0)
    if reduction == "none":
        return rows
    return rows.sum() if norm is None else divide(rows.sum(), norm)


def divide(value: Tensor, norm: Tensor) -> Tensor:
    """``value / norm``, where 0/0 is 0: a batch of padding has loss and gradients zero."""
    return (value / norm).masked_fill_(norm == 0, 0)


def domain_weights_gradient(
    rows: RowOptions,
    prepared: Prepared,
    row_loss: Tensor,  # [B] r_i l_i
    row_grad: Tensor | None,  # [B]
) -> Tensor:  # [num_domains]
    """``dL/dW_d``: the losses of the rows of domain ``d``, each by its share of the weight."""
    ids, domain_weights = rows.domain_ids, rows.domain_weights
    assert ids is not None
    assert domain_weights is not None
    if row_grad is not None:
        d_weight = row_grad * row_loss
    else:
        if rows.reduction == "weighted_mean":
            # The norm is the sum of the weights and moves with them.
            row_loss = row_loss - reduce_rows(row_loss, prepared, rows.reduction)
        d_weight = row_loss if prepared.norm is None else divide(row_loss, prepared.norm)
    if rows.example_weights is not None:
        d_weight = d_weight * rows.example_weights
    if prepared.active is not None:
        d_weight = torch.where(prepared.active, d_weight, 0.0)
    present = (ids >= 0) & (ids < domain_weights.shape[0])
    share = d_weight[:, None] / present.sum(1, keepdim=True).clamp(min=1)
    share = torch.where(present, share, 0.0)  # an infinite loss goes to its own domains only
    slots = ids.masked_fill(~present, 0).long()
    return torch.zeros_like(domain_weights).index_add_(0, slots.flatten(), share.flatten())
