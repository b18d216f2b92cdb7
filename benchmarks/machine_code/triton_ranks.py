"""The Triton kernels that rank targets, compiled: what they need, and the loop that counts."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.machine_code.sass import Code, innermost, machine_code
from benchmarks.machine_code.triton_shared import Launch, compiled_for
from dwl_kernels.backends.triton.kernels import rank_targets as ranks

B, V = 4096, 65_536

Row = tuple[str, int, int, torch.dtype, bool]  # kernel, capability, D, dtype, bias


def launch_of(row: Row) -> Launch:
    """The launch by `rank_targets`."""
    name, capability, d, dtype, bias = row
    query, table = torch.zeros(16, d, dtype=dtype), torch.zeros(16, d, dtype=dtype)
    form = ranks._form(
        d, dtype, torch.get_float32_matmul_precision() == "highest", capability // 10
    )
    ctx = ranks.Context(query, table, torch.zeros(16) if bias else None, form)
    scores, ids = torch.zeros(16), torch.zeros(16, dtype=torch.int64)
    if name == "pair":
        return Launch((scores, ids, ids, V, ctx), {"num_warps": 8})
    counts, nowhere = torch.zeros(16, dtype=torch.int32), torch.zeros(16, dtype=torch.bool)
    return Launch((counts, scores, nowhere, B, V, 4, V // 4, ctx), {"num_warps": 8})


def count(row: Row) -> dict[str, Any]:
    """What one kernel needs, and the spills and instructions of its loop of products."""
    name, capability, d, dtype, bias = row
    function = ranks.pair_kernel if name == "pair" else ranks.count_kernel
    compiled = compiled_for(capability, function, launch_of(row))
    sass, usage = machine_code(compiled.asm["cubin"])
    code = Code(sass, products=("HGMMA", "HMMA", "FFMA", "UTCHMMA"))
    loops = [loop for loop in innermost(code.loops) if code.multiplies(loop)]
    names = [code.names[loop.first : loop.last + 1] for loop in loops]
    return {
        "kernel": name,
        "capability": capability,
        "D": d,
        "dtype": str(dtype).removeprefix("torch."),
        "bias": bias,
        **usage,
        "shared": compiled.metadata.shared,
        "wgmma": sum(one == "HGMMA" for one in code.names),
        "instructions": [len(one) for one in names],
        "spills": sum(one.count("LDL") + one.count("STL") for one in names),
    }
