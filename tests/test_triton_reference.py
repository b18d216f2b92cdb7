"""How often a tile of rows starts again, and that one outlier costs no more than its own tile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
import triton_access

import dwl_kernels
from dwl_kernels import backends
from dwl_kernels.backends.triton import solve as host
from dwl_kernels.backends.triton.kernels import row_pass as triton_rows
from dwl_kernels.backends.triton.kernels.row_pass import any_above, reference_of
from dwl_kernels.backends.triton.tiles import Tiles

REASON = backends.unavailable_reason("triton", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
CANDIDATES, BLOCK, TILE = 8192, 64, 64  # the narrowest first block of the default tiles, rows


class FormOfReference(NamedTuple):
    HALF: Any
    MAXIMA: Any
    REFINED: Any
    LARGEST: Any


class ContextOfReference(NamedTuple):
    form: Any


triton_access.KERNELS |= {
    "reference_kernel": triton_access.Written((), kept=("reference",)),
    "again_kernel": triton_access.Written((), kept=("again",)),
}


@triton.jit
def reference_kernel(z_positive, largest, reference, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    ctx = ContextOfReference(FormOfReference(False, False, False, 3.4e38))
    found = reference_of(tl.load(z_positive + row), tl.load(largest + row), 64.0, ctx)
    tl.store(reference + row, found)


@triton.jit
def again_kernel(total, again, ROWS: tl.constexpr):
    tl.store(again, any_above(tl.load(total + tl.arange(0, ROWS))).to(tl.int32))


def tiles_that_start_again(z: torch.Tensor, z_positive: torch.Tensor) -> int:
    """By the kernel's own reference and limit, from logits in powers of two."""
    count = 0
    for first in range(0, len(z), TILE):
        rows, positive = z[first : first + TILE], z_positive[first : first + TILE].contiguous()
        largest, reference = rows[:, :BLOCK].amax(1), torch.empty(TILE)
        reference_kernel[(1,)](positive, largest, reference, TILE)
        total = (rows - reference[:, None]).exp2().sum(1)
        again = torch.zeros(1, dtype=torch.int32)
        again_kernel[(1,)](total, again, TILE)
        count += int(again)
    return count


DATA = [("normal", dim, 1.0) for dim in (64, 96, 128, 256)]
DATA += [("unit", dim, tau) for dim in (64, 128) for tau in (0.05, 0.01, 0.005)]


@pytest.mark.parametrize(("kind", "dim", "tau"), DATA)
def test_tiles_of_usual_embeddings_do_not_start_again(kind: str, dim: int, tau: float) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = 16 * TILE
    query, positive, negative = (
        torch.randn(n, dim, generator=generator) for n in (rows, rows, CANDIDATES)
    )
    if kind == "unit":
        query, positive, negative = (
            torch.nn.functional.normalize(x, dim=1) for x in (query, positive, negative)
        )
    scale = 1.4426950408889634 / tau
    z = query @ negative.T * scale
    assert tiles_that_start_again(z, (query * positive).sum(1) * scale) == 0


def test_a_tile_whose_total_overflows_is_seen() -> None:
    z = torch.zeros(3 * TILE, CANDIDATES)
    z[TILE + 3, 5000] = 165.0  # 2^165 as likely as all others: 64 of it are foreseen, and 2^100
    assert tiles_that_start_again(z, torch.zeros(3 * TILE)) == 1
    z[TILE + 3, 5000] = 160.0
    assert tiles_that_start_again(z, torch.zeros(3 * TILE)) == 0


@pytest.mark.parametrize("where", [3, 100], ids=["first block", "later block"])
def test_an_outlier_costs_one_tile_its_maxima(monkeypatch: pytest.MonkeyPatch, where: int) -> None:
    """In the interpreter; the row of the outlier lies in the second of three tiles."""
    monkeypatch.setattr(host, "INTERPRETER", host.Interpreter(Tiles(16, 16, 16, 16, 1, 1, 4, 1), 3))
    found = SimpleNamespace(searches=0)
    searched = triton_rows.row_maxima

    def counted(rows: Any, log_q: Any, first: Any, stop: Any, ctx: Any) -> Any:
        found.searches += int(stop) > int(first) + 1
        return searched(rows, log_q, first, stop, ctx)

    monkeypatch.setattr(triton_rows, "row_maxima", counted)
    generator = torch.Generator().manual_seed(2)
    query, positive, negative = (torch.randn(n, 16, generator=generator) for n in (48, 48, 128))
    query[20] *= 30
    negative[where] = query[20] / 5
    inputs = [x.bfloat16().requires_grad_() for x in (query, positive, negative)]
    results = {}
    for backend in ("triton", "eager"):
        loss = dwl_kernels.sampled_softmax_loss(*inputs, backend=backend)
        results[backend] = (loss, *torch.autograd.grad(loss, inputs))
    assert found.searches == (where >= 16)
    for ours, theirs in zip(results["triton"], results["eager"], strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("margin", [30.0, 47.0, 70.0, 95.0])
@pytest.mark.parametrize("correction", ["standard", "refined"])
def test_positives_far_ahead_of_all_candidates(
    backend: str, margin: float, correction: str
) -> None:
    """By so many nats: what lies below the range of a float32 is zero and not NaN."""
    if (reason := backends.unavailable_reason(backend, "cpu")) is not None:
        pytest.skip(reason)
    query = torch.ones(33, 1, dtype=torch.bfloat16)
    positive = torch.full((33, 1), margin, dtype=torch.bfloat16)
    negative = torch.linspace(-1, 0, 40, dtype=torch.bfloat16)[:, None]
    inputs = [x.requires_grad_() for x in (query, positive, negative)]
    results = {}
    for name in (backend, "eager"):
        loss = dwl_kernels.sampled_softmax_loss(*inputs, correction=correction, backend=name)
        results[name] = (loss, *torch.autograd.grad(loss, inputs))
    for ours, theirs in zip(results[backend], results["eager"], strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.02, atol=1e-15)
