"""The checker of the interpreter's memory accesses finds what it is there for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
import triton_access
from triton.runtime.errors import InterpreterError
from triton_access import CHECKER, Written

from dwl_kernels import backends

REASON = backends.unavailable_reason("triton", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@triton.jit
def copy_kernel(source, target, length, shift, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.load(source + at + shift, mask=at < length, other=0.0)
    tl.store(target + at, value, mask=at < length)


@triton.jit
def spoil_kernel(source, target):
    tl.store(target, tl.load(source))
    tl.store(source, 0.0)


@triton.jit
def pile_kernel(target):
    tl.store(target + tl.arange(0, 4) // 2, 1.0)


@triton.jit
def hint_kernel(target, first, length):
    first = tl.multiple_of(first + 0, 16)
    at = tl.max_contiguous(tl.multiple_of(first + tl.arange(0, 16) * length, 16), 16)
    tl.store(target + tl.arange(0, 16), at)


@triton.jit
def product_kernel(target, a, b):
    tl.store(target, a * b)


@triton.jit
def cut_kernel(target, a):
    tl.store(target, (tl.cast(a, tl.int64) * 4).to(tl.int32))


@triton.jit
def odd_kernel(target):
    pointer = tl.cast(target + 1, tl.pointer_type(tl.int64))
    tl.store(target, tl.load(pointer).to(tl.int32))


@triton.jit
def keep_kernel(target):
    tl.store(target, tl.load(target + 1))


KERNELS = (copy_kernel, spoil_kernel, pile_kernel, hint_kernel)
KERNELS += (product_kernel, cut_kernel, odd_kernel, keep_kernel)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in KERNELS:
        monkeypatch.setitem(triton_access.KERNELS, kernel.__name__, Written(("target",)))


def fails(message: str) -> Any:
    return pytest.raises((InterpreterError, triton_access.AccessError), match=message)


def floats(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float32)


def test_what_is_right_passes_and_computes() -> None:
    target = torch.empty(5)
    copy_kernel[(1,)](floats(5), target, 5, 0, 8)
    assert target.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("length", "shift"), [(6, 0), (5, 1), (5, -1), (5, 1 << 30)])
def test_access_beside_a_tensor(length: int, shift: int) -> None:
    with fails("load from elements .* source"):
        copy_kernel[(1,)](floats(5), torch.empty(5), length, shift, 8)


def test_tensor_beside_another_one_is_no_excuse() -> None:
    both = floats(16)
    with fails("load from elements 1 to 8 of source"):
        copy_kernel[(1,)](both[:8], both[8:], 8, 1, 8)


def test_unwritten_output() -> None:
    with fails("left 2 elements of target .* the first is 3"):
        copy_kernel[(1,)](floats(5), torch.empty(5), 3, 0, 8)


def test_store_into_an_input() -> None:
    with fails("source .* an input"):
        spoil_kernel[(1,)](floats(1), torch.empty(1))


def test_two_lanes_at_one_element() -> None:
    with fails("two lanes store to the same element of target"):
        pile_kernel[(1,)](torch.empty(2))


def test_false_hints() -> None:
    target = torch.empty(16, dtype=torch.int64)
    hint_kernel[(1,)](target, 32, 1)
    assert target.tolist() == list(range(32, 48))
    with fails(r"multiple_of\(16\) of 40"):
        hint_kernel[(1,)](target, 40, 1)
    with fails(r"max_contiguous\(16\)"):
        hint_kernel[(1,)](target, 32, 16)


def test_integers_that_overflow() -> None:
    target = torch.empty(1, dtype=torch.int64)
    product_kernel[(1,)](target, 1 << 15, 1 << 15)
    assert target.item() == 1 << 30
    with fails("mul gives 4294967296"):
        product_kernel[(1,)](target, 1 << 16, 1 << 16)
    with fails("a conversion gives 2147483648"):
        cut_kernel[(1,)](target, 1 << 29)


def test_odd_address() -> None:
    with fails("odd addresses of target"):
        odd_kernel[(1,)](torch.zeros(4, dtype=torch.int32))


def test_outputs_hold_anything_but_what_they_held() -> None:
    seen = []
    for _ in triton_access.FILLS:
        target = torch.zeros(2)
        with fails("unwritten"):
            keep_kernel[(1,)](target)
        seen.append(target[0].item())
    assert 0.0 not in seen
    assert len(set(map(str, seen))) == len(triton_access.FILLS)


def test_unknown_kernel_has_to_be_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(triton_access.KERNELS, "keep_kernel")
    with fails("does not say what keep_kernel writes"):
        keep_kernel[(1,)](torch.zeros(2))


def test_launches_of_this_package_are_checked() -> None:
    import dwl_kernels

    before = CHECKER.launches, CHECKER.accesses
    x = torch.ones(3, 4)
    dwl_kernels.sampled_softmax_loss(x, x, x, backend="triton")
    assert CHECKER.launches == before[0] + 1
    assert CHECKER.accesses > before[1] + 10
