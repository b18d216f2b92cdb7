"""Candidates that go round a ring of ranks, where no rank has room for all of them.

The log-odds of all candidates against a positive that is not corrected,

    O_i = log sum_j exp(z_ij - <q_i, p_i> / tau_i),        l_i = log(1 + exp(O_i + log Q+_i))

are a sum, under the logarithm, over the blocks of candidates that the ranks hold. Block k is a
problem of its own for the backends, whose row losses ``l_ik`` are log(1 + exp O_ik). In the
backward its rows get the gradient of O_i times exp(l_ik - O_i), which turns the probabilities
within the block into those among all candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dwl_kernels import ops
from dwl_kernels.core.candidates import log_q_of_positives
from dwl_kernels.core.double_backward import once
from dwl_kernels.core.problem import NO_GRADIENTS, NO_ITEM, GradMask, RowOptions, SharedProblem
from dwl_kernels.core.rows import Prepared
from dwl_kernels.distributed.exchange import Layout
from dwl_kernels.distributed.group import Group
from dwl_kernels.distributed.reduction import log_odds, weighted
from dwl_kernels.distributed.told import padded_positives, told_of


def ring_loss(
    problem: SharedProblem,
    prepared: Prepared,
    shared: Sequence[int],
    group: Group,
    backend: str,
) -> Tensor:
    """The sum of ``w_i r_i l_i`` over the rows of this rank, or the rows for "none"."""
    rows = problem.rows
    circle = _Ring(problem, shared, group, backend, prepared.active)
    odds = _Odds.apply(
        circle, problem.query, problem.positive, problem.candidates, rows.temperature
    )
    refined = rows.correction == "refined"
    log_q = problem.positive_log_q if refined else log_q_of_positives(problem)
    if log_q is not None:
        odds = odds + (torch.log1p(-log_q.exp()) if refined else log_q)
    if prepared.active is not None:  # padding holds anything
        odds = odds.masked_fill(~prepared.active, -torch.inf)
    if refined:
        losses = _refined(odds, circle.count)
    else:
        losses = torch.logaddexp(odds, torch.zeros_like(odds))
    losses = weighted(losses, prepared.weight)
    return losses if rows.reduction == "none" else losses.sum()


def _refined(odds: Tensor, count: Tensor) -> Tensor:  # [B]
    """``r_i l_i`` of arXiv 2507.09331, where ``l_i`` is the log-odds."""
    nothing = odds == -torch.inf
    r = torch.sigmoid(odds.detach() - count.to(odds.dtype).log())
    return torch.where(nothing, 0.0, torch.where(nothing, 0.0, r) * odds)


class _Ring:
    """The problems of this rank's rows with the candidates of every rank."""

    def __init__(
        self,
        problem: SharedProblem,
        shared: Sequence[int],
        group: Group,
        backend: str,
        active: Tensor | None,
    ) -> None:
        self.problem, self.shared, self.group, self.backend = problem, shared, group, backend
        self.active = active
        self.told = told_of(problem, shared[group.rank])
        self.layout = Layout(self.told)
        self.padded = padded_positives(problem)
        # n_i, how many candidates of all ranks a row has: counted in the forward for "refined".
        self.count = torch.zeros_like(problem.query[:, 0], dtype=torch.int64)

    def blocks(self) -> Iterator[tuple[int, SharedProblem]]:
        """Every rank and the problem with its candidates, beginning with this rank's own.

        While the caller is at one, the next is on its way.
        """
        group, num_bytes = self.group, self.layout.num_bytes(max(self.shared))
        own = self._own()
        device = self.problem.query.device
        here = self.layout.packed(self.told, num_bytes, device)
        for step in range(group.size):
            rank = (group.rank + step) % group.size
            coming, moves = torch.empty_like(here), []
            if step + 1 < group.size:
                moves = self.pass_on(here, coming)
            yield rank, own if step == 0 else self._with(here, self.shared[rank])
            wait(moves)
            here = coming

    def pass_on(self, sent: Tensor, received: Tensor) -> list[Any]:
        """Start to send a tensor to the rank before this one, and to receive one from the next."""
        group = self.group
        if not sent.numel() and not received.numel():
            return []
        return dist.batch_isend_irecv(
            [
                dist.P2POp(op, tensor, group=group.process_group, group_peer=peer % group.size)
                for op, tensor, peer in (
                    (dist.isend, sent, group.rank - 1),
                    (dist.irecv, received, group.rank + 1),
                )
                if tensor.numel()
            ]
        )

    def _rows(self) -> RowOptions:
        rows, mask = self.problem.rows, None
        if self.active is not None:
            mask = self.active.to(self.problem.dtypes.accumulate)
        return RowOptions(
            example_weights=mask,
            temperature=None if rows.temperature is None else rows.temperature.detach(),
            tau=rows.tau,
            reduction="none",
        )

    def _own(self) -> SharedProblem:
        problem = self.problem
        positive = None if problem.positive is None else problem.positive.detach()
        return problem._replace(
            query=problem.query.detach(),
            positive=positive,
            candidates=problem.candidates.detach(),
            positive_log_q=self._zeros(problem.candidate_log_q),
            rows=self._rows(),
        )

    def _with(self, buffer: Tensor, count: int) -> SharedProblem:
        problem = self.problem
        candidates, ids, query_ids, log_q = self.layout.views(buffer, count)
        assert candidates is not None
        return SharedProblem(
            query=problem.query.detach(),
            positive=self.positive().detach(),
            candidates=candidates,
            positive_log_q=self._zeros(log_q),
            candidate_log_q=log_q,
            positive_ids=None if ids is None else problem.positive_ids,
            candidate_ids=ids,
            query_ids=problem.query_ids,
            candidate_query_ids=query_ids,
            rows=self._rows(),
        )

    def _zeros(self, log_q: Tensor | None) -> Tensor | None:  # [B]
        """The log-Q of positives that are not corrected."""
        return None if log_q is None else log_q.new_zeros(len(self.problem.query))

    def positive(self) -> Tensor:  # [B, D]
        problem = self.problem
        if problem.positive is not None:
            return problem.positive
        return problem.candidates[: len(problem.query)]


