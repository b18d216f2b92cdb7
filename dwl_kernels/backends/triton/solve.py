"""The Triton kernel, from the host: what it takes, its tiles, its launch.

The device side is `kernels`. This module imports Triton on first use, so that the package
works without it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwl_kernels.backends.device import unfit_reason
from dwl_kernels.backends.triton import wide
from dwl_kernels.backends.triton.launch import launch, on, workspace
from dwl_kernels.backends.triton.specialize import (
    MAX_WORKERS,
    Results,
    common,
    constants_of,
    form_of,
    inputs_of,
    interpreting,
    kernel_of,
    launch_options,
    load_of,
    outputs_of,
    polls,
    power_of_two,
    results_of,
    workspace_floats,
    workspace_integers,
)
from dwl_kernels.backends.triton.tiles import Tiles, choose, per_row
from dwl_kernels.core.problem import GradMask, Output, Problem, SharedProblem
from dwl_kernels.core.rows import prepare
from dwl_kernels.core.values import checks_values

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_D = 256  # a row tile keeps [BLOCK_M1, D] sums in registers; above, `wide` takes over
MAX_TABLE_D = 4096  # a warp keeps the sums of one row of a table
MAX_ROWS = 1 << 27  # a workspace of 11 numbers a row has 32-bit offsets
MAX_CANDIDATES = 1 << 30  # so have places, past which a tile reaches
# Logits are scaled by 1 + factor * hardness, which this keeps above 0.2: factors of the
# competition, clipped to [1/2, 2] and divided by their mean, are below 4.
LEAST_HARDNESS = -0.2
MAX_DOMAINS = 1 << 16  # the workspace holds two sums for every worker and domain


class Interpreter(NamedTuple):
    """What stands in for a device where TRITON_INTERPRET=1: one program plays `workers`."""

    tiles: Tiles
    workers: int


one_at_a_time = threading.Lock()  # the interpreter patches `triton.language` while it runs
INTERPRETER = Interpreter(Tiles(16, 16, 16, 16, 1, 1, 4, 1), workers=5)


@functools.cache
def _missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install 'triton>=3.6'"
    return None


def unavailable_reason(device_type: str) -> str | None:
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
    return unfit_reason(torch.cuda.current_device())


def unsupported_reason(problem: Problem) -> str | None:
    """Why the kernel does not take this problem; None where it does."""
    dtype, (rows, d), candidates = problem.query.dtype, problem.query.shape, problem.num_candidates
    if dtype == torch.float64 and not interpreting():
        return "it takes float64 in the interpreter only; backend='chunked' takes it"
    if dtype not in DTYPES:
        return f"it does not take {dtype}; backend='chunked' does"
    if d > MAX_D and (part := wide.unsupported_part(problem)) is not None:
        return (
            f"with {part} it takes embeddings of at most {MAX_D} elements, and these have {d}; "
            "backend='chunked' takes them"
        )
    dual = problem.dual if isinstance(problem, SharedProblem) else None
    if d <= MAX_D and dual is not None and dual.hardness < LEAST_HARDNESS:
        return (
            f"it takes a hardness of at least {LEAST_HARDNESS}, and this is {dual.hardness}; "
            "backend='chunked' takes it"
        )
    if rows > MAX_ROWS or candidates > MAX_CANDIDATES:
        return (
            f"it takes at most {MAX_ROWS} rows and {MAX_CANDIDATES} candidates, and these are "
            f"{rows} rows and {candidates} candidates; backend='chunked' takes them"
        )
    weights = problem.rows.domain_weights
    if weights is not None and weights.shape[0] > MAX_DOMAINS:
        return (
            f"it takes at most {MAX_DOMAINS} domains, and these are {weights.shape[0]}; "
            "backend='chunked' takes them"
        )
    return None


def solve(
    problem: Problem,
    wanted: GradMask,
    row_grad: Tensor | None = None,  # [B], gradient of the row losses of reduction "none"
) -> Output:
    """The loss and the wanted gradients in one launch, with no logits in memory."""
    device = problem.query.device
    if checks_values(problem.query):
        prepare(problem, None)  # which raises
    run = wide.solve if _is_wide(problem) else _launch
    if interpreting():
        with one_at_a_time:
            return run(problem, wanted, row_grad)
    return on(device, run, problem, wanted, row_grad)


def _is_wide(problem: Problem) -> bool:
    taken = problem.query.shape[1] > MAX_D or wide.asked()
    taken = taken or problem.rows.competition_factor is not None
    return taken and wide.unsupported_part(problem) is None


class Plan(NamedTuple):
    """What calls share whose shapes, dtypes and choices are the same."""

    kernel: Any
    grid: int
    options: dict[str, Any]
    form: Any
    entry: int  # of `launch`: what `_entries` has of it
    results: Results
    groups: tuple[int, int]  # where outputs, then the workspace begin among the tensors
    sizes: tuple[int, ...]  # as the kernel takes them, then `tau`, then these:
    constants: tuple[float, ...]
    floats: int  # elements of the workspace, as the next
    integers: int


def _launch(
    problem: Problem,
    wanted: GradMask,
    row_grad: Tensor | None,
    plan: Plan | None = None,
    warm_up: bool = False,
) -> Any:
    """Launch the kernel, or (`warm_up`) compile it and return the compiled kernel."""
    if plan is None:
        plan = _plan(problem, wanted, row_grad)
    inputs = inputs_of(problem, row_grad)
    outputs = outputs_of(plan.results, inputs)
    once = interpreting() or polls() > 0  # a barrier at which somebody gave up serves no other call
    space = workspace(problem.query.device, plan.results.sums, plan.floats, plan.integers, once)

    def arguments(t: Sequence[Any]) -> tuple[Any, ...]:
        if t is tensors:  # names are for the compiler, the launcher takes addresses
            kernels = common()
            call = kernels.Call(inputs, kernels.Outputs(*outputs), plan.form)
        else:
            call = t[:results], t[results:others], plan.form
        return call, *t[others:], *plan.sizes, problem.rows.tau, *plan.constants

    results, others = plan.groups
    tensors = (*inputs, *outputs, space.floats, space.integers, space.barrier)
    if warm_up:
        return plan.kernel.warmup(*arguments(tensors), grid=(1,), **plan.options)
    launch(plan.kernel, plan.grid, plan.entry, tensors, arguments, plan.options, space.stream)
    return outputs


_plans: dict[Hashable, Plan] = {}
_MOST_PLANS = 1024  # shapes that are new with every call do not fill the memory
_tuned: dict[Hashable, Tiles] = {}
_room: dict[Hashable, int] = {}
_entries: dict[Hashable, int] = {}  # numbers for tuples that take a microsecond to hash and compare


def _plan(problem: Problem, wanted: GradMask, row_grad: Tensor | None) -> Plan:
    p, temperature, domain_ids = problem, problem.rows.temperature, problem.rows.domain_ids
    exact = torch.get_float32_matmul_precision() == "highest"
    kind = (
        *(p.query.device, p.query.shape[1], exact, wanted, row_grad is None, p.choices()),
        *[t if t is None else t.dtype for t in p.tensors()],
        temperature is not None and temperature.dim(),
        INTERPRETER if interpreting() else None,
    )
    key = (kind, _sizes(p), None if domain_ids is None else domain_ids.shape[1])
    plan = _plans.get(key)
    if plan is None:
        tiles, workers = INTERPRETER if interpreting() else _tune(p, wanted, row_grad, kind, exact)
        plan = plan_of(p, wanted, row_grad, tiles, workers, kind)
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan


def _tune(
    problem: Problem, wanted: GradMask, row_grad: Tensor | None, kind: Hashable, exact: bool
) -> tuple[Tiles, int]:
    """Tiles, and how many programs the device runs at once with them."""
    searching = os.environ.get("DWL_KERNELS_AUTOTUNE") == "1"
    key = (kind, _sizes(problem) if searching else None)
    if key not in _tuned:
        _tuned[key] = _tiles(problem, wanted, row_grad, exact, kind)
    tiles = _tuned[key]
    # Sizes decide about the form as well, and the device may have room for fewer of another form.
    form = kind, id(form_of(problem, inputs_of(problem, row_grad), tiles))
    if form not in _room:
        _room[form] = _workers(problem, wanted, row_grad, tiles)
    return tiles, _room[form]


def plan_of(
    problem: Problem,
    wanted: GradMask,
    row_grad: Tensor | None,
    tiles: Tiles,
    workers: int,
    kind: Hashable = None,
) -> Plan:
    """The plan with these tiles; `kind` tells dtypes, choices and absences apart."""
    inputs = inputs_of(problem, row_grad)
    form = form_of(problem, inputs, tiles)
    sizes = (*_sizes(problem), workers)
    # `_form` makes one form of the same values, so that its address stands for them. Sizes past
    # 2^31, of a table, are of another type.
    entry = (problem.per_row, id(form), tiles, kind, *(n >= 2**31 for n in sizes))
    return Plan(
        kernel=kernel_of(problem),
        grid=1 if interpreting() else workers,
        options=launch_options(tiles),
        form=form,
        entry=_entries.setdefault(entry, len(_entries)),
        results=results_of(problem, wanted, inputs),
        groups=(len(inputs), len(inputs) + len(Output._fields)),
        sizes=sizes,
        constants=constants_of(problem),
        floats=workspace_floats(problem, wanted, tiles, workers),
        integers=workspace_integers(problem, workers),
    )


def _sizes(problem: Problem) -> tuple[int, ...]:
    """The integers that a kernel takes, but for the workers."""
    weights = problem.rows.domain_weights
    table = () if isinstance(problem, SharedProblem) else (problem.item_table.shape[0],)
    domains = 0 if weights is None else weights.shape[0]
    return (problem.query.shape[0], *table, problem.num_candidates, domains)


def _tiles(
    problem: Problem, wanted: GradMask, row_grad: Tensor | None, exact: bool, kind: Hashable
) -> Tiles:
    block_d, dtype = power_of_two(problem.query.shape[1], 16), problem.query.dtype
    if not isinstance(problem, SharedProblem):
        return per_row(block_d, dtype)

    def seconds(tried: list[Tiles]) -> list[float]:
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as pool:
            ready = list(pool.map(lambda tiles: _compiles(problem, wanted, row_grad, tiles), tried))
        return [
            _seconds(problem, wanted, row_grad, tiles, kind) if fits else float("inf")
            for tiles, fits in zip(tried, ready, strict=True)
        ]

    ids = [t.dtype for pair in problem.id_pairs() for t in pair]
    target = None if problem.target is None else problem.target.dtype
    sizes = problem.query.shape[0], problem.candidates.shape[0]
    device = torch.cuda.get_device_name(problem.query.device)
    major = torch.cuda.get_device_capability()[0]
    form = (device, *sizes, *ids, target)
    return choose(block_d, dtype, major, exact, load_of(problem, row_grad), form, seconds)


def _workers(problem: Problem, wanted: GradMask, row_grad: Tensor | None, tiles: Tiles) -> int:
    """What the registers and the shared memory of the compiled kernel leave room for."""
    device = torch.cuda.get_device_properties(problem.query.device)
    most = device.multi_processor_count * tiles.ctas_per_sm
    plan = plan_of(problem, wanted, row_grad, tiles, most)
    compiled = _launch(problem, wanted, row_grad, plan, warm_up=True)
    compiled._init_handles()
    registers = -(-compiled.n_regs // 8) * 8 * tiles.warps * 32
    shared = compiled.metadata.shared + 1024  # of which the driver takes one for itself
    fit = min(65536 // registers, device.shared_memory_per_multiprocessor // shared)
    fit = min(fit, _resident(compiled, tiles.warps * 32) or fit)
    return min(device.multi_processor_count * max(1, min(tiles.ctas_per_sm, fit)), MAX_WORKERS)


def _resident(compiled: Any, threads: int) -> int | None:
    """How many programs the driver lets run at once on a multiprocessor; None where it is silent.

    The driver fails a cooperative launch of more, also where a tool such as compute-sanitizer adds
    instructions of its own.
    """
    try:
        ask = ctypes.CDLL("libcuda.so.1").cuOccupancyMaxActiveBlocksPerMultiprocessor
    except (OSError, AttributeError):
        return None
    found = ctypes.c_int(0)
    function, shared = ctypes.c_void_p(compiled.function), compiled.metadata.shared
    status = ask(ctypes.byref(found), function, ctypes.c_int(threads), ctypes.c_size_t(shared))
    return found.value if status == 0 else None


def _compiles(problem: Problem, wanted: GradMask, row_grad: Tensor | None, tiles: Tiles) -> bool:
    """Compile the kernel, which lets other threads run; whether it fits the device."""
    from triton.runtime.errors import OutOfResources

    try:
        with torch.cuda.device(problem.query.device):  # a thread has a current one of its own
            _workers(problem, wanted, row_grad, tiles)
    except OutOfResources:
        return False
    return True


def _seconds(
    problem: Problem, wanted: GradMask, row_grad: Tensor | None, tiles: Tiles, kind: Hashable
) -> float:
    """The median time of a call with these tiles, which have been compiled."""
    from triton.testing import do_bench

    workers = _workers(problem, wanted, row_grad, tiles)
    plan = plan_of(problem, wanted, row_grad, tiles, workers, kind)
    return do_bench(lambda: _launch(problem, wanted, row_grad, plan), return_mode="median")


def scaled(
    gradients: Sequence[Tensor],
    upstream: Tensor,
    dtypes: list[torch.dtype],
    in_place: bool = False,
) -> list[Tensor]:
    """All gradients times the upstream gradient of the loss, in one launch."""
    run = _scale().scaled
    if not gradients or interpreting():
        return run(gradients, upstream, dtypes, in_place)
    return on(upstream.device, run, gradients, upstream, dtypes, in_place)


@functools.cache
def _scale() -> Any:
    from dwl_kernels.backends.triton.kernels import scale_gradients as triton_scale

    return triton_scale


def takes_table(source: Tensor, dtype: torch.dtype) -> bool:
    """Whether `table_gradient` sums such rows for a table of such a dtype."""
    return source.shape[1] <= MAX_TABLE_D


def table_gradient(
    source: Tensor,  # [R, D]
    ids: list[Tensor],  # each [R, J]
    coefficients: list[Tensor],  # each [R, J], or none at all for 1
    table_rows: int,
    dtype: torch.dtype,
    compact: bool,
) -> tuple[Tensor, Tensor]:
    """As `chunked.table_gradient`."""
    from dwl_kernels.backends.triton.kernels import table_gradient as triton_table

    arguments = (source, ids, coefficients, table_rows, dtype, compact)
    if interpreting():
        with one_at_a_time:
            return triton_table.table_gradient(*arguments)
    return on(source.device, triton_table.table_gradient, *arguments)
