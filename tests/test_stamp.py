"""The stamp of a table changes with what the compiler sees, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.stamp import cpp_source, stamp, triton_source

KERNEL = '''"""A file."""
import triton
import triton.language as tl
from somewhere import host_helper, kernel_helper

BLOCK = tl.constexpr(16)  # elements


class Form(NamedTuple):
    """What it is compiled for."""

    D: Any


@triton.jit(do_not_specialize=["n"])
def kernel(x, n):
    """Adds."""
    # in place
    tl.store(x, tl.load(x) + kernel_helper(n))


def launch(x):
    host_helper(kernel, x)
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Adds."""', '"""Adds n."""'),
        ('    """Adds."""\n', ""),
        ("  # elements", ""),
        ("tl.load(x) + kernel_helper(n)", "(tl.load(x)\n        + kernel_helper(n))"),
        ("host_helper(kernel, x)", "host_helper(kernel, x, fast=True)"),
        ("host_helper, kernel_helper", "another, host_helper, kernel_helper"),
        ("import triton\n", "import functools\nimport triton\n"),
    ],
)
def test_words_formatting_and_the_host_do_not_count(old: str, new: str) -> None:
    assert old in KERNEL
    assert triton_source(KERNEL.replace(old, new)) == triton_source(KERNEL)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("+ kernel", "- kernel"),
        ("constexpr(16)", "constexpr(32)"),
        ("D: Any", "D: Any\n    E: Any"),
        ('["n"]', '["x"]'),
        ("from somewhere", "from elsewhere"),
        ("kernel_helper\n", "other as kernel_helper\n"),
    ],
)
def test_kernel_and_what_it_reads_count(old: str, new: str) -> None:
    assert old in KERNEL
    assert triton_source(KERNEL.replace(old, new)) != triton_source(KERNEL)


CUDA = """// A file.
#define TWICE(x) \\
    ((x) + (x))
#pragma once

/* Adds
   one. */
__global__ void add(float* x, long n = 1'000) {
    x[0] = TWICE(x[1]) + 1.0e-3f; // in place
    printf("// %s", "a  b");
}
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (" // in place", ""),
        ("   one. */", "   two. */"),
        ("float* x, long", "float *x,\n    long"),
        ("    x[0] = ", "  x[0]="),
        ("(x) \\\n    ((x)", "(x) ((x)"),
        ("\n\n", "\n"),
    ],
)
def test_words_and_formatting_of_cuda_do_not_count(old: str, new: str) -> None:
    assert old in CUDA
    assert cpp_source(CUDA.replace(old, new)) == cpp_source(CUDA)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1.0e-3f", "1.0e-4f"),
        ("1'000", "1'001"),
        ("a  b", "a b"),
        ('"// %s"', '"// %d"'),
        ("(x))\n#pragma once", "(x)) _Pragma(once)"),
        ("float* x, long", "floatx, long"),
    ],
)
def test_tokens_of_cuda_count(old: str, new: str) -> None:
    assert old in CUDA
    assert cpp_source(CUDA.replace(old, new)) != cpp_source(CUDA)


def test_stamp_is_of_files_by_name_and_of_what_else_decides(tmp_path: Path) -> None:
    kernel, cuda = tmp_path / "kernel.py", tmp_path / "kernel.cu"
    kernel.write_text(KERNEL)
    cuda.write_text(CUDA)
    one = stamp([kernel, cuda], "-O3", (64, 32))
    assert one == stamp([cuda, kernel], "-O3", (64, 32))
    assert one != stamp([kernel, cuda], "-O2", (64, 32))
    assert one != stamp([kernel], "-O3", (64, 32))
    cuda.rename(tmp_path / "other.cu")
    assert one != stamp([kernel, tmp_path / "other.cu"], "-O3", (64, 32))