def num_competing(problem: SharedProblem, active: Tensor | None) -> Tensor:  # [B]
    """How many candidates compete with each row: no hits, nothing that a log-Q takes out."""
    log_q, rows = problem.candidate_log_q, len(problem.query)
    there = torch.ones(problem.num_candidates, dtype=torch.bool, device=problem.query.device)
    if log_q is not None:
        there &= log_q != torch.inf
    if problem.in_batch:
        if log_q is not None:
            there[:rows] &= log_q[:rows] != -torch.inf
        if active is not None:
            there[:rows] &= active
    own = torch.zeros_like(problem.query[:, 0], dtype=torch.int64)
    if problem.in_batch:
        own += there[:rows]
    pairs = problem.id_pairs()
    if len(pairs) == 2:
        pairs.append(_both(*pairs))
    hits, nobody = torch.zeros_like(own), torch.ones_like(own, dtype=torch.bool)
    for number, (row_ids, candidate_ids) in enumerate(pairs):
        # By sorting, and not by comparing all pairs.
        ids = candidate_ids[there].sort()[0]
        first = torch.searchsorted(ids, row_ids)
        found = torch.searchsorted(ids, row_ids, right=True) - first
        found = found.masked_fill(row_ids == NO_ITEM, 0)
        hits += found if number < 2 else -found  # those of both were counted twice
        nobody &= row_ids == NO_ITEM  # hits nothing, but is not its own candidate
    return there.sum() - torch.where(nobody, own, hits)


