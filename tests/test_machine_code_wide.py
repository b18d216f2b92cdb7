"""The machine code of the wide form, compiled without a GPU: nothing spills, loads are wide."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")
from compiled import by_triton

from benchmarks.machine_code import arithmetic

pytestmark = pytest.mark.timeout(900)  # where a kernel has changed

COMPILE = """
import json, sys, torch
from concurrent.futures import ProcessPoolExecutor
from benchmarks.machine_code import triton_wide

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
ROWS = [
    ("exponentials", "sampled", 512, bf16, False, 90, "mean"),
    ("exponentials", "in-batch", 512, f16, True, 90, "none"),
    ("exponentials", "full", 300, f32, True, 90, "mean"),
    ("gradients", "in-batch", 512, f16, True, 90, "none"),
    ("gradients", "full", 1024, bf16, True, 90, "mean"),
    ("columns", "full", 512, bf16, True, 90, "mean"),
]

if __name__ == "__main__":
    with ProcessPoolExecutor(2) as pool:
        json.dump(list(pool.map(triton_wide.count, ROWS)), open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = by_triton("triton_wide", COMPILE)
    return rows


def test_nothing_spills_and_two_programs_fit(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        assert row["stack"] == 0, row["kernel"]
        assert all(loop["spills"] == 0 for loop in row["loops"]), row["kernel"]
        assert 2 * row["registers"] * row["warps"] * 32 <= 65536
        assert row["shared"] <= 16384


def test_pass_over_the_logits_loads_16_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        if row["kernel"] != "exponentials":
            continue
        search, *_, write, zeros = row["loops"]
        assert search["loads"] == search["loads_128"] > 0
        assert write["loads"] == write["loads_128"] > 0
        assert write["exponentials"] > 0
        assert zeros["loads"] == 0


def test_prediction_names_what_products_do_not_take() -> None:
    parts = arithmetic.wide_us(512, 5.0, 1 / 8, 1024)
    bound = 6 * 8192**2 * 512 / 790e12 * 1e6
    assert parts["products"] == pytest.approx(bound)
    assert parts["launches"] == pytest.approx(8 * 5 * 2)
    l2 = 28 * 132 * 1.755e9
    # 8 by 2 tiles, split eight times to fill 128 of 132 multiprocessors
    few = bound / 3 * (132 / 128 - 1) + 2 * 4 * 8 * 8192 * 512 / l2 * 1e6
    assert parts["few tiles"] == pytest.approx(few)
    exponentials, issue = 1 / 16, 5.0 / 128
    clocks = 6.5 / 28 + (exponentials + issue) / 4
    assert parts["pass"] == pytest.approx(clocks * 8192**2 / (132 * 1.755e9) * 1e6)
    assert parts["float32 logits"] == 0
    assert arithmetic.wide_us(128, 5.0, 1 / 8, 1024)["float32 logits"] > 0
