"""Small problems whose numbers are made infinite or NaN, and their losses row by row."""

from __future__ import annotations

from typing import Any

import cases
import torch
from torch import Tensor

KINDS = ("sampled", "in_batch", "mixed", "dual", "indexed", "indexed_rows")
ROWS, CANDIDATES = 6, 9
INF, NAN = torch.inf, torch.nan


def problem(kind: str, **options: Any) -> tuple[cases.Case, cases.Inputs]:
    case = cases.Case(
        f"edges of {kind}",
        rows=ROWS,
        candidates=CANDIDATES,
        dim=5,
        kind=kind,
        log_q=True,
        ids=not kind.startswith("indexed"),
        temperature="rows",
        options={"reduction": "none", **options},
    )
    inputs = case.inputs(torch.float64)
    if "positive_ids" in inputs and "table" in inputs:  # no accidental hits, each row by itself
        inputs["positive_ids"] = torch.arange(ROWS)
        inputs["negative_ids"] = inputs["negative_ids"].clamp(min=ROWS)
    elif kind not in ("indexed", "indexed_rows", "full"):
        inputs[name_of(inputs, "ids")] = torch.arange(ROWS)
        if "negative_ids" in inputs:
            inputs["negative_ids"] = torch.arange(CANDIDATES) + 4  # two hits
    return case, inputs


def name_of(inputs: cases.Inputs, what: str) -> str:
    """How the call names `ids` or `log_q` of the positives."""
    return what if what in inputs else "positive_" + what


def embeddings(inputs: cases.Inputs) -> tuple[Tensor, Tensor]:
    """The positives and the candidates that are given, ``[N, D]`` or ``[B, K, D]``."""
    if "table" in inputs:
        return inputs["table"][inputs["positive_ids"]], inputs["table"][inputs["negative_ids"]]
    nothing = inputs["query"].new_empty(0, inputs["query"].shape[1])
    return inputs["positive"], inputs.get("negative", nothing)


def row_losses(kind: str, inputs: cases.Inputs, rows: list[int] | None = None) -> Tensor:
    """Losses of the standard correction, of all rows or some."""
    assert kind != "dual"
    positive, negative = embeddings(inputs)
    query, tau = inputs["query"], inputs["temperature"]
    log_q = inputs[name_of(inputs, "log_q")]
    ids = inputs.get(name_of(inputs, "ids"))
    losses = []
    for i in range(len(query)) if rows is None else rows:
        z_positive = query[i] @ positive[i] / tau[i] - log_q[i]
        terms = [z_positive]
        if kind in ("in_batch", "mixed"):
            for k in range(len(query)):
                if k == i or (ids[k] == ids[i] != -1) or log_q[k].isinf():
                    continue
                terms.append(query[i] @ positive[k] / tau[i] - log_q[k])
        if "negative_ids" in inputs:
            per_row = inputs["negative_ids"].dim() == 2
            own = negative[i] if per_row else negative
            own_ids = inputs["negative_ids"][i] if per_row else inputs["negative_ids"]
            own_log_q = inputs["negative_log_q"][i] if per_row else inputs["negative_log_q"]
            for c, id, q in zip(own, own_ids, own_log_q, strict=True):
                if not (id == ids[i] != -1):
                    terms.append(query[i] @ c / tau[i] - q)
        losses.append(torch.stack(terms).logsumexp(0) - z_positive)
    return torch.stack(losses)


def gradients(loss: Tensor, inputs: cases.Inputs) -> dict[str, Tensor]:
    leaves = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        k: torch.zeros_like(leaves[k]) if g is None else g
        for k, g in zip(leaves, grads, strict=True)
    }


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-10, atol=1e-12, msg=f"{name}: {{}}".format
        )
