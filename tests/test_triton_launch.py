"""Launching what has been compiled before, with kernels that only take notes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dwl_kernels.backends import triton_launch
from dwl_kernels.backends.triton_launch import launch


class Compiled:
    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.calls.append(("direct", grid, arguments))


class Kernel:
    """As a jitted function: looks at the arguments, compiles and launches."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.fn = object()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> Compiled:
            self.calls.append(("looked", grid, arguments))
            return Compiled(self.calls)

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(triton_launch, "_compiled", {})
    return Kernel()


def ways(kernel: Kernel) -> list[str]:
    return [way for way, *_ in kernel.calls]


def test_second_call_goes_straight_to_the_compiled_kernel(kernel: Kernel) -> None:
    tensors = (torch.zeros(8), None)
    for _ in range(3):
        launch(kernel, 5, "key", tensors, (tensors, 7), {"num_warps": 4})
    assert ways(kernel) == ["looked", "direct", "direct"]
    assert all(call[1:] == ((5, 1, 1), (tensors, 7)) for call in kernel.calls)


def test_another_key_dtype_or_absence_is_another_kernel(kernel: Kernel) -> None:
    x = torch.zeros(8)
    for key, tensors in (("a", (x,)), ("b", (x,)), ("a", (x.double(),)), ("a", (x, None))):
        launch(kernel, 1, key, tensors, tensors, {})
    assert ways(kernel) == ["looked"] * 4


def test_pointers_that_are_not_aligned_take_the_slow_way_and_leave_no_trace(kernel: Kernel) -> None:
    x = torch.zeros(9)
    for tensor in (x[1:], x[:8], x[1:], x[:8]):
        launch(kernel, 1, "key", (tensor,), (tensor,), {})
    assert ways(kernel) == ["looked", "looked", "looked", "direct"]
