"""What only the CUDA kernel has: tiles, splits, barriers, fallbacks. Runs emulated, on fibers."""

from __future__ import annotations

import ctypes
from pathlib import Path

import cases
import cuda_emulator
import pytest
import torch
from cuda_emulator import TILES

import dwl_kernels
from dwl_kernels import backends
from dwl_kernels.backends.cache import BuildError
from dwl_kernels.backends.cuda import build as cuda_build
from dwl_kernels.backends.cuda import solve as cuda
from dwl_kernels.backends.cuda import variants as cuda_tiles
from dwl_kernels.backends.cuda.variants import Tiles, variant
from dwl_kernels.backends.triton import solve as triton
from dwl_kernels.core.problem import Problem

emulated = pytest.mark.skipif(
    backends.unavailable_reason("cuda", "cpu") is not None, reason="the emulator is off"
)
TEAMS = Tiles(32, 1, 4, 1, TEAM=2)
CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
BY_NAME = {case.name: case for case in cases.CASES}


def use(
    monkeypatch: pytest.MonkeyPatch, blocks: int = 3, order: int = 0, tiles: Tiles = TILES
) -> None:
    emulation = cuda_emulator.Emulation(blocks, order, tiles)
    monkeypatch.setattr(cuda_emulator, "EMULATION", emulation)


@emulated
@pytest.mark.parametrize("blocks", [1, 2, 7, 40])
@pytest.mark.parametrize("name", ["mixed, everything", "full softmax, past the tile"])
def test_splits_do_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch, name: str, blocks: int
) -> None:
    """1 block splits nothing, 40 split every tile."""
    use(monkeypatch, blocks)
    cases.check(BY_NAME[name], "cuda", torch.float64)


@emulated
@pytest.mark.parametrize(
    ("dtype", "dim", "capability"),
    [
        (torch.bfloat16, 20, (9, 0)),
        (torch.bfloat16, 64, (9, 0)),
        (torch.bfloat16, 128, (9, 0)),
        (torch.float16, 256, (9, 0)),
        (torch.float32, 128, (9, 0)),
        (torch.float32, 256, (8, 6)),
        (torch.float64, 200, (8, 6)),
    ],
    ids=str,
)
def test_default_tiles_at_their_own_sizes(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, dim: int, capability: tuple[int, int]
) -> None:
    """The tiles that a GPU gets; float64 of 200 dimensions takes several passes."""
    use(monkeypatch, 2, tiles=variant(dtype, dim, capability).tiles)
    case = cases.Case("wide", rows=150, candidates=140, dim=dim, **cases._FULL_ROWS)
    cases.check(case, "cuda", dtype)


@emulated
@pytest.mark.parametrize(
    ("name", "tiles", "dtype"),
    [
        *(("mixed, everything", TEAMS, dtype) for dtype in cuda_tiles.MATH),
        ("refined, everything", TEAMS, torch.float32),
        ("full softmax, past the tile", Tiles(32, 2, 2, 1, TEAM=2), torch.bfloat16),
    ],
    ids=str,
)
def test_warps_that_share_rows(
    monkeypatch: pytest.MonkeyPatch, name: str, tiles: Tiles, dtype: torch.dtype
) -> None:
    use(monkeypatch, 3, tiles=tiles)
    cases.check(BY_NAME[name], "cuda", dtype)


@emulated
@pytest.mark.parametrize(
    ("dtype", "tiles"),
    [(torch.bfloat16, TILES), (torch.float32, TILES), (torch.bfloat16, TEAMS)],
    ids=str,
)
@pytest.mark.parametrize("name", ["mixed, everything", "full softmax, past the tile"])
def test_threads_may_run_in_any_order_between_barriers(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, tiles: Tiles
) -> None:
    """A race would show: in the order of their numbers, reversed, and drawn anew at each turn."""
    results = []
    for order in (0, 1, 2, 3):
        use(monkeypatch, 7, order, tiles)
        results.append(cases.loss_and_gradients(BY_NAME[name], "cuda", dtype))
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in other)


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_candidate_far_above_the_positive_starts_the_tile_again(dtype: torch.dtype) -> None:
    """Logits from -300 to 300: with the positive as reference a total overflows float32."""
    query = torch.linspace(-1, 1, 33)[:, None].to(dtype).requires_grad_()
    positive = -10 * query.detach()
    negative = torch.linspace(-300, 300, 40)[:, None].to(dtype).requires_grad_()
    losses = {}
    for backend in ("cuda", "eager"):
        loss = dwl_kernels.sampled_softmax_loss(query, positive, negative, backend=backend)
        losses[backend] = (loss, *torch.autograd.grad(loss, (query, negative)))
    for ours, theirs in zip(losses["cuda"], losses["eager"], strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.01, atol=0.01)


