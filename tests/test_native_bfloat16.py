"""Products of bfloat16 in the CPU kernel: where they run, and the float32 road where they do not.

That they are as exact as asked, the cases of all backends and `test_native.py` say.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cases
import pytest
import torch
from torch import Tensor

from dwl_kernels.backends.cpu import solve as cpu

CASE = cases.Case("rows of many candidates", 150, 2100, log_q=True, ids=True, domains=2)
FULL = cases.Case("items", 70, 1100, kind="full", log_q=True)

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _kernel() -> None:
    if cpu.does_not_build() is not None:
        pytest.skip(f"no CPU kernel: {cpu.does_not_build()}")


@pytest.fixture
def _medium() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def processor_has_bfloat16() -> bool:
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "avx512_bf16" in flags.read_text()


needs_bfloat16 = pytest.mark.skipif(
    not processor_has_bfloat16(), reason="the processor has no products of bfloat16"
)


def gradients(case: cases.Case, dtype: torch.dtype, rounded: bool = False) -> dict[str, Tensor]:
    """The loss and its gradients; of embeddings `rounded` to bfloat16 first."""
    inputs = case.inputs(dtype)
    for name, value in inputs.items():
        if rounded and name in ("query", "positive", "negative", "table"):
            inputs[name] = value.detach().to(BF16).to(dtype).requires_grad_()
    loss = case.loss(inputs, "cpu")
    leaves = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, found, strict=True))}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[k], b[k].to(a[k].dtype)) for k in a)


@needs_bfloat16
@pytest.mark.usefixtures("_medium")
@pytest.mark.parametrize("case", [CASE, FULL], ids=lambda case: case.name)
def test_medium_precision_rounds_float32_embeddings_once(case: cases.Case) -> None:
    medium, bfloat16 = gradients(case, torch.float32), gradients(case, BF16)
    assert medium["query"].dtype == torch.float32
    assert torch.equal(medium["loss"], bfloat16["loss"])
    assert same(bfloat16, medium)  # rounded to bfloat16, they are those of bfloat16


@pytest.mark.usefixtures("_medium")
@pytest.mark.parametrize("precision", ["high", "highest"])
def test_other_precisions_keep_every_digit(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    cases.check(CASE, "cpu", torch.float32)


@needs_bfloat16
def test_products_of_bfloat16_do_run_here() -> None:
    assert not same(gradients(CASE, BF16), gradients(CASE, torch.float32, rounded=True))


@pytest.mark.usefixtures("_medium")
def test_without_onednn_bfloat16_takes_the_float32_road() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert same(gradients(CASE, BF16), gradients(CASE, torch.float32, rounded=True))
        cases.check(CASE, "cpu", BF16)


def test_processor_without_bfloat16_takes_the_float32_road() -> None:
    """oneDNN, whose products they are, can be told that the processor has less."""
    code = (
        "import torch, test_native_bfloat16 as t\n"
        "bfloat16 = t.gradients(t.CASE, torch.bfloat16)\n"
        "assert t.same(bfloat16, t.gradients(t.CASE, torch.float32, rounded=True))\n"
    )
    environment = {
        **os.environ,
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "PYTHONPATH": os.pathsep.join(["tests", *sys.path]),
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dim", [2, 7, 30])
def test_any_number_of_dimensions(dim: int) -> None:
    """Pairs of dimensions are what is multiplied; an odd number takes the float32 road."""
    cases.check(cases.Case("dimensions", 40, 70, dim, log_q=True, ids=True), "cpu", BF16)
