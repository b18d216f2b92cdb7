"""The form of the Triton kernels in which no program waits for ever for the others."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch

pytest.importorskip("triton")
import triton_access

from dwl_kernels.backends.triton import solve as host
from dwl_kernels.backends.triton import specialize

BY_NAME = {case.name: case for case in cases.CASES}
pytestmark = pytest.mark.skipif(not specialize.interpreting(), reason="needs the interpreter")


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with ``DWL_KERNELS_DEBUG=1``, but for a shorter time."""
    for module in (specialize, host):
        monkeypatch.setattr(module, "polls", lambda: 5)
    monkeypatch.setattr(host, "_plans", {})
    for kernel in ("softmax_loss_kernel", "indexed_softmax_loss_kernel"):
        unfinished = triton_access.Written((), ("floats", "integers"), ("barrier", "call.outputs"))
        monkeypatch.setitem(triton_access.KERNELS, kernel, unfinished)
    # Arrivals of more than one program wrap around.
    monkeypatch.setattr(triton_access.Checker, "_fits", staticmethod(lambda *_: None))


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize(
    "name", ["plain", "everything", "dual scale, everything", "full softmax", "by row, everything"]
)
def test_programs_that_wait_for_one_that_never_comes_end_with_nan(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter runs programs one after another, so the first of two waits in vain."""
    case, launch = BY_NAME[name], host.launch

    def of_two(kernel: Any, programs: int, *rest: Any) -> None:
        assert programs == 1
        launch(kernel, 2, *rest)

    expected = cases.loss_and_gradients(case, "triton", torch.float32)
    with monkeypatch.context() as patched:
        patched.setattr(host, "launch", of_two)
        got = cases.loss_and_gradients(case, "triton", torch.float32)
    assert torch.isnan(got["loss"]).all()
    assert torch.isfinite(expected["loss"]).all()
    again = cases.loss_and_gradients(case, "triton", torch.float32)
    assert all(torch.equal(again[output], value) for output, value in expected.items())


def test_only_the_environment_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = specialize.polls.__wrapped__
    monkeypatch.delenv("DWL_KERNELS_DEBUG", raising=False)
    assert ask() == 0
    monkeypatch.setenv("DWL_KERNELS_DEBUG", "1")
    assert ask() == 2**26
