"""The Triton kernel of candidates that all rows share, compiled with its default tiles.

Counts registers, stack, shared memory, and for every main loop the instructions per element of the
logits and the spills in it. `triton_per_row` compiles its kernels as this one does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.machine_code.arithmetic import clocks, predicted_us
from benchmarks.machine_code.sass import machine_code, main_loops
from dwl_kernels.backends.triton import specialize as host
from dwl_kernels.backends.triton.kernels.common import Call
from dwl_kernels.backends.triton.kernels.shared_candidates import softmax_loss_kernel
from dwl_kernels.backends.triton.tiles import Tiles, default
from dwl_kernels.core.build import full_problem, in_batch_problem, sampled_problem
from dwl_kernels.core.problem import DualScale, GradMask, SharedProblem


def example(
    kind: str, d: int, dtype: torch.dtype, options: bool, reduction: str = "mean"
) -> tuple[SharedProblem, GradMask]:
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
        common["domain_ids"] = torch.tensor([[0, 1]]).repeat(rows, 1)
        common["domain_weights"] = torch.ones(32)
        common["example_weights"] = torch.ones(rows)
        common["temperature"] = torch.tensor(0.05)
    gradients = {"temperature": options, "domain_weights": options}
    wanted = GradMask(True, kind in ("sampled", "dual"), True, False, **gradients)
    if kind in ("full", "skip"):
        threshold = 2.0**-12 if kind == "skip" else 0.0
        target = torch.zeros(rows, dtype=torch.int64)
        del common["correction"]
        problem = full_problem(
            *(query, negative, target),
            **{"bias": log_q, "ignore_index": -100, "skip_threshold": threshold, **common},
        )
        return problem, wanted._replace(candidate_log_q=options)
    if kind == "in-batch":
        none: dict[str, Any] = {"negative_log_q": None, "negative_ids": None, "negative": None}
        return in_batch_problem(query, positive, log_q=log_q, ids=ids, **none, **common), wanted
    names = ("positive_log_q", "negative_log_q", "positive_ids", "negative_ids")
    more: dict[str, Any] = dict(zip(names, (log_q, log_q, ids, ids), strict=True))
    more["dual"] = DualScale(1.0, 1.0, 16, 1.0) if kind == "dual" else None
    shared = sampled_problem(query, positive, negative, **more, **common)
    assert isinstance(shared, SharedProblem)  # as its negatives are
    return shared, wanted


class Launch(NamedTuple):
    """``kernel[grid](*arguments, **options)``. With the sources it decides the machine code."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]


def launch_of(
    problem: SharedProblem,
    wanted: GradMask,
    tiles: Tiles,
    row_grad: Tensor | None = None,
    capability: int = 90,
) -> Launch:
    """The launch of `triton.solve` on a device."""
    inputs = host.inputs_of(problem, row_grad)
    form = host.form_of(problem, inputs, tiles, capability // 10)
    outputs = host.outputs_of(host.results_of(problem, wanted, inputs), inputs)
    call = Call(inputs, outputs, form)
    buffers = torch.empty(64), *(torch.empty(64, dtype=torch.int32) for _ in range(2))
    domains = 0 if problem.rows.domain_weights is None else len(problem.rows.domain_weights)
    sizes = len(problem.query), problem.num_candidates, domains, 264
    numbers = problem.rows.tau, *host.constants_of(problem)
    return Launch((call, *buffers, *sizes, *numbers), host.launch_options(tiles))


def compiled_for(capability: int, kernel: Any, launch: Launch) -> Any:
    """A kernel as the launch would compile it on such a device."""
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {**launch.options, "debug": False}
    bound, specialization, extra = binder(*launch.arguments, **options)
    packed = kernel._pack_args(backend, options, bound, specialization, extra)
    parsed, signature, constants, attributes = packed
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=parsed.__dict__)


Row = tuple[str, int, torch.dtype, bool, int, str]


