"""Compile the Triton kernels of candidates by row ahead of time and look at their gathers.

``python -m benchmarks.aot_indexed OUT`` needs no GPU. For capabilities 8.0, 9.0 and 10.0 it writes
``OUT/aot-indexed.json`` and ``OUT/aot-indexed.md``: registers, stack and shared memory, and of each
loop that gathers embeddings what one turn of it executes, its loads of 128 bits and its spills.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.aot import CAPABILITIES, compiled_for
from benchmarks.machine_code import machine_code
from dwl_kernels.backends import triton as host
from dwl_kernels.backends import triton_table
from dwl_kernels.backends.triton_common import Call, Inputs, Outputs
from dwl_kernels.backends.triton_indexed import indexed_softmax_loss_kernel
from dwl_kernels.backends.triton_tiles import by_row
from dwl_kernels.problem import Problem, Wanted

B, K, V = 1024, 128, 4096
WIDE = 8  # a gather of fewer loads is that of the positives


def problem(d: int, dtype: torch.dtype, options: bool, reduction: str) -> Problem:
    """A problem of the wanted form; only its shapes, dtypes and absences matter here."""
    more: dict[str, Any] = {}
    if options:
        more = {
            "positive_log_q": torch.zeros(B),
            "candidate_log_q": torch.zeros(B, K),
            "domain_ids": torch.zeros(B, 2, dtype=torch.int64),
            "domain_weights": torch.ones(32),
            "example_weights": torch.ones(B),
            "temperature": torch.tensor(0.05),
        }
    return Problem(
        query=torch.zeros(B, d, dtype=dtype),
        positive=None,
        candidates=torch.zeros(V, d, dtype=dtype),
        target=torch.zeros(B, dtype=torch.int64),
        candidate_rows=torch.zeros(B, K, dtype=torch.int64),
        tau=0.05,
        reduction=reduction,  # type: ignore[arg-type]
        **more,
    )


def loss_kernel(capability: int, d: int, dtype: torch.dtype, options: bool, reduction: str) -> Any:
    """The kernel of the loss as `host.solve` would launch it on such a device."""
    p = problem(d, dtype, options, reduction)
    row_grad = torch.zeros(B) if reduction == "none" else None
    tiles = by_row(host._power_of_two(d, 16), dtype)
    inputs = host._inputs(p, row_grad)
    wanted = Wanted(True, True, True, False, options, options)
    form = host.form_of(p, inputs, tiles)
    call = Call(Inputs(*inputs), Outputs(*host._outputs(p, wanted)), form)
    buffers = torch.empty(64), *(torch.empty(64, dtype=torch.int32) for _ in range(2))
    domains = len(p.domain_weights) if p.domain_weights is not None else 0
    arguments = (call, *buffers, B, V, K, domains, 264, p.tau)
    options_of = host.launch_options(tiles)
    return compiled_for(capability, indexed_softmax_loss_kernel, arguments, options_of)


def sum_kernel(capability: int, d: int, dtype: torch.dtype) -> Any:
    """The kernel that sums the gradient of the table."""
    values, source = torch.zeros(V, d, dtype=dtype), torch.zeros(B, d, dtype=dtype)
    bounds, order = torch.zeros(V, dtype=torch.int32), torch.zeros(B, dtype=torch.int64)
    numbers = torch.zeros(B)
    form = triton_table._form(d, triton_table.SPAN, 2, True)
    tensors = (values, bounds, source, order, numbers, numbers, numbers)
    arguments = (*tensors, V, V, (B, B * K), (1, K), form)
    return compiled_for(capability, triton_table.sum_kernel, arguments, {"num_warps": 1})


def gathers(sass: str) -> list[dict[str, Any]]:
    """The innermost loops with loads of 128 bits, or without any those with most loads."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(re.sub(r"^@!?U?P\w+\s+", "", instruction[1]))
    back = []
    for at, text in enumerate(code):
        branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", text)
        if branch and labels[branch[1]] <= at:
            back.append((labels[branch[1]], at))
    found = []
    for first, last in back:
        if any((a, b) != (first, last) and first <= a and b <= last for a, b in back):
            continue
        body = code[first : last + 1]
        kinds = collections.Counter(text.split()[0].split(".")[0] for text in body)
        found.append(
            {
                "instructions": len(body),
                "loads": kinds["LDG"],
                "loads_128": sum(text.startswith("LDG.E.128") for text in body),
                "spills": kinds["LDL"] + kinds["STL"],
            }
        )
    return [loop for loop in found if loop["loads"] >= WIDE]


def row(name: str, capability: int, d: int, dtype: torch.dtype, kernel: Any) -> dict[str, Any]:
    sass, usage = machine_code(kernel.asm["cubin"])
    return {
        "kernel": name,
        "capability": capability,
        "D": d,
        "dtype": str(dtype).removeprefix("torch."),
        **usage,
        "shared": kernel.metadata.shared,
        "loops": gathers(sass),
    }


def rows(quick: bool) -> list[dict[str, Any]]:
    """Every D on every capability for the plain problem; the rest on 9.0."""
    if quick:
        kernel = loss_kernel(90, 64, torch.bfloat16, True, "mean")
        table = sum_kernel(90, 64, torch.bfloat16)
        return [
            row("loss, everything, mean", 90, 64, torch.bfloat16, kernel),
            row("table gradient", 90, 64, torch.bfloat16, table),
        ]
    found = []
    for capability in CAPABILITIES:
        for dtype in (torch.bfloat16, torch.float32):
            for d in (16, 32, 64, 96, 128, 256):
                kernel = loss_kernel(capability, d, dtype, False, "mean")
                found.append(row("loss, plain, mean", capability, d, dtype, kernel))
                kernel = sum_kernel(capability, d, dtype)
                found.append(row("table gradient", capability, d, dtype, kernel))
    for reduction in ("weighted_mean", "none"):
        for d, dtype in ((64, torch.bfloat16), (128, torch.float16), (128, torch.float32)):
            kernel = loss_kernel(90, d, dtype, True, reduction)
            found.append(row(f"loss, everything, {reduction}", 90, d, dtype, kernel))
    return found


def markdown(table: list[dict[str, Any]]) -> str:
    lines = [
        f"Triton {triton.__version__}, torch {torch.__version__}. One turn of the loss takes 8",
        "candidates of every row of a tile (4 with Triton 3.6). One of the table gradient takes 4",
        "places of every id: of short ranges, then, of long ones, the sums of chunks and the rest.",
        "",
        "| capability | kernel | D | dtype | registers | stack | shared KB |"
        " instructions a turn | loads, of them 128 bits | spills |",
        "|" + "---|" * 10,
    ]
    for r in table:
        loops = [loop for loop in r["loops"] if loop["loads_128"]] or r["loops"]
        counts = ", ".join(str(loop["instructions"]) for loop in loops)
        loads = ", ".join(f"{loop['loads']}: {loop['loads_128']}" for loop in loops)
        spills = sum(loop["spills"] for loop in r["loops"])
        lines.append(
            f"| {r['capability']} | {r['kernel']} | {r['D']} | {r['dtype']} | {r['registers']} |"
            f" {r['stack']} | {r['shared'] / 1024:.1f} | {counts} | {loads} | {spills} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true", help="two kernels, to try the tool")
    arguments = parser.parse_args()
    table = rows(arguments.quick)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "aot-indexed.json").write_text(json.dumps(table, indent=1) + "\n")
    (arguments.out / "aot-indexed.md").write_text(markdown(table))


if __name__ == "__main__":
    main()
