"""The upstream gradient of a scalar loss, applied to all gradients by one launch.

A program owns a block of one gradient. The product is made in float32 or wider: a loss scaler's
65536 is infinite in float16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwl_kernels.backends.triton_launch import launch, specialised

BLOCK = 4096


@triton.jit
def scale_kernel(
    gradients,  # tuple of pointers
    results,
    lengths,
    upstream,  # []
    BLOCK: tl.constexpr,
    NUM: tl.constexpr,
):
    program = tl.program_id(0)
    factor = tl.load(upstream)
    first = 0
    for k in tl.static_range(NUM):
        blocks = tl.cdiv(lengths[k], BLOCK)
        if (program >= first) & (program < first + blocks):
            at = tl.cast(program - first, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = at < lengths[k]
            value = tl.load(gradients[k] + at, mask=inside)
            if value.dtype == tl.float64:
                value *= factor
            else:
                value = value.to(tl.float32) * factor
            tl.store(results[k] + at, value.to(results[k].dtype.element_ty), mask=inside)
        first += blocks


def scaled(
    gradients: Sequence[Tensor], upstream: Tensor, dtypes: Sequence[torch.dtype]
) -> list[Tensor]:
    """``gradient * upstream`` in the wanted dtypes, out of place so that backward may run twice."""
    results = [
        torch.empty(g.shape, dtype=d, device=g.device)
        for g, d in zip(gradients, dtypes, strict=True)
    ]
    sources = [g.contiguous() for g in gradients]
    lengths = tuple(g.numel() for g in gradients)
    blocks = sum(triton.cdiv(n, BLOCK) for n in lengths)
    if blocks:
        arguments = (tuple(sources), tuple(results), lengths, upstream, BLOCK, len(sources))
        tensors = (*sources, *results, upstream)
        launch(scale_kernel, blocks, specialised(lengths), tensors, arguments, {})
    return results
