"""What only the Triton kernel has: tiles, splits, references, packed rows. Runs interpreted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch

import dwl_kernels
from dwl_kernels import backends
from dwl_kernels.backends.triton import solve as host
from dwl_kernels.backends.triton import tiles as triton_tiles
from dwl_kernels.backends.triton.tiles import LIMITS, RULES, Tiles, around, choose, default
from dwl_kernels.core import build as builders
from dwl_kernels.core.problem import GradMask, SharedProblem

REASON = backends.unavailable_reason("triton", "cpu")
interpreted = pytest.mark.skipif(REASON is not None, reason=str(REASON))
BY_NAME = {case.name: case for case in cases.CASES}


def use(monkeypatch: pytest.MonkeyPatch, tiles: tuple[int, ...], workers: int) -> None:
    chosen = host.Interpreter(Tiles(*tiles, 1, 1, 4, 1), workers)
    monkeypatch.setattr(host, "INTERPRETER", chosen)


@interpreted
@pytest.mark.parametrize("workers", [1, 2, 7, 40])
@pytest.mark.parametrize("tiles", [(16, 32, 32, 16), (32, 16, 16, 64)], ids=str)
@pytest.mark.parametrize("name", ["mixed, everything", "refined, everything", "by row, refined"])
def test_tile_shapes_and_splits_do_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch, name: str, tiles: tuple[int, ...], workers: int
) -> None:
    """1 worker splits nothing, 40 split every tile; blocks of 64 are wider than some inputs."""
    use(monkeypatch, tiles, workers)
    cases.check(BY_NAME[name], "triton", torch.float64)


@interpreted
@pytest.mark.parametrize("tiles", [(16, 32, 32, 16), (32, 16, 16, 32)], ids=str)
@pytest.mark.parametrize("name", ["in-batch", "mixed without ids"])
def test_own_positive_is_found_in_tiles_that_are_no_squares(
    monkeypatch: pytest.MonkeyPatch, name: str, tiles: tuple[int, ...]
) -> None:
    """Ids do not find it there, and it lies in blocks that begin elsewhere than their tile."""
    use(monkeypatch, tiles, 3)
    case = dataclasses.replace(BY_NAME[name], rows=35)
    cases.check(case, "triton", torch.float64)


@interpreted
@pytest.mark.parametrize("workers", [3, 40])
@pytest.mark.parametrize("name", ["full softmax, past the tile", "dual scale, everything"])
def test_targets_and_slates_may_stand_anywhere_in_the_tiles(
    monkeypatch: pytest.MonkeyPatch, name: str, workers: int
) -> None:
    use(monkeypatch, (16, 32, 64, 16), workers)
    cases.check(BY_NAME[name], "triton", torch.float64)


@interpreted
@pytest.mark.parametrize("slate_size", [1, 3, 32, 33, 40])
def test_groups_of_the_slate_may_be_smaller_than_blocks_and_empty(slate_size: int) -> None:
    case = BY_NAME["dual scale, mixed, NaN in the padding"]
    options = {**case.options, "slate_size": slate_size}
    cases.check(dataclasses.replace(case, options=options), "triton", torch.float64)


@interpreted
@pytest.mark.parametrize("wanted", [("bias",), ("table",), ("query", "bias"), ("temperature",)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bias_and_table_need_no_other_gradient(wanted: tuple[str, ...], reduction: str) -> None:
    case = BY_NAME["full softmax, weighted_mean"]
    results = []
    for backend in ("triton", "eager"):
        inputs = {**case.inputs(torch.float64), "reduction": reduction}
        for name in ("query", "table", "bias", "temperature", "domain_weights"):
            inputs[name].requires_grad_(name in wanted)
        loss = case.loss(inputs, backend)
        results.append(torch.autograd.grad(loss.sum(), [inputs[name] for name in wanted]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@interpreted
def test_log_q_of_a_batch_gets_the_gradient_of_both_roles() -> None:
    """The public losses take log-Q without a gradient; the kernel gives it for any problem."""
    inputs = BY_NAME["mixed, everything"].inputs(torch.float64)
    inputs = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    problem = builders.in_batch_problem(**inputs, correction="standard", reduction="mean")
    wanted = GradMask(False, False, False, True, False, False)
    ours, theirs = (backends.pick(b, problem)(problem, wanted, None) for b in ("triton", "eager"))
    assert ours.candidates is ours.query is None
    torch.testing.assert_close(ours.candidate_log_q, theirs.candidate_log_q, rtol=1e-9, atol=1e-12)


@interpreted
@pytest.mark.parametrize(
    ("name", "skip_threshold"),
    [
        *(("mixed, everything", 0.0), ("in-batch, NaN in the padding", 0.0)),
        *(("everything, none", 0.0), ("refined, everything", 0.0), ("dual scale, everything", 0.0)),
        *(("full softmax, NaN in the padding", t) for t in (0.0, 0.02)),
        ("by row, everything", 0.0),
    ],
)
def test_what_the_workspace_held_before_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, name: str, skip_threshold: float
) -> None:
    """Blocks read places past the last row, which nobody has written."""
    triton_access = pytest.importorskip("triton_access")
    use(monkeypatch, (16, 16, 16, 16), 3)
    case, results = BY_NAME[name], []
    if skip_threshold:
        options = {**case.options, "skip_threshold": skip_threshold}
        case = dataclasses.replace(case, options=options)
    try:
        for fill in ((0.0, 0), *triton_access.FILLS):
            triton_access.CHECKER.fill_with(fill)
            results.append(cases.loss_and_gradients(case, "triton", torch.float32))
    finally:
        triton_access.CHECKER.fill_with()
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], rtol=0, atol=0, equal_nan=True)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_candidate_far_above_the_positive_starts_the_tile_again(dtype: torch.dtype) -> None:
    """Logits from -300 to 300: with the positive as reference a total overflows float32."""
    query = torch.linspace(-1, 1, 33)[:, None].to(dtype).requires_grad_()
    positive = -10 * query.detach()
    negative = torch.linspace(-300, 300, 40)[:, None].to(dtype).requires_grad_()
    losses = {}
    for backend in ("triton", "eager"):
        loss = dwl_kernels.sampled_softmax_loss(query, positive, negative, backend=backend)
        losses[backend] = (loss, *torch.autograd.grad(loss, (query, negative)))
    for ours, theirs in zip(losses["triton"], losses["eager"], strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.01, atol=0.01)


@interpreted
def test_tf32_products_pass_at_lower_matmul_precision() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        cases.check(BY_NAME["log-Q"], "triton", torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


@interpreted
def test_padding_reaches_neither_the_tiles_nor_the_losses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every second row is padding: the result is that of the other rows alone."""
    use(monkeypatch, (16, 16, 16, 16), 3)
    generator = torch.Generator().manual_seed(5)
    query, positive = (torch.randn(70, 8, generator=generator) for _ in range(2))
    weights = torch.arange(70) % 2
    query[weights == 0] = torch.nan
    loss = dwl_kernels.in_batch_softmax_loss(
        query, positive, example_weights=weights, backend="triton"
    )
    expected = dwl_kernels.in_batch_softmax_loss(query[1::2], positive[1::2], backend="eager")
    torch.testing.assert_close(loss, expected)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_launch_scales_all_gradients(dtype: torch.dtype) -> None:
    """Lengths around the block of 4096; a factor that float16 cannot hold."""
    generator = torch.Generator().manual_seed(3)
    gradients = [
        torch.randn(n, generator=generator).mul(1e-3).to(torch.float32 if n == 1 else dtype)
        for n in (1, 4095, 4097, 0, 9000)
    ]
    dtypes = [g.dtype for g in gradients]
    products = host.scaled(gradients, torch.tensor(70000.0), dtypes)
    for gradient, product in zip(gradients, products, strict=True):
        assert product.dtype == gradient.dtype
        torch.testing.assert_close(product, (gradient.float() * 70000.0).to(gradient.dtype))


