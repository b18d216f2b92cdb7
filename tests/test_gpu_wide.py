"""The wide form of the Triton backend on a CUDA device: exactness, repeats, graphs, no wait."""

from __future__ import annotations

import dataclasses

import cases
import pytest
import torch

import dwl_kernels
from dwl_kernels import backends
from dwl_kernels.backends.triton import wide as triton_wide

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _runs(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = backends.unavailable_reason("triton", "cuda")
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(triton_wide, "asked", lambda: True)


def batch(rows: int, candidates: int, dim: int, dtype: torch.dtype) -> dict:
    generator = torch.Generator(device="cuda").manual_seed(0)

    def unit(n: int) -> torch.Tensor:
        x = torch.randn(n, dim, generator=generator, device="cuda")
        return torch.nn.functional.normalize(x, dim=1).to(dtype).requires_grad_()

    return {"query": unit(rows), "positive": unit(rows), "negative": unit(candidates)}


def step(inputs: dict) -> tuple[torch.Tensor, ...]:
    loss = dwl_kernels.sampled_softmax_loss(**inputs, temperature=0.05, backend="triton")
    return (loss, *torch.autograd.grad(loss, list(inputs.values())))


@pytest.mark.parametrize(
    "case",
    [c for c in cases.CASES if c.kind not in ("dual", "indexed_rows", "rows")],
    ids=lambda c: c.name,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_form_is_as_exact_as_eager(case: cases.Case, dtype: torch.dtype) -> None:
    cases.check(case, "triton", dtype, device="cuda")


@pytest.mark.parametrize("dim", [384, 512, 1000, 4096])
@pytest.mark.parametrize("shape", [(1, 1), (1000, 3000), (3000, 9000)], ids=str)
@pytest.mark.parametrize("kind", ["sampled", "mixed", "full"])
def test_blocks_at_their_own_sizes(kind: str, dim: int, shape: tuple[int, int]) -> None:
    """Several blocks of rows and of candidates, with edges."""
    case = cases.Case("device", *shape, dim, kind, **cases._FULL_ROWS)

    def change(inputs: cases.Inputs) -> None:
        inputs["query"] /= dim**0.5

    case = dataclasses.replace(case, change=change)
    cases.check(case, "triton", torch.bfloat16, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_call_gives_bitwise_the_same_result(dtype: torch.dtype) -> None:
    inputs = batch(5000, 6000, 512, dtype)
    first = step(inputs)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, step(inputs), strict=True))


def test_call_does_not_wait_for_the_device() -> None:
    inputs = batch(2000, 2000, 512, torch.bfloat16)
    inputs["negative"].data[1500] *= 1000  # rows that pass again
    expected = step(inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_call_goes_into_a_graph() -> None:
    inputs = batch(2000, 3000, 384, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(inputs)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_memory_is_that_of_a_block() -> None:
    inputs = batch(65536, 8192, 512, torch.bfloat16)
    step(inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = step(inputs)
    results = sum(t.numel() * t.element_size() for t in found)
    peak = torch.cuda.max_memory_allocated() - before - results
    assert peak < 0.05 * 65536 * 8192 * 4
