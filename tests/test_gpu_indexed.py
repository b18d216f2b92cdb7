"""Candidates drawn by row from a table, on a CUDA device; the cases are in test_gpu.py."""

from __future__ import annotations

import cases
import pytest
import torch
from torch import Tensor

import dwl_kernels
from benchmarks.speed.measure import work_on_gpu
from dwl_kernels import backends
from dwl_kernels import gather as table
from dwl_kernels.core.problem import GradMask, PerRowProblem, RowOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _can_run() -> None:
    reason = backends.unavailable_reason("triton", DEVICE)
    if reason is not None:
        pytest.skip(reason)


def draws(rows: int, width: int, dim: int, table_rows: int) -> dict[str, Tensor]:
    generator = torch.Generator(device=DEVICE).manual_seed(0)

    def unit(n: int) -> Tensor:
        x = torch.randn(n, dim, generator=generator, device=DEVICE)
        return torch.nn.functional.normalize(x, dim=1).bfloat16().requires_grad_()

    def ids(*shape: int) -> Tensor:
        return torch.randint(0, table_rows, shape, generator=generator, device=DEVICE)

    return {
        **{"query": unit(rows), "table": unit(table_rows)},
        **{"positive_ids": ids(rows), "negative_ids": ids(rows, width)},
    }


def step(inputs: dict[str, Tensor], **options: object) -> tuple[Tensor, ...]:
    loss = dwl_kernels.indexed_sampled_softmax_loss(
        **inputs, temperature=0.05, backend="triton", **options
    )
    return (loss, *torch.autograd.grad(loss.sum(), [inputs["query"], inputs["table"]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [16, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("shape", [(1, 1), (127, 129), (1000, 33), (4096, 16)], ids=str)
def test_default_tiles_at_their_own_sizes(
    dim: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Several tiles and steps; of 41 ids each is drawn up to 2,000 times."""
    rows, width = shape
    case = cases.Case(
        "device by row", kind="indexed_rows", rows=rows, candidates=width, dim=dim,
        **cases._FULL_ROWS,
    )  # fmt: skip
    cases.check(case, "triton", dtype, device=DEVICE)


def test_forward_and_its_gradients_are_one_launch() -> None:
    inputs = {k: v.detach() for k, v in draws(2048, 64, 64, 10_000).items()}
    problem = PerRowProblem(
        query=inputs["query"],
        item_table=inputs["table"],
        positive_rows=inputs["positive_ids"],
        candidate_rows=inputs["negative_ids"],
        rows=RowOptions(tau=0.05),
    )

    def run() -> None:
        wanted = GradMask(True, True, True, False, False, False)
        backends.pick("triton", problem)(problem, wanted, None)

    run()
    names = [event.name for event in work_on_gpu(run)]
    assert len(names) == 1, names


def test_twenty_repeats_are_bitwise_equal() -> None:
    inputs = draws(8192, 128, 64, 50_000)
    inputs["negative_ids"][:, :30] = 7  # 245,760 places of one id
    first = step(inputs)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, step(inputs), strict=True))


@pytest.mark.parametrize("rows", [100, 300_000])
def test_a_hot_id_is_summed_as_exactly_as_others(rows: int) -> None:
    """An id with 300,000 places is 4,687 chunks and 73 chunks of chunks."""
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    source = torch.randn(rows, 64, generator=generator, device=DEVICE)
    ids = torch.randint(0, 9, (rows, 3), generator=generator, device=DEVICE)
    ids[:, 1] = 4
    weight = torch.rand(rows, 3, generator=generator, device=DEVICE)
    for compact in (False, True):
        call = ([ids], [weight], 9, torch.float32, compact)
        got = table.table_gradient(source, *call, "triton")
        wide = ([ids], [weight.double()], 9, torch.float64, compact)
        expected = table.table_gradient(source.double(), *wide, "chunked")
        got, expected = (t.to_dense() if compact else t for t in (got, expected))
        error = (got - expected).abs().max() / expected.abs().max()
        assert error <= 2e-6


def test_rows_past_two_to_the_31_elements_are_the_right_ones() -> None:
    """A table of 2^25 + 3 rows of 64, 4.3 GB, and its gradient, dense and compact."""
    many = (1 << 25) + 3
    items = torch.zeros(many, 64, dtype=torch.bfloat16, device=DEVICE)
    used = torch.tensor([0, 1, 2, many - 3, many - 2, many - 1], device=DEVICE)
    small = draws(2, 3, 64, 6)
    small["positive_ids"] = torch.tensor([5, 0], device=DEVICE)
    small["negative_ids"] = torch.tensor([[4, 0, 3], [1, 2, 5]], device=DEVICE)
    items[used] = small["table"].detach()
    far = {
        **{"query": small["query"], "table": items.requires_grad_()},
        **{k: used[small[k]] for k in ("positive_ids", "negative_ids")},
    }
    expected = step(small)
    for sparse in (False, True):
        got = step(far, sparse_grad=sparse)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        gradient = got[2].coalesce() if sparse else got[2]
        if sparse:
            assert torch.equal(gradient.indices()[0], used)
            assert torch.equal(gradient.values(), expected[2])
        else:
            assert torch.equal(gradient[used], expected[2])
            assert not gradient[3 : many - 3].any()


def test_graph_replay_computes_the_new_inputs() -> None:
    """Nothing on the way to a dense gradient of the table waits for the device."""
    inputs = draws(1024, 32, 64, 5000)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs)
    for _ in range(3):
        inputs["negative_ids"].copy_(inputs["negative_ids"].roll(1, 0))
        graph.replay()
        expected = step(inputs)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("bad", [-2, 5000, 1 << 40])
@pytest.mark.parametrize("name", ["positive_ids", "negative_ids"])
def test_bad_id_gives_nan_or_the_error_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, name: str, bad: int
) -> None:
    inputs = draws(64, 33, 64, 5000)
    inputs[name].view(64, -1)[3, -1] = bad
    loss, query, _ = step(inputs, reduction="none")
    assert loss.isnan().nonzero()[:, 0].tolist() == [3]
    assert query.isnan().any(1).nonzero()[:, 0].tolist() == [3]
    monkeypatch.setenv("DWL_KERNELS_CHECK", "1")
    with pytest.raises(IndexError, match=f"{name} holds {bad}"):
        step(inputs)
