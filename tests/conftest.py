"""Backends that the tests run on."""

from __future__ import annotations

import pytest

from dwl_kernels import backends


@pytest.fixture(params=["eager", "chunked", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = backends.why_not(name, "cpu")
    if reason is not None:
        pytest.skip(f"backend {name!r} cannot run here: {reason}")
    return name
