"""What the CUDA kernel is compiled for: its type, D rounded up, and the shape of its tiles.

None of the shapes is measured yet. They were chosen by what nvcc reports: no spilled registers, and
where it can be two blocks on a multiprocessor, so that one computes exponentials while the tensor
cores work for the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_D = 256  # a warp keeps 16 rows of sums in registers; above, the product dominates anyway
WIDTHS = (16, 32, 64, 96, 128, 192, 256)  # D rounded up


class Math(NamedTuple):
    """A type in `csrc/cuda/fragments.cuh`."""

    name: str
    element: int  # bytes
    number: int  # bytes of logits and sums


MATH = {
    torch.bfloat16: Math("BrainFloat", 2, 4),
    torch.float16: Math("Half", 2, 4),
    torch.float32: Math("Float32", 4, 4),
    torch.float64: Math("Float64", 8, 8),
}
TF32 = Math("Tf32", 4, 4)


class Tiles(NamedTuple):
    """`Shape` in `csrc/cuda/program.cuh` says what each is."""

    BN: int  # of the streamed side at a time
    MT: int  # blocks of 16 rows of the owned side that a warp has
    WARPS: int
    BLOCKS: int  # at once on a multiprocessor: bounds the registers

    @property
    def BM(self) -> int:
        return 16 * self.MT * self.WARPS


class Variant(NamedTuple):
    """One compiled library."""

    math: Math
    block_d: int
    tiles: Tiles

    def definitions(self) -> list[str]:
        values = {"MATH": self.math.name, "BLOCK_D": self.block_d, **self.tiles._asdict()}
        return [f"-DDWL_{name}={value}" for name, value in values.items()]

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: `Shape::Shared`."""
        tile = (self.tiles.BM + 2 * self.tiles.BN) * (self.block_d + 8) * self.math.element
        numbers = 2 * self.tiles.BN * (5 * self.math.number + 2 * 8)
        return tile + numbers + self.tiles.BM * self.math.number

    def __str__(self) -> str:
        return f"{self.math.name}, D <= {self.block_d}"


def math_of(dtype: torch.dtype) -> Math:
    """float32 is rounded to tf32 unless ``torch.get_float32_matmul_precision()`` is "highest"."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return TF32
    return MATH[dtype]


def block_d(dim: int) -> int:
    return next(width for width in WIDTHS if width >= dim)


def tiles(math: Math, width: int) -> Tiles:
    if math.number == 8:
        return Tiles(16, 1, 2, 1)
    if math.element == 4:
        return Tiles(32, 1, 4, 2) if width <= 128 else Tiles(16, 1, 4, 1)
    if width <= 64:
        return Tiles(64, 2, 4, 2) if width <= 32 else Tiles(32, 2, 4, 2)
    return Tiles(64, 1, 4, 2) if width <= 128 else Tiles(32, 1, 4, 2)


EMULATED = Tiles(16, 1, 2, 1)


def variant(dtype: torch.dtype, dim: int, emulated: bool = False) -> Variant:
    math, width = math_of(dtype), block_d(dim)
    return Variant(math, width, EMULATED if emulated else tiles(math, width))
