"""What the forwards of the loss modules check before they call a function."""

from __future__ import annotations

import torch
from torch import Tensor

from dwl_kernels.core.arguments import check_dense, integers


def check_tensors(**named: Tensor | None) -> None:
    """TypeError for what is given and no dense tensor."""
    for name, value in named.items():
        if value is not None:
            check_dense(name, value)


def checked_ids(query: Tensor, **named: Tensor | None) -> list[Tensor | None]:
    """Ids and domains as tensors of int64 or int32; those of no tensor go to the query's device."""
    return [
        None if value is None else integers(name, value, query.device)
        for name, value in named.items()
    ]


def check_rows(name: str, value: Tensor, leading: torch.Size, *, slots: bool = False) -> None:
    """One entry per row, or with `slots` several."""
    check_dense(name, value)
    if value.shape == leading or (slots and value.dim() and value.shape[:-1] == leading):
        return
    wanted = f"{list(leading)}" + (f", or {[*leading, 'G']}".replace("'", "") if slots else "")
    raise ValueError(f"{name} has shape {list(value.shape)}; wanted {wanted}")


def padding(example_weights: Tensor | None, leading: torch.Size) -> Tensor | None:  # [...] bool
    """Which rows are padding; None where none can be."""
    if example_weights is None:
        return None
    check_rows("example_weights", example_weights, leading)
    return example_weights == 0


def check_candidates(
    positive: Tensor | None,
    negative: Tensor | None,
    table: Tensor | None,
    positive_ids: Tensor | None,
    negative_ids: Tensor | None,
    negative_log_q: Tensor | None,
) -> None:
    """ValueError unless there are either embeddings or a table, and what describes them."""
    if table is not None:
        if positive is not None or negative is not None:
            raise ValueError(
                "table is given together with embeddings; leave positive and negative out: "
                "positive_ids and negative_ids name their rows of the table"
            )
        if positive_ids is None:
            raise ValueError(
                "table is given without positive_ids; pass the row of the table that is each row's "
                "positive"
            )
        if negative_ids is None and negative_log_q is not None:
            raise ValueError("negative_log_q is given without negative_ids; pass both, or neither")
        return
    if positive is None:
        raise ValueError(
            "there is no positive; pass the embeddings, positive, or a table together with "
            "positive_ids"
        )
    if negative is None and (negative_ids is not None or negative_log_q is not None):
        raise ValueError(
            "negative_ids and negative_log_q describe negatives, which are not given; pass "
            "negative, or a table whose rows negative_ids names"
        )
