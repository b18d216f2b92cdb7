"""The machine code of the CUDA kernel, compiled without a GPU: no warnings, nothing spilled, as
many registers as the committed table says, and tensor instructions only where the lanes of a warp
run together."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.aot import TOOLS
from dwl_kernels import _build, _build_cuda
from dwl_kernels.backends import cuda_tiles
from dwl_kernels.backends.cuda_tiles import Variant, tiles


def _missing() -> str | None:
    try:
        _build_cuda.nvcc()
    except _build.BuildError as error:
        return str(error)
    return None


COMMITTED = Path(__file__).parent.parent / "benchmarks" / "results" / "aot" / "aot-cuda.json"
pytestmark = pytest.mark.skipif(_missing() is not None, reason=f"no nvcc here: {_missing()}")

BF16, F16, F32, F64 = (
    cuda_tiles.MATH[dtype]
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
)
# A compilation takes 5 to 10 s, so these are the widest and the commonest of each type.
CHOSEN = [
    *((math, width, 90) for math in (BF16, F16) for width in (64, 128, 256)),
    *((BF16, width, 90) for width in (16, 192)),
    *((math, width, 90) for math in (F32, cuda_tiles.TF32) for width in (64, 256)),
    *((F64, width, 90) for width in (32, 128)),
    *((BF16, width, arch) for width in (64, 128) for arch in (80, 100)),
    *((F32, 128, arch) for arch in (80, 100)),
]


@pytest.mark.parametrize(
    ("math", "width", "arch"), CHOSEN, ids=[f"{m.name}-{w}-sm_{a}" for m, w, a in CHOSEN]
)
def test_kernel_compiles_without_warnings_and_spills(
    tmp_path: Path, math: cuda_tiles.Math, width: int, arch: int
) -> None:
    variant = Variant(math, width, tiles(math, width))
    library = tmp_path / "kernel.so"
    source = _build.source_dir() / "cuda" / "sampled_softmax.cu"
    command = [
        *(_build_cuda.nvcc(), *_build_cuda.FLAGS.split(), *variant.definitions()),
        *(f"-arch=sm_{arch}", "-Xptxas", "-v", "-Werror", "all-warnings"),
        *(str(source), "-o", str(library)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stderr
    stack = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said)
    assert stack == [("0", "0", "0")], said
    registers = int(re.findall(r"Used (\d+) registers", said)[0])
    threads = 32 * variant.tiles.WARPS
    assert -(-registers // 8) * 8 * threads * variant.tiles.BLOCKS <= 65536
    assert "warning" not in said
    committed = json.loads(COMMITTED.read_text())
    if committed["compiler"] == _build_cuda.nvcc_version():
        key = (math.name, width, arch)
        rows = committed["kernels"]
        (row,) = [r for r in rows if (r["dtype"], r["D"], r["capability"]) == key]
        assert (registers, variant.shared_bytes) == (row["registers"], row["shared"])
    # The library needs no driver until it is called.
    assert ctypes.CDLL(str(library)).dwl_shared_bytes() == variant.shared_bytes
    dump = [str(TOOLS / "cuobjdump"), "-sass", str(library)]
    sass = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    together, apart = tensor_instructions(sass)
    assert together > 0 or math == F32  # whose products are no tensor instructions
    assert apart == 0


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
