"""What the CUDA kernel is compiled for: its type, D rounded up, and the shape of its tiles.

None of the shapes is measured yet. They were chosen by what nvcc reports and what
`benchmarks/machine_code` makes of it: no spilled registers; 32 rows for a warp, because every warp
reads each streamed embedding from shared memory, and that is what the kernel waits for most; two
blocks on a multiprocessor or one of eight warps, so that some compute exponentials while the tensor
cores work for others. Where shared memory does not hold the first choice, the next one is taken.
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
    """`Shape` in `csrc/cuda/shape.cuh` says what each is."""

    BN: int  # of the streamed side at a time
    MT: int  # blocks of 16 rows of the owned side that a team of warps has
    WARPS: int
    BLOCKS: int  # at once on a multiprocessor: bounds the registers
    TEAM: int = 1  # warps that share rows, for sums that no single one has registers for
    PAD: int = 8  # elements between rows of shared memory

    @property
    def BM(self) -> int:
        return 16 * self.MT * self.WARPS // self.TEAM


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
        shape, math = self.tiles, self.math
        tile = (shape.BM + 2 * shape.BN) * (self.block_d + shape.PAD) * math.element
        streamed = 2 * shape.BN * (5 * math.number + 2 * 8)
        owned = shape.BM * (math.number + 8 + 4)
        if shape.TEAM == 1:
            return tile + streamed + owned
        exchanged = shape.BM * shape.BN * (16 if math.name == "Float32" else math.element)
        return tile + streamed + owned + exchanged + shape.TEAM * shape.BM * math.number

    @property
    def passes(self) -> int:
        """Over the columns, as many as `Shape::ACC_D` makes: their sums must fit the registers."""
        if self.math.number == 4 or self.block_d <= 96:
            return 1
        return self.block_d // (96 if self.block_d % 96 == 0 else 64)

    def __str__(self) -> str:
        return f"{self.math.name}, D <= {self.block_d}"


def math_of(dtype: torch.dtype) -> Math:
    """float32 is rounded to tf32 unless ``torch.get_float32_matmul_precision()`` is "highest"."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return TF32
    return MATH[dtype]


def block_d(dim: int) -> int:
    return next(width for width in WIDTHS if width >= dim)


def shared_limit(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block may have: CUDA C++ Programming Guide, table "Technical
    Specifications per Compute Capability". What is unknown is taken for the least."""
    if capability in ((8, 0), (8, 7)):
        return 163 * 1024
    return (227 if 9 <= capability[0] <= 11 else 99) * 1024


def tiles(math: Math, width: int, capability: tuple[int, int]) -> Tiles:
    """The first choice that the shared memory of such a device holds."""
    limit = shared_limit(capability)
    return next(
        shape
        for shape in _choices(math, width, capability[0])
        if Variant(math, width, shape).shared_bytes <= limit
    )


def _choices(math: Math, width: int, major: int) -> tuple[Tiles, ...]:
    more = 9 <= major <= 11  # elsewhere 32 rows a warp spill registers above 64 columns
    if math.number == 8:
        return Tiles(16, 1, 2, 1), Tiles(16, 1, 1, 1), Tiles(16, 1, 1, 1, PAD=2)
    if math == TF32 and (more or width <= 64):
        if width <= 128:
            return Tiles(32, 2, 4, 2), Tiles(32, 1, 4, 2)
        return Tiles(32, 2, 8, 1, TEAM=2), Tiles(16, 1, 4, 1), Tiles(16, 1, 3, 1)
    if math.element == 4:
        if width <= 128:
            return (Tiles(32, 1, 4, 2),)
        return Tiles(16, 1, 4, 1), Tiles(16, 1, 3, 1)
    if width <= 64:
        return (Tiles(64 if width <= 32 or major == 9 else 32, 2, 4, 2),)
    if width <= 128:
        return (Tiles(32, 2, 4, 2) if more else Tiles(64, 1, 4, 2),)
    return (Tiles(32, 2, 8, 1, TEAM=2) if more else Tiles(32, 1, 4, 2),)  # BN = 64 spills


def variant(dtype: torch.dtype, dim: int, capability: tuple[int, int]) -> Variant:
    """What a device of such a capability runs."""
    math, width = math_of(dtype), block_d(dim)
    return Variant(math, width, tiles(math, width, capability))
