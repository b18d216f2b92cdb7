"""What a call hands to the Triton kernel: arguments, the form it is compiled for, its workspace.

Nothing here needs a device, so that the machine code of every form can be made without one.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwl_kernels.backends.triton.tiles import Load, Tiles, installed
from dwl_kernels.core.problem import (
    ROW_TENSORS,
    DualScale,
    GradMask,
    Output,
    Problem,
    SharedProblem,
    accumulate_dtype,
)

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
    from dwl_kernels.backends.triton.kernels import common as triton_common

    return triton_common


def kernel_of(problem: Problem) -> Any:
    if problem.per_row:
        from dwl_kernels.backends.triton.kernels.per_row_candidates import (
            indexed_softmax_loss_kernel,
        )

        return indexed_softmax_loss_kernel
    from dwl_kernels.backends.triton.kernels.shared_candidates import softmax_loss_kernel

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


def load_of(problem: SharedProblem, row_grad: Tensor | None) -> Load:
    """Which tiles the problem needs."""
    p, temperature = problem, problem.rows.temperature
    if p.dual is not None and p.dual.similarity:
        return "dual"
    if p.skip_threshold > 0:
        return "skip"
    of_row = temperature is not None and temperature.dim() > 0
    ids = p.positive_ids, p.query_ids
    given = (p.target, p.candidate_log_q, *ids, p.rows.example_weights, p.dual, row_grad)
    return "options" if of_row or any(t is not None for t in given) else "plain"


def constants_of(problem: Problem) -> tuple[float, ...]:
    """What the kernel takes after `tau`: the strengths of the dual scale, and the threshold."""
    if not isinstance(problem, SharedProblem):
        return ()
    return (*strengths_of(problem.dual, problem.num_candidates), problem.skip_threshold)


def strengths_of(dual: DualScale | None, num_candidates: int) -> tuple[float, float, float, int]:
    """The strengths of the dual scale, and its slate: at most one group for every candidate."""
    dual = dual or DualScale(0.0, 0.0, 1, 0.0)
    slate = min(dual.slate_size, num_candidates)
    return float(dual.hardness), float(dual.similarity), float(dual.competition), slate


_NOTHING: tuple[Tensor | None, Tensor | None] = (None, None)


def id_pairs_of(problem: SharedProblem) -> tuple[tuple[Tensor | None, Tensor | None], ...]:
    """Both pairs of ids; where there is one, of whatever kind, it is the first."""
    items = problem.positive_ids, problem.candidate_ids
    queries = problem.query_ids, problem.candidate_query_ids
    return (queries, _NOTHING) if items[0] is None else (items, queries)


def inputs_of(problem: Problem, row_grad: Tensor | None) -> Any:
    """The tensors of the problem as `common.Inputs`."""
    p, rows = problem, problem.rows
    if rows.temperature is None and p.query.dtype == torch.float64:
        # A float argument of a kernel is float32.
        tau = torch.full((), rows.tau, dtype=torch.float64, device=p.query.device)
        rows = rows._replace(temperature=tau)
    if isinstance(p, SharedProblem):
        positive, candidates, target = p.positive, p.candidates, p.target
        (positive_ids, candidate_ids), others = id_pairs_of(p)
    else:  # the positives may lie in the table
        positive, candidates, target = p.positive, p.item_table, None
        positive_ids, candidate_ids, others = p.positive_rows, p.candidate_rows, _NOTHING
    # In the order of `Inputs`, so that a new option of the rows passes through by itself.
    given = common().Inputs(
        *(p.query, positive, candidates, p.positive_log_q, p.candidate_log_q),
        *(positive_ids, candidate_ids, *others),
        *rows[: len(ROW_TENSORS)],
        *(row_grad, target),
    )
    if [t for t in given if t is not None and not t.is_contiguous()]:
        return given._make([None if t is None else t.contiguous() for t in given])
    return given


_OF_ROWS = -1  # a number of every row, ``dL/d<q_i, p_i>``


class Results(NamedTuple):
    """The outputs of a call that have no memory yet."""

    loss: tuple[int, ...]  # its shape
    sums: torch.dtype  # of the loss and of all that is summed
    # Of the fields of `Output` but the loss, the place of the input that has the shape of
    # the gradient, or _OF_ROWS, and its dtype; None where it is not wanted.
    gradients: tuple[tuple[int, torch.dtype] | None, ...]


def results_of(problem: Problem, wanted: GradMask, inputs: Any) -> Results:
    (sums, gradient), products = problem.dtypes, problem.candidate_gradient
    sources = {
        "query": ("query", gradient),
        "positive": ("positive", products),
        "candidates": ("candidates", products),
        "temperature": ("temperature", sums),
        "domain_weights": ("domain_weights", sums),
        "candidate_log_q": ("candidate_log_q", sums),
    }
    if problem.per_row:  # the gradients of the products
        sources |= {"positive": ("", products), "candidates": ("candidate_ids", products)}
    return Results(
        loss=problem.query.shape[:1] if problem.rows.reduction == "none" else (),
        sums=sums,
        gradients=tuple(
            _place(inputs, *sources[name]) if getattr(wanted, name) else None
            for name in Output._fields[1:]
        ),
    )


def _place(inputs: Any, like: str, dtype: torch.dtype) -> tuple[int, torch.dtype] | None:
    if not like:
        return _OF_ROWS, dtype
    return None if getattr(inputs, like) is None else (inputs._fields.index(like), dtype)


def outputs_of(results: Results, inputs: Any) -> Output:
    """New memory for the results."""
    query = inputs.query
    loss = query.new_empty(results.loss, dtype=results.sums)
    gradients = [  # written out: a function for each would be seen in the time of a step
        like
        and (
            query.new_empty(len(query), dtype=like[1])
            if like[0] == _OF_ROWS
            else torch.empty_like(inputs[like[0]], dtype=like[1])
        )
        for like in results.gradients
    ]
    outputs = Output(loss, *gradients)
    if polls():
        for output in outputs:
            if output is not None:
                output.fill_(float("nan"))
    return outputs


def power_of_two(n: int, least: int) -> int:
    return max(1 << (n - 1).bit_length(), least)


def is_even(problem: Problem) -> bool:
    """Whether loads in pairs and fours reach the end of rows and candidates, and are worth it."""
    if problem.num_candidates % 16 != 0:
        return False
    if not isinstance(problem, SharedProblem):
        return True
    # At D = 256 they cost the last registers, so that without ids there is nothing to gain.
    rows, d = problem.query.shape
    return rows % 16 == 0 and (d <= 128 or bool(problem.id_pairs()))


def fenced(capability: int) -> bool:
    """Whether Triton forgets a fence that products on such a device need (its issue 9610)."""
    return capability in (9, 10) and installed() < (3, 7, 1)


def order_ahead(dual: DualScale | None, skip: bool, capability: int) -> bool:
    """Whether the order of packed rows is loaded a stage before the rows, in phase 2.

    No gather then waits for its addresses, at no price but where registers are few: below 9.0, with
    a second query, and with a `skip_threshold`, which loads more that belongs to a row.
    """
    return capability == 9 and not skip and not (dual is not None and dual.similarity != 0)


def form_of(
    problem: Problem,
    inputs: Any,
    tiles: Tiles,
    capability: int | None = None,
) -> Any:
    """What the kernel is compiled for; `capability`: the major one, if not that of the device."""
    if capability is None:
        device = problem.query.device
        capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    if capability == 10 and fenced(capability):  # its pipeliner fails at the fence
        tiles = tiles._replace(stages_1=1, stages_2=1)
    rows, temperature = problem.rows, inputs.temperature
    dual, skip = None, False
    if isinstance(problem, SharedProblem):
        dual, skip = problem.dual, problem.skip_threshold > 0
    domain_ids, domain_weights = rows.domain_ids, rows.domain_weights
    return _form(
        d=problem.query.shape[1],
        dtype=problem.query.dtype,
        few_candidates=inputs.candidates.shape[0] < tiles.BLOCK_N1,
        few_rows=problem.query.shape[0] < tiles.BLOCK_M2,
        narrow_ids=inputs.candidates.shape[0] < 2**31,
        even=is_even(problem),
        slots=1 if domain_ids is None else domain_ids.shape[1],
        domains=0 if domain_weights is None else domain_weights.shape[0],
        reduction=rows.reduction,
        correction=rows.correction,
        temperature="float" if temperature is None else "row" if temperature.dim() else "scalar",
        precision=torch.get_float32_matmul_precision(),
        tiles=tiles,
        row_grad=inputs.row_grad is not None,
        in_batch=problem.in_batch,
        log_q=inputs.candidate_log_q is not None,
        targets=inputs.target is not None,
        example_weights=inputs.example_weights is not None,
        ignore_index=rows.ignore_index,
        strengths=tuple(s != 0 for s in strengths_of(dual, problem.num_candidates)[:3]),
        skip=skip,
        fence=fenced(capability),
        ahead=order_ahead(dual, skip, capability),
        interpreted=interpreting(),
        polls=polls(),
    )


@functools.cache
def _form(
    *,
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

    from dwl_kernels.backends.triton.kernels.common import Form

    exact = dtype == torch.float64 or (dtype == torch.float32 and precision == "highest")
    narrow = dtype in (torch.bfloat16, torch.float16)
    packed = targets or example_weights
    # numpy cannot multiply bfloat16, and the order of its float32 sums depends on the shapes, so
    # that the two phases would not agree about a logit as they do on a device.
    upcast = interpreted and dtype in (torch.bfloat16, torch.float32)
    values = Form(
        D=d,
        BLOCK_D=power_of_two(d, 16),
        BLOCK_M1=tiles.BLOCK_M1,
        BLOCK_N1=tiles.BLOCK_N1,
        BLOCK_N2=tiles.BLOCK_N2,
        BLOCK_M2=tiles.BLOCK_M2,
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


def workspace_floats(problem: Problem, wanted: GradMask, tiles: Tiles, workers: int) -> int:
    """As `workspace` in the kernels cuts it up."""
    rows, d = problem.query.shape
    kernels = common()
    floats = kernels.NUM_ROW_ARRAYS.value * -(-rows // 64) * 64
    floats += kernels.NUM_WORKER_ARRAYS.value * workers + 64
    if problem.rows.domain_weights is not None and wanted.domain_weights:
        floats += 2 * workers * problem.rows.domain_weights.shape[0]
    if problem.in_batch and problem.candidate_log_q is not None:
        floats += -(-problem.num_candidates // 64) * 64
    if not problem.per_row:
        floats += 2 * workers * max(tiles.BLOCK_M1, tiles.BLOCK_N2) * (power_of_two(d, 16) + 3)
    return int(floats)


def workspace_integers(problem: Problem, workers: int) -> int:
    """Counts of the workers, then the integers of the rows, as far as the problem has them."""
    rows = -(-problem.query.shape[0] // 64) * 64 + common().ROOM.value
    arrays = 1
    if isinstance(problem, SharedProblem):
        ids = len(problem.id_pairs())
        arrays = 2 + 2 * ids if ids else 2 if problem.target is not None else 1
    return -(-workers // 64) * 64 + arrays * rows
