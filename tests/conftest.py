"""Backends that the tests run on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read once, when torch is imported: threads that spin while they wait slow a busy machine down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from processes import Ranks

if not torch.cuda.is_available():
    # Triton's interpreter runs the kernels on CPU tensors; it is chosen when triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

    import cuda_emulator

    cuda_emulator.install()  # and a few hundred fibers the CUDA one

from cases import CASES, NOT_IN_CUDA

from dwl_kernels import backends
from dwl_kernels.backends.triton.specialize import interpreting

if interpreting() and backends.unavailable_reason("triton", "cpu") is None:
    import quick_interpreter
    import triton_access

    quick_interpreter.install()
    triton_access.install()

# The interpreter takes about a second for a small problem, so it runs every case in float32, and in
# the other dtypes those cases that between them take every path through the kernel.
INTERPRETED = {
    *("past the tile", "everything", "refined, everything", "everything, none", "large logits"),
    *("every candidate a hit", "mixed, everything", "in-batch, NaN in the padding"),
    *("by row, everything", "by row, refined", "by row, none", "by row, large logits"),
    *("full softmax, past the tile", "dual scale, everything", "dual scale, in-batch, everything"),
    *("full softmax, NaN in the padding", "in-batch, refined, candidates taken out"),
}
FINITE_DIFFERENCES = {("standard", "none"), ("standard", "weighted_mean"), ("refined", "mean")}
ABOUT_OTHERS = {
    "test_id_outside_the_table_is_an_index_error",
    "test_dual_scale_takes_the_other_rows_as_any_candidates",
}
# Files whose tests compare what kernels write.
FRESH_MEMORY = {
    *("test_backends.py", "test_edges.py", "test_edges_padding.py", "test_rows_apart.py"),
    *("test_indexed.py", "test_table_gradient.py"),
    *("test_native.py", "test_native_ops.py", "test_skip_threshold.py"),
    "test_triton_wide.py",
}
INDEXED = {"test_indexed.py", "test_table_gradient.py"}
BY_NAME = {case.name: case for case in CASES}


def _interpreted(item: pytest.Item, values: dict[str, Any]) -> bool:
    if values["backend"] == "cuda":
        if item.path.name == "test_skip_threshold.py":  # that kernel leaves nothing out
            return False
        # What is about nothing but losses that this kernel does not take.
        if item.path.name in INDEXED or item.originalname in ABOUT_OTHERS:
            return False
        case = values.get("case") or BY_NAME.get(values.get("name"))
        if values.get("kind") in NOT_IN_CUDA or not (case is None or case.in_cuda):
            return False
    if "correction" in values and "reduction" in values:  # finite differences: seconds a problem
        return (values["correction"], values["reduction"]) in FINITE_DIFFERENCES
    if "case" not in values or values["dtype"] == torch.float32:
        return True
    return values["case"].name in INTERPRETED


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def runs(item: pytest.Item) -> bool:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        if "backend" not in values:
            return True
        if values["backend"] in ("triton", "cuda"):
            return _interpreted(item, values)
        if "case" not in values:
            return True
        return values["backend"] != "eager"  # the reference itself: see `test_formulas`

    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = [item for item in items if runs(item)]


@pytest.fixture(autouse=True)
def _fresh_memory_holds_nan(request: pytest.FixtureRequest) -> Iterator[None]:
    """What nobody writes shows: PyTorch, told to be deterministic, fills what it allocates."""
    if request.path.name not in FRESH_MEMORY:
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["eager", "chunked", "cpu", "triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = backends.unavailable_reason(name, "cpu")
    if reason is not None:
        pytest.skip(f"backend {name!r} cannot run here: {reason}")
    return name


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes of a gloo group."""
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Three processes of a gloo group."""
    ranks = Ranks(3, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four processes of a gloo group."""
    ranks = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> Ranks:
    """Two processes, then three."""
    return request.getfixturevalue("two_ranks" if request.param == 2 else "three_ranks")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of compiled kernels, of this test alone and not made yet."""
    folder = tmp_path / "the cache"
    monkeypatch.setenv("DWL_KERNELS_CACHE", str(folder))
    return folder
