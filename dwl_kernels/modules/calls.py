"""What a call of a module of sampled softmax asks for, and reading the rows of its table."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwl_kernels.backends import Backend
from dwl_kernels.core.drawn import item_ids, leave_out_no_items, left_out, table_rows
from dwl_kernels.gather import shared_rows


class Given(NamedTuple):
    """What `forward` was given beside embeddings, and later the same as tensors."""

    table_ids: Tensor | None
    positive_ids: Tensor | None
    negative_ids: Tensor | None
    query_ids: Tensor | None
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
    table_ids: Tensor | None,  # [V]
    draws: dict[str, Any],  # ids and log-Q; those of items, of negatives that are some, are left
    sparse_grad: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor | None]:  # [..., D], [N, D]
    """The embeddings that the ids name."""
    positive_ids, drawn = draws["positive_ids"], draws["negative_ids"]
    there = drawn is not None
    if drawn is None:
        drawn = positive_ids.new_empty(0)
    positive_rows, drawn = table_rows(query, table, positive_ids, drawn, example_weights)
    if there:
        drawn = left_out(positive_rows, drawn, table_ids, hits=False)
        log_q = draws["positive_log_q"], draws["negative_log_q"]
        drawn, negative_log_q = leave_out_no_items(drawn, *log_q)
        draws |= {"negative_ids": item_ids(drawn, table_ids), "negative_log_q": negative_log_q}
    draws["positive_ids"] = item_ids(positive_rows, table_ids)
    positive, negative = shared_rows(table, positive_rows, drawn, sparse_grad, backend)
    return positive, negative if there else None
