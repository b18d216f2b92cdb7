"""The kernels on a CUDA device: exactness, launches, repeats, graphs, streams."""

from __future__ import annotations

import cases
import pytest
import torch

import dwl_kernels
from benchmarks.speed.measure import work_on_gpu
from dwl_kernels import backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(params=["triton", "cuda"])
def kernel(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = backends.unavailable_reason(name, "cuda")
    if reason is not None:
        pytest.skip(reason)
    return name


def batch(rows: int, candidates: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> dict:
    generator = torch.Generator(device="cuda").manual_seed(0)

    def unit(n: int) -> torch.Tensor:
        x = torch.randn(n, dim, generator=generator, device="cuda")
        return torch.nn.functional.normalize(x, dim=1).to(dtype).requires_grad_()

    return {"query": unit(rows), "positive": unit(rows), "negative": unit(candidates)}


def step(inputs: dict, kernel: str, **options: object) -> tuple[torch.Tensor, ...]:
    loss = dwl_kernels.sampled_softmax_loss(**inputs, temperature=0.05, backend=kernel, **options)
    return (loss, *torch.autograd.grad(loss, list(inputs.values())))


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_is_as_exact_as_eager(kernel: str, case: cases.Case, dtype: torch.dtype) -> None:
    if kernel == "triton" and dtype == torch.float64:
        pytest.skip("it takes float64 in the interpreter only")
    backend = "chunked" if kernel == "cuda" and not case.in_cuda else kernel
    cases.check(case, backend, dtype, device="cuda")


@pytest.mark.parametrize("name", ["log-Q", "mixed, everything", "full softmax, past the tile"])
def test_tf32_products_are_as_exact_as_their_mantissa(
    kernel: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Precision "high": float32 is rounded to tf32, which has the mantissa of float16."""
    monkeypatch.setitem(cases.MARGIN, torch.float32, cases.MARGIN[torch.float16])
    case = next(case for case in cases.CASES if case.name == name)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        cases.check(case, kernel, torch.float32, device="cuda")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 200, 256])
@pytest.mark.parametrize("shape", [(1, 1), (127, 129), (1000, 3000), (4096, 515)], ids=str)
def test_default_tiles_at_their_own_sizes(kernel: str, dim: int, shape: tuple[int, int]) -> None:
    """Several tiles, splits and edges of the real tile shapes."""
    case = cases.Case("device", rows=shape[0], candidates=shape[1], dim=dim, **cases._FULL_ROWS)
    cases.check(case, kernel, torch.bfloat16, device="cuda")


def test_forward_and_backward_are_two_launches() -> None:
    """In Triton: one for the loss and all gradients, one that applies the upstream gradient."""
    reason = backends.unavailable_reason("triton", "cuda")
    if reason is not None:
        pytest.skip(reason)
    inputs = batch(2048, 2048, 128)
    upstream = torch.tensor(2.0, device="cuda")
    leaves = list(inputs.values())

    def run() -> None:
        loss = dwl_kernels.sampled_softmax_loss(**inputs, temperature=0.05, backend="triton")
        torch.autograd.grad(loss, leaves, upstream)

    run()
    names = [event.name for event in work_on_gpu(run)]
    assert len(names) == 2, names


@pytest.mark.parametrize("shape", [(512, 512, 64), (8192, 4096, 128)], ids=str)
def test_fifty_repeats_are_bitwise_equal(kernel: str, shape: tuple[int, int, int]) -> None:
    inputs = batch(*shape)
    first = step(inputs, kernel)
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(first, step(inputs, kernel), strict=True))


def test_graph_replay_computes_the_new_inputs(kernel: str) -> None:
    inputs = batch(1024, 1024, 64)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(inputs, kernel)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs, kernel)
    for _ in range(3):
        with torch.no_grad():
            inputs["query"].copy_(inputs["query"].roll(1, 0))
        graph.replay()
        expected = step(inputs, kernel)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("sizes", [(1, 16, 17, 128), (128, 127, 16, 1)], ids=str)
def test_batches_of_other_sizes_follow_each_other(kernel: str, sizes: tuple[int, ...]) -> None:
    """A kernel that was compiled for lengths of 1, or multiples of 16, takes no others."""
    for rows in sizes:
        case = cases.Case("device", rows=rows, candidates=rows, dim=20, **cases._FULL_ROWS)
        cases.check(case, kernel, torch.float32, device="cuda")


def test_embeddings_at_odd_addresses(kernel: str) -> None:
    inputs = batch(300, 500, 64)
    expected = step(inputs, kernel)
    odd = {}
    for name, value in inputs.items():
        space = torch.empty(value.numel() + 1, dtype=value.dtype, device="cuda")
        odd[name] = space[1:].view(value.shape).copy_(value.detach()).requires_grad_()
    for got, wanted in zip(step(odd, kernel), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=1e-6)


def test_torch_compile_makes_graphs_of_the_step(kernel: str) -> None:
    def loss(query: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        return dwl_kernels.sampled_softmax_loss(
            query, positive, negative, temperature=0.05, backend=kernel
        )

    inputs = batch(1024, 512, 64)
    compiled = torch.compile(loss, mode="reduce-overhead")
    for _ in range(4):  # it warms up, captures and replays
        torch.compiler.cudagraph_mark_step_begin()
        value = compiled(**inputs)
        got = (value.detach().clone(), *torch.autograd.grad(value, list(inputs.values())))
        assert all(torch.equal(a, b) for a, b in zip(got, step(inputs, kernel), strict=True))
        with torch.no_grad():
            inputs["query"].copy_(inputs["query"].roll(1, 0))


def test_two_streams_at_once(kernel: str) -> None:
    """A cooperative launch takes the whole device; the second waits and must not hang or mix."""
    inputs = [batch(4096, 4096, 64), batch(2048, 8192, 64)]
    expected = [step(x, kernel) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    got: list[list] = [[], []]
    for _ in range(20):
        for k, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[k].append(step(inputs[k], kernel))
    torch.cuda.synchronize()
    for k in range(2):
        for result in got[k]:
            assert all(torch.equal(a, b) for a, b in zip(result, expected[k], strict=True))


@pytest.mark.parametrize("side", ["rows", "candidates"])
def test_products_past_two_to_the_31_elements(kernel: str, side: str) -> None:
    """9 million embeddings of 256: the last ones lie past element 2^31."""
    many, few, dim = 9_000_000, 64, 256
    rows, candidates = (many, few) if side == "rows" else (few, many)
    inputs = batch(rows, candidates, dim)
    loss, *gradients = step(inputs, kernel, reduction="sum")
    tail = slice(-64, None)
    if side == "rows":
        small = {"query": inputs["query"][tail], "positive": inputs["positive"][tail]}
        small = {k: v.detach().requires_grad_() for k, v in small.items()}
        small["negative"] = inputs["negative"]
        _, *expected = step(small, kernel, reduction="sum")
        torch.testing.assert_close(gradients[0][tail], expected[0], rtol=2e-2, atol=1e-4)
        torch.testing.assert_close(gradients[1][tail], expected[1], rtol=2e-2, atol=1e-4)
    else:
        query, positive = inputs["query"].float(), inputs["positive"].float()
        z = query @ inputs["negative"].float().T / 0.05
        z_positive = (query * positive).sum(1) / 0.05
        lse = torch.logaddexp(z.logsumexp(1), z_positive)
        p = (z[:, tail] - lse[:, None]).exp()
        torch.testing.assert_close(loss, (lse - z_positive).sum(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            gradients[2][tail].float(), p.T @ query / 0.05, rtol=2e-2, atol=1e-6
        )


def test_half_padded_rows_take_about_half_the_time(kernel: str) -> None:
    inputs = batch(65536, 8192, 128)
    weights = torch.ones(65536, device="cuda")
    half = weights.clone()
    half[::2] = 0

    def milliseconds(example_weights: torch.Tensor) -> float:
        do_bench = pytest.importorskip("triton.testing").do_bench
        return do_bench(
            lambda: step(inputs, kernel, example_weights=example_weights), return_mode="median"
        )

    assert milliseconds(half) < 0.65 * milliseconds(weights)


def test_bad_domain_id_gives_nan_and_reads_nothing_outside(kernel: str) -> None:
    inputs = batch(64, 64, 64)
    ids = torch.zeros(64, dtype=torch.int64, device="cuda")
    ids[3] = 1 << 40
    loss = dwl_kernels.sampled_softmax_loss(
        **inputs,
        domain_ids=ids,
        domain_weights=torch.ones(4, device="cuda"),
        reduction="none",
        backend=kernel,
    )
    assert loss[3].isnan()
    assert loss.isnan().sum() == 1
