"""The Triton backend for wide embeddings: matrix products by the vendor's BLAS, the rest in a pass.

Above 256 elements a tile of sums does not fit the registers that the one-launch kernel has, and the
products are most of the work anyway. So a block of rows at a time passes through

    logits = q c^T        ``exponentials_kernel``        sum_j e_ij c_j = e c
    ``gradients_kernel``  dc += e^T (share q)

while its logits lie in the L2 cache: 6 B N D operations, nothing computed twice. `kernels.wide` has
the device side. What is linear in the rows, `rows` does.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwl_kernels.backends.triton.launch import entry_of, launch
from dwl_kernels.backends.triton.specialize import (
    common,
    form_of,
    id_pairs_of,
    inputs_of,
    interpreting,
    power_of_two,
)
from dwl_kernels.backends.triton.tiles import Tiles
from dwl_kernels.backends.triton.wide_dual import Pulled, pulled
from dwl_kernels.core.candidates import log_q_of_candidates, log_q_of_positives
from dwl_kernels.core.problem import GradMask, Output, Problem, RowOptions, SharedProblem
from dwl_kernels.core.rows import Gradients, Prepared, clear_padding, finish
from dwl_kernels.core.rows import prepare as prepare_rows

# Logits of a block: 32 MB of float32 and 16 MB of 16-bit exponentials, about the L2 of an H200. A
# block of fewer rows would read and write dc more often than its products can hide.
BLOCK_ELEMENTS = 1 << 23
LEAST_ROWS = 512
MOST_ELEMENTS = 1 << 27  # however many candidates there are: 0.8 GB
ALIGN_ROWS = 128  # a tile of the BLAS


class Work(NamedTuple):
    """Rows and candidates, or elements of an embedding, that programs take at a time."""

    rows: int  # of `exponentials`: what belongs to a candidate is read once for all of them
    candidates: int
    width: int
    warps: int


class Interpreter(NamedTuple):
    """What takes the place of the numbers above where TRITON_INTERPRET=1."""

    work: Work
    block_rows: int


WORK = Work(4, 1024, 512, 8)
INTERPRETER = Interpreter(Work(16, 64, 128, 4), block_rows=48)  # small problems have several blocks


@functools.cache  # a call of the one-launch form asks as well
def asked() -> bool:
    """Whether the wide form takes narrow embeddings too, to be measured beside the other form."""
    return os.environ.get("DWL_KERNELS_WIDE") == "1"


def unsupported_part(problem: Problem) -> str | None:
    """What of a problem is not for this form; None where it takes it."""
    if not isinstance(problem, SharedProblem):
        return "candidates by row"
    return None


@torch.no_grad()
def solve(
    problem: Problem,
    wanted: GradMask,
    row_grad: Tensor | None = None,  # [B], gradient of the row losses of reduction "none"
) -> Output:
    """The loss and the wanted gradients, with the logits of a block of rows in memory at a time."""
    assert isinstance(problem, SharedProblem)  # see `unsupported_part`
    prepared, pull = prepare_rows(problem, row_grad), None
    if problem.dual is not None:
        pull, prepared = pulled(problem, problem.dual, prepared)
    call = prepare(problem, prepared, pull, wanted, row_grad)
    for first, stop in call.blocks:
        call.run(first, stop)
    kernels, found = device_side(), call.outputs
    d_tau = call.arrays[kernels.D_TAU.value] if wanted.temperature else None
    if d_tau is not None and pull is not None:
        d_tau = d_tau * pull.factor
    d_candidates = found.candidates
    if d_candidates is not None:
        clear_padding(problem, prepared.active, d_candidates)
    gradients = Gradients(
        query=found.query,
        positive=found.positive,
        candidates=d_candidates,
        candidate_log_q=found.candidate_log_q,
        tau=d_tau,
    )
    row_loss = call.arrays[kernels.ROW_LOSS.value]
    return finish(problem, wanted, prepared, row_grad, row_loss, gradients)


class Launched(NamedTuple):
    """A kernel and what all of its launches in a call share."""

    kernel: Any
    entry: Hashable  # of `launch`
    groups: tuple[Any, Any, Any, Any]  # inputs, outputs, columns, block
    tensors: tuple[Tensor | None, ...]  # all of them
    form: Any
    shape: Any
    sizes: tuple[int, ...]
    options: dict[str, Any]

    def __call__(self, programs: int, first: int, stop: int) -> None:
        """Rows ``first : stop``."""
        arguments = functools.partial(self.arguments, first, stop)
        launch(self.kernel, programs, self.entry, self.tensors, arguments, self.options)

    def arguments(self, first: int, stop: int, t: Sequence[Any]) -> tuple[Any, ...]:
        inputs, outputs, columns, block = self.groups
        if t is not self.tensors:  # names are for the compiler, the launcher takes addresses
            rest = iter(t)
            inputs, outputs, columns, block = (
                tuple(islice(rest, len(group))) for group in self.groups
            )
            call = inputs, outputs, self.form
        else:
            call = common().Call(inputs, outputs, self.form)
        return call, columns, block, self.shape, first, stop, *self.sizes


class Call(NamedTuple):
    """A call: its results, and what makes them, a block of rows at a time."""

    run: Callable[[int, int], None]
    blocks: list[tuple[int, int]]
    arrays: Tensor  # [NUM_ROW_ARRAYS, B]
    outputs: Any  # of the kernels
    launched: tuple[Launched, ...]


def prepare(
    problem: SharedProblem,
    prepared: Prepared,
    pull: Pulled | None,
    wanted: GradMask,
    row_grad: Tensor | None,
) -> Call:
    """Everything but the launches."""
    kernels = device_side()
    p, dtype = problem, problem.dtypes.accumulate
    rows, d = p.query.shape
    work = INTERPRETER.work if interpreting() else WORK
    n = p.num_candidates
    at_once = min(work.candidates, power_of_two(n, 16))
    stride = -(-n // at_once) * at_once
    blocks = list(row_blocks(rows, stride))
    size = blocks[0][1]

    flat = flattened(p, prepared)
    inputs = inputs_of(flat, row_grad)
    query, candidates = inputs.query, inputs.candidates
    assert query is not None
    assert candidates is not None
    want_query = wanted.query or wanted.temperature
    keep = want_query or wanted.candidates or wanted.candidate_log_q

    def new(want: bool, *shape: int, of: torch.dtype = dtype) -> Tensor | None:
        return query.new_empty(shape, dtype=of) if want else None

    arrays = query.new_empty(kernels.NUM_ROW_ARRAYS.value, rows, dtype=dtype)
    outputs = common().Outputs(
        loss=None,
        query=new(wanted.query, rows, d, of=p.dtypes.gradient),
        positive=new(wanted.positive and p.positive is not None, rows, d, of=p.dtypes.gradient),
        candidates=torch.zeros_like(candidates, dtype=dtype) if wanted.candidates else None,
        temperature=arrays if wanted.temperature else None,
        domain_weights=None,
        candidate_log_q=query.new_zeros(n, dtype=dtype) if wanted.candidate_log_q else None,
    )
    logits = query.new_empty(size, stride, dtype=dtype)
    logits[:, n:] = 0  # nobody writes there, and `shift` makes nothing of it
    block = kernels.Block(
        logits=logits,
        exponentials=new(True, size, stride, of=query.dtype) if keep else logits,
        weighted=new(want_query, size, d),
        query=new(wanted.candidates, size, d, of=query.dtype),
        arrays=arrays,
        norm=prepared.norm,
        own=None if p.target is None else p.own_columns(),
        unscale=new(query.dtype == torch.float16, 1),
    )
    product = new(wanted.candidates and query.dtype == torch.float16, n, d)
    columns = columns_of(p, prepared.active, stride)
    form = form_of(flat, inputs, Tiles(16, 16, 16, 16, 1, 1, work.warps, 1))
    groups = (inputs, outputs, columns, block)
    tensors = tuple(tensor for group in groups for tensor in group)
    options = {"num_warps": work.warps, "enable_fp_fusion": True}  # Triton 3.10 changes the default
    width = min(work.width, power_of_two(d, 16))

    def launched(kernel: Any, *shape: int) -> Launched:
        entry = entry_of(kernel, (id(form), *shape, at_once, keep), tensors)
        sizes = rows, n, stride // at_once
        constants = constants_of(*shape, width, p.in_batch, keep, at_once)
        return Launched(kernel, entry, groups, tensors, form, constants, sizes, options)

    exponentials = launched(kernels.exponentials_kernel, work.rows, at_once)
    gradients = launched(kernels.gradients_kernel, work.rows, at_once)
    log_q = launched(kernels.columns_kernel, 16, min(at_once, 128))
    across = candidates.T
    second = new(pull is not None, size, n)
    programs_of_columns = -(-n // min(at_once, 128))

    @functools.cache  # all blocks but the last are of one size; a view takes a microsecond
    def views(size: int) -> tuple[Any, ...]:
        e = block.exponentials[:size, :n]
        cut = (None if t is None else t[:size] for t in (block.weighted, block.query))
        return block.logits[:size, :n], e, e.T, *cut

    def run(first: int, stop: int) -> None:
        logits, e, e_across, weighted, shares = views(stop - first)
        programs = -(-(stop - first) // work.rows)
        multiply(query[first:stop], across, logits)
        if pull is not None:
            products = second[: stop - first]  # type: ignore[index]
            multiply(pull.pull[first:stop], across, products)
            pull.add_to(logits, products, slice(first, stop))
        exponentials(programs, first, stop)
        if want_query:
            multiply(e, candidates, weighted)
        if keep or outputs.positive is not None:
            gradients(programs, first, stop)
        if product is not None:
            multiply(e_across, shares, product)
            outputs.candidates.addcmul_(product, block.unscale)
        elif wanted.candidates:
            add_product(outputs.candidates, e_across, shares)
        if wanted.candidate_log_q:
            log_q(programs_of_columns, first, stop)

    return Call(run, blocks, arrays, outputs, (exponentials, gradients, log_q))


def row_blocks(rows: int, stride: int) -> Iterator[tuple[int, int]]:
    """Blocks of rows of about one size, as many at once as L2 has room for."""
    size = max(min(max(BLOCK_ELEMENTS // stride, LEAST_ROWS), MOST_ELEMENTS // stride), 1)
    if interpreting():
        size = INTERPRETER.block_rows
    elif size < rows:
        even = -(-rows // -(-rows // size))
        size = min(size, -(-even // ALIGN_ROWS) * ALIGN_ROWS)
    for first in range(0, rows, size):
        yield first, min(first + size, rows)


def flattened(problem: SharedProblem, prepared: Prepared) -> SharedProblem:
    """The same problem as the kernels are to see it: all that weighs a row is its example weight.

    Padded rows hold anything, so in a batch their positives become zeros: `columns_of` takes them
    out of the candidates, but they still are in the products.
    """
    p, active = problem, prepared.active
    candidates = p.candidates
    if p.in_batch and active is not None:
        candidates = candidates.clone()
        candidates[: len(active)].masked_fill_(~active[:, None], 0)
    refined = p.rows.correction == "refined"
    return p._replace(
        candidates=candidates,
        dual=None,  # `Pulled` has it
        target=None,  # `Block.own` has them
        positive_log_q=p.positive_log_q if refined else log_q_of_positives(p),
        rows=p.rows._replace(
            domain_ids=None,
            domain_weights=None,
            example_weights=prepared.weight,
            temperature=prepared.tau,
            tau=1.0,
            ignore_index=RowOptions().ignore_index,  # the same kernel for all
        ),
        skip_threshold=0.0,
    )


def columns_of(problem: SharedProblem, active: Tensor | None, stride: int) -> Any:
    """What is known of the candidates, with room for the places past the last."""
    p, dtype = problem, problem.dtypes.accumulate
    n, device = len(p.candidates), p.query.device
    log_q = log_q_of_candidates(p)
    padded = ~active if p.in_batch and active is not None else None
    shift = counts = None
    if log_q is not None or padded is not None or stride > n:
        shift = torch.full((stride,), torch.inf, dtype=dtype, device=device)
        shift[:n] = 0 if log_q is None else log_q if is_exact(p) else log_q * (1 / math.log(2))
        if padded is not None:
            shift[: len(padded)].masked_fill_(padded, torch.inf)
    ids = [one if one is None else one.contiguous() for _, one in id_pairs_of(p)]
    if stride > n:
        pad = torch.nn.functional.pad
        ids = [one if one is None else pad(one, (0, stride - n)) for one in ids]
    if p.rows.correction == "refined":
        counts = torch.zeros(stride, dtype=dtype, device=device)
        counts[:n] = 1 if log_q is None else (log_q != torch.inf)
        if padded is not None:
            counts[: len(padded)].masked_fill_(padded, 0)
    return device_side().Columns(shift, *ids, counts)


def is_exact(problem: Problem) -> bool:
    """Whether logits are computed as `eager` does, as `Form.EXACT` says."""
    dtype = problem.query.dtype
    return dtype == torch.float64 or (
        dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    )


def multiply(a: Tensor, b: Tensor, to: Tensor) -> None:
    """``to = a b``, with sums and the result in the dtype of `to`."""
    if a.dtype == to.dtype:
        torch.mm(a, b, out=to)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=to.dtype, out=to)
    else:  # the interpreter: a CPU has no such product
        torch.mm(a.to(to.dtype), b.to(to.dtype), out=to)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a b``, likewise."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif not a.is_cuda:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    elif adds_wide(a.device.index, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))


@functools.cache
def adds_wide(device: int, dtype: torch.dtype) -> bool:
    """Whether PyTorch adds a product of 16-bit matrices to a float32 one; not all versions do."""
    total = torch.zeros(16, 16, device=f"cuda:{device}")
    a = torch.zeros(16, 16, device=total.device, dtype=dtype)
    try:
        torch.addmm(total, a, a, out_dtype=total.dtype, out=total)
    except RuntimeError:
        return False
    return True


@functools.cache
def constants_of(*values: Any) -> Any:
    import triton.language as tl

    return device_side().Shape(*(tl.constexpr(value) for value in values))


@functools.cache
def device_side() -> Any:
    from dwl_kernels.backends.triton.kernels import wide as triton_wide_kernels

    return triton_wide_kernels
