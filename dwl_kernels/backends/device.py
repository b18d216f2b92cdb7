"""What `triton.solve` and `cuda.solve` ask of a device before they run on it."""

from __future__ import annotations

import functools

import torch

OLDEST = (8, 0)  # the first compute capability whose tensor cores take bfloat16


@functools.cache
def unfit_reason(index: int) -> str | None:
    """Why none of the kernels runs on a CUDA device, and the mend; None where they run."""
    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU; backend='chunked' runs on this one"
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST:
        return None
    return (
        f"it needs compute capability {OLDEST[0]}.{OLDEST[1]}, and this device has "
        f"{capability[0]}.{capability[1]}; backend='chunked' runs here"
    )
