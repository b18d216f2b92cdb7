"""The full softmax over a table whose rows are spread over a process group.

Every rank scores the rows of all ranks by its own shard, and no rank ever holds the table. A rank
gives ``log sum_v exp z_iv`` over its shard without the target, and the rank that has the target
gives ``z_i+``. These two numbers a row and rank make the log-odds of all items against the target,

    O_i = log sum_{v != y_i} exp(z_iv - z_i+),        l_i = log(1 + exp O_i)

As in `ring`, a shard is a problem of its own for the backends, one whose positive has a logit that
is known beforehand: in the forward for its row losses, in the backward with a gradient of the rows
that makes its probabilities those of the whole table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwl_kernels import backends, ops
from dwl_kernels.core.arguments import flag
from dwl_kernels.core.double_backward import once
from dwl_kernels.core.problem import NO_GRADIENTS, NO_ITEM, GradMask, RowOptions, SharedProblem
from dwl_kernels.core.rows import Prepared, active_rows, divide, prepare
from dwl_kernels.core.untraced import untraced
from dwl_kernels.core.values import checks_values, no_autocast
from dwl_kernels.distributed.exchange import (
    agree,
    all_gather,
    exchanged,
    gathered,
    in_order,
    summed,
)
from dwl_kernels.distributed.group import Group
from dwl_kernels.distributed.reduction import kind_of, log_odds, same_of_rows, weighted, whole_loss
from dwl_kernels.gather import table_gradient


class Shards(NamedTuple):
    """Where the rows of the batch and of the table are."""

    group: Group
    rows: tuple[int, ...]  # of the batch, on every rank
    items: tuple[int, ...]  # rows of the table, on every rank
    replicated_rows: bool  # whether all ranks hold the same rows of the batch

    def first_item(self) -> int:
        """The row of the table that the shard of this rank begins with."""
        return sum(self.items[: self.group.rank])

    def own_rows(self) -> slice:
        """The rows of this rank among those that it scores."""
        if self.replicated_rows:
            return slice(None)
        first = sum(self.rows[: self.group.rank])
        return slice(first, first + self.rows[self.group.rank])


@untraced
def full_loss(
    build: Callable[[], SharedProblem],
    query: Tensor,
    group: Group,
    replicated_rows: bool,
    backend: str,
) -> Tensor:
    """The loss of a full softmax whose problem has the shard of this rank for candidates."""

    def local() -> tuple[tuple[SharedProblem, Prepared], dict[str, Any], list[int]]:
        problem = build()
        same = same_of_rows("full_softmax_loss", problem)
        same["replicated_rows"] = flag("replicated_rows", replicated_rows)
        same["bias"] = kind_of(problem.candidate_log_q)
        same["table_ids"] = kind_of(problem.candidate_ids)
        same["skip_threshold"] = problem.skip_threshold
        backends.check_name(backend)
        backends.pick(backend, problem)  # raises if it cannot run
        sizes = [len(problem.query), problem.num_candidates, _items_asked_for(problem)]
        return (problem, _prepared(problem)), same, sizes

    (problem, prepared), sizes = agree(group, query, local)
    rows, items, asked = (tuple(one[i] for one in sizes) for i in range(3))
    if replicated_rows and len(set(rows)) > 1:
        raise ValueError(
            f"query has {list(rows)} rows on the ranks of the process group, and with "
            "replicated_rows=True all ranks pass the same rows"
        )
    for rank, least in enumerate(asked):
        if least > sum(items):
            raise IndexError(
                f"target holds {least - 1} on rank {rank} of the process group, but the shards of "
                f"the table have {sum(items)} rows together: ids are rows of the whole table"
            )
    call = _Call(problem, prepared.active, Shards(group, rows, items, replicated_rows), backend)
    leaves = problem.query, problem.candidates, problem.candidate_log_q, problem.rows.temperature
    odds = _Odds.apply(call, *leaves)
    losses = torch.logaddexp(odds, torch.zeros_like(odds))
    target = problem.target
    if target is not None and not checks_values(target):
        losses = losses.masked_fill((target < 0) | (target >= sum(items)), torch.nan)
    own = weighted(losses, prepared.weight)
    reduction = problem.rows.reduction
    own = own if reduction == "none" else own.sum()
    if not replicated_rows:
        own = whole_loss(own, prepared.norm, reduction, group)
    elif prepared.norm is not None:
        own = divide(own, prepared.norm)
    return own.reshape(query.shape[:-1]) if reduction == "none" else own


def _items_asked_for(problem: SharedProblem) -> int:
    """How many rows the table has at least, by the targets, where values are looked at.

    Raises:
        IndexError: a target below 0.
    """
    target, active = problem.target, active_rows(problem)
    assert target is not None
    if not checks_values(target):
        return 0
    if active is not None:
        target = target[active]
    if not target.numel():
        return 0
    low, high = (int(extreme) for extreme in target.aminmax())
    if low < 0:
        raise IndexError(f"target holds {low}: ids are rows of the whole table, or ignore_index")
    return high + 1


def _prepared(problem: SharedProblem) -> Prepared:
    """What is known of the rows. Whether targets are rows of the table, one rank cannot say."""
    active, rows = active_rows(problem), problem.rows
    if active is not None:
        weights = rows.example_weights
        mask = active.to(problem.dtypes.accumulate)
        rows = rows._replace(example_weights=mask if weights is None else weights * mask)
    return prepare(problem._replace(target=None, rows=rows), None)


class _Call(NamedTuple):
    problem: SharedProblem  # with this rank's rows and shard
    active: Tensor | None  # [B]
    shards: Shards
    backend: str


class _Scored(NamedTuple):
    """The rows of all ranks, as this rank scores them."""

    query: Tensor  # [T, D], zeros where padded
    target: Tensor  # [T] rows of the shard, -1 where it does not have them
    tau: Tensor | None  # [T] or []
    known: Tensor  # [T] the logit of what stands for the positive
    item: Tensor | None  # [T] the item of the target, wherever it is, where rows have items


class _Odds(torch.autograd.Function):
    """``O_i`` ``[B]`` of the rows of this rank."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        query: Tensor,  # [B, D]
        shard: Tensor,  # [V_r, D]
        minus_bias: Tensor | None,  # [V_r]
        temperature: Tensor | None,  # [] or [B]
    ) -> Tensor:
        with no_autocast(query.device.type):
            scored, positive = _scored(call)
            of_shard = scored.known.double().new_full(scored.known.shape, -torch.inf)
            losses = of_shard
            if len(shard):
                block = _problem_of_shard(call, scored)
                losses = ops.solve(block, None, NO_GRADIENTS, call.backend).loss.double()
                of_shard = scored.known.double() + log_odds(losses)
            pairs = _to_owners(torch.stack((of_shard, positive), 1), call.shards)
            everything = pairs[:, :, 0].logsumexp(0)  # [B]
            odds = everything - pairs[:, :, 1].amax(0)
        ctx.call = call
        ctx.save_for_backward(losses, everything, *scored)
        return odds.to(call.problem.dtypes.accumulate)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), call = upstream, ctx.call
        losses, everything, *saved = ctx.saved_tensors
        scored = _Scored(*saved)
        with no_autocast(grad.device.type):
            gradients = _gradients(
                call, scored, losses, everything, grad.detach(), ctx.needs_input_grad
            )
        return None, *(g if g is None else once(g, grad) for g in gradients)


