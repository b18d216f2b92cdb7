"""Backends that the tests run on."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's interpreter runs the kernels on CPU tensors; it is chosen when triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dwl_kernels import backends


@pytest.fixture(params=["eager", "chunked", "cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = backends.why_not(name, "cpu")
    if reason is not None:
        pytest.skip(f"backend {name!r} cannot run here: {reason}")
    return name
