"""The machine code of the CUDA kernel, compiled without a GPU: no warnings, nothing spilled, what
the committed table counts, and tensor instructions only where the lanes of a warp run together."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")  # its tools read the machine code
from benchmarks import aot_cuda, arithmetic
from benchmarks.machine_code import TOOLS
from dwl_kernels import _build, _build_cuda
from dwl_kernels.backends import cuda_tiles


def _missing() -> str | None:
    try:
        _build_cuda.nvcc()
    except _build.BuildError as error:
        return str(error)
    return None


COMMITTED = Path(__file__).parent.parent / "benchmarks" / "results" / "aot" / "aot-cuda.json"
SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # KB of a multiprocessor
needs_nvcc = pytest.mark.skipif(_missing() is not None, reason=f"no nvcc here: {_missing()}")

BF16, F16, F32, F64 = (
    cuda_tiles.MATH[dtype]
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
)
# A compilation takes 5 to 10 s, so these are the widest and the commonest of each type.
CHOSEN = [
    *((math, width, 90) for math in (BF16, F16) for width in (64, 128, 256)),
    (BF16, 192, 90),
    *((math, width, 90) for math in (F32, cuda_tiles.TF32) for width in (64, 256)),
    *((F64, width, 90) for width in (32, 128)),
    *((BF16, width, arch) for width in (64, 128) for arch in (80, 100)),
    (F32, 128, 80),
    (BF16, 128, 120),
    *((math, 256, 86) for math in (F32, F64)),
]


@needs_nvcc
@pytest.mark.parametrize(
    ("math", "width", "arch"), CHOSEN, ids=[f"{m.name}-{w}-sm_{a}" for m, w, a in CHOSEN]
)
def test_kernel_compiles_without_warnings_and_spills(
    tmp_path: Path, math: cuda_tiles.Math, width: int, arch: int
) -> None:
    variant = aot_cuda.variant_of(math, width, arch)
    library = tmp_path / "kernel.so"
    command = [
        *(_build_cuda.nvcc(), *_build_cuda.FLAGS.split(), *variant.definitions()),
        *(f"-arch=sm_{arch}", "-Xptxas", "-v", "-Werror", "all-warnings"),
        *("-keep", "-keep-dir", str(tmp_path)),
        *(str(aot_cuda.SOURCES / "sampled_softmax.cu"), "-o", str(library)),
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
    row = aot_cuda.count(binary.read_bytes(), math, width, arch)
    check(row)
    committed = json.loads(COMMITTED.read_text())
    if committed["compiler"] == _build_cuda.nvcc_version():
        assert row in committed["kernels"]


def check(row: dict) -> None:
    """Nothing spills, blocks fit side by side, and the loops are those of the source."""
    tiles = cuda_tiles.Tiles(**row["tiles"])
    assert row["stack"] == 0
    assert -(-row["registers"] // 8) * 8 * 32 * tiles.WARPS * tiles.BLOCKS <= 65536
    assert row["shared"] + 1024 <= SHARED[row["capability"]] * 1024
    assert [loop["spills"] for loop in row["loops"]] == [0, 0, 0]
    product, share = aot_cuda.PRODUCT[row["dtype"]]
    logits = row["logits"] * row["D"] * share
    found = [loop["kinds"][product] for loop in row["loops"]]
    sums = logits / row["passes"]
    if product == "FFMA":  # not only of products
        assert all(
            a >= b for a, b in zip(found, (logits, logits + sums, logits + sums), strict=True)
        )
    else:
        assert found == [logits, logits + sums, logits + sums]


def test_committed_table_is_of_these_sources_and_has_every_type_and_width() -> None:
    committed = json.loads(COMMITTED.read_text())
    assert committed["stamp"] == aot_cuda.sources_stamp()
    found = [(row["dtype"], row["D"], row["capability"]) for row in committed["kernels"]]
    assert found == [(math.name, width, arch) for math, width, arch in aot_cuda.rows()]
    for row, (math, width, arch) in zip(committed["kernels"], aot_cuda.rows(), strict=True):
        assert row["tiles"] == aot_cuda.variant_of(math, width, arch).tiles._asdict()
        check(row)


def test_prediction_takes_the_slowest_resource_and_a_quarter_of_the_others() -> None:
    """At D = 128 a step of 32 by 32 logits of a warp reads 32 rows, 32 columns and 32 columns."""
    rows = json.loads(COMMITTED.read_text())["kernels"]
    (row,) = [r for r in rows if (r["dtype"], r["D"], r["capability"]) == ("BrainFloat", 128, 90)]
    tiles, clocks = row["tiles"], arithmetic.cuda_clocks(row)
    assert (tiles["BN"], tiles["MT"], tiles["TEAM"]) == (32, 2, 1)
    assert clocks["tensor"] == 8 * 128 / (4270 * 0.63)
    assert clocks["exponentials"] == 2 / 16
    embeddings = 2 * 2 * 128 * (1 / 32 + 1 / 32 + 1 / 32)
    copies = 2 * 2 * 128 / 128
    assert embeddings + copies < 128 * clocks["shared memory"] < embeddings + copies + 8
    alone = max(clocks.values()) * 8192**2 / 132 / 1755
    others = (sum(clocks.values()) - max(clocks.values())) / 4 * 8192**2 / 132 / 1755
    assert row["predicted_us"] == pytest.approx(alone + others, abs=1)
    assert all((r["predicted_us"] is None) == (r["capability"] != 90) for r in rows)


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