def _scored(call: _Call) -> tuple[_Scored, Tensor]:
    """The rows that this rank scores, and ``z_i+`` in float64, -inf if another has the target."""
    problem, active, shards = call.problem, call.active, call.shards
    query, target = problem.query.detach(), problem.target
    assert target is not None
    tau = problem.rows.temperature
    tau = None if tau is None else tau.detach()
    per_row = tau if tau is not None and tau.dim() else None
    if active is not None:
        query = query.masked_fill(~active[:, None], 0)
        target = target.masked_fill(~active, NO_ITEM)
        per_row = None if per_row is None else per_row.masked_fill(~active, 1)
    if not shards.replicated_rows:
        query, target, per_row = gathered([query, target, per_row], shards.rows, shards.group)
    tau = tau if per_row is None else per_row
    local = target - shards.first_item()
    shard, minus_bias = problem.candidates.detach(), problem.candidate_log_q
    here = (local >= 0) & (local < len(shard)) & (target >= 0)
    local = local.masked_fill(~here, NO_ITEM)
    items = _items_of_targets(problem.candidate_ids, local, shards.group)
    if not len(shard):
        known = query.new_zeros(len(query), dtype=problem.dtypes.accumulate)
        return _Scored(query, local, tau, known, items), known.double() - torch.inf
    # Where the target is elsewhere, an item of this shard stands for it, so that no sum of
    # exponentials is lost however far the logits are from 0.
    item = local.new_zeros(()) if minus_bias is None else minus_bias.detach().argmin()
    place = torch.where(here, local, item)
    wide = problem.dtypes.accumulate
    product = shard[place].to(wide)
    product *= query
    score = product.sum(1) / (problem.rows.tau if tau is None else tau * problem.rows.tau)
    logit = score if minus_bias is None else score - minus_bias.detach()[place]
    positive = torch.where(here, logit.double(), -torch.inf)
    # A bias may be infinite, and what others are measured by must not be.
    return _Scored(query, local, tau, torch.where(logit.isinf(), score, logit), items), positive


def _items_of_targets(
    table_ids: Tensor | None,  # [V_r]
    local: Tensor,  # [T] rows of the shard, -1 where it does not have them
    group: Group,
) -> Tensor | None:  # [T]
    """The items of the targets, which their owners tell. 8 bytes for every row and rank."""
    if table_ids is None:
        return None
    unknown = torch.full_like(local, torch.iinfo(torch.int64).min)
    if len(table_ids):
        unknown = torch.where(local == NO_ITEM, unknown, table_ids[local.clamp(min=0)])
    every = unknown.new_empty((group.size, len(unknown)))
    all_gather(every, unknown, group)
    return every.amax(0)