@interpreted
@pytest.mark.parametrize(
    ("change", "error"),
    [({"domain_ids": torch.tensor([0, 9])}, IndexError),
     ({"domain_weights": torch.tensor([1.0, -1.0])}, ValueError)],
    ids=["domain id", "negative weight"],
)  # fmt: skip
def test_bad_values_raise_on_a_cpu(change: dict, error: type[Exception]) -> None:
    arguments = {
        "domain_ids": torch.tensor([0, 1]),
        "domain_weights": torch.tensor([1.0, 2.0]),
    }
    with pytest.raises(error):
        dwl_kernels.sampled_softmax_loss(
            torch.ones(2, 3), torch.ones(2, 3), torch.ones(4, 3),
            backend="triton", **{**arguments, **change},
        )  # fmt: skip


@interpreted
def test_bad_values_give_nan_where_nothing_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the row's loss is NaN, no other row's is."""
    monkeypatch.setattr(host, "checks_values", lambda device: False)
    loss = dwl_kernels.sampled_softmax_loss(
        torch.ones(4, 3),
        torch.ones(4, 3),
        torch.ones(5, 3),
        domain_ids=torch.tensor([0, 7, 1, -9]),
        domain_weights=torch.tensor([1.0, -1.0]),
        reduction="none",
        backend="triton",
    )
    assert loss.isnan().tolist() == [False, True, True, True]


@interpreted
@pytest.mark.parametrize("bad", [-2, 41, 1 << 40], ids=str)
@pytest.mark.parametrize("name", ["positive_ids", "negative_ids"])
def test_id_outside_the_table_gives_nan_and_reads_nothing_outside(
    monkeypatch: pytest.MonkeyPatch, name: str, bad: int
) -> None:
    """As on a GPU. Two rows, one of weight zero and one padded: nobody looks at the ids of that."""
    monkeypatch.setattr(host, "checks_values", lambda device: False)
    inputs = BY_NAME["by row, none"].inputs(torch.float32)
    inputs["example_weights"][:5] = 1.0
    inputs["example_weights"][4] = 0.0
    inputs["domain_ids"][3] = 0
    with torch.no_grad():
        inputs["domain_weights"][0] = 0.0
    for row in (2, 3, 4):
        inputs[name].view(17, -1)[row, -1] = bad
    loss = BY_NAME["by row, none"].loss(inputs, "triton")
    assert loss.isnan().nonzero()[:, 0].tolist() == [2, 3]
    (gradient,) = torch.autograd.grad(loss, [inputs["query"]], torch.ones_like(loss))
    assert gradient.isnan().any(1).nonzero()[:, 0].tolist() == [2, 3]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_candidate_by_row_far_above_the_positive_overflows_nothing(dtype: torch.dtype) -> None:
    """Logits from -300 to 300, the largest in the last of three steps."""
    query = torch.linspace(-1, 1, 33)[:, None].to(dtype).requires_grad_()
    table = torch.linspace(-300, 300, 41)[:, None].to(dtype).requires_grad_()
    ids = torch.arange(33) % 41, torch.arange(40).expand(33, 40) + 1
    losses = {}
    for backend in ("triton", "eager"):
        loss = dwl_kernels.indexed_sampled_softmax_loss(query, table, *ids, backend=backend)
        losses[backend] = (loss, *torch.autograd.grad(loss, (query, table)))
    for ours, theirs in zip(losses["triton"], losses["eager"], strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.01, atol=0.01)


@interpreted
@pytest.mark.parametrize("bad", [41, -1, 1 << 40])
def test_target_outside_the_table_gives_nan_where_nothing_checks(
    monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    monkeypatch.setattr(host, "checks_values", lambda device: False)
    loss = dwl_kernels.full_softmax_loss(
        torch.ones(4, 3),
        torch.ones(41, 3),
        torch.tensor([0, bad, -100, 2]),
        reduction="none",
        backend="triton",
    )
    assert loss.isnan().tolist() == [False, True, False, False]
    assert loss[2] == 0


def test_old_triton_has_rows_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {}
    for version in ((3, 6), (3, 7), (3, 9)):
        monkeypatch.setattr(triton_tiles, "installed", lambda version=version: version)
        for load in ("plain", "options"):
            widths = (16, 32, 64, 128, 256)
            rows[load, version] = [default(d, torch.bfloat16, 9, True, load) for d in widths]

    def differ(load: str, first: tuple[int, int], second: tuple[int, int]) -> list[bool]:
        pairs = zip(rows[load, first], rows[load, second], strict=True)
        return [a != b for a, b in pairs]

    assert differ("plain", (3, 6), (3, 7)) == [True, True, True, True, True]
    assert differ("options", (3, 7), (3, 9)) == [False, False, False, True, False]


def test_every_default_has_tiles() -> None:
    for capability in (8, 9, 10, 12):
        for block_d in (16, 32, 64, 128, 256):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for exact in (False, True):
                    tiles = default(block_d, dtype, capability, exact)
                    assert tiles.BLOCK_M1 % 16 == tiles.BLOCK_N2 % 16 == 0
                    if capability == 12:  # the shared memory of 8.6, no wgmma
                        assert tiles == default(block_d, dtype, 8, exact)
    all_tiles = [rule.tiles for rule in RULES]
    assert all(t.ctas_per_sm * t.warps * 32 * (t.registers or 255) <= 65536 for t in all_tiles)


def test_threshold_has_small_blocks_for_the_default_and_for_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for version in ((3, 6), (3, 9)):
        monkeypatch.setattr(triton_tiles, "installed", lambda version=version: version)
        for capability in (8, 9, 10, 12):
            for block_d in (16, 32, 64, 128, 256):
                for dtype in (torch.float32, torch.bfloat16):
                    tiles = default(block_d, dtype, capability, False, "skip")
                    tried = around(tiles, "skip")
                    assert tried[0] == tiles
                    assert max(other.BLOCK_M2 for other in tried) == 32
                    assert len(set(tried)) == len(tried)


def test_search_takes_the_fastest_and_remembers_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    path = f"{tmp_path}/tiles.json"
    monkeypatch.setenv("DWL_KERNELS_AUTOTUNE", "1")
    monkeypatch.setenv("DWL_KERNELS_TILES", path)
    key = (64, torch.bfloat16, 9, False, "plain")
    tried = around(default(64, torch.bfloat16, 9, False))
    assert len(tried) <= 14  # each is compiled, which takes seconds

    def seconds(tiles: list[Tiles]) -> list[float]:
        return [0.0 if one == tried[7] else 1.0 for one in tiles]

    assert choose(*key, ("a GPU", 512, 512), seconds) == tried[7]
    monkeypatch.delenv("DWL_KERNELS_AUTOTUNE")
    for problem in (
        ("a GPU", 512, 512),
        ("another GPU", 512, 512),
        ("a GPU", 512, 512, torch.int32),
    ):
        known = choose(*key, problem, seconds)
        assert known == (tried[7] if problem == ("a GPU", 512, 512) else tried[0])


def test_search_gives_every_dtype_of_ids_an_entry_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else ids of 64 bits would be read by a kernel that was compiled for 32."""
    pytest.importorskip("triton")
    from triton import testing

    entries: list[set[object]] = []
    named: set[object] = set()

    def chosen(*call: Any) -> Tiles:
        tiles = default(16, torch.float32, 9, False)
        named.add(call[5])
        assert len(call[6]([tiles])) == 1
        return tiles

    for name in ("_plans", "_tuned", "_room"):
        monkeypatch.setattr(host, name, {})
    monkeypatch.setattr(host, "interpreting", lambda: False)
    monkeypatch.setattr(host, "choose", chosen)
    monkeypatch.setattr(host, "_workers", lambda *_: 3)
    monkeypatch.setattr(host, "_launch", lambda p, w, g, plan: entries[-1].add(plan.entry))
    monkeypatch.setattr(testing, "do_bench", lambda run, return_mode: run() or 1.0)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    case = BY_NAME["plain"].inputs(torch.float32)
    embeddings = case["query"], case["positive"], case["negative"]
    wanted = GradMask(True, True, True, False, False, False)
    for dtype in (torch.int32, torch.int64):
        entries.append(set())
        ids = [torch.zeros(len(case[side]), dtype=dtype) for side in ("positive", "negative")]
        problem = SharedProblem(*embeddings, positive_ids=ids[0], candidate_ids=ids[1])
        host._plan(problem, wanted, None)
    assert entries[0]
    assert not entries[0] & entries[1]
    assert len(named) == 2


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ([64, 64, 64, 256, 2, 2, 4, 2], "BLOCK_M2 = 256; wanted one of \\(16, 32, 64, 128\\)"),
        ([64, 48, 64, 64, 2, 2, 4, 2], "BLOCK_N1 = 48"),
        ([64, 64, 64, 64, 2, 2, 4.0, 2], "warps = 4.0"),
        ([64, 64, 64, 64], "wanted 8 integers"),
    ],
)
def test_entry_that_no_kernel_takes_is_refused_by_file_and_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entry: list[float], said: str
) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"a key": entry}))
    monkeypatch.setenv("DWL_KERNELS_TILES", str(path))
    with pytest.raises(ValueError, match=f"'a key' of {path}.*{said}"):
        choose(64, torch.bfloat16, 9, False, "plain", (), lambda tiles: [])
    path.with_name("broken.json").write_text("{")
    monkeypatch.setenv("DWL_KERNELS_TILES", str(path.with_name("broken.json")))
    with pytest.raises(ValueError, match=r"broken\.json is no JSON object"):
        choose(64, torch.bfloat16, 9, False, "plain", (), lambda tiles: [])


