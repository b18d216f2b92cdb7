"""Small embeddings, ids and domains that fit every loss."""

from __future__ import annotations

import torch

B, V, D = 3, 6, 4
IDS = [4, 0, 2]
NEGATIVE_IDS = [1, 5]
DOMAINS = [1, -1, 0]


def embeddings(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))


QUERY, POSITIVE, NEGATIVE, TABLE = (embeddings(n, n) for n in (B, B + 10, 2, V))
POSITIVE = POSITIVE[:B]
