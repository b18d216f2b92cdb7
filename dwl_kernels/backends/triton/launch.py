"""Launching a Triton kernel that has run before.

Triton looks at every argument of every call to find out which compiled kernel it is for, and the
losses have dozens. What decides is known here in a few comparisons, so that a second call with the
same entry goes straight to the compiled kernel, with addresses in place of tensors: Triton's
launcher would ask the driver about every tensor. Through `kernel[grid](...)` the host takes 1.4
times as long for a small step (`public_ways` in `benchmarks/results/host.json`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
ALIGNMENT = 16  # Triton compiles one kernel for pointers and integers that are multiples of it
_compiled: dict[Hashable, tuple[Any, Any, Any]] = {}  # launcher, function, metadata


def specialised(numbers: Sequence[int]) -> tuple[tuple[bool, bool, bool], ...]:
    """What Triton compiles for of integers inside a tuple, whatever ``do_not_specialize`` says."""
    return tuple([(n == 1, n % ALIGNMENT == 0, n >= 2**31) for n in numbers])


def entry_of(kernel: Any, key: Hashable, tensors: Sequence[Any]) -> Hashable:
    """What one compiled kernel serves.

    Args:
        key: what the kernel is compiled for, but for the dtypes of `tensors` and their device.
            Integers must be marked ``do_not_specialize``, and where they can pass 2^31, which
            changes their type, the key says whether they do; or they are part of the key. Of
            integers inside a tuple the key holds :func:`specialised`.
        tensors: all tensors among the arguments, the first of them not None.
    """
    dtypes = [None if t is None else t.dtype for t in tensors]
    return (kernel.fn, key, tensors[0].device, *dtypes)


def launch(
    kernel: Any,
    programs: int,
    entry: Hashable,
    tensors: Sequence[Tensor | None],
    arguments: Callable[[Sequence[Any]], Sequence[Any]],
    options: dict[str, Any],
    stream: int | None = None,
) -> None:
    """``kernel[(programs,)](*arguments(tensors), **options)``.

    Args:
        entry: of :func:`entry_of`, or what changes whenever that does.
        arguments: the arguments with what it is given in the places of the tensors.
        stream: the handle of the current stream, where it is known.
    """
    grid = (programs, 1, 1)
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    # One compiled kernel serves aligned pointers; the rare others take Triton's own way.
    aligned = not [a for a in addresses if a and a % ALIGNMENT]
    known = _compiled.get(entry) if aligned else None
    if known is not None and not _hooked():
        run, function, metadata = known
        handle = _stream() if stream is None else stream
        no_hooks = None, None, None
        run(*grid, handle, function, metadata, *no_hooks, *arguments(addresses))
        return
    compiled = kernel[grid](*arguments(tensors), **options)
    if aligned and compiled is not None:  # the interpreter compiles nothing
        _compiled[entry] = compiled.run, compiled.function, compiled.packed_metadata


def on(device: torch.device, call: Callable[..., T], *arguments: Any) -> T:
    """``call(*arguments)`` while `device` is the current one; a context takes time to enter."""
    if device.index == torch.cuda.current_device():
        return call(*arguments)
    with torch.cuda.device(device):
        return call(*arguments)


class Space(NamedTuple):
    """What a launch writes to besides its results."""

    floats: Tensor
    integers: Tensor  # int32
    barrier: Tensor  # [1] int32, the counter of `grid_barrier`: zero between launches
    stream: int | None = None


_spaces: dict[tuple[int | None, int, torch.dtype], Space] = {}


def workspace(
    device: torch.device, dtype: torch.dtype, floats: int, integers: int, once: bool = False
) -> Space:
    """At least so many elements, one space per device and stream: launches in order share it."""

    def new(floats: int, integers: int, stream: int | None = None) -> Space:
        return Space(
            torch.empty(floats, dtype=dtype, device=device),
            torch.empty(integers, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            stream,
        )

    if once or torch.cuda.is_current_stream_capturing():
        # A graph may be replayed on another stream than this one, beside calls that use it.
        return new(floats, integers)
    stream = _stream()
    key = (device.index, stream, dtype)
    space = _spaces.get(key)
    if space is None or space.floats.numel() < floats or space.integers.numel() < integers:
        if space is not None:
            floats = max(floats, space.floats.numel())
            integers = max(integers, space.integers.numel())
        space = _spaces[key] = _kept(device, lambda: new(floats, integers, stream))
    return space


def release() -> None:
    """Free the workspaces that are kept between calls."""
    _spaces.clear()


def _kept(device: torch.device, new: Callable[[], Space]) -> Space:
    """A space that outlives the call, allocated by a thread of its own.

    While a thread warms a CUDA graph up, PyTorch takes what it allocates from the pool of the
    graph, and `torch.compile` then fails because memory of that pool is still in use.
    """
    stream = torch.cuda.current_stream(device)

    def allocate() -> Space:
        with torch.cuda.stream(stream):
            return new()

    with ThreadPoolExecutor(1) as other:
        return other.submit(allocate).result()


def _stream() -> int:
    """The handle of the current stream, from Triton: PyTorch makes an object of it first."""
    driver = _triton().runtime.driver.active
    handle: int = driver.get_current_stream(driver.get_current_device())
    return handle


def _hooked() -> bool:
    """Whether somebody, such as Triton's profiler, asked Triton to be called at every launch."""
    runtime = _triton().knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


@functools.cache
def _triton() -> Any:
    import triton

    return triton
