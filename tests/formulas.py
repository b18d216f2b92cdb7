"""The losses written out row by row, for autograd: what the reference itself is compared with.

Nothing of the package is called. A row lists the candidates that it has, and leaves out the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

DUAL = {"hardness": 0.0, "similarity": 0.0, "slate_size": 16, "competition": 1.0}  # defaults


class Row(NamedTuple):
    query: Tensor  # [D]
    positive: Tensor  # [D]
    log_q: Tensor | None  # of the positive
    candidates: Tensor  # [n, D], those that the row competes with
    candidate_log_q: Tensor  # [n]
    places: list[int]  # [n], among all candidates
    count: int  # of all candidates


def loss(kind: str, inputs: dict[str, Any]) -> Tensor:
    """The loss of keyword arguments of the public function of this kind."""
    query = inputs["query"]
    found = rows_of(kind, inputs)
    alive = list(found)
    tau = torch.as_tensor(inputs["temperature"], dtype=query.dtype).expand(len(query))
    factor = dict.fromkeys(alive, 1.0)
    if kind == "dual":
        factor = temperature_factors(found, tau.detach(), inputs)
    refined = inputs.get("correction") == "refined"
    losses, weights = query.sum(1).nan_to_num() * 0, query.new_zeros(len(query))
    for i in alive:
        weight = weight_of(inputs, i)
        bias = log_kappa(found[i], tau[i].detach(), inputs) if kind == "dual" else 0.0
        value = (of_row_refined if refined else of_row)(found[i], tau[i] * factor[i], bias)
        here = torch.arange(len(query)) == i
        weights = torch.where(here, weight, weights)
        losses = torch.where(here, weight * value, losses)
    reduction = inputs.get("reduction", "mean")
    if reduction == "none":
        return losses
    norm = {"mean": len(alive), "weighted_mean": weights.sum(), "sum": 1}[reduction]
    return losses.sum() / norm if norm != 0 else losses.sum() * 0


def rows_of(kind: str, inputs: dict[str, Any]) -> dict[int, Row]:
    """Those that are no padding, by their number."""
    rows, example = range(len(inputs["query"])), inputs.get("example_weights")
    padded = [example is not None and bool(example[i] == 0) for i in rows]
    names = ("target",) if kind == "full" else ("ids", "positive_ids")
    ignore = inputs.get("ignore_index", -100 if kind == "full" else None)
    for name in names:
        if ignore is not None and name in inputs:
            padded = [padded[i] or int(inputs[name][i]) == ignore for i in rows]
    return {i: row_of(kind, inputs, i, padded) for i in rows if not padded[i]}


def statistics(kind: str, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, log-probability and rank of every row; zeros for padding."""
    query, refined = inputs["query"], inputs.get("correction") == "refined"
    found = rows_of(kind, inputs)
    tau = torch.as_tensor(inputs["temperature"], dtype=query.dtype).expand(len(query))
    factor = dict.fromkeys(found, 1.0)
    if kind == "dual":
        factor = temperature_factors(found, tau, inputs)
    lse, log_p = query.new_zeros(len(query)), query.new_zeros(len(query))
    rank = torch.zeros(len(query), dtype=torch.int64)
    for i, row in found.items():
        bias = log_kappa(row, tau[i], inputs) if kind == "dual" else 0.0
        scale = tau[i] * factor[i]
        # One sum for each product, so that equal embeddings tie.
        z = (row.candidates * row.query).sum(1) / scale - row.candidate_log_q + bias
        z_positive = (row.positive[None] * row.query).sum(1)[0] / scale
        if refined:
            rest = 1.0 if row.log_q is None else 1 - row.log_q.exp()
            lse[i] = (z.exp().sum() * rest).log()
        else:
            z_positive = z_positive if row.log_q is None else z_positive - row.log_q
            lse[i] = torch.cat((z_positive[None], z)).logsumexp(0)
        log_p[i] = 0.0 if z_positive == lse[i] else z_positive - lse[i]
        rank[i] = 1 + (~(z < z_positive)).sum()
    return lse, log_p, rank


