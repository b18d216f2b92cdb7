"""Published packages that compute a full softmax, where they are installed (`.[bench]`).

They run on GPUs only, and none of them is ever needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.shapes import Inputs


def losses() -> dict[str, Callable[[Inputs], Tensor]]:
    """Each with its defaults, and with its most accurate settings."""
    found: dict[str, Callable[[Inputs], Tensor]] = {}
    liger = _optional("liger_kernel.transformers")
    if liger is not None:
        make = liger.LigerFusedLinearCrossEntropyLoss
        found["liger-kernel"] = _liger(make())
        found["liger-kernel, float32 sums"] = _liger(make(accum_dtype=torch.float32))
    cce = _optional("cut_cross_entropy")
    if cce is not None:
        found["cut-cross-entropy"] = _cut(cce.linear_cross_entropy)
        found["cut-cross-entropy, no filter"] = _cut(cce.linear_cross_entropy, filter_eps=None)
    return found


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception:  # not installed, or not made for this PyTorch or Triton
        return None


def _liger(module: Callable[..., Tensor]) -> Callable[[Inputs], Tensor]:
    return lambda x: module(x.table, x.query / x.temperature, x.positive_ids)


def _cut(function: Callable[..., Tensor], **options: Any) -> Callable[[Inputs], Tensor]:
    return lambda x: function(x.query / x.temperature, x.table, x.positive_ids, **options)
