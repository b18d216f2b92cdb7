"""Arguments of the losses that are right, to be changed one at a time."""

from __future__ import annotations

from typing import Any

import torch

B, N, D = 4, 6, 3


def good(**changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    inputs = {
        "query": torch.randn(B, D, generator=g),
        "positive": torch.randn(B, D, generator=g),
        "negative": torch.randn(N, D, generator=g),
    }
    return {**inputs, **changes}


def ids(n: int) -> torch.Tensor:
    return torch.arange(n)
