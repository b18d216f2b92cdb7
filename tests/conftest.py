"""Backends that the tests run on."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's interpreter runs the kernels on CPU tensors; it is chosen when triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dwl_kernels import backends

# The interpreter takes about a second for a small problem, so it runs every case in float32, and in
# the other dtypes those cases that between them take every path through the kernel.
INTERPRETED = {
    *("past the tile", "everything", "refined, everything", "everything, none", "large logits"),
    *("every candidate a hit", "mixed, everything", "in-batch, NaN in the padding"),
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def runs(item: pytest.Item) -> bool:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        if "backend" not in values:
            return True
        if values["backend"] == "triton" and "correction" in values:  # finite differences
            return values["correction"] == "standard" or values["reduction"] == "mean"
        if "case" not in values:
            return True
        backend, case, dtype = (values[name] for name in ("backend", "case", "dtype"))
        if backend == "eager":
            return dtype != torch.float64  # the reference itself
        if backend == "cpu":
            return dtype != torch.float16  # `auto` takes chunked there
        return backend != "triton" or dtype == torch.float32 or case.name in INTERPRETED

    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = [item for item in items if runs(item)]


@pytest.fixture(params=["eager", "chunked", "cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = backends.why_not(name, "cpu")
    if reason is not None:
        pytest.skip(f"backend {name!r} cannot run here: {reason}")
    return name
