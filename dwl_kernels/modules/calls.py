"""What a call of a module of sampled softmax asks for, and reading the rows of its table."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwl_kernels.backends import Backend
from dwl_kernels.core.build import leave_out_no_items, table_ids
from dwl_kernels.gather import shared_rows


class Given(NamedTuple):
    """What `forward` was given beside embeddings, and later the same as tensors."""

    positive_ids: Tensor | None
    negative_ids: Tensor | None
    domain_ids: Tensor | None
    negative_domain_ids: Tensor | None
    positive_log_q: Tensor | None
    negative_log_q: Tensor | None
    example_weights: Tensor | None


class Call(NamedTuple):
    """What a call of `forward` asks for."""

    given: Given
    padded: Tensor | None  # [...] bool
    negatives: torch.Size | None  # [N] or [B, K]
    in_batch: bool
    per_row: bool  # whether every row has negatives of its own


def rows_of_table(
    query: Tensor,  # [..., D]
    table: Tensor,  # [V, D]
    example_weights: Tensor | None,  # [...]
    draws: dict[str, Any],  # ids and log-Q; negatives that are no items are left out of it
    sparse_grad: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor | None]:  # [..., D], [N, D]
    """The embeddings that the ids name."""
    positive_ids, drawn = draws["positive_ids"], draws["negative_ids"]
    if drawn is None:
        drawn = positive_ids.new_empty(0)
    ids = table_ids(query, table, positive_ids, drawn, example_weights)
    if draws["negative_ids"] is not None:
        log_q = draws["positive_log_q"], draws["negative_log_q"]
        drawn, negative_log_q = leave_out_no_items(ids[1], *log_q)
        draws |= {"negative_ids": drawn, "negative_log_q": negative_log_q}
    positive, negative = shared_rows(table, ids[0], drawn, sparse_grad, backend)
    return positive, None if draws["negative_ids"] is None else negative
