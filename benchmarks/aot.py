"""Compile the Triton kernel ahead of time and count what the machine code does.

``python -m benchmarks.aot OUT`` needs no GPU. It compiles the default tiles for capabilities 8.0,
9.0 and 10.0 and writes ``OUT/aot.json`` and ``OUT/aot.md``: registers, stack, shared memory, and
for every main loop the instructions per element of the logits and the spills in it. The committed
tables are named after the version of Triton.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.arithmetic import clocks, predicted_us
from benchmarks.machine_code import machine_code, main_loops
from dwl_kernels.backends import triton as host
from dwl_kernels.backends.triton_common import Call, Inputs, Outputs
from dwl_kernels.backends.triton_kernels import softmax_loss_kernel
from dwl_kernels.backends.triton_tiles import Tiles, default
from dwl_kernels.problem import DualScale, Problem, Wanted
from dwl_kernels.validation import full_problem, in_batch_problem, sampled_problem

RESULTS = Path(__file__).parent / "results" / "aot"
CAPABILITIES = (80, 90, 100)


def example(
    kind: str, d: int, dtype: torch.dtype, options: bool, reduction: str = "mean"
) -> tuple[Problem, Wanted]:
    """A problem of the wanted form; only its shapes, dtypes and absences matter here."""
    rows = 1024
    common: dict[str, Any] = {
        "domain_ids": None,
        "domain_weights": None,
        "example_weights": None,
        "temperature": 0.05,
        "correction": "standard",
        "reduction": reduction,
    }
    query, positive, negative = (torch.zeros(rows, d, dtype=dtype) for _ in range(3))
    log_q = torch.zeros(rows) if options else None
    ids = torch.zeros(rows, dtype=torch.int64) if options else None
    if options:
        common["domain_ids"] = torch.zeros(rows, 2, dtype=torch.int64)
        common["domain_weights"] = torch.ones(32)
        common["example_weights"] = torch.ones(rows)
        common["temperature"] = torch.tensor(0.05)
    gradients = {"temperature": options, "domain_weights": options}
    wanted = Wanted(True, kind in ("sampled", "dual"), True, False, **gradients)
    if kind == "full":
        target = torch.zeros(rows, dtype=torch.int64)
        del common["correction"]
        problem = full_problem(
            query, negative, target, bias=log_q, ignore_index=-100, skip_threshold=0.0, **common
        )
        return problem, wanted._replace(candidate_log_q=options)
    if kind == "in-batch":
        none: dict[str, Any] = {"negative_log_q": None, "negative_ids": None, "negative": None}
        return in_batch_problem(query, positive, log_q=log_q, ids=ids, **none, **common), wanted
    names = ("positive_log_q", "negative_log_q", "positive_ids", "negative_ids")
    more: dict[str, Any] = dict(zip(names, (log_q, log_q, ids, ids), strict=True))
    more["dual"] = DualScale(1.0, 1.0, 16, 1.0) if kind == "dual" else None
    return sampled_problem(query, positive, negative, **more, **common), wanted


def compiled(
    problem: Problem,
    wanted: Wanted,
    tiles: Tiles,
    capability: int,
    row_grad: Tensor | None = None,
) -> Any:
    """The kernel as `host.solve` would launch it on a device of this capability."""
    inputs = host._inputs(problem, row_grad)
    form = host.form_of(problem, inputs, tiles)
    call = Call(Inputs(*inputs), Outputs(*host._outputs(problem, wanted)), form)
    buffers = torch.empty(64), *(torch.empty(64, dtype=torch.int32) for _ in range(2))
    domains = 0 if problem.domain_weights is None else len(problem.domain_weights)
    sizes = len(problem.query), len(problem.candidates), domains, 264
    numbers = problem.tau, *host._dual(problem), problem.skip_threshold
    arguments = (call, *buffers, *sizes, *numbers)
    return compiled_for(capability, softmax_loss_kernel, arguments, host.launch_options(tiles))


def compiled_for(
    capability: int, kernel: Any, arguments: Sequence[Any], options: dict[str, Any]
) -> Any:
    """A kernel as ``kernel[grid](*arguments, **options)`` would compile it on such a device."""
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {**options, "debug": False}
    bound, specialization, extra = binder(*arguments, **options)
    packed = kernel._pack_args(backend, options, bound, specialization, extra)
    parsed, signature, constants, attributes = packed
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=parsed.__dict__)


def count(
    kind: str, d: int, dtype: torch.dtype, options: bool, capability: int, reduction: str
) -> dict[str, Any]:
    """One row of the table."""
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    problem, wanted = example(kind, d, dtype, options, reduction)
    row_grad = torch.zeros(len(problem.query)) if reduction == "none" else None
    load = host.load_of(problem, row_grad)
    tiles = default(host._power_of_two(d, 16), dtype, capability // 10, exact, load)
    kernel = compiled(problem, wanted, tiles, capability, row_grad)
    sass, usage = machine_code(kernel.asm["cubin"])
    loops = main_loops(sass)
    logits = [tiles.BM * tiles.BN] * (len(loops) - 1) + [tiles.CM * tiles.CN]
    if kind == "dual":
        logits[0] //= 2
    row: dict[str, Any] = {
        "capability": capability,
        "problem": kind + (", everything" if options else ", plain"),
        "reduction": reduction,
        "D": d,
        "dtype": str(dtype).removeprefix("torch.") + (" exact" if exact else ""),
        "tiles": tiles._asdict(),
        **usage,
        "shared": kernel.metadata.shared,
        "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
        "loops": [
            {"per_element": round(loop["instructions"] * tiles.warps * 32 / size, 2), **loop}
            for loop, size in zip(loops, logits, strict=True)
        ],
    }
    return {**row, "predicted_us": predicted_us(row, clocks(row))}


Row = tuple[str, int, torch.dtype, bool, int, str]


def quick_rows() -> list[Row]:
    """A few that between them have every loop, with what needs most registers."""
    return [
        ("sampled", 64, torch.bfloat16, False, 90, "mean"),
        ("in-batch", 128, torch.bfloat16, True, 90, "none"),
        ("full", 128, torch.bfloat16, True, 90, "mean"),
        ("dual", 64, torch.bfloat16, True, 90, "none"),
    ]


def rows() -> list[Row]:
    """Every row of the tile tables: plain, with everything, and with a second query."""
    found = [
        ("sampled", d, dtype, False, capability, "mean")
        for capability in CAPABILITIES
        for dtype in (torch.bfloat16, torch.float32)
        for d in (16, 32, 64, 128, 256)
    ]
    found += [
        (kind, d, torch.bfloat16, True, capability, reduction)
        for capability in CAPABILITIES
        for d in ((16, 32, 64, 128, 256) if capability == 90 else (64, 128, 256))
        for kind, reduction in (("in-batch", "none"), ("full", "mean"), ("dual", "none"))
    ]
    found += [("sampled", 128, torch.bfloat16, True, 90, r) for r in ("weighted_mean", "none")]
    found += [("in-batch", 128, torch.bfloat16, True, 90, "weighted_mean")]
    for kind in ("in-batch", "full", "dual"):
        found += [(kind, 128, torch.bfloat16, False, 90, "mean")]
    for kind in ("sampled", "full", "dual"):
        found += [(kind, 128, torch.float16, False, 90, "mean")]
        found += [(kind, 128, torch.float32, True, 90, "mean")]
    found += [("sampled", 96, torch.bfloat16, True, 80, "mean")]
    return found


def markdown(table: list[dict[str, Any]]) -> str:
    """The table, one line per kernel; loops in their order: phase 1, its maxima, phase 2."""
    lines = [
        f"Triton {triton.__version__}, torch {torch.__version__}. Per element: what one turn of a",
        "main loop executes, over the elements of the logits that a thread holds. Loops:",
        "with the dual scale its own, phase 1, the search for the maxima (float16 has it before,",
        "the others rarely run it), phase 2. Predicted: what `benchmarks/arithmetic.py` makes of",
        "the counts, microseconds for B = N = 8,192 on an H200; nothing was measured.",
        "",
        "| capability | problem | D | dtype | BM BN CM CN stages warps programs | registers |"
        " stack | shared KB | wgmma | instructions per element | spills in loops | predicted |",
        "|" + "---|" * 12,
    ]
    for row in table:
        tiles = " ".join(str(v) for v in row["tiles"].values())
        counts = ", ".join(f"{loop['per_element']:.2f}" for loop in row["loops"])
        spills = ", ".join(str(loop["spills"]) for loop in row["loops"])
        lines.append(
            f"| {row['capability']} | {row['problem']}, {row['reduction']} | {row['D']} |"
            f" {row['dtype']} | {tiles} | {row['registers']} | {row['stack']} |"
            f" {row['shared'] / 1024:.0f} | {row['wgmma']} | {counts} | {spills} |"
            f" {row['predicted_us'] or ''} |"
        )
    return "\n".join(lines) + "\n"


KEY = ("capability", "problem", "reduction", "D", "dtype")


def committed() -> Path:
    """The table of this version of Triton, which need not exist."""
    version = ".".join(triton.__version__.split(".")[:2])
    return RESULTS / f"aot-{version}.json"


def changes(table: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[str]:
    """What `table` counts otherwise than an earlier one, a line each."""
    known = {tuple(row[k] for k in KEY): row for row in before}
    lines = []
    for row in table:
        name = tuple(row[k] for k in KEY)
        if name not in known:
            lines.append(f"{name}: not in the committed table")
            continue
        for field, value in row.items():
            was, now = known[name].get(field), value
            if field == "loops":
                was, now = ([(x["per_element"], x["spills"]) for x in y] for y in (was or [], now))
            if was != now:
                lines.append(f"{name}: {field} was {was}, is {now}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a few kernels, to try the tool")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="fail where a count differs from the committed table of this version of Triton",
    )
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    table = []
    for row in quick_rows() if arguments.quick else rows():
        table.append(count(*row))
        print(table[-1]["capability"], table[-1]["problem"], table[-1]["D"], table[-1]["dtype"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "aot.json").write_text(json.dumps(table, indent=1) + "\n")
    (arguments.out / "aot.md").write_text(markdown(table))
    if arguments.compare and committed().exists():
        lines = changes(table, json.loads(committed().read_text()))
        if lines:
            raise SystemExit("\n".join([f"{committed()} has other counts:", *lines]))


if __name__ == "__main__":
    main()