def _problem_of_shard(call: _Call, scored: _Scored) -> SharedProblem:
    problem, shard = call.problem, call.problem.candidates.detach()
    minus_bias = problem.candidate_log_q
    if minus_bias is None:
        minus_bias = scored.known.new_zeros(len(shard))
    return SharedProblem(
        query=scored.query,
        positive=torch.zeros_like(scored.query),
        candidates=shard,
        positive_log_q=-scored.known,
        candidate_log_q=minus_bias.detach(),
        positive_ids=scored.target if scored.item is None else scored.item,
        candidate_ids=torch.arange(len(shard), device=shard.device)
        if scored.item is None
        else problem.candidate_ids,
        rows=RowOptions(temperature=scored.tau, tau=problem.rows.tau, reduction="none"),
    )


def _to_owners(pairs: Tensor, shards: Shards) -> Tensor:  # [T, 2] -> [ranks, B, 2]
    """What all ranks found out about the rows of this one."""
    group, count = shards.group, shards.rows[shards.group.rank]
    if shards.replicated_rows:
        every = pairs.new_empty((group.size, *pairs.shape))
        all_gather(every, pairs, group)
        return every
    return exchanged(pairs, shards.rows, [count] * group.size, group).view(group.size, count, 2)


def _gradients(
    call: _Call,
    scored: _Scored,
    losses: Tensor,  # [T] of the shard, float64
    everything: Tensor,  # [B] float64, log sum exp over all items but the target
    grad: Tensor,  # [B]
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    problem, shards, group = call.problem, call.shards, call.shards.group
    _, want_query, want_shard, want_bias, want_temperature = needed
    pairs = torch.stack((grad.double(), everything), 1)
    if not shards.replicated_rows:
        (pairs,) = gathered([pairs], shards.rows, group)
    upstream, everything = pairs.unbind(1)  # [T]
    shard, wide = problem.candidates.detach(), problem.dtypes.accumulate
    d_query: Tensor | None = None
    d_shard = d_minus_bias = None
    if len(shard):
        # Of an infinite sum the part that is infinite is all.
        share = (scored.known.double() + losses - everything).exp()
        share = torch.where(losses == torch.inf, 1.0, share)
        of_rows = torch.where(upstream == 0, 0.0, upstream * share).to(wide)
        wanted = GradMask(
            want_query or want_temperature, False, want_shard, want_bias, False, False
        )
        found = ops.solve(_problem_of_shard(call, scored), of_rows, wanted, call.backend)
        # What the target's own logit adds, with the opposite sign.
        here, place = scored.target >= 0, scored.target.clamp(min=0)
        of_target = torch.where(here, -upstream, 0.0).to(wide)
        tau = problem.rows.tau if scored.tau is None else scored.tau * problem.rows.tau
        if found.query is not None:
            own = shard[place].to(wide)
            own *= (of_target / tau)[:, None]
            d_query = found.query.to(wide)
            d_query += own.masked_fill_((of_target == 0)[:, None], 0)
            del own
        ids = [scored.target[:, None]]
        if found.candidates is not None:
            options = (len(shard), wide, False, call.backend)
            coefficients = [(of_target / tau)[:, None]]
            d_shard = table_gradient(scored.query, ids, coefficients, *options)
            d_shard += found.candidates
        if found.candidate_log_q is not None:
            ones = torch.ones_like(of_target)[:, None]
            options = (len(shard), wide, False, call.backend)
            added = table_gradient(ones, ids, [of_target[:, None]], *options)
            d_minus_bias = found.candidate_log_q - added[:, 0]
    else:
        d_query = torch.zeros_like(scored.query, dtype=wide)
        d_shard, d_minus_bias = shard.to(wide), scored.known.new_zeros(0)
    if d_query is not None:
        if shards.replicated_rows:
            every = d_query.new_empty((group.size, *d_query.shape))
            all_gather(every, d_query, group)
            d_query = in_order(every, wide)
        else:
            d_query = summed(d_query, shards.rows, group)
    d_temperature = None
    if want_temperature:
        theta = problem.rows.temperature
        assert theta is not None
        assert d_query is not None
        own = scored.query[shards.own_rows()].to(wide)
        d_temperature = -(own * d_query).sum(1) / theta.detach()
        if call.active is not None:
            d_temperature = torch.where(call.active, d_temperature, 0.0)
        if not theta.dim():
            d_temperature = d_temperature.sum()
    if not shards.replicated_rows:  # the gradient of the rows is times the number of ranks
        for gradient in (d_shard, d_minus_bias):
            if gradient is not None:
                gradient /= group.size
    return [
        d_query.to(problem.query.dtype) if want_query and d_query is not None else None,
        d_shard.to(shard.dtype) if want_shard and d_shard is not None else None,
        d_minus_bias if want_bias else None,
        d_temperature,
    ]
