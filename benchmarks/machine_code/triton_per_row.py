"""The Triton kernels of candidates per row, and of the gradient of their table, compiled.

Counts registers, stack and shared memory, and of each loop that gathers embeddings what one turn of
it executes, its loads of 128 bits and its spills.
"""

from __future__ import annotations

import collections
import re
from typing import Any

import torch
import triton

from benchmarks.machine_code.arithmetic import predicted_per_row_us
from benchmarks.machine_code.sass import machine_code
from benchmarks.machine_code.triton_shared import Launch, compiled_for
from dwl_kernels.backends.triton import specialize as host
from dwl_kernels.backends.triton.kernels import table_gradient as triton_table
from dwl_kernels.backends.triton.kernels.common import Call
from dwl_kernels.backends.triton.kernels.per_row_candidates import indexed_softmax_loss_kernel
from dwl_kernels.backends.triton.tiles import per_row
from dwl_kernels.core.problem import GradMask, PerRowProblem, RowOptions

B, K, V = 1024, 128, 4096
WIDE = 8  # a loop with fewer loads than this, of 128 bits too, gathers the positives


def problem(d: int, dtype: torch.dtype, options: bool, reduction: str) -> PerRowProblem:
    """A problem of the wanted form; only its shapes, dtypes and absences matter here."""
    more: dict[str, Any] = {}
    rows: dict[str, Any] = {"tau": 0.05, "reduction": reduction}
    if options:
        more = {"positive_log_q": torch.zeros(B), "candidate_log_q": torch.zeros(B, K)}
        rows |= {
            "domain_ids": torch.zeros(B, 2, dtype=torch.int64),
            "domain_weights": torch.ones(32),
            "example_weights": torch.ones(B),
            "temperature": torch.tensor(0.05),
        }
    return PerRowProblem(
        query=torch.zeros(B, d, dtype=dtype),
        item_table=torch.zeros(V, d, dtype=dtype),
        positive_rows=torch.zeros(B, dtype=torch.int64),
        candidate_rows=torch.zeros(B, K, dtype=torch.int64),
        rows=RowOptions(**rows),
        **more,
    )


def loss_launch(d: int, dtype: torch.dtype, options: bool, reduction: str) -> Launch:
    """The launch of the loss by `triton.solve`."""
    p = problem(d, dtype, options, reduction)
    row_grad = torch.zeros(B) if reduction == "none" else None
    tiles = per_row(host.power_of_two(d, 16), dtype)
    inputs = host.inputs_of(p, row_grad)
    wanted = GradMask(True, True, True, False, options, options)
    form = host.form_of(p, inputs, tiles)
    call = Call(inputs, host.outputs_of(host.results_of(p, wanted, inputs), inputs), form)
    buffers = torch.empty(64), *(torch.empty(64, dtype=torch.int32) for _ in range(2))
    domains = len(p.rows.domain_weights) if p.rows.domain_weights is not None else 0
    arguments = (call, *buffers, B, V, K, domains, 264, p.rows.tau)
    return Launch(arguments, host.launch_options(tiles))


def sum_launch(d: int, dtype: torch.dtype) -> Launch:
    """The launch that sums the gradient of the table."""
    values, source = torch.zeros(V, d, dtype=dtype), torch.zeros(B, d, dtype=dtype)
    bounds, order = torch.zeros(V, dtype=torch.int32), torch.zeros(B, dtype=torch.int64)
    numbers = torch.zeros(B)
    form = triton_table._form(d, triton_table.SPAN, 2, True)
    tensors = (values, bounds, source, order, numbers, numbers, numbers)
    return Launch((*tensors, V, V, (B, B * K), (1, K), form), {"num_warps": 1})


def gathers(sass: str) -> list[dict[str, Any]]:
    """The innermost loops with loads of 128 bits; if there are none, those with most loads."""
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
    return [loop for loop in found if loop["loads"] >= WIDE or loop["loads_128"] >= 4]


