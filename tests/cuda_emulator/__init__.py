"""Runs the CUDA kernel of `csrc/cuda/` on CPU tensors, its threads as fibers, every access checked.

Installed once (`conftest.py`), it holds for every call of backend "cuda" in the process: CPU
tensors run here, all others on their device as before. A race, an access out of bounds, a byte
that is read before it is written, or an output that is not complete raises `RuntimeError`.

`emulate.h` gives the kernel its primitives, `emulate.cpp` schedules the fibers, `checks.cpp` looks
at loads and stores, `launch.cpp` is the library that `build` compiles of all of it.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cuda_emulator.build import load
from dwl_kernels.backends.cache import BuildError
from dwl_kernels.backends.cuda import solve as cuda
from dwl_kernels.backends.cuda.variants import Tiles, Variant, block_d, math_of
from dwl_kernels.core.problem import SharedProblem

TILES = Tiles(16, 1, 2, 1)  # the smallest, so that small problems have several
MESSAGE_BYTES = 512
INPUT, OUTPUT, WORKSPACE = range(3)  # `Use` of emulate.h


class Emulation(NamedTuple):
    """How the grid runs; tests put another one in the place of `EMULATION`."""

    blocks: int = 3
    order: int = 0  # of threads between barriers: 0 as numbered, 1 reversed, others random
    tiles: Tiles = TILES


EMULATION = Emulation()


def variant(dtype: torch.dtype, dim: int, tiles: Tiles = TILES) -> Variant:
    """The library for embeddings of such a type and width, with tiles of any shape."""
    return Variant(math_of(dtype), block_d(dim), tiles)


def install() -> None:
    """Let backend "cuda" take CPU tensors."""
    launch_on_device, unavailable_on_device = cuda.launch, cuda.unavailable_reason

    def launch_here(problem: SharedProblem, fields: dict[str, Any]) -> None:
        run = launch if problem.query.device.type == "cpu" else launch_on_device
        run(problem, fields)

    def unavailable_here(device_type: str) -> str | None:
        return does_not_build() if device_type == "cpu" else unavailable_on_device(device_type)

    cuda.launch, cuda.unavailable_reason = launch_here, unavailable_here


@functools.cache
def does_not_build() -> str | None:
    """Why no emulated kernel compiles here; None where one does."""
    try:
        load(variant(torch.bfloat16, 64))
    except BuildError as error:
        return str(error)
    return None


def launch(problem: SharedProblem, fields: dict[str, Any]) -> None:
    """Write the results that a call names, in the place of the package's `launch`."""
    query, (blocks, order, tiles) = problem.query, EMULATION
    library = load(variant(query.dtype, query.shape[1], tiles))
    call, space = cuda.filled_call(problem, fields, library, blocks)
    buffers = [Buffer(b"call", ctypes.addressof(call), ctypes.sizeof(call), INPUT, 0)]
    buffers += Buffer.all_of(fields | {"space": space})
    message = ctypes.create_string_buffer(MESSAGE_BYTES)
    failed = library.dwl_launch(
        ctypes.byref(call),
        ctypes.c_int64(blocks),
        ctypes.c_int64(order),
        (Buffer * len(buffers))(*buffers),
        ctypes.c_int64(len(buffers)),
        message,
        ctypes.c_int64(MESSAGE_BYTES),
    )
    if failed:
        raise RuntimeError(f"backend 'cuda', emulated: {message.value.decode()}")


class Buffer(ctypes.Structure):
    """What the kernel may touch, `Buffer` of emulate.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("use", ctypes.c_int64),
        ("written", ctypes.c_int64),
    )

    @classmethod
    def of(cls, name: str, tensor: Tensor, use: int = INPUT, rows: int = 0) -> Buffer:
        size = tensor.numel() * tensor.element_size()
        return cls(
            name=name.encode(),
            begin=tensor.data_ptr(),
            bytes=size,
            use=use,
            written=size * rows // len(tensor),
        )

    @classmethod
    def all_of(cls, fields: dict[str, Any]) -> list[Buffer]:
        """All tensors of a call, by the names of its fields."""
        buffers = []
        for name, value in fields.items():
            if isinstance(value, cuda.Side):
                for part, tensor in zip(
                    ("embedding", "order", "count"), value.tensors, strict=True
                ):
                    if tensor is not None:
                        buffers.append(cls.of(f"{name} {part}", tensor))
            elif isinstance(value, Tensor):
                side = fields["candidate" if name.startswith("candidate") else "row"]
                _, _, count = side.tensors
                rows = side.length if count is None else int(count)  # the others are padding
                output = name == "row_loss" or name.endswith("_gradient")
                use = OUTPUT if output else WORKSPACE if name == "space" else INPUT
                buffers.append(cls.of(name, value, use, rows))
        return buffers
