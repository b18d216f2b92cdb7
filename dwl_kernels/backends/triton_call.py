"""What a call hands to the Triton kernel: arguments, the form it is compiled for, its workspace.

Nothing here needs a device, so that the machine code of every form can be made without one.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwl_kernels.backends.triton_tiles import Load, Tiles, installed
from dwl_kernels.problem import DualScale, Problem, Wanted, accumulate_dtype

MAX_WORKERS = 1024  # more than any device has multiprocessors, three programs on each


@functools.cache  # as Triton does, which looks once, when a kernel is defined
def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def polls() -> int:
    """After how many looks a program gives up that waits for others; 0: never."""
    return 2**26 if os.environ.get("DWL_KERNELS_DEBUG") == "1" else 0


@functools.cache
def common() -> Any:
    from dwl_kernels.backends import triton_common

    return triton_common


def kernel_of(problem: Problem) -> Any:
    if problem.by_row:
        from dwl_kernels.backends.triton_indexed import indexed_softmax_loss_kernel

        return indexed_softmax_loss_kernel
    from dwl_kernels.backends.triton_kernels import softmax_loss_kernel

    return softmax_loss_kernel


def launch_options(tiles: Tiles) -> dict[str, Any]:
    options = {
        "num_warps": tiles.warps,
        "launch_cooperative_grid": True,
        "enable_fp_fusion": True,  # Triton 3.10 changes the default
    }
    if tiles.registers is not None:
        options["maxnreg"] = tiles.registers
    return options


def load_of(problem: Problem, row_grad: Tensor | None) -> Load:
    """Which tiles the problem needs."""
    p = problem
    if p.dual is not None and p.dual.similarity:
        return "dual"
    if p.skip_threshold > 0:
        return "skip"
    by_row = p.temperature is not None and p.temperature.dim() > 0
    given = (p.target, p.candidate_log_q, p.candidate_ids, p.example_weights, p.dual, row_grad)
    return "options" if by_row or any(one is not None for one in given) else "plain"


def num_candidates(problem: Problem) -> int:
    """How many a row has."""
    if problem.candidate_rows is not None:
        return problem.candidate_rows.shape[1]
    return problem.candidates.shape[0]


def constants_of(problem: Problem) -> tuple[float, ...]:
    """What the kernel takes after `tau`: the strengths of the dual scale, and the threshold."""
    return () if problem.by_row else (*strengths_of(problem), problem.skip_threshold)


def strengths_of(problem: Problem) -> tuple[float, float, float, int]:
    """The strengths of the dual scale, and its slate: at most one group for every candidate."""
    dual = problem.dual or DualScale(0.0, 0.0, 1, 0.0)
    slate = min(dual.slate_size, problem.candidates.shape[0])
    return float(dual.hardness), float(dual.similarity), float(dual.competition), slate


def inputs_of(problem: Problem, row_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    p = problem
    temperature = p.temperature
    if temperature is None and p.accumulate == torch.float64:
        # A float argument of a kernel is float32.
        temperature = torch.full((), p.tau, dtype=torch.float64, device=p.query.device)
    positive, ids = p.positive, (p.positive_ids, p.candidate_ids)
    if p.by_row:  # the positives lie in the table
        positive, ids = p.candidates, (p.target, p.candidate_rows)
    tensors = (
        *(p.query, positive, p.candidates, p.positive_log_q, p.candidate_log_q),
        *(*ids, p.domain_ids, p.domain_weights, p.example_weights),
        *(temperature, row_grad, None if p.by_row else p.target),
    )
    return tuple([None if t is None else t.contiguous() for t in tensors])


class Results(NamedTuple):
    """The outputs of a call that have no memory yet."""

    loss: tuple[int, ...]  # its shape
    sums: torch.dtype  # of the loss and of all that is summed
    gradients: tuple[tuple[int, torch.dtype] | None, ...]  # the place of the input, and the dtype


def results_of(problem: Problem, wanted: Wanted, inputs: tuple[Tensor | None, ...]) -> Results:
    p, products, sums = problem, problem.candidate_gradient, problem.accumulate
    positive, candidates = (5, 6) if p.by_row else (1, 2)  # by row those of their products
    gradients = (
        (wanted.query, 0, p.gradient),
        (wanted.positive, positive, products),
        (wanted.candidates, candidates, products),
        (wanted.temperature, 10, sums),
        (wanted.domain_weights, 8, sums),
        (wanted.candidate_log_q, 4, sums),
    )
    return Results(
        p.query.shape[:1] if p.reduction == "none" else (),
        sums,
        tuple(
            (place, dtype) if want and inputs[place] is not None else None
            for want, place, dtype in gradients
        ),
    )


def outputs_of(results: Results, inputs: tuple[Any, ...]) -> list[Tensor | None]:
    found = [
        inputs[0].new_empty(results.loss, dtype=results.sums),
        *[r and torch.empty_like(inputs[r[0]], dtype=r[1]) for r in results.gradients],
    ]
    if polls():
        for output in found:
            if output is not None:
                output.fill_(float("nan"))
    return found


def power_of_two(n: int, least: int) -> int:
    return max(1 << (n - 1).bit_length(), least)


def is_even(problem: Problem) -> bool:
    """Whether loads in pairs and fours reach the end of rows and candidates, and are worth it."""
    if num_candidates(problem) % 16 != 0:
        return False
    # At D = 256 they cost the last registers, so that without ids there is nothing to gain.
    rows, d = problem.query.shape
    return problem.by_row or (rows % 16 == 0 and (d <= 128 or problem.candidate_ids is not None))


def fenced(capability: int) -> bool:
    """Whether Triton forgets a fence that products on such a device need (its issue 9610)."""
    return capability in (9, 10) and installed() < (3, 7, 1)


def order_ahead(problem: Problem, capability: int) -> bool:
    """Whether the order of packed rows is loaded a stage before the rows, in phase 2.

    No gather then waits for its addresses, at no price but where registers are few: below 9.0, with
    a second query, and with a `skip_threshold`, which loads more that belongs to a row.
    """
    similar = problem.dual is not None and problem.dual.similarity > 0
    return capability == 9 and problem.skip_threshold == 0 and not similar


def form_of(
    problem: Problem,
    inputs: tuple[Tensor | None, ...],
    tiles: Tiles,
    capability: int | None = None,
) -> Any:
    """What the kernel is compiled for; `capability`: the major one, if not that of the device."""
    if capability is None:
        device = problem.query.device
        capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    if capability == 10 and fenced(capability):  # its pipeliner fails at the fence
        tiles = tiles._replace(stages_1=1, stages_2=1)
    temperature = inputs[10]
    return _form(
        problem.query.shape[1],
        problem.query.dtype,
        problem.candidates.shape[0] < tiles.BN,
        problem.query.shape[0] < tiles.CN,
        problem.candidates.shape[0] < 2**31,
        is_even(problem),
        1 if problem.domain_ids is None else problem.domain_ids.shape[1],
        0 if problem.domain_weights is None else problem.domain_weights.shape[0],
        problem.reduction,
        problem.correction,
        "float" if temperature is None else "row" if temperature.dim() else "scalar",
        torch.get_float32_matmul_precision(),
        tiles,
        inputs[11] is not None,
        *(problem.in_batch, inputs[4] is not None, inputs[12] is not None),
        problem.example_weights is not None,
        problem.ignore_index,
        tuple(strength > 0 for strength in strengths_of(problem)[:3]),
        problem.skip_threshold > 0,
        fenced(capability),
        order_ahead(problem, capability),
        interpreting(),
        polls(),
    )


@functools.cache
def _form(
    d: int,
    dtype: torch.dtype,
    few_candidates: bool,
    few_rows: bool,
    narrow_ids: bool,
    even: bool,
    slots: int,
    domains: int,
    reduction: str,
    correction: str,
    temperature: str,
    precision: str,
    tiles: Tiles,
    row_grad: bool,
    in_batch: bool,
    log_q: bool,
    targets: bool,
    example_weights: bool,
    ignore_index: int,
    strengths: tuple[bool, bool, bool],
    skip: bool,
    fence: bool,
    ahead: bool,
    interpreted: bool,
    polls: int,
) -> Any:
    import triton.language as tl

    from dwl_kernels.backends.triton_common import Form

    exact = dtype == torch.float64 or (dtype == torch.float32 and precision == "highest")
    narrow = dtype in (torch.bfloat16, torch.float16)
    packed = targets or example_weights
    # numpy cannot multiply bfloat16, and the order of its float32 sums depends on the shapes, so
    # that the two phases would not agree about a logit as they do on a device.
    upcast = interpreted and dtype in (torch.bfloat16, torch.float32)
    values = Form(
        D=d,
        BLOCK_D=power_of_two(d, 16),
        BM=tiles.BM,
        BN=tiles.BN,
        CM=tiles.CM,
        CN=tiles.CN,
        STAGES_1=tiles.stages_1,
        STAGES_2=tiles.stages_2 + (ahead and packed and tiles.stages_2 > 1),
        OWN=targets or in_batch,
        IN_BATCH=in_batch,
        DRAWN=in_batch and log_q,
        PACKED=packed,
        IGNORE=ignore_index,
        SLOTS=slots,
        WORKERS=MAX_WORKERS,
        DOMAINS=min(power_of_two(max(domains, 1), 2), 64),
        REDUCTION=reduction,
        REFINED=correction == "refined",
        SKIP=skip,
        HARDNESS=strengths[0],
        SIMILARITY=strengths[1],
        COMPETITION=strengths[2],
        TEMPERATURE=temperature,
        ROW_SCALE=temperature == "row" or strengths[0] or strengths[2],
        DTYPE=tl.float64 if dtype == torch.float64 else tl.float32,
        LARGEST=torch.finfo(accumulate_dtype(dtype)).max,
        PRECISION="ieee" if exact else "tf32",
        EXACT=exact,
        FOLD=narrow and not row_grad,
        HALF=dtype == torch.float16,
        MAXIMA=exact or dtype == torch.float16,
        FEW_CANDIDATES=few_candidates,
        FEW_ROWS=few_rows,
        NARROW=narrow_ids,
        EVEN=even,
        FENCED=fence,
        UPCAST=upcast,
        COMPILED=not interpreted,
        POLLS=polls,
    )
    return Form(*(tl.constexpr(value) for value in values))


def workspace_floats(problem: Problem, wanted: Wanted, tiles: Tiles, workers: int) -> int:
    """As `workspace` in the kernels cuts it up."""
    rows, d = problem.query.shape
    floats = common().NUM_ROW_ARRAYS.value * -(-rows // 64) * 64 + 3 * workers + 64
    if problem.domain_weights is not None and wanted.domain_weights:
        floats += 2 * workers * problem.domain_weights.shape[0]
    if problem.in_batch and problem.candidate_log_q is not None:
        floats += -(-num_candidates(problem) // 64) * 64
    if not problem.by_row:
        floats += 2 * workers * max(tiles.BM, tiles.CM) * (power_of_two(d, 16) + 3)
    return int(floats)


def workspace_integers(problem: Problem, workers: int) -> int:
    """Counts of the workers, then the integers of the rows, as far as the problem has them."""
    rows = -(-problem.query.shape[0] // 64) * 64 + common().ROOM.value
    arrays = 4 if problem.candidate_ids is not None else 2 if problem.target is not None else 1
    return -(-workers // 64) * 64 + arrays * rows
