"""The machine code of the CUDA kernel, compiled without a GPU: no warnings, nothing spilled, and
tensor instructions only where the lanes of a warp run together."""

from __future__ import annotations

import ctypes
import inspect
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")  # its tools read the machine code
from compiled import CUDA, found

from benchmarks.machine_code import arithmetic
from benchmarks.machine_code import cuda as counts
from benchmarks.machine_code.sass import TOOLS
from dwl_kernels.backends import cache as _cache
from dwl_kernels.backends import compilers
from dwl_kernels.backends.cuda import build as cuda_build
from dwl_kernels.backends.cuda import variants as cuda_tiles


def _missing() -> str | None:
    try:
        cuda_build.nvcc()
    except _cache.BuildError as error:
        return str(error)
    return None


pytestmark = pytest.mark.timeout(900)  # where the kernel has changed
SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # KB of a multiprocessor
needs_nvcc = pytest.mark.skipif(_missing() is not None, reason=f"no nvcc here: {_missing()}")

BF16, F16, F32, F64 = (
    cuda_tiles.MATH[dtype]
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
)
# The widest or the commonest of each type.
CHOSEN = [
    (BF16, 128, 90),
    (F16, 256, 90),
    (cuda_tiles.TF32, 64, 90),
    (F32, 256, 86),
    (F64, 128, 90),
    (BF16, 64, 80),
]


NAMES = [f"{math.name}-{width}-sm_{arch}" for math, width, arch in CHOSEN]


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    def run() -> dict[str, dict[str, Any]]:
        return dict(zip(NAMES, compilers.in_parallel(compile_and_count, CHOSEN), strict=True))

    asked = map(inspect.getsource, (compile_and_count, tensor_instructions))
    compiler = "".join([cuda_build.nvcc_version(), *NAMES, *asked])
    rows: dict[str, dict[str, Any]] = found("cuda", CUDA, compiler, run)
    return rows


def compile_and_count(chosen: tuple[cuda_tiles.Math, int, int]) -> dict[str, Any]:
    math, width, arch = chosen
    variant = counts.variant_of(math, width, arch)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernel.so"
        command = [
            *(cuda_build.nvcc(), *cuda_build.FLAGS.split(), *variant.definitions()),
            *(f"-arch=sm_{arch}", "-Xptxas", "-v", "-Werror", "all-warnings"),
            *("-keep", "-keep-dir", folder),
            *(str(counts.SOURCES / "sampled_softmax.cu"), "-o", str(library)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        dump = [str(TOOLS / "cuobjdump"), "-sass", str(library)]
        sass = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        (binary,) = Path(folder).glob("sampled_softmax*.cubin")
        return {
            "said": re.findall(r"\d+ bytes stack frame.*|.*warning.*", done.stderr),
            # The library needs no driver until it is called.
            "shared_bytes": ctypes.CDLL(str(library)).dwl_shared_bytes(),
            "tensor_instructions": tensor_instructions(sass),
            "row": counts.count(binary.read_bytes(), math, width, arch),
        }


@needs_nvcc
@pytest.mark.parametrize(("name", "chosen"), [*zip(NAMES, CHOSEN, strict=True)], ids=NAMES)
def test_kernel_compiles_without_warnings_and_spills(
    compiled: dict[str, dict[str, Any]], name: str, chosen: tuple[cuda_tiles.Math, int, int]
) -> None:
    row = compiled[name]
    assert row["said"] == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"]
    assert row["shared_bytes"] == counts.variant_of(*chosen).shared_bytes
    together, apart = row["tensor_instructions"]
    assert together > 0 or chosen[0] == F32  # whose products are no tensor instructions
    assert apart == 0
    check(row["row"])


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