def row_of(kind: str, inputs: dict[str, Any], i: int, padded: list[bool]) -> Row:
    query = inputs["query"]
    in_batch = kind in ("in_batch", "mixed") or inputs.get("in_batch", False)
    if kind == "dual" and "negative" not in inputs:
        in_batch = True
    prefix = "" if kind in ("in_batch", "mixed") else "positive_"
    own_id = None if inputs.get(prefix + "ids") is None else int(inputs[prefix + "ids"][i])
    log_q = inputs.get(prefix + "log_q")
    own_log_q = None if log_q is None else log_q[i]
    if kind == "full":
        bias = inputs.get("bias", query.new_zeros(len(inputs["table"])))
        target = int(inputs["target"][i])
        table_ids = inputs.get("table_ids", torch.arange(len(bias))).tolist()
        out = {table_ids[target], -1}
        items = [v for v, item in enumerate(table_ids) if v != target and item not in out]
        return Row(
            query[i], inputs["table"][target], -bias[target], inputs["table"][items], -bias[items],
            items, len(bias),
        )  # fmt: skip
    parts = []  # embeddings, log-Q and ids of candidates
    if in_batch:
        parts.append((inputs["positive"], log_q, inputs.get(prefix + "ids")))
    item_of: dict[int, int] = {}  # of rows of a table
    if "table_ids" in inputs:
        item_of = dict(enumerate(inputs["table_ids"].tolist()))
    if kind.startswith("indexed"):
        ids, more = inputs["negative_ids"], inputs.get("negative_log_q")
        if kind == "indexed_rows":
            ids, more = ids[i], None if more is None else more[i]
        positive = inputs["table"][own_id]
        own_id = item_of.get(own_id, own_id)
        parts.append((inputs["table"][ids.clamp(min=0).long()], more, ids))
    else:
        positive = inputs["positive"][i]
        if "negative" in inputs:
            names = ("negative", "negative_log_q", "negative_ids")
            given = [inputs.get(name) for name in names]
            if kind == "rows":
                given = [None if one is None else one[i] for one in given]
            parts.append(tuple(given))
    chosen, chosen_log_q, places, count = [], [], [], 0
    for number, (embeddings, part_log_q, ids) in enumerate(parts):
        for j in range(len(embeddings)):
            count += 1
            of_batch = in_batch and number == 0
            q = query.new_zeros(()) if part_log_q is None else part_log_q[j]
            id = None if ids is None else int(ids[j])
            ignored = id is not None and id == inputs.get("ignore_index")
            id = item_of.get(id, id)
            gone = ignored or bool(q == torch.inf)
            gone |= of_batch and (bool(q == -torch.inf) or j == i or padded[j])
            if of_batch and "query_ids" in inputs:
                of_query = inputs["query_ids"].tolist()
                gone |= of_query[j] == of_query[i] != -1
            keeps = not inputs.get("remove_accidental_hits", True)
            gone |= id is not None and id == own_id and id != -1 and not keeps
            gone |= kind.startswith("indexed") and id == -1
            if not gone:
                chosen.append(embeddings[j])
                chosen_log_q.append(q)
                places.append(count - 1)
    candidates = torch.stack(chosen) if chosen else query[:0]
    candidate_log_q = torch.stack(chosen_log_q) if chosen else query.new_zeros(0)
    return Row(query[i], positive, own_log_q, candidates, candidate_log_q, places, count)


def corrected(row: Row, tau: Tensor) -> Tensor:
    z_positive = row.positive @ row.query / tau
    return z_positive if row.log_q is None else z_positive - row.log_q


def of_row(row: Row, tau: Tensor, bias: Any) -> Tensor:
    """``log(e^z+ + sum_j e^z_j) - z+``."""
    z_positive = corrected(row, tau)
    if z_positive == torch.inf or not len(row.candidates):
        return row.query.sum() * 0
    z = row.candidates @ row.query / tau - row.candidate_log_q + bias
    return torch.cat((z_positive[None], z)).logsumexp(0) - z_positive


def of_row_refined(row: Row, tau: Tensor, bias: Any) -> Tensor:
    """arXiv 2507.09331: no positive in the denominator, a detached weight of the row."""
    if not len(row.candidates):
        return row.query.sum() * 0
    z_positive = row.positive @ row.query / tau
    z = row.candidates @ row.query / tau - row.candidate_log_q + bias
    rest = 1.0 if row.log_q is None else 1 - row.log_q.exp()
    lse = (z.exp().sum() * rest).log()
    odds = z.exp().sum() * rest / len(z) / z_positive.exp()
    return (odds / (1 + odds)).detach() * (lse - z_positive)


def weight_of(inputs: dict[str, Any], i: int) -> Any:
    """The example weight times the mean over the row's domains, 1 if it has none."""
    weight = inputs["example_weights"][i] if "example_weights" in inputs else 1.0
    if "domain_ids" in inputs:
        domains = [d for d in inputs["domain_ids"][i].reshape(-1).tolist() if d >= 0]
        if domains:
            weight = weight * sum(inputs["domain_weights"][d] for d in domains) / len(domains)
    return weight


def log_kappa(row: Row, tau: Tensor, inputs: dict[str, Any]) -> Tensor:  # [n]
    """``log(n softmax(h <q, c> / tau + s <p, c> / tau))``, which weighs candidates, detached."""
    h, s = (inputs.get(name, DUAL[name]) for name in ("hardness", "similarity"))
    with torch.no_grad():
        x = (h * (row.candidates @ row.query) + s * (row.candidates @ row.positive)) / tau
        return (len(x) * x.softmax(0)).log()


def temperature_factors(
    found: dict[int, Row], tau: Tensor, inputs: dict[str, Any]
) -> dict[int, Any]:
    """``f / mean f`` of every row, from how hard its slate competes."""
    size, k = (inputs.get(name, DUAL[name]) for name in ("slate_size", "competition"))
    g = {}
    with torch.no_grad():
        for i, row in found.items():
            z = row.candidates @ row.query / tau[i] - row.candidate_log_q
            z_positive = corrected(row, tau[i])
            best: dict[int, float] = {}  # by group of places
            for place, value in zip(row.places, z.tolist(), strict=True):
                group = place * size // row.count
                best[group] = max(value, best.get(group, value))
            wins = [float(1 / (1 + (z_positive - b).exp())) for b in best.values()]
            g[i] = sum(wins) / max(len(wins), 1)
    mean_g = sum(g.values()) / max(len(g), 1)
    f = {i: min(max(1 + k * (value - mean_g), 0.5), 2.0) for i, value in g.items()}
    mean_f = sum(f.values()) / max(len(f), 1)
    return {i: value / mean_f for i, value in f.items()}