@emulated
def test_tf32_products_are_as_exact_as_their_mantissa(monkeypatch: pytest.MonkeyPatch) -> None:
    """tf32 has the mantissa of float16, and hence its margin."""
    monkeypatch.setitem(cases.MARGIN, torch.float32, cases.MARGIN[torch.float16])
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert cuda_tiles.math_of(torch.float32) == cuda_tiles.TF32
        for name in ("log-Q", "past the tile", "mixed, everything", "full softmax, past the tile"):
            cases.check(BY_NAME[name], "cuda", torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


@emulated
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_embeddings_that_are_not_aligned_are_copied_one_by_one(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def shifted(*shape: int) -> torch.Tensor:
        numbers = torch.randn(shape[0] * shape[1] + 1, generator=generator).to(dtype)
        return numbers[1:].view(shape)

    inputs = (shifted(35, 64), shifted(35, 64), shifted(50, 64))
    got = dwl_kernels.sampled_softmax_loss(*inputs, backend="cuda")
    again = dwl_kernels.sampled_softmax_loss(*(x.clone() for x in inputs), backend="cuda")
    assert torch.equal(got, again)
    expected = dwl_kernels.sampled_softmax_loss(*inputs, backend="eager")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)


def dealt(tiles: int, steps: int, workers: int) -> list[list[int]]:
    """All units in order: tile, first and last step, place, whether it is a whole tile."""
    library = cuda_emulator.load(cuda_emulator.variant(torch.bfloat16, 64))
    found, units = (ctypes.c_int * 5)(), []
    for worker in range(workers):
        for turn in range(library.dwl_unit(tiles, steps, workers, worker, 0, found)):
            library.dwl_unit(tiles, steps, workers, worker, turn, found)
            assert found[3] // 2 == worker
            units.append(list(found))
    return sorted(units)


@emulated
@pytest.mark.parametrize("workers", [1, 2, 7, 16, 264])
@pytest.mark.parametrize("steps", [0, 1, 2, 9, 64, 2**26])
def test_shares_deal_every_step_of_every_tile_out_once(steps: int, workers: int) -> None:
    library = cuda_emulator.load(cuda_emulator.variant(torch.bfloat16, 64))
    places = (ctypes.c_int * workers)()
    for tiles in (0, 1, 3, 7, 20, workers - 1, workers, workers + 1):
        units = dealt(tiles, steps, workers)
        split = [unit[3] for unit in units if not unit[4]]
        assert len(set(split)) == len(split)
        for tile in range(tiles):
            mine = [unit for unit in units if unit[0] == tile]
            assert [unit[1] for unit in mine] == [0, *(unit[2] for unit in mine[:-1])]
            assert mine[-1][2] == steps
            parts = library.dwl_parts(tiles, steps, workers, tile, places)
            assert parts == (0 if mine[0][4] else len(mine))
            assert list(places[:parts]) == [unit[3] for unit in mine[:parts]]


@emulated
def test_no_size_leaves_the_chip_idle() -> None:
    """264 blocks: either side from 4,096 to 65,536, the other 8,192; the same in both phases."""
    library = cuda_emulator.load(cuda_emulator.variant(torch.bfloat16, 64))
    for rows, columns in ((128, 32), (128, 64)):
        for n in range(4096, 65537, 100):
            for a, b in ((n, 8192), (8192, n)):
                tiles, steps = -(-a // rows), -(-b // columns)
                longest = library.dwl_longest(tiles, steps, 264)
                assert tiles * steps > 0.85 * 264 * longest, (a, b)


@emulated
def test_shared_memory_is_what_the_host_computes() -> None:
    for dtype, dim, tiles in (
        (torch.bfloat16, 64, TILES),
        (torch.float32, 20, TEAMS),
        (torch.bfloat16, 200, TEAMS),
        (torch.float64, 96, TILES._replace(PAD=2)),
    ):
        chosen = cuda_emulator.variant(dtype, dim, tiles)
        assert cuda_emulator.load(chosen).dwl_shared_bytes() == chosen.shared_bytes


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("math", [*cuda_tiles.MATH.values(), cuda_tiles.TF32], ids=lambda m: m.name)
def test_every_width_of_every_type_fits_every_gpu(
    math: cuda_tiles.Math, capability: tuple[int, int]
) -> None:
    limit = {8: 99, 12: 99, 9: 227, 10: 227}[capability[0]] * 1024
    limit = 163 * 1024 if capability == (8, 0) else limit
    for width in cuda_tiles.WIDTHS:
        tiles = cuda_tiles.tiles(math, width, capability)
        assert cuda_tiles.Variant(math, width, tiles).shared_bytes <= limit
        assert tiles.WARPS * 32 * tiles.BLOCKS * 255 <= 65536


def test_gpu_of_unknown_capability_gets_what_fits_all() -> None:
    for width in cuda_tiles.WIDTHS:
        math = cuda_tiles.MATH[torch.float64]
        assert cuda_tiles.tiles(math, width, (13, 0)) == cuda_tiles.tiles(math, width, (8, 6))


@emulated
def test_wide_embeddings_are_refused_with_the_mend() -> None:
    with pytest.raises(RuntimeError, match=r"at most 256.*chunked"):
        dwl_kernels.sampled_softmax_loss(
            torch.ones(2, 257), torch.ones(2, 257), torch.ones(4, 257), backend="cuda"
        )


@emulated
@pytest.mark.parametrize("name", ["by row", "dual scale"])
def test_problems_that_it_does_not_take_are_refused_with_the_mend(name: str) -> None:
    case = BY_NAME[name]
    with pytest.raises(RuntimeError, match=r"does not take .*chunked"):
        case.loss(case.inputs(torch.float32), "cuda")


@emulated
def test_bad_values_give_nan_where_nothing_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the row's loss is NaN, no other row's is."""
    monkeypatch.setattr("dwl_kernels.core.values.checks_values", lambda device: False)
    loss = dwl_kernels.sampled_softmax_loss(
        torch.ones(4, 3),
        torch.ones(4, 3),
        torch.ones(5, 3),
        domain_ids=torch.tensor([0, 7, 1, -9]),
        domain_weights=torch.tensor([1.0, -1.0]),
        reduction="none",
        backend="cuda",
    )
    assert loss.isnan().tolist() == [False, True, True, True]


# Where it cannot run ------------------------------------------------------------------------------


def test_missing_compiler_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cuda_build, "_PLACES", ())
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    with pytest.raises(BuildError, match=r"no CUDA compiler found.*CUDA_HOME"):
        cuda_build.nvcc()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(BuildError, match=rf"CUDA_HOME={tmp_path}.*bin/nvcc"):
        cuda_build.nvcc()


def test_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\necho 'Unsupported gpu architecture' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("DWL_KERNELS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(BuildError, match=r"Unsupported gpu architecture(.|\n)*CUDA_HOME"):
        cuda_build.build(variant(torch.bfloat16, 64, (9, 0)), (9, 0))


def test_old_device_is_told_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 99)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    reason = backends.unavailable_reason("cuda", "cuda")
    assert reason is not None
    assert "capability 8.0" in reason
    assert "7.5" in reason


@pytest.fixture
def gpu_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors get the backends of CUDA tensors, and nothing has been warned about yet."""
    monkeypatch.setattr(backends, "_AUTO", {"cpu": ("triton", "cuda", "chunked")})
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(backends, "_broken", {})


def solved_by(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which backends return a result, in the order of calls."""
    calls: list[str] = []

    def watched(name: str, solve: backends.Solve) -> backends.Solve:
        def run(*arguments: object) -> object:
            output = solve(*arguments)  # type: ignore[arg-type]
            calls.append(name)
            return output

        return run  # type: ignore[return-value]

    for name, entry in backends.BACKENDS.items():
        monkeypatch.setattr(entry.kernel, "solve", watched(name, entry.kernel.solve))
    return calls


def loss() -> torch.Tensor:
    return dwl_kernels.sampled_softmax_loss(torch.ones(4, 3), torch.ones(4, 3), torch.ones(5, 3))


@emulated
@pytest.mark.filterwarnings("error")
def test_without_triton_auto_takes_cuda_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, gpu_order: None
) -> None:
    monkeypatch.setattr(triton, "unavailable_reason", lambda device: "Triton cannot be imported")
    calls = solved_by(monkeypatch)
    with pytest.warns(UserWarning, match="'triton' cannot run.*cannot be imported") as caught:
        loss()
    loss()  # a second warning would be an error
    assert len(caught) == 1
    assert calls == ["cuda", "cuda"]


@emulated
def test_triton_that_does_not_compile_is_left_for_cuda_once_and_for_all(
    monkeypatch: pytest.MonkeyPatch, gpu_order: None
) -> None:
    attempts = []

    def fails(problem: Problem, *_: object) -> None:
        attempts.append(problem)
        raise RuntimeError("Failed to find C compiler. Please specify via CC")

    monkeypatch.setattr(triton, "solve", fails)
    monkeypatch.setattr(triton, "unavailable_reason", lambda device: None)
    calls = solved_by(monkeypatch)
    with pytest.warns(UserWarning, match="'triton' cannot run.*Failed to find C compiler"):
        loss()
    loss()
    assert len(attempts) == 1
    assert calls == ["cuda", "cuda"]
    assert "Failed to find C compiler" in (backends.unavailable_reason("triton", "cpu") or "")


def test_other_errors_of_a_backend_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, gpu_order: None
) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(triton, "solve", fails)
    monkeypatch.setattr(triton, "unavailable_reason", lambda device: None)
    with pytest.raises(torch.OutOfMemoryError):
        loss()


@emulated
def test_without_both_compilers_auto_takes_chunked(
    monkeypatch: pytest.MonkeyPatch, gpu_order: None
) -> None:
    monkeypatch.setattr(triton, "unavailable_reason", lambda device: "no Triton")
    monkeypatch.setattr(cuda, "unavailable_reason", lambda device: "no CUDA compiler found")
    calls = solved_by(monkeypatch)
    with pytest.warns(UserWarning, match="cannot run, a slower one does: no") as caught:
        loss()
    assert [str(one.message).split("'")[1] for one in caught] == ["triton", "cuda"]
    assert calls == ["chunked"]
