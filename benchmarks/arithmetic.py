"""What the machine code of the Triton kernel promises on an H200: arithmetic, not a measurement.

For every resource of a multiprocessor, the clocks that one element of the logits takes of it in all
phases; the kernel cannot be faster than the largest. Programs side by side overlap the resources
imperfectly: the prediction is the largest plus a quarter of the others, a guess that a measurement
will correct.
"""

from __future__ import annotations

from typing import Any

CLOCK = 1.755e9  # Hz
MULTIPROCESSORS = 132
MATMUL = 4270  # bfloat16 operations per clock and multiprocessor of tensor core; tf32 has half
EXPONENTIALS = 16  # per clock, multi-function unit
LANES = 128  # instructions of one thread issued per clock
L2 = 28  # bytes per clock: an assumption
SHAPE = (8192, 8192)  # B, N of the predicted time


def clocks(row: dict[str, Any]) -> dict[str, float]:
    """Clocks per element of the logits, by resource, of a row of the table of `benchmarks.aot`."""
    d, tiles = row["D"], row["tiles"]
    size = 2 if row["dtype"] in ("bfloat16", "float16") else 4
    loops = [loop["per_element"] for loop in row["loops"]]
    products, exponentials, passes = 4, 2, 1  # passes of the candidates past a row tile
    if row["problem"].startswith("dual"):
        products, exponentials, passes = products + 2, exponentials + 1, passes + 1
    if row["dtype"] == "float16":
        products, passes = products + 1, passes + 1
    else:
        del loops[-2]  # the search for the maxima, rarely run
    return {
        "tensor": 2 * d * products / (MATMUL * 2 / size),
        "exponentials": exponentials / EXPONENTIALS,
        "issue": sum(loops) / LANES,
        "L2": size * d * (passes / tiles["BM"] + 1 / tiles["CM"]) / L2,
    }


def predicted_us(row: dict[str, Any]) -> int | None:
    """Microseconds for B, N = `SHAPE`; None for another chip than capability 9.0."""
    if row["capability"] != 90:
        return None
    *others, largest = sorted(clocks(row).values())
    elements = SHAPE[0] * SHAPE[1] / MULTIPROCESSORS
    return round((largest + sum(others) / 4) * elements / CLOCK * 1e6)
