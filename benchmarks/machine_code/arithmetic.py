"""What the machine code of a kernel promises on an H200: arithmetic, not a measurement.

One element of the logits takes some clocks of each resource of a multiprocessor, in all phases
together. The kernel cannot be faster than the largest of these numbers. Programs that run side by
side use several resources at once, but not perfectly: the prediction is the largest number plus a
quarter of the others. That quarter is a guess, to be replaced by a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

CLOCK = 1.755e9  # Hz
MULTIPROCESSORS = 132
MATMUL = 4270  # bfloat16 operations per clock and multiprocessor of tensor core; tf32 has half
EXPONENTIALS = 16  # per clock, multi-function unit
LANES = 128  # instructions of one thread issued per clock
L2 = 28  # bytes per clock: an assumption
SHARED = 128  # bytes per clock of shared memory
# Of the tensor core's rate, what `mma.sync` reaches on capability 9.0, where `wgmma` has all of it:
# an assumption. arXiv 2402.13499 reports 0.63, the authors of FlashAttention-3 about two thirds.
MMA_SYNC = 0.63
FLOAT64_MATMUL = 256  # operations per clock of tensor core; `mma.sync` is its only instruction
FLOAT64_LANES = 64  # instructions of one thread per clock
MEMORY = 4.3e12  # bytes per second, read plus written
SHAPE = (8192, 8192)  # B, N of the predicted time
PRODUCTS = 790e12  # bfloat16 operations per second of a large product by the BLAS
BLAS_TILE = (128, 256)  # of its results that one multiprocessor makes at a time: an assumption
LAUNCH = 2e-6  # seconds from the end of a launch to the full speed of the next: an assumption
PER_EXAMPLE = (65536, 128, 1 << 20)  # B, K and rows of the table, for candidates per row


def clocks(row: dict[str, Any], left_out: bool = False) -> dict[str, float]:
    """Clocks per element of the logits, by resource, of a row of the table of `triton_shared`.

    `left_out`: where a `skip_threshold` leaves every block out of the gradients.
    """
    d, tiles = row["D"], row["tiles"]
    size = 2 if row["dtype"] in ("bfloat16", "float16") else 4
    loops = [loop["per_element_left_out" if left_out else "per_element"] for loop in row["loops"]]
    products, exponentials, passes = 4, 2, 1  # passes of the candidates past a row tile
    if left_out:
        products, exponentials = 2, 1
    if row["problem"].startswith("dual"):
        products, exponentials, passes = products + 2, exponentials + 1, passes + 1
    if row["dtype"] == "float16":
        products, passes = products + 1, passes + 1
    else:
        del loops[-3]  # the search for the maxima, rarely run
    return {
        "tensor": 2 * d * products / (MATMUL * 2 / size),
        "exponentials": exponentials / EXPONENTIALS,
        "issue": sum(loops) / LANES,
        "L2": size * d * (passes / tiles["BLOCK_M1"] + 1 / tiles["BLOCK_N2"]) / L2,
    }


# Of the CUDA kernel: bytes of an element, and how often the maxima are searched.
TYPES = {"BrainFloat": (2, 0), "Half": (2, 1), "Tf32": (4, 0), "Float32": (4, 1), "Float64": (8, 1)}
FLOAT64 = ("DFMA", "DADD", "DMUL", "DSETP")


def cuda_clocks(row: dict[str, Any]) -> dict[str, float]:
    """The same of a row of the table of `cuda`."""
    d, tiles = row["D"], row["tiles"]
    element, searched = TYPES[row["dtype"]]
    loops = row["loops"][0 if searched else 1 :]  # else the maxima are rarely searched
    passes = row["passes"]  # over the columns, each with the logits anew
    steps = searched + 2 * passes
    products = steps + 2  # of 2 D operations
    each = [1] * searched + [passes, passes]

    def total(value: Callable[[dict[str, Any]], float]) -> float:
        """Per element of the logits and lane."""
        return sum(n * value(loop) for n, loop in zip(each, loops, strict=True)) / row["logits"]

    def count(*kinds: str) -> float:
        return total(lambda loop: sum(loop["kinds"].get(kind, 0) for kind in kinds))

    rates = {2: MATMUL * MMA_SYNC, 4: MATMUL * MMA_SYNC / 2, 8: FLOAT64_MATMUL}
    rows = 16 * tiles["MT"] * tiles["WARPS"] // tiles["TEAM"]
    copied = element * d * steps / rows
    written = 3 * copied if row["dtype"] == "Tf32" else copied  # and read and written to be rounded
    found = {
        "tensor": 2 * d * products / rates[element],
        "shared memory": (total(lambda loop: loop["shared_bytes"]) + written) / SHARED,
        "exponentials": count("MUFU") / EXPONENTIALS,
        "issue": total(lambda loop: loop["instructions"]) / LANES,
        "float64": count(*FLOAT64) / FLOAT64_LANES,
        "L2": copied / L2,
    }
    if row["dtype"] == "Float32":  # its products are instructions as all others
        del found["tensor"]
    return found


def predicted_us(row: dict[str, Any], clocks: dict[str, float]) -> int | None:
    """Microseconds for B, N = `SHAPE`; None for another chip than capability 9.0."""
    if row["capability"] != 90:
        return None
    *others, largest = sorted(clocks.values())
    elements = SHAPE[0] * SHAPE[1] / MULTIPROCESSORS
    return round((largest + sum(others) / 4) * elements / CLOCK * 1e6)


def predicted_per_row_us(row: dict[str, Any]) -> int | None:
    """Microseconds for `PER_EXAMPLE` of a row of the table of `triton_per_row`.

    The loss reads a table row and an id for every pair, writes its logit, reads it and writes the
    coefficient. The gradient of the table reads order, coefficient and, from L2, a row of the
    source for every pair, and writes the table; the sort before it is not counted.
    """
    if row["capability"] != 90:
        return None
    rows, candidates, table_rows = PER_EXAMPLE
    pairs = rows * candidates
    width = row["D"] * (2 if row["dtype"] in ("bfloat16", "float16") else 4)
    clocks = MULTIPROCESSORS * CLOCK
    times = [pairs * row["per_element"] / (LANES * clocks)]
    if row["kernel"].startswith("loss"):
        times.append((pairs * (width + 8 + 3 * 4) + 3 * rows * width) / MEMORY)
    else:
        times.append((pairs * (8 + 4) + table_rows * width) / MEMORY)
        times.append(pairs * width / (L2 * clocks))
    *others, largest = sorted(times)
    return round((largest + sum(others) / 4) * 1e6)


def wide_us(
    d: int,
    per_element: float,  # instructions of the pass over the logits
    searched: float,  # the share of them that is read for the reference first
    block_rows: int,
    shape: tuple[int, int] = SHAPE,
) -> dict[str, float]:
    """Microseconds of the wide form by what takes them, one after another: bfloat16, plain."""
    rows, candidates = shape
    pairs, blocks = rows * candidates, rows / block_rows
    multiprocessors = MULTIPROCESSORS * CLOCK
    l2 = L2 * multiprocessors
    product = 2 * pairs * d / PRODUCTS
    # sum_j e c of a block has few tiles, so each is split along j and the parts are summed.
    tiles = math.ceil(block_rows / BLAS_TILE[0]) * math.ceil(d / BLAS_TILE[1])
    splits = max(MULTIPROCESSORS // tiles, 1)
    waves = math.ceil(tiles * splits / MULTIPROCESSORS)
    idle = waves * MULTIPROCESSORS / (tiles * splits) - 1
    parts = 2 * 4 * splits * rows * d / l2 if splits > 1 else 0
    *others, largest = sorted(
        (
            (6 + 4 * searched) * pairs / l2,  # float32 logits in, 16 bits out
            pairs / EXPONENTIALS / multiprocessors,
            pairs * per_element / LANES / multiprocessors,
        )
    )
    found = {
        "products": 3 * product,
        "float32 logits": max(4 * pairs / l2 - product, 0),  # written slower than multiplied
        "few tiles": idle * product + parts,
        "pass": largest + sum(others) / 4,
        "sums of dc": blocks * 8 * candidates * d / l2,
        "rows": 18 * rows * d / l2,
        "launches": 5 * blocks * LAUNCH,
    }
    return {name: seconds * 1e6 for name, seconds in found.items()}
