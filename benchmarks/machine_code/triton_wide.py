"""The kernels of the wide form of the Triton backend, compiled: what an element of logits costs.

Counts registers, stack and shared memory, and for every loop its instructions, its spills and the
width of its loads.
"""

from __future__ import annotations

import collections
from typing import Any

import torch
import triton

from benchmarks.machine_code.arithmetic import SHAPE, wide_us
from benchmarks.machine_code.sass import Code, innermost, machine_code
from benchmarks.machine_code.triton_shared import Launch, compiled_for, example
from dwl_kernels.backends.triton import wide as triton_wide
from dwl_kernels.core.rows import prepare

NAMES = ("exponentials", "gradients", "columns")
Row = tuple[str, str, int, torch.dtype, bool, int, str]  # a kernel, and as of `triton_shared`


def launch_of(row: Row) -> tuple[Any, Launch, Any]:
    """A kernel, its launch by `triton_wide.solve`, and the shape it is compiled for."""
    name, kind, d, dtype, options, _, reduction = row
    problem, wanted = example(kind, d, dtype, options, reduction)
    row_grad = torch.zeros(len(problem.query)) if reduction == "none" else None
    call = triton_wide.prepare(problem, prepare(problem, row_grad), None, wanted, row_grad)
    one = call.launched[NAMES.index(name)]
    return one.kernel, Launch(one.arguments(0, 64, one.tensors), one.options), one.shape


def loops_of(sass: str) -> list[dict[str, Any]]:
    """The innermost loops in their order."""
    code = Code(sass)
    end = max(at for at, name in enumerate(code.names) if name == "EXIT")
    found = []
    for loop in innermost([one for one in code.loops if one.last < end]):
        texts = code.text[loop.first : loop.last + 1]
        kinds = collections.Counter(text.split()[0].split(".")[0] for text in texts)
        found.append(
            {
                "instructions": len(texts),
                "exponentials": sum(text.startswith("MUFU.EX2") for text in texts),
                "loads": kinds["LDG"],
                "loads_128": sum(text.startswith("LDG.E.128") for text in texts),
                "stores": kinds["STG"],
                "spills": kinds["LDL"] + kinds["STL"],
                "kinds": dict(kinds.most_common()),
            }
        )
    return found


def count(row: Row) -> dict[str, Any]:
    """One row of the table."""
    name, kind, d, dtype, options, capability, reduction = row
    kernel, launch, shape = launch_of(row)
    compiled = compiled_for(capability, kernel, launch)
    sass, usage = machine_code(compiled.asm["cubin"])
    elements = shape.BM.value * shape.BN.value
    loops = loops_of(sass)
    if name == "gradients":  # whose loops are over the width, and about the shares of the rows
        elements = 0
    # The compiler takes four blocks a turn where a loop is short: the pass that writes never is.
    loads = [loop["loads"] for loop in loops if loop["exponentials"]][-1:] or [0]
    for loop in loops if elements else []:
        turns = loop["loads"] // loads[0] if loads[0] else 1
        threads = launch.options["num_warps"] * 32
        loop["per_element"] = round(loop["instructions"] * threads / elements / max(turns, 1), 2)
    return {
        "capability": capability,
        "kernel": name,
        "problem": kind + (", everything" if options else ", plain"),
        "reduction": reduction,
        "D": d,
        "dtype": str(dtype).removeprefix("torch."),
        "warps": launch.options["num_warps"],
        **usage,
        "shared": compiled.metadata.shared,
        "loops": loops,
    }


def predicted(d: int, row: dict[str, Any]) -> dict[str, float]:
    """Microseconds by what takes them, from the counts of the plain `exponentials` kernel.

    The search looks at the first block of candidates, one of eight here.
    """
    search, write = row["loops"][:2]
    searched = triton_wide.WORK.candidates / SHAPE[1]
    per_element = write["per_element"] + searched * search["per_element"]
    (_, block_rows), *_ = triton_wide.row_blocks(*SHAPE)
    return wide_us(d, per_element, searched, block_rows)


def rows() -> list[Row]:
    """On 9.0 what differs between problems and dtypes; on others one form of each kernel."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    found: list[Row] = [("exponentials", "sampled", 512, bf16, False, 90, "mean")]
    found += [("exponentials", "sampled", 512, dtype, False, 90, "mean") for dtype in (f16, f32)]
    found += [
        ("exponentials", "sampled", 512, bf16, True, 90, "mean"),
        ("exponentials", "in-batch", 512, bf16, True, 90, "none"),
        ("exponentials", "full", 512, bf16, True, 90, "mean"),
        ("gradients", "sampled", 512, bf16, True, 90, "mean"),
        ("gradients", "in-batch", 512, f16, True, 90, "none"),
        ("gradients", "full", 384, f32, True, 90, "mean"),
        ("columns", "full", 512, bf16, True, 90, "mean"),
    ]
    for capability in (80, 100, 120):
        found.append(("exponentials", "in-batch", 512, bf16, True, capability, "none"))
        found.append(("gradients", "in-batch", 512, bf16, True, capability, "none"))
    return found


def markdown(table: list[dict[str, Any]]) -> str:
    """The table, one line per kernel, and what the first row promises."""
    lines = [
        f"Triton {triton.__version__}, float32 with products in tf32. Instructions of a loop per",
        "element of the logits. Loops of `exponentials`: the search for maxima (of the first",
        "block of candidates, in float16 of all), in float16 their sum, the pass that writes,",
        "zeros for rows of weight zero. Nothing was measured.",
        "",
        "| capability | kernel | problem | D | dtype | warps | registers | stack | shared KB |"
        " instructions per element | spills in loops |",
        "|" + "---|" * 11,
    ]
    for row in table:
        per_element = ", ".join(
            f"{loop['per_element']:.2f}" for loop in row["loops"] if "per_element" in loop
        )
        spills = ", ".join(str(loop["spills"]) for loop in row["loops"])
        lines.append(
            f"| {row['capability']} | {row['kernel']} | {row['problem']}, {row['reduction']} |"
            f" {row['D']} | {row['dtype']} | {row['warps']} | {row['registers']} |"
            f" {row['stack']} | {row['shared'] / 1024:.0f} | {per_element} | {spills} |"
        )
    widths = (128, 256, 512, 768, 1024)
    times = [predicted(d, table[0]) for d in widths]
    lines += [
        "",
        "Predicted for an H200, bf16, plain, B = N = 8,192: us by what takes them, in turn.",
        "",
        "| D | " + " | ".join(times[0]) + " | together | bound | of the bound |",
        "|" + "---|" * (len(times[0]) + 4),
    ]
    for d, parts in zip(widths, times, strict=True):
        whole = sum(parts.values())
        cells = " | ".join(f"{us:.0f}" for us in (*parts.values(), whole, parts["products"]))
        lines.append(f"| {d} | {cells} | {parts['products'] / whole:.0%} |")
    return "\n".join(lines) + "\n"