def _both(
    items: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:  # [B], [N]
    """Ids that are the same where those of both kinds are; -1 where one is."""
    kinds = [torch.cat(pair).long() for pair in (items, queries)]
    numbers = torch.stack(kinds, 1).unique(dim=0, return_inverse=True)[1]
    nobody = (kinds[0] == NO_ITEM) | (kinds[1] == NO_ITEM)
    numbers = numbers.masked_fill(nobody, NO_ITEM)
    rows = len(items[0])
    return numbers[:rows], numbers[rows:]


class _Odds(torch.autograd.Function):
    """``O_i`` ``[B]``. Candidates go round twice; the second time their gradients come home."""

    @staticmethod
    def forward(
        ctx: Any,
        circle: _Ring,
        query: Tensor,  # [B, D]
        positive: Tensor | None,  # [B, D]
        candidates: Tensor,  # [N, D]
        temperature: Tensor | None,  # [] or [B]
    ) -> Tensor:
        of_blocks: list[Tensor] = [query.new_empty(0)] * circle.group.size
        for rank, block in circle.blocks():
            of_blocks[rank] = ops.solve(block, None, NO_GRADIENTS, circle.backend).loss.double()
            if circle.problem.rows.correction == "refined":
                circle.count += num_competing(block, circle.active)
        losses = torch.stack(of_blocks)  # [ranks, B], in the order of the ranks
        odds = log_odds(losses).logsumexp(0)
        ctx.circle = circle
        ctx.save_for_backward(losses, odds)
        return odds.to(circle.problem.dtypes.accumulate)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), circle = upstream, ctx.circle
        losses, odds = ctx.saved_tensors
        problem, group, accumulate = circle.problem, circle.group, grad.dtype
        # Of an infinite sum the part that is infinite is all.
        share = torch.where(losses == torch.inf, 0.0, losses - odds).exp()
        of_rows = torch.where(grad.detach() == 0, 0.0, grad.detach() * share).to(accumulate)
        _, query, positive, candidates, temperature = ctx.needs_input_grad
        in_batch = problem.in_batch
        wanted = GradMask(
            query, positive or (in_batch and candidates), candidates, False, temperature, False
        )
        totals: dict[str, Tensor] = {}
        moves: list[Any] = []
        before: Tensor | None = None
        for rank, block in circle.blocks():
            mask = wanted if block.positive is not None else wanted._replace(positive=False)
            found = ops.solve(block, of_rows[rank], mask, circle.backend)
            for name in ("query", "positive", "temperature"):
                part = getattr(found, name)
                if part is not None:
                    part = part.to(accumulate)
                    totals[name] = totals[name] + part if name in totals else part
            if not candidates:
                continue
            assert found.candidates is not None
            d_candidates = found.candidates.to(accumulate)
            if rank == group.rank:
                kept, d_candidates = d_candidates, d_candidates[: circle.shared[rank]]
            wait(moves)
            if before is not None:
                d_candidates = before + d_candidates
            d_candidates = d_candidates.contiguous()
            # What comes next is of the block after this one; after the last, of our own.
            before = d_candidates.new_empty(
                (circle.shared[(rank + 1) % group.size], d_candidates.shape[1])
            )
            moves = circle.pass_on(d_candidates, before)
        wait(moves)
        gradients: list[Any] = [totals.get("query"), totals.get("positive"), None]
        if before is not None:
            home = torch.cat((before, kept[circle.shared[group.rank] :]))
            if in_batch:
                home[: len(problem.query)] += totals["positive"]
                gradients[1] = None
            if circle.padded is not None:
                home.masked_fill_(circle.padded[:, None], 0)
            gradients[2] = home
        gradients.append(totals.get("temperature"))
        leaves = problem.query, problem.positive, problem.candidates, problem.rows.temperature
        return None, *(
            g if g is None else once(g.to(leaf.dtype), grad)
            for g, leaf in zip(gradients, leaves, strict=True)
        )


def wait(moves: Sequence[Any]) -> None:
    for move in moves:
        move.wait()