Row = tuple[str, int, int, torch.dtype]  # what of, capability, D, dtype
SUM = "table gradient"


def rows() -> list[Row]:
    """The usual widths on 9.0, and one on each other capability."""
    found: list[Row] = []
    for dtype in (torch.bfloat16, torch.float32):
        for d in (64, 128, 256):
            found += [("loss, plain, mean", 90, d, dtype), (SUM, 90, d, dtype)]
        found.append(("loss, everything, none", 90, 128, dtype))
    for capability in (80, 100):
        found.append(("loss, everything, none", capability, 128, torch.bfloat16))
        found.append((SUM, capability, 128, torch.bfloat16))
    return found


def launch_of(row: Row) -> Launch:
    name, _, d, dtype = row
    if name == SUM:
        return sum_launch(d, dtype)
    _, options, reduction = name.split(", ")
    return loss_launch(d, dtype, options == "everything", reduction)


def count(row: Row) -> dict[str, Any]:
    """One row of the table."""
    name, capability, d, dtype = row
    function = triton_table.sum_kernel if name == SUM else indexed_softmax_loss_kernel
    kernel = compiled_for(capability, function, launch_of(row))
    sass, usage = machine_code(kernel.asm["cubin"])
    loops = gathers(sass)
    found = {
        "kernel": name,
        "capability": capability,
        "D": d,
        "dtype": str(dtype).removeprefix("torch."),
        **usage,
        "shared": kernel.metadata.shared,
        "loops": loops,
    }
    return {**found, **per_pair(row, found)}


def per_pair(row: Row, found: dict[str, Any]) -> dict[str, Any]:
    """Instructions of a lane for each pair of a row and a candidate, in the loop that gathers most
    pairs, and the time that they predict."""
    name, _, d, dtype = row
    gathering = [loop for loop in found["loops"] if loop["loads_128"]]
    if name == SUM:
        form = triton_table._form(d, triton_table.SPAN, 2, True)
        lanes, pairs = 32, form.ROWS.value * form.LANES.value
        loop = gathering[0]  # short ranges, as most are
    else:
        tiles = per_row(host.power_of_two(d, 16), dtype)
        lanes, pairs = 32 * tiles.warps, tiles.BLOCK_M1 * tiles.BLOCK_N1
        loop = max(gathering, key=lambda one: one["instructions"])
    counted = {"per_element": round(loop["instructions"] * lanes / pairs, 2)}
    return {**counted, "predicted_us": predicted_per_row_us({**found, **counted})}


def markdown(table: list[dict[str, Any]]) -> str:
    lines = [
        f"Triton {triton.__version__}. One turn of the loss takes",
        f"{per_row(64, torch.bfloat16).BLOCK_N1} candidates of every row of a tile. One of the",
        "table gradient takes 4 places of every id: of short ranges, then, of long ones, the sums",
        "of chunks and the rest. Per element: instructions of a lane for a pair of a row and a",
        "candidate in the loop that gathers. Predicted: microseconds for the shape",
        "`per-example` at this D on an H200, by `arithmetic`; nothing was measured.",
        "",
        "| capability | kernel | D | dtype | registers | stack | shared KB |"
        " instructions a turn | loads, of them 128 bits | spills | per element | predicted |",
        "|" + "---|" * 12,
    ]
    for r in table:
        loops = [loop for loop in r["loops"] if loop["loads_128"]] or r["loops"]
        counts = ", ".join(str(loop["instructions"]) for loop in loops)
        loads = ", ".join(f"{loop['loads']}: {loop['loads_128']}" for loop in loops)
        spills = sum(loop["spills"] for loop in r["loops"])
        lines.append(
            f"| {r['capability']} | {r['kernel']} | {r['D']} | {r['dtype']} | {r['registers']} |"
            f" {r['stack']} | {r['shared'] / 1024:.1f} | {counts} | {loads} | {spills} |"
            f" {r['per_element']:.1f} | {r['predicted_us'] or ''} |"
        )
    return "\n".join(lines) + "\n"
