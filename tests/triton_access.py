"""Checks every memory access of a Triton kernel in the interpreter, and what the compiler is told.

Installed once (`conftest.py`), it holds for every launch of the process. The first thing that is
wrong raises `AccessError` where the kernel does it, so that the traceback names the line:

- a lane that is not masked reads or writes outside of its tensor, or at an odd address,
- a store into an input, or two lanes of one store at one place,
- a hint to the compiler (`multiple_of`, `max_contiguous`) that is not true,
- 32-bit arithmetic or a conversion to 32 bits that loses bits,
- an output of which the kernel leaves a part unwritten.

Every tensor of a launch gets addresses of its own, far from all others, so that an access beside
one tensor never passes for an access to another; the interpreter sees the real ones again when it
reads and writes. Outputs and the workspace hold NaN, an infinity or huge numbers before a launch,
in turn: a kernel that uses what nobody wrote reads outside of a tensor or gives a wrong result.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.jit import mangle_type

SLOT = 44  # a tensor owns 2^44 addresses and lies in the middle of them
FILLS = ((float("nan"), 2**31 - 1), (float("inf"), -1), (-float("inf"), -(2**31)), (1e30, 17))


class Written(NamedTuple):
    """Which arguments of a kernel it writes, by the beginning of their names."""

    outputs: tuple[str, ...]  # every element
    workspace: tuple[str, ...] = ()  # some elements, and what was there does not matter
    kept: tuple[str, ...] = ()  # some elements, and what was there does


KERNELS: dict[str, Written] = {}  # by name; `install` knows those of the package


class AccessError(AssertionError):
    """What the kernel did would be undefined on a device."""


class Region:
    """One tensor among the arguments of a launch."""

    def __init__(self, number: int, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        self.tensor, self.item = tensor, tensor.element_size()
        self.names: list[str] = []
        # Addresses that only the checker sees, as odd as the real ones.
        self.begin = (number << SLOT) + (1 << (SLOT - 1)) + tensor.data_ptr() % 256
        self.end = self.begin + tensor.numel() * self.item
        self.to_real = np.uint64((tensor.data_ptr() - self.begin) % 2**64)
        self.writable = False
        self.written: np.ndarray | None = None  # of an output, by element
        self.last: np.ndarray | None = None

    def fill(self, number: float, integer: int) -> None:
        if not self.tensor.is_floating_point():
            limits = torch.iinfo(self.tensor.dtype)
            number = max(min(integer, limits.max), limits.min)
        elif abs(number) < float("inf"):
            number = min(number, torch.finfo(self.tensor.dtype).max)
        self.tensor.fill_(number)

    def __str__(self) -> str:
        return f"{'/'.join(self.names)} {list(self.tensor.shape)}"


class Checker:
    """Stands between the kernels and the interpreter."""

    def __init__(self) -> None:
        self.regions: dict[int, Region] = {}
        self.fills: Iterator[tuple[float, int]] = itertools.cycle(FILLS)
        self.launches = self.accesses = 0

    def fill_with(self, *fills: tuple[float, int]) -> None:
        """What outputs and the workspace hold before launches, in turn, as floats and integers."""
        self.fills = itertools.cycle(fills or FILLS)

    # A launch ------------------------------------------------------------------------------------

    def bind(self, kernel: str, names: list[str], values: tuple[Any, ...]) -> list[Any]:
        """The arguments with checked addresses in the place of tensors."""
        if kernel not in KERNELS:
            raise AccessError(f"triton_access.KERNELS does not say what {kernel} writes")
        self.regions, found = {}, {}
        number, integer = next(self.fills)

        def bound(name: str, value: Any) -> Any:
            if isinstance(value, tuple):
                fields = getattr(value, "_fields", None) or map(str, range(len(value)))
                parts = [bound(f"{name}.{f}", v) for f, v in zip(fields, value, strict=True)]
                return interpreter._tuple_create(value, parts)
            if not isinstance(value, Tensor):
                return value
            key = (value.data_ptr(), value.numel(), value.dtype)
            if key not in found:
                found[key] = Region(len(found) + 1, value)
                self.regions[len(found)] = found[key]
            found[key].names.append(name)
            kind = tl.str_to_ty(mangle_type(value), None)
            address = np.array([found[key].begin], dtype=np.uint64)
            return tl.tensor(interpreter.TensorHandle(address, kind), kind)

        arguments = [bound(name, value) for name, value in zip(names, values, strict=False)]
        for region in self.regions.values():
            roles = [self._role(kernel, name) for name in region.names]
            region.writable = any(roles)
            if "outputs" in roles:
                region.written = np.zeros(region.tensor.numel(), dtype=bool)
            if all(role in ("outputs", "workspace") for role in roles):  # none is read as well
                region.fill(number, integer)
        return arguments

    @staticmethod
    def _role(kernel: str, name: str) -> str | None:
        written = KERNELS[kernel]
        for role, names in zip(Written._fields, written, strict=True):
            if any(f"{name}.".startswith(f"{one}.") for one in names):
                return role
        return None

    def finish(self, kernel: str) -> None:
        for region in self.regions.values():
            if region.written is not None and not region.written.all():
                missing = np.flatnonzero(~region.written)
                raise AccessError(
                    f"{kernel} left {len(missing)} elements of {region} unwritten, "
                    f"the first is {missing[0]}"
                )

    # Memory --------------------------------------------------------------------------------------

    def addresses(self, pointers: Any, mask: Any, store: bool) -> tuple[Any, Any]:
        """Real addresses, and which lanes are to be touched."""
        self.accesses += 1
        data = pointers.data
        keep = np.ones(data.shape, bool) if mask is None else np.broadcast_to(mask.data, data.shape)
        live = data[keep]
        if live.size == 0:
            return interpreter.TensorHandle(data, pointers.dtype), keep
        item = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        low, high = int(live.min()), int(live.max())
        region = self.regions.get(low >> SLOT)
        what = "store to" if store else "load from"
        if region is None:
            raise AccessError(f"{what} {low:#x}, which is no tensor's")
        if low < region.begin or high + item > region.end:
            first, last = ((x - region.begin) / region.item for x in (low, high))
            raise AccessError(f"{what} elements {first:g} to {last:g} of {region}")
        if item != region.item and ((live - np.uint64(region.begin)) % np.uint64(item)).any():
            raise AccessError(f"{what} odd addresses of {region}")
        if store:
            self._store(region, (live - np.uint64(region.begin)) // np.uint64(region.item), item)
        real = data + region.to_real
        return interpreter.TensorHandle(real, pointers.dtype), np.ascontiguousarray(keep)

    @staticmethod
    def _store(region: Region, index: np.ndarray, item: int) -> None:
        if not region.writable:
            raise AccessError(f"store to {region}, which is an input")
        if region.last is None:
            region.last = np.empty(region.tensor.numel(), dtype=np.int32)
        lane = np.arange(len(index), dtype=np.int32)
        region.last[index] = lane
        if (region.last[index] != lane).any():
            raise AccessError(f"two lanes store to the same element of {region}")
        if region.written is not None:
            assert item == region.item, "an output is written by elements"
            region.written[index] = True

    # Integers and hints --------------------------------------------------------------------------

    def arithmetic(self, lhs: Any, rhs: Any, operation: Callable[..., Any]) -> None:
        """In the place of what Triton computes for its own check, which nobody looks at."""
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64:
            return
        exact = getattr(
            np, {"add": "add", "sub": "subtract", "mul": "multiply"}[operation.__name__]
        )
        result = exact(lhs.handle.data, rhs.handle.data, dtype=np.int64)
        self._fits(result, kind, operation.__name__)

    def conversion(self, source: Any, kind: Any) -> None:
        # Of a comparison the interpreter says that it has the type of what was compared.
        if source.data.dtype.kind in "iu" and 1 < kind.scalar.int_bitwidth < 64:
            self._fits(source.data, kind.scalar, "a conversion")

    @staticmethod
    def _fits(value: np.ndarray, kind: Any, what: str) -> None:
        low, high = value.min(), value.max()
        if low < kind.get_int_min_value() or high > kind.get_int_max_value():
            raise AccessError(f"{what} gives {low} to {high}, which {kind} does not hold")

    def multiple_of(self, value: Any, divisors: Any, **_: Any) -> Any:
        """Every run of consecutive numbers begins at a multiple."""
        data, (divisor,) = _numbers(value), _plain(divisors)
        starts = data[np.diff(data, prepend=data[:1]) != 1]
        if (starts % divisor).any():
            raise AccessError(f"multiple_of({divisor}) of {starts[starts % divisor != 0][0]}")
        return value

    def max_contiguous(self, value: Any, lengths: Any, **_: Any) -> Any:
        data, (length,) = _numbers(value), _plain(lengths)
        if (np.diff(data.reshape(-1, min(length, len(data))), axis=1) != 1).any():
            raise AccessError(f"max_contiguous({length}) of {data}")
        return value

    def max_constancy(self, value: Any, lengths: Any, **_: Any) -> Any:
        data, (length,) = _numbers(value), _plain(lengths)
        if np.diff(data.reshape(-1, min(length, len(data))), axis=1).any():
            raise AccessError(f"max_constancy({length}) of {data}")
        return value


def _numbers(value: Any) -> np.ndarray:
    data = np.atleast_1d(value.handle.data if isinstance(value, tl.tensor) else int(value))
    if data.ndim != 1:
        raise NotImplementedError("hints about more than one dimension")
    return data


def _plain(values: Any) -> list[int]:
    values = values if isinstance(values, list | tuple) else [values]
    return [int(getattr(value, "value", value)) for value in values]


CHECKER = Checker()


def install() -> Checker:
    """Check every launch of this process from now on."""
    KERNELS.update(
        softmax_loss_kernel=Written(("call.outputs",), ("floats", "integers"), ("barrier",)),
        indexed_softmax_loss_kernel=Written(
            ("call.outputs",), ("floats", "integers"), ("barrier",)
        ),
        scale_kernel=Written(("results",)),
        list_kernel=Written(("keys", "weights")),
        chunk_kernel=Written((), ("parts",)),
        sum_kernel=Written(("values",)),
        pair_kernel=Written(("scores",)),
        count_kernel=Written(("counts",)),
        exponentials_kernel=Written((), kept=("block",)),
        gradients_kernel=Written((), kept=("block", "call.outputs")),
        columns_kernel=Written((), kept=("call.outputs",)),
    )
    builder, semantic = interpreter.InterpreterBuilder, interpreter.TritonSemantic
    load, store = builder.create_masked_load, builder.create_masked_store
    update, convert = builder.create_atomic_rmw, builder.create_int_cast
    call, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[int] = set()  # modules whose `triton.language` is the interpreter's in this launch

    def checked_call(self: Any, *arguments: Any, **options: Any) -> None:
        kernel = self.fn.__name__
        CHECKER.launches += 1
        bound = CHECKER.bind(kernel, self.arg_names, arguments)
        try:
            call(self, *bound, **options)
        finally:
            patched.clear()
        CHECKER.finish(kernel)

    def patched_once(fn: Any) -> Any:
        """The interpreter's `triton.language`, and the hints.

        A call of a device function would patch all of it again: half of the interpreter's time.
        """
        if id(fn.__globals__) in patched:
            return None
        patched.add(id(fn.__globals__))
        scope = patch(fn)
        for hint in ("multiple_of", "max_contiguous", "max_constancy"):
            scope.set_attr(tl, hint, getattr(CHECKER, hint))
        return scope

    def checked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        real, keep = CHECKER.addresses(pointers, mask, store=False)
        if other is None and not keep.all():  # undefined on a device
            kind = pointers.get_element_ty()
            dtype = interpreter._get_np_dtype(kind)
            value = np.nan if dtype.kind == "f" else np.iinfo(dtype).max
            other = interpreter.TensorHandle(np.full(keep.shape, value, dtype), kind)
        return load(self, real, interpreter.TensorHandle(keep, tl.int1), other, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        real, keep = CHECKER.addresses(pointers, mask, store=True)
        return store(self, real, value, interpreter.TensorHandle(keep, tl.int1), *rest)

    def checked_update(self: Any, op: Any, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
        real, keep = CHECKER.addresses(pointer, mask, store=True)
        return update(self, op, real, value, interpreter.TensorHandle(keep, tl.int1), *rest)

    def checked_conversion(self: Any, source: Any, kind: Any, *rest: Any) -> Any:
        CHECKER.conversion(source, kind)
        return convert(self, source, kind, *rest)

    def checked_arithmetic(self: Any, *operands_and_operation: Any) -> None:
        CHECKER.arithmetic(*operands_and_operation)

    interpreter.GridExecutor.__call__ = checked_call
    interpreter._patch_lang = patched_once
    builder.create_masked_load = checked_load
    builder.create_masked_store = checked_store
    builder.create_atomic_rmw = checked_update
    builder.create_int_cast = checked_conversion
    semantic.binary_op_sanitize_overflow_impl = checked_arithmetic
    return CHECKER
