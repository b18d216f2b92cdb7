"""The dual scale over a process group: its groups of candidates and its means are of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dwl_kernels.core.candidates import (
    Slate,
    excluded_candidates,
    row_blocks,
    temperature_factor,
)
from dwl_kernels.core.problem import SharedProblem
from dwl_kernels.core.rows import Prepared, embeddings
from dwl_kernels.core.values import no_autocast
from dwl_kernels.distributed.exchange import gathered
from dwl_kernels.distributed.group import Group


def places(
    problem: SharedProblem, rows: Sequence[int], shared: Sequence[int], group: Group
) -> Tensor:
    """Where one process would have each candidate: all positives, then all negatives, ``[N]``.

    In the order that the candidates have here: those of this rank, then those of the others.
    """
    device = problem.query.device
    positives = rows if problem.in_batch else [0] * group.size
    told = [many - few for many, few in zip(shared, positives, strict=True)]
    in_order = []
    for rank in range(group.size):
        negatives = sum(positives) + sum(told[:rank])
        first = torch.arange(positives[rank], device=device) + sum(positives[:rank])
        in_order.append(torch.cat((first, torch.arange(told[rank], device=device) + negatives)))
    own = in_order.pop(group.rank)
    # Negatives that all ranks hold are told to nobody, and come last.
    kept = torch.arange(problem.num_candidates - len(own), device=device) + sum(shared)
    return torch.cat((own, kept, *in_order))


def with_competition(
    problem: SharedProblem,  # with the candidates of all ranks
    prepared: Prepared,
    place: Tensor,  # [N]
    rows: Sequence[int],
    group: Group,
) -> SharedProblem:
    """The problem with the factors of its rows' temperatures, whose means are over all rows.

    One exchange of the intensities, a number for each row of all ranks.
    """
    dual = problem.dual
    assert dual is not None
    with torch.no_grad(), no_autocast(problem.query.device.type):
        parts = embeddings(problem, prepared.active)
        slate = Slate(problem, dual, prepared, *parts, place)
        g = torch.empty_like(prepared.tau)
        for block in row_blocks(problem):
            excluded = excluded_candidates(problem, prepared.active, block)
            g[block] = slate.intensity(block, excluded)
        if prepared.active is not None:
            g = g.masked_fill(~prepared.active, torch.nan)
        own = slice(sum(rows[: group.rank]), sum(rows[: group.rank + 1]))
        (every,) = gathered([g], rows, group)
        factor = temperature_factor(dual, every, None)[own]
    return problem._replace(rows=problem.rows._replace(competition_factor=factor))
