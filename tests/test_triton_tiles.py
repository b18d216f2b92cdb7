"""Which tiles the Triton kernel takes, from tables or by a search, and their limits."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch

from dwl_kernels.backends.triton import solve as host
from dwl_kernels.backends.triton import tiles as triton_tiles
from dwl_kernels.backends.triton.tiles import LIMITS, RULES, Tiles, around, choose, default
from dwl_kernels.core.problem import DualScale, GradMask, SharedProblem

BY_NAME = {case.name: case for case in cases.CASES}


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


def test_hardness_that_would_turn_the_logits_over_is_left_to_others() -> None:
    query = torch.empty(9, 8, dtype=torch.bfloat16, device="meta")
    for hardness, taken in ((-0.2, True), (-0.25, False)):
        dual = DualScale(hardness, 0.0, 4, 1.0)
        problem = SharedProblem(query=query, positive=query, candidates=query, dual=dual)
        assert (host.unsupported_reason(problem) is None) == taken


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
