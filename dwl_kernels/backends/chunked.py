"""Pure PyTorch over blocks of rows: bounded memory on every device that PyTorch runs on.

The formulas are those of `eager`, a block of rows at a time, in place where `eager` makes a copy.
A block keeps its logits from the forward to the backward, so nothing is computed twice, and the
products are the three that any implementation must do, through the vendor's BLAS.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from dwl_kernels.backends import eager
from dwl_kernels.core.problem import Output, Problem, RowWeights, Wanted, accumulate_dtype

# Logits kept at once. On a CPU every operation ends with its threads spinning until the last one is
# done, which on a busy machine may have lost its core: blocks of 2^19 took up to 14 times the
# processor time of one thread, these twice. Without other work 2^20 to 2^22 are fastest. A GPU
# wants products that fill it.
BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}


def solve(
    problem: Problem,
    wanted: Wanted,
    row_grad: Tensor | None = None,  # [B], gradient of the row losses of reduction "none"
) -> Output:
    """The loss and the wanted gradients, with a block of the logits in memory at a time."""
    weights = problem.row_weights()
    query, positive, candidates = eager.embeddings(problem, weights)
    tau = problem.temperatures(weights.active)[:, None]  # [B, 1]
    score, shift = query, None  # z_ij = <score_i, c_j> / tau_i + shift_i - log Q_j
    if problem.dual is not None:
        score, shift, tau = dual_scale(problem, weights, query, positive, candidates)
    coefficients = eager.row_coefficients(weights, row_grad)[:, None]  # [B, 1]
    refined = problem.correction == "refined"
    counts = refined and problem.candidate_log_q is not None  # +inf takes a candidate out
    masks = problem.positive is None or problem.positive_ids is not None or counts
    by_row = problem.by_row

    want_query = wanted.query or wanted.temperature
    own = problem.own_columns() if problem.positive_competes else None
    want_positive = wanted.positive or (wanted.candidates and own is not None)
    positive_log_q = eager.log_q_of_positives(problem)
    candidate_log_q = eager.log_q_of_candidates(problem)
    row_loss = query.new_empty(len(query))
    d_query = torch.empty_like(query) if want_query else None
    d_positive = torch.empty_like(row_loss if by_row else positive) if want_positive else None
    d_candidates = None
    if wanted.candidates:
        shape = candidates.shape if problem.candidate_rows is None else problem.candidate_rows.shape
        d_candidates = query.new_zeros(shape)
    d_log_q = query.new_zeros(len(candidates)) if wanted.candidate_log_q else None

    for rows in row_blocks(problem):
        c = eager.candidates_of(problem, weights, candidates, rows.start, rows.stop)
        z = eager.scores(score[rows], c).div_(tau[rows])
        if shift is not None:
            z += shift[rows]
        if candidate_log_q is not None:
            z -= candidate_log_q[rows] if by_row else candidate_log_q
        count = torch.full_like(tau[rows, 0], z.shape[1])
        if masks:
            excluded = eager.excluded_candidates(problem, weights, rows.start, rows.stop)
            z.masked_fill_(excluded, -torch.inf)
            if refined:
                count -= excluded.sum(1)
            del excluded
        z_positive = (query[rows] * positive[rows]).sum(1) / tau[rows, 0]
        e, total, lse_candidates = eager.exponentials(z)
        a = coefficients[rows]
        if refined:
            log_q = None if problem.positive_log_q is None else problem.positive_log_q[rows]
            lse, r = eager.refine(lse_candidates, z_positive, log_q, count)
            row_loss[rows] = torch.where(r == 0, 0.0, r * (lse - z_positive))
            a = eager.refined_coefficients(a, r[:, None])
            p_positive_minus_1 = torch.full_like(a, -1.0)
        else:
            if positive_log_q is not None:
                z_positive -= positive_log_q[rows]
            row_loss[rows], minus_1 = eager.compete(lse_candidates, z_positive)
            p_positive_minus_1 = minus_1[:, None]
        if not any(wanted[:5]):
            continue
        # A row of weight zero gives exact zeros, also where its p overflowed or something is NaN.
        nothing = a == 0
        dz_positive = torch.where(nothing, 0.0, a * p_positive_minus_1)
        scaled_query = torch.where(nothing, 0.0, query[rows] / tau[rows])
        if d_positive is not None:
            one = dz_positive[:, 0] / tau[rows, 0] if by_row else dz_positive * scaled_query
            d_positive[rows] = one
        if d_query is None and d_candidates is None and d_log_q is None:
            continue
        dz = e.mul_(eager.shares(dz_positive, total)).masked_fill_(nothing, 0)
        if d_query is not None:
            d = eager.weighted_sum(dz, c).addcmul_(dz_positive, positive[rows])
            d_query[rows] = d.div_(tau[rows]).masked_fill_(nothing, 0)
        if d_candidates is not None and by_row:
            d_candidates[rows] = dz / tau[rows]
        elif d_candidates is not None:
            d_candidates.addmm_(dz.T, scaled_query)
        if d_log_q is not None:
            d_log_q -= dz.sum(0)
            if own is not None:
                d_log_q.index_add_(0, own[rows], -dz_positive[:, 0])

    if d_candidates is not None and d_positive is not None and own is not None:
        d_candidates.index_add_(0, own, d_positive)
        eager.clear_padding(problem, weights, d_candidates)
    loss = eager.reduce_rows(row_loss, weights, problem.reduction)
    gradients = eager.Gradients(d_query, d_positive, d_candidates, d_log_q)
    return eager.finish(problem, wanted, weights, loss, row_loss, row_grad, query, gradients)


def table_gradient(
    source: Tensor,  # [R, D]
    ids: list[Tensor],  # each [R, J]
    coefficients: list[Tensor],  # each [R, J], or none at all for 1
    table_rows: int,
    dtype: torch.dtype,
    compact: bool,
) -> tuple[Tensor, Tensor]:
    """For every id, the sum over its places of ``coefficient * source``, in a fixed order.

    Places whose id is outside the table or whose coefficient is 0 go nowhere: padding may hold NaN.

    Returns:
        The sums, ``[V, D]``, and nothing; or ``compact`` those of the different ids, and the ids.
    """
    source = source.to(accumulate_dtype(dtype))
    rows = torch.arange(len(source), device=source.device)[:, None]
    row = torch.cat([rows.expand_as(one).flatten() for one in ids])
    if coefficients:
        coefficient = torch.cat([one.flatten() for one in coefficients])
    else:
        coefficient = source.new_ones(len(row))
    id = torch.cat([one.flatten() for one in ids])
    nowhere = (id < 0) | (id >= table_rows) | (coefficient == 0)
    id, order = id.masked_fill(nowhere, table_rows).sort(stable=True)  # these come last
    if compact:
        distinct, counts = id.unique_consecutive(return_counts=True)
        offsets = counts.cumsum(0) - counts
        distinct = distinct[: int((distinct < table_rows).sum())]
    else:
        offsets = torch.searchsorted(id, torch.arange(table_rows + 1, device=id.device))
        distinct = id.new_empty(0)
    # A bag reads its rows one after the other: no matrix of all products, and no atomics.
    sums = embedding_bag(
        row[order], source, offsets, mode="sum", per_sample_weights=coefficient[order]
    )
    return sums[: len(distinct) if compact else table_rows].to(dtype), distinct


def row_blocks(problem: Problem) -> Iterator[slice]:
    """Blocks of rows whose logits, and candidates where they are by row, are kept at once."""
    elements = BLOCK_ELEMENTS.get(problem.query.device.type, 1 << 22)
    per_row = len(problem.candidates)
    if problem.candidate_rows is not None:
        per_row = problem.candidate_rows.shape[1] * problem.query.shape[1]
    step = max(elements // max(per_row, 1), 1)
    rows = len(problem.query)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def dual_scale(
    problem: Problem, weights: RowWeights, query: Tensor, positive: Tensor, candidates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the dual scale makes of the rows: ``score`` [B, D], ``shift`` [B, 1], ``tau`` [B, 1].

    ``log kappa_ij`` is linear in ``c_j`` but for a constant of the row, so that all logits of the
    row are still one product, ``z_ij = <score_i, c_j> / tau_i + shift_i - log Q_j``.
    """
    assert problem.dual is not None
    tau = problem.temperatures(weights.active)[:, None]
    candidate_log_q = eager.log_q_of_candidates(problem)
    pull = problem.dual.hardness * query + problem.dual.similarity * positive
    z_positive = (query * positive).sum(1) / tau[:, 0]
    g, shift = torch.empty_like(z_positive), torch.empty_like(z_positive)
    for rows in row_blocks(problem):
        excluded = eager.excluded_candidates(problem, weights, rows.start, rows.stop)
        x = (pull[rows] @ candidates.T).div_(tau[rows]).masked_fill_(excluded, -torch.inf)
        count = (~excluded).sum(1).to(x.dtype)
        shift[rows] = torch.where(count > 0, count.log() - x.logsumexp(1), 0.0)
        z = (query[rows] @ candidates.T).div_(tau[rows])
        if candidate_log_q is not None:
            z -= candidate_log_q
        z.masked_fill_(excluded, -torch.inf)
        g[rows] = eager.competition_on_slate(problem, z, z_positive[rows], rows.start)
    factor = eager.temperature_factor(problem.dual, g, weights)[:, None]
    return query + factor * pull, shift[:, None], tau * factor