def test_tables_and_the_search_keep_to_the_limits_of_a_file() -> None:
    rows = [rule.tiles for rule in RULES]
    assert len(rows) > 40
    for row in (*rows, *(tiles for one in rows for tiles in around(one))):
        for name, value in row._asdict().items():
            assert value in LIMITS[name]


@pytest.mark.parametrize(("rows", "candidates", "named"), [(1 << 28, 3, "rows"), (3, 1 << 31, "c")])
def test_more_than_offsets_of_32_bits_reach_is_refused(
    rows: int, candidates: int, named: str
) -> None:
    many = (torch.empty(n, 1, dtype=torch.bfloat16, device="meta") for n in (rows, candidates))
    query, table = many
    problem = SharedProblem(query=query, positive=query, candidates=table)
    reason = host.unsupported_reason(problem)
    assert reason is not None
    assert f" {named}" in reason
    assert (
        host.unsupported_reason(
            SharedProblem(query=query[:9], positive=query[:9], candidates=table[:9])
        )
        is None
    )


def test_programs_are_no_more_than_the_driver_lets_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cooperative launch of more is an error; where there is no driver, the arithmetic counts."""
    pytest.importorskip("triton")
    compiled = SimpleNamespace(
        n_regs=128, metadata=SimpleNamespace(shared=20_000), _init_handles=lambda: None, function=1
    )
    device = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=233_472)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(host, "_launch", lambda *_, **__: compiled)
    case = BY_NAME["plain"].inputs(torch.float32)
    problem = SharedProblem(case["query"], case["positive"], case["negative"])
    wanted = GradMask(True, True, True, False, False, False)
    for allowed, programs in ((None, 2), (5, 2), (1, 1)):
        monkeypatch.setattr(host, "_resident", lambda *_, found=allowed: found)
        workers = host._workers(problem, wanted, None, Tiles(64, 64, 64, 64, 2, 2, 8, 2))
        assert workers == 132 * programs
