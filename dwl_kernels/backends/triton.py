"""The Triton kernel, from the host: what it takes, its tiles, its workspace, its launch.

The device side is `triton_kernels`. This module imports Triton on first use, so that the package
works without it.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwl_kernels.backends import eager
from dwl_kernels.problem import Output, Problem, Wanted, checks_values

MAX_D = 256  # a row tile keeps [BM, D] sums in registers; above, the product dominates anyway
MAX_DOMAINS = 1 << 16  # the workspace holds two sums for every worker and domain


class Tiles(NamedTuple):
    """Tile shapes; `Form` in the kernels says what each is."""

    BM: int
    BN: int
    CM: int
    CN: int
    stages_1: int
    stages_2: int
    warps: int
    programs: int  # at once on a multiprocessor, which registers and shared memory must allow


class Interpreter(NamedTuple):
    """What stands in for a device where TRITON_INTERPRET=1: one program plays `workers`."""

    tiles: Tiles
    workers: int


INTERPRETER = Interpreter(Tiles(16, 16, 16, 16, 1, 1, 4, 1), workers=5)


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install 'triton>=3.6'"
    return None


def why_not(device_type: str) -> str | None:
    """Why the kernel cannot run on such a device here and the mend; None where it can."""
    if _missing() is not None:
        return _missing()
    if interpreting():
        if device_type != "cpu":
            return "TRITON_INTERPRET=1 is set, which takes CPU tensors; unset it before the start"
        return None
    if device_type != "cuda":
        return (
            f"it runs on CUDA tensors, and these are on {device_type}; with TRITON_INTERPRET=1 in "
            "the environment it takes CPU tensors, slowly"
        )
    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU; backend='chunked' runs on this one"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return (
            f"it needs compute capability 8.0, and this device has {capability[0]}.{capability[1]};"
            " backend='chunked' runs here"
        )
    return None


def refuses(problem: Problem) -> str | None:
    """Why the kernel does not take this problem; None where it does."""
    if problem.query.shape[1] > MAX_D:
        return (
            f"it takes embeddings of at most {MAX_D} elements, and these have "
            f"{problem.query.shape[1]}; backend='chunked' takes them"
        )
    if problem.domain_weights is not None and problem.domain_weights.shape[0] > MAX_DOMAINS:
        return (
            f"it takes at most {MAX_DOMAINS} domains, and these are "
            f"{problem.domain_weights.shape[0]}; backend='chunked' takes them"
        )
    return None


def solve(
    problem: Problem,
    wanted: Wanted,
    row_grad: Tensor | None = None,  # [B], gradient of the row losses of reduction "none"
) -> Output:
    """The loss and the wanted gradients in one launch, with no logits in memory."""
    rows, candidates = problem.query.shape[0], problem.candidates.shape[0]
    if rows == 0 or candidates == 0:
        return eager.solve(problem, wanted, row_grad)
    device = problem.query.device
    if checks_values(device):
        problem.row_weights()
    from dwl_kernels.backends import triton_kernels as kernels

    tiles, workers = _plan(problem)
    inputs = _inputs(problem, row_grad)
    outputs = _outputs(problem, wanted, row_grad)
    form = _form(problem, inputs, tiles, workers)
    floats, integers = _workspace(problem, outputs, tiles, workers)
    domains = 0 if problem.domain_weights is None else problem.domain_weights.shape[0]
    kernels.softmax_loss_kernel[(1 if interpreting() else workers,)](
        kernels.Inputs(*inputs),
        kernels.Outputs(*outputs),
        floats,
        integers,
        _barrier(device),
        rows,
        candidates,
        domains,
        workers,
        problem.tau,
        form,
        num_warps=tiles.warps,
        launch_cooperative_grid=True,
        enable_fp_fusion=True,
    )
    return Output(*outputs)


def _plan(problem: Problem) -> tuple[Tiles, int]:
    if interpreting():
        return INTERPRETER
    raise NotImplementedError


def _inputs(problem: Problem, row_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    p = problem
    temperature = p.temperature
    if temperature is None and p.accumulate == torch.float64:
        # A float argument of a kernel is float32.
        temperature = torch.full((), p.tau, dtype=torch.float64, device=p.query.device)
    tensors = (
        *(p.query, p.positive, p.candidates, p.positive_log_q, p.candidate_log_q),
        *(p.positive_ids, p.candidate_ids, p.domain_ids, p.domain_weights, p.example_weights),
        *(temperature, row_grad),
    )
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _outputs(
    problem: Problem, wanted: Wanted, row_grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    p = problem

    def like(tensor: Tensor | None, want: bool, dtype: torch.dtype) -> Tensor | None:
        if not want or tensor is None:
            return None
        return torch.empty(tensor.shape, dtype=dtype, device=tensor.device)

    loss = p.query.new_empty(
        p.query.shape[:1] if p.reduction == "none" else (), dtype=p.accumulate
    )
    return (
        loss,
        like(p.query, wanted.query, p.gradient),
        like(p.positive, wanted.positive, p.gradient),
        like(p.candidates, wanted.candidates, p.gradient),
        like(p.temperature, wanted.temperature, p.accumulate),
        like(p.domain_weights, wanted.domain_weights, p.accumulate),
    )


def _power_of_two(n: int, least: int) -> int:
    return max(1 << (n - 1).bit_length(), least)


def _form(
    problem: Problem, inputs: tuple[Tensor | None, ...], tiles: Tiles, workers: int
) -> Any:
    temperature = inputs[10]
    return _form_of(
        problem.query.shape[1],
        problem.query.dtype,
        problem.candidates.shape[0] < tiles.BN,
        problem.query.shape[0] < tiles.CN,
        1 if problem.domain_ids is None else problem.domain_ids.shape[1],
        0 if problem.domain_weights is None else problem.domain_weights.shape[0],
        problem.reduction,
        problem.correction,
        "float" if temperature is None else "row" if temperature.dim() else "scalar",
        torch.get_float32_matmul_precision(),
        tiles,
        workers,
        inputs[11] is not None,
        interpreting(),
    )


@functools.cache
def _form_of(
    d: int,
    dtype: torch.dtype,
    few_candidates: bool,
    few_rows: bool,
    slots: int,
    domains: int,
    reduction: str,
    correction: str,
    temperature: str,
    precision: str,
    tiles: Tiles,
    workers: int,
    row_grad: bool,
    interpreted: bool,
) -> Any:
    import triton.language as tl

    from dwl_kernels.backends.triton_kernels import Form

    exact = dtype == torch.float64 or (dtype == torch.float32 and precision == "highest")
    values = Form(
        D=d,
        BLOCK_D=_power_of_two(d, 16),
        BM=tiles.BM,
        BN=tiles.BN,
        CM=tiles.CM,
        CN=tiles.CN,
        STAGES_1=tiles.stages_1,
        STAGES_2=tiles.stages_2,
        SLOTS=slots,
        WORKERS=_power_of_two(workers, 2),
        DOMAINS=min(_power_of_two(max(domains, 1), 2), 64),
        REDUCTION=reduction,
        REFINED=correction == "refined",
        TEMPERATURE=temperature,
        PRECISION="ieee" if exact else "tf32",
        FOLD=dtype in (torch.bfloat16, torch.float16) and not row_grad,
        HALF=dtype == torch.float16,
        FEW_CANDIDATES=few_candidates,
        FEW_ROWS=few_rows,
        UPCAST=interpreted and dtype == torch.bfloat16,
    )
    return Form(*(tl.constexpr(value) for value in values))


def _workspace(
    problem: Problem, outputs: tuple[Tensor | None, ...], tiles: Tiles, workers: int
) -> tuple[Tensor, Tensor]:
    """Two buffers, as `workspace` in the kernels cuts them up; the allocator caches them."""
    rows, d = problem.query.shape
    floats = 7 * -(-rows // tiles.BM) * tiles.BM + 3 * workers
    if outputs[5] is not None:
        floats += 2 * workers * outputs[5].shape[0]
    floats += 64 + workers * max(tiles.BM, tiles.CM) * (_power_of_two(d, 16) + 3)
    device = problem.query.device
    return (
        torch.empty(floats, dtype=problem.accumulate, device=device),
        torch.empty(workers + rows, dtype=torch.int32, device=device),
    )


_barriers: dict[tuple[int, int], Tensor] = {}


def _barrier(device: torch.device) -> Tensor:
    """The counter of `grid_barrier`, one per device and stream: launches in order share it."""
    if device.type == "cpu":
        return torch.zeros(1, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        # A graph may be replayed on another stream than this one, beside calls that use it.
        return torch.zeros(1, dtype=torch.int32, device=device)
    index = torch.cuda.current_device() if device.index is None else device.index
    key = (index, torch.cuda.current_stream(device).cuda_stream)
    if key not in _barriers:
        _barriers[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _barriers[key]


def module() -> ModuleType:
    """The kernels, for tools that compile or count them."""
    from dwl_kernels.backends import triton_kernels

    return triton_kernels