def prepared(row: Row) -> tuple[Tiles, Launch]:
    """The default tiles of a row of the table, and its launch."""
    kind, d, dtype, options, capability, reduction = row
    problem, wanted = example(kind, d, dtype, options, reduction)
    row_grad = torch.zeros(len(problem.query)) if reduction == "none" else None
    load = host.load_of(problem, row_grad)
    tiles = default(host.power_of_two(d, 16), dtype, capability // 10, exact(dtype), load)
    return tiles, launch_of(problem, wanted, tiles, row_grad, capability)


def exact(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


def count(row: Row) -> dict[str, Any]:
    """One row of the table."""
    kind, d, dtype, options, capability, reduction = row
    tiles, launch = prepared(row)
    kernel = compiled_for(capability, softmax_loss_kernel, launch)
    sass, usage = machine_code(kernel.asm["cubin"])
    loops = main_loops(sass)
    inputs = launch.arguments[0].inputs
    if inputs.domain_weights is not None or inputs.row_grad is not None:
        del loops[-2]  # phase 2 where rows that weigh nothing hold NaN or infinities: rarely run
    logits = [tiles.BLOCK_M1 * tiles.BLOCK_N1] * (len(loops) - 1) + [
        tiles.BLOCK_N2 * tiles.BLOCK_M2
    ]
    if kind == "dual":
        logits[0] //= 2
    for loop, size in zip(loops, logits, strict=True):
        threads = tiles.warps * 32
        loop["per_element"] = round(loop["instructions"] * threads / size, 2)
        shortest = loop.pop("shortest")
        if kind == "skip":  # and nothing of the block counts
            loop["per_element_left_out"] = round(shortest * threads / size, 2)
    found: dict[str, Any] = {
        "capability": capability,
        "problem": kind + (", everything" if options else ", plain"),
        "reduction": reduction,
        "D": d,
        "dtype": str(dtype).removeprefix("torch.") + (" exact" if exact(dtype) else ""),
        "tiles": tiles._asdict(),
        **usage,
        "shared": kernel.metadata.shared,
        "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
        "loops": loops,
    }
    found["predicted_us"] = predicted_us(found, clocks(found))
    if kind == "skip":
        found["predicted_left_out_us"] = predicted_us(found, clocks(found, left_out=True))
    return found


def rows() -> list[Row]:
    """All forms at the usual widths on 9.0; elsewhere the plainest and the fullest one."""
    widths = (64, 128, 256)
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    found: list[Row] = [("sampled", d, bf16, False, 90, "mean") for d in (16, 32, *widths)]
    found += [("sampled", d, f32, False, 90, "mean") for d in widths]
    found += [(kind, 128, f16, False, 90, "mean") for kind in ("sampled", "dual")]
    found += [(kind, 128, bf16, False, 90, "mean") for kind in ("in-batch", "full", "dual")]
    for kind, reduction in (
        ("sampled", "mean"),
        ("in-batch", "none"),
        ("full", "mean"),
        ("skip", "mean"),
        ("dual", "none"),
    ):
        found += [(kind, d, bf16, True, 90, reduction) for d in widths]
    for capability in (80, 100, 120):
        found += [("sampled", 128, bf16, False, capability, "mean")]
        found += [("in-batch", 128, bf16, True, capability, "none")]
    return found


PER_ELEMENT = ("per_element", "per_element_left_out")
PREDICTED = ("predicted_us", "predicted_left_out_us")


def markdown(table: list[dict[str, Any]]) -> str:
    """The table, one line per kernel; loops in their order: phase 1, its maxima, phase 2."""
    lines = [
        f"Triton {triton.__version__}. Per element: what one turn of a main loop executes, over",
        "the elements of the logits that a thread holds. Loops: with the dual scale its own, the",
        "search for the maxima (always run in float16, else rarely), phase 1, phase 2.",
        "`skip` is the full softmax with a `skip_threshold`: where nothing is left out of the",
        "gradients, and after the stroke where every block is. Predicted: what",
        "`arithmetic` makes of the counts, us for B = N = 8,192 on an H200:",
        "nothing was measured.",
        "",
        "| capability | problem | D | dtype | BLOCK_M1 BLOCK_N1 BLOCK_N2 BLOCK_M2 stages warps"
        " ctas_per_sm | registers |"
        " stack | shared KB | wgmma | instructions per element | spills in loops | predicted |",
        "|" + "---|" * 12,
    ]
    for row in table:
        tiles = " ".join(str(v) for v in row["tiles"].values())
        counts = ", ".join(
            " / ".join(f"{loop[k]:.2f}" for k in PER_ELEMENT if k in loop) for loop in row["loops"]
        )
        predicted = " / ".join(str(row[k]) for k in PREDICTED if row.get(k))
        spills = ", ".join(str(loop["spills"]) for loop in row["loops"])
        lines.append(
            f"| {row['capability']} | {row['problem']}, {row['reduction']} | {row['D']} |"
            f" {row['dtype']} | {tiles} | {row['registers']} | {row['stack']} |"
            f" {row['shared'] / 1024:.0f} | {row['wgmma']} | {counts} | {spills} |"
            f" {predicted} |"
        )
    return "\n".join(lines) + "\n"
