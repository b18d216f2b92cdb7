"""The upstream gradient of a scalar loss, applied to all gradients by one launch.

A program owns a block of one gradient. The product is made in float32 or wider: a loss scaler's
65536 is infinite in float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwl_kernels.backends.triton.launch import entry_of, launch, specialised

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
    gradients: Sequence[Tensor],
    upstream: Tensor,
    dtypes: Sequence[torch.dtype],
    in_place: bool = False,
) -> list[Tensor]:
    """``gradient * upstream`` in the wanted dtypes; in the place of gradients that have them."""
    sources = [g.contiguous() for g in gradients]
    results = [
        g if in_place and g.dtype == d else torch.empty_like(g, dtype=d)
        for g, d in zip(sources, dtypes, strict=True)
    ]
    lengths = tuple([g.numel() for g in sources])
    blocks = sum([-(-n // BLOCK) for n in lengths])
    if blocks:
        num = len(sources)
        tensors = (*sources, *results, upstream)
        entry = entry_of(scale_kernel, specialised(lengths), tensors)

        def arguments(t: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(t[:num]), tuple(t[num:-1]), lengths, t[-1], BLOCK, num

        launch(scale_kernel, blocks, entry, tensors, arguments, {})
    return results
