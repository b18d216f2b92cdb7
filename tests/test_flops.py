"""The counter of operations."""

from __future__ import annotations

import pytest
from differentiated import KINDS, SIZES, gradients, loss_and_values
from torch.utils.flop_counter import FlopCounterMode

# ---------------------------------------------------------------- counters of operations

# Products of B x N x D multiplications and additions in a whole step, of which some for the loss.
B, N, D = SIZES["rows"], SIZES["candidates"], SIZES["dim"]
PRODUCT, BATCH = 2 * B * N * D, 2 * B * B * D
TABLE = 2 * B * (N + 1) * D  # a product for each place in the table
STEPS = {
    "sampled": 3 * PRODUCT,
    "in_batch": 3 * BATCH,
    "mixed": 3 * (BATCH + PRODUCT),
    "full": 3 * PRODUCT,
    "indexed": 3 * PRODUCT,
    "indexed_rows": 2 * PRODUCT + TABLE,
    "dual": 4 * PRODUCT,
}


@pytest.mark.parametrize("kind", KINDS)
def test_counter_of_operations_sees_every_product(kind):
    alone = {"in_batch": BATCH, "mixed": BATCH + PRODUCT, "dual": 2 * PRODUCT}.get(kind, PRODUCT)
    for reduction, again in (("mean", 0), ("none", alone)):
        loss, values = loss_and_values(f"{kind}, {reduction}")
        with FlopCounterMode(display=False) as counter:
            loss(*values)
        assert counter.get_total_flops() == alone
        with FlopCounterMode(display=False) as counter:
            gradients(loss, values)
        assert counter.get_total_flops() == STEPS[kind] + again
