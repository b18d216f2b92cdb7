"""The machine code of the CUDA kernel, compiled without a GPU: no warnings, nothing spilled, and
tensor instructions only where the lanes of a warp run together."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")  # its tools read the machine code
from benchmarks.machine_code import arithmetic
from benchmarks.machine_code import cuda as counts
from benchmarks.machine_code.sass import TOOLS
from dwl_kernels.backends import cache as _cache
from dwl_kernels.backends.cuda import build as cuda_build
from dwl_kernels.backends.cuda import variants as cuda_tiles


def _missing() -> str | None:
    try:
        cuda_build.nvcc()
    except _cache.BuildError as error:
        return str(error)
    return None


SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # KB of a multiprocessor
needs_nvcc = pytest.mark.skipif(_missing() is not None, reason=f"no nvcc here: {_missing()}")

BF16, F16, F32, F64 = (
    cuda_tiles.MATH[dtype]
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
)
# A compilation takes 5 to 10 s: the widest or the commonest of each type.
CHOSEN = [
    (BF16, 128, 90),
    (F16, 256, 90),
    (cuda_tiles.TF32, 64, 90),
    (F32, 256, 86),
    (F64, 128, 90),
    (BF16, 64, 80),
]


@needs_nvcc
@pytest.mark.parametrize(
    ("math", "width", "arch"), CHOSEN, ids=[f"{m.name}-{w}-sm_{a}" for m, w, a in CHOSEN]
)
def test_kernel_compiles_without_warnings_and_spills(
    tmp_path: Path, math: cuda_tiles.Math, width: int, arch: int
) -> None:
    variant = counts.variant_of(math, width, arch)
    library = tmp_path / "kernel.so"
    command = [
        *(cuda_build.nvcc(), *cuda_build.FLAGS.split(), *variant.definitions()),
        *(f"-arch=sm_{arch}", "-Xptxas", "-v", "-Werror", "all-warnings"),
        *("-keep", "-keep-dir", str(tmp_path)),
        *(str(counts.SOURCES / "sampled_softmax.cu"), "-o", str(library)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stderr
    stack = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said)
    assert stack == [("0", "0", "0")], said
    assert "warning" not in said
    # The library needs no driver until it is called.
    assert ctypes.CDLL(str(library)).dwl_shared_bytes() == variant.shared_bytes
    dump = [str(TOOLS / "cuobjdump"), "-sass", str(library)]
    sass = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    together, apart = tensor_instructions(sass)
    assert together > 0 or math == F32  # whose products are no tensor instructions
    assert apart == 0
    (binary,) = tmp_path.glob("sampled_softmax*.cubin")
    row = counts.count(binary.read_bytes(), math, width, arch)
    check(row)


def check(row: dict) -> None:
    """Nothing spills, blocks fit side by side, and the loops are those of the source."""
    tiles = cuda_tiles.Tiles(**row["tiles"])
    assert row["stack"] == 0
    assert -(-row["registers"] // 8) * 8 * 32 * tiles.WARPS * tiles.BLOCKS <= 65536
    assert row["shared"] + 1024 <= SHARED[row["capability"]] * 1024
    assert [loop["spills"] for loop in row["loops"]] == [0, 0, 0]
    product, share = counts.PRODUCT[row["dtype"]]
    logits = row["logits"] * row["D"] * share
    found = [loop["kinds"][product] for loop in row["loops"]]
    sums = logits / row["passes"]
    if product == "FFMA":  # not only of products
        assert all(
            a >= b for a, b in zip(found, (logits, logits + sums, logits + sums), strict=True)
        )
    else:
        assert found == [logits, logits + sums, logits + sums]


def test_prediction_counts_what_a_warp_reads_from_shared_memory() -> None:
    tiles = {"BN": 32, "MT": 2, "WARPS": 4, "TEAM": 1}
    loop = {"instructions": 640, "shared_bytes": 3072, "kinds": {"MUFU": 32}}
    row = {"D": 128, "dtype": "BrainFloat", "tiles": tiles, "logits": 32, "passes": 1}
    row = {**row, "capability": 90, "loops": [loop, loop, loop]}
    clocks = arithmetic.cuda_clocks(row)
    copied = 2 * 128 * 2 / 128  # of either phase, by 128 rows
    assert clocks == {
        "tensor": 8 * 128 / (4270 * 0.63),
        "shared memory": (2 * 3072 / 32 + copied) / 128,
        "exponentials": 2 / 16,
        "issue": 2 * 640 / 32 / 128,
        "float64": 0,
        "L2": copied / 28,
    }


def tensor_instructions(sass: str) -> tuple[int, int]:
    """How many tensor and matrix instructions stand outside and inside of what a branch divides.

    All lanes have to execute them together, which the emulation, where they only exchange
    registers, does not show. BSSY starts a region in which lanes may take different ways, and
    names the address where they meet again.
    """
    regions: list[int] = []
    counts = [0, 0]
    for address, code in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass):
        regions = [end for end in regions if end > int(address, 16)]
        meets = re.search(r"\bBSSY\S* B\d+, 0x([0-9a-f]+)", code)
        if meets:
            regions.append(int(meets[1], 16))
        if re.search(r"\b([HD]MMA|LDSM)\b", code):
            counts[len(regions) > 0] += 1
    return counts[0], counts[1]


def test_a_product_in_a_divided_region_is_seen() -> None:
    lines = [
        "BSSY.RECONVERGENT B0, 0x30",
        "@P0 BRA 0x20",
        "HMMA.16816.F32 R0",
        "BSYNC B0",
        "DMMA R1",
    ]
    sass = "".join(f"  /*{16 * k:04x}*/  {line} ;\n" for k, line in enumerate(lines))
    assert tensor_instructions(sass) == (1, 1)
