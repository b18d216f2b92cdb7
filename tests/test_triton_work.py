"""What the Triton kernel multiplies, counted in the interpreter: only what somebody asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dwl_kernels
from dwl_kernels import backends
from dwl_kernels.backends.triton import solve as host
from dwl_kernels.backends.triton.tiles import Tiles

REASON = backends.unavailable_reason("triton", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
ROWS, CANDIDATES, DIM = 96, 64, 16  # multiples of the tiles
PRODUCT = ROWS * CANDIDATES * DIM  # multiplications of one pass over all logits
BLOCK = 16 * 16 * DIM  # those of one block: the first of every unit is looked at for its reference


class Multiplications:
    def __init__(self) -> None:
        self.count = 0


@pytest.fixture
def multiplications(monkeypatch: pytest.MonkeyPatch) -> Multiplications:
    from triton.runtime import interpreter

    found = Multiplications()
    builder = interpreter.interpreter_builder
    dot = builder.create_dot

    def counted(a: Any, b: Any, *rest: Any) -> Any:
        found.count += a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(a, b, *rest)

    monkeypatch.setattr(builder, "create_dot", counted)
    monkeypatch.setattr(host, "INTERPRETER", host.Interpreter(Tiles(16, 16, 16, 16, 1, 1, 4, 1), 5))
    return found


def embeddings(rows: int, wanted: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, DIM, generator=generator).bfloat16().requires_grad_(wanted)


@pytest.mark.parametrize(
    ("wanted", "products"),
    [
        ((), 1),  # the logits
        (("positive",), 1),  # its gradient is a number times the query
        (("query",), 2),  # and sum_j p_ij c_j
        (("query", "positive"), 2),
        (("negative",), 3),  # the logits once more, transposed, and sum_i p_ij q_i
        (("query", "positive", "negative"), 4),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_frozen_inputs_cost_no_product(
    multiplications: Multiplications, wanted: tuple[str, ...], products: int
) -> None:
    sizes = {"query": ROWS, "positive": ROWS, "negative": CANDIDATES}
    inputs = {name: embeddings(rows, name in wanted) for name, rows in sizes.items()}
    dwl_kernels.sampled_softmax_loss(**inputs, backend="triton")
    units = 5 + 4  # of six tiles, dealt out to five workers: the last one is split into its steps
    assert multiplications.count == products * PRODUCT + units * BLOCK


@pytest.mark.parametrize("kind", ["sampled", "in-batch", "full"])
def test_padded_rows_cost_no_product(multiplications: Multiplications, kind: str) -> None:
    """Every second row is padding; in a batch it is nobody's candidate, too."""
    kept = torch.arange(ROWS) % 2
    query = embeddings(ROWS)
    if kind == "sampled":
        inputs = query, embeddings(ROWS), embeddings(CANDIDATES)
        dwl_kernels.sampled_softmax_loss(*inputs, example_weights=kept, backend="triton")
        expected = 4 * PRODUCT // 2
    elif kind == "in-batch":
        dwl_kernels.in_batch_softmax_loss(
            query, embeddings(ROWS), example_weights=kept, backend="triton"
        )
        expected = 4 * (ROWS // 2) ** 2 * DIM
    else:
        target = torch.where(kept == 1, torch.arange(ROWS) % CANDIDATES, -100)
        dwl_kernels.full_softmax_loss(query, embeddings(CANDIDATES), target, backend="triton")
        expected = 4 * PRODUCT // 2
    assert multiplications.count == expected + 3 * BLOCK  # as many tiles, none of them split
