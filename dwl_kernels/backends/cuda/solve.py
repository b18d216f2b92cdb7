"""The CUDA kernel of ``csrc/cuda/``, from the host: for GPUs where Triton is missing or broken.

The kernel solves everything between the embeddings and their gradients in one cooperative launch.
What is linear in the rows, their weights before and the sums after it, `rows` does; nothing of it
waits for the device. Padded rows are packed away by a permutation whose length the kernel reads
from the device.

The emulator of the tests puts itself in the place of `unavailable_reason` and `launch` for CPU
tensors; all else is the same there.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from dwl_kernels.backends.cache import BuildError
from dwl_kernels.backends.cuda import build as cuda_build
from dwl_kernels.backends.cuda import variants as cuda_tiles
from dwl_kernels.backends.cuda.variants import MAX_D, Variant
from dwl_kernels.backends.device import unfit_reason
from dwl_kernels.core.candidates import log_q_of_candidates, log_q_of_positives
from dwl_kernels.core.problem import NO_ITEM, ROW_TENSORS, GradMask, Output, Problem, SharedProblem
from dwl_kernels.core.rows import Gradients, finish, prepare

MAX_LENGTH = (1 << 31) - (1 << 16)  # places are 32-bit numbers, offsets 64-bit ones
_PROBE = torch.bfloat16, 64  # compiled to see whether anything compiles
_MESSAGE_BYTES = 512
# The options of a row that `prepare` answers for. Any other is refused until the kernel knows it.
_ROW_OPTIONS = {"domain_ids", "domain_weights", "example_weights", "temperature"}
_UNKNOWN_OPTIONS = tuple(name for name in ROW_TENSORS if name not in _ROW_OPTIONS)


def unavailable_reason(device_type: str) -> str | None:
    """Why the kernel cannot run on such a device here and the mend; None where it can.

    Compiles a kernel on first use.
    """
    if device_type != "cuda":
        return f"it runs on CUDA tensors, and these are on {device_type}"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device; torch.cuda.is_available() must be true"
    index = torch.cuda.current_device()
    if (reason := unfit_reason(index)) is not None:
        return reason
    capability = torch.cuda.get_device_capability(index)
    return _does_not_build(cuda_tiles.variant(*_PROBE, capability), capability)


@functools.cache
def _does_not_build(variant: Variant, capability: tuple[int, int]) -> str | None:
    try:
        cuda_build.load(variant, capability)
    except BuildError as error:
        return str(error)
    return None


def unsupported_reason(problem: Problem) -> str | None:
    """Why the kernel does not take this problem; None where it does."""
    if not isinstance(problem, SharedProblem):
        return "it does not take candidates by row; backend='chunked' does"
    if problem.query.dtype not in cuda_tiles.MATH:
        return f"it does not take {problem.query.dtype}; backend='chunked' does"
    if problem.dual is not None:
        return "it does not take the dual scale; backend='chunked' does"
    if len(problem.id_pairs()) > 1:
        return "it does not take ids of items and of queries at once; backend='chunked' does"
    for name in _UNKNOWN_OPTIONS:
        if getattr(problem.rows, name) is not None:
            return f"it does not take {name}; backend='chunked' does"
    dim = problem.query.shape[1]
    if dim > MAX_D:
        return (
            f"it takes embeddings of at most {MAX_D} elements, and these have {dim}; "
            "backend='chunked' takes them"
        )
    if max(len(problem.query), len(problem.candidates)) > MAX_LENGTH:
        return f"it takes at most {MAX_LENGTH} rows or candidates; backend='chunked' takes more"
    return None


def solve(
    problem: Problem,
    wanted: GradMask,
    row_grad: Tensor | None = None,  # [B], gradient of the row losses of reduction "none"
) -> Output:
    """The loss and the wanted gradients, with no logits in memory."""
    assert isinstance(problem, SharedProblem)  # see `unsupported_reason`
    p, prepared = problem, prepare(problem, row_grad)
    order = count = candidate_order = candidate_count = None
    if prepared.active is not None:
        order, count = _packed(prepared.active)
        if p.in_batch:
            candidate_order, candidate_count = _packed_candidates(p, order, count)
    refined = p.rows.correction == "refined"
    log_q, removed = log_q_of_candidates(p), None
    if refined and log_q is not None:
        removed = log_q == torch.inf
        if p.in_batch and prepared.active is not None:  # padding is no candidate anyway
            removed[: len(p.query)] &= prepared.active
    row_ids, candidate_ids = next(iter(p.id_pairs()), (None, None))
    items = _items(row_ids, candidate_ids, removed)
    half = p.query.dtype == torch.float16
    narrowing = _narrowing(prepared.coefficient, prepared.tau) if half else None

    # What the kernel does not reach belongs to padding.
    make = torch.empty if order is None else torch.zeros

    def like(tensor: Tensor | None, want: bool, dtype: torch.dtype) -> Tensor | None:
        if not want or tensor is None:
            return None
        return make(tensor.shape, dtype=dtype, device=tensor.device)

    accumulate, gradient = p.dtypes
    row_loss = make(len(p.query), dtype=accumulate, device=p.query.device)
    gradients = Gradients(
        query=like(p.query, wanted.query, gradient),
        positive=like(p.positive, wanted.positive, gradient),
        candidates=like(p.candidates, wanted.candidates, gradient),
        candidate_log_q=like(p.candidate_log_q, wanted.candidate_log_q, accumulate),
        tau=like(row_loss, wanted.temperature, accumulate),
    )
    call = {
        "dim": p.query.shape[1],
        "row": Side.of(p.query.contiguous(), order, count),
        "candidate": Side.of(p.candidates.contiguous(), candidate_order, candidate_count),
        "positive": None if p.positive is None else p.positive.contiguous(),
        "own": None if p.target is None else _take(p.own_columns(), order),
        "tau": _take(prepared.tau, order),
        "coefficient": _take(prepared.coefficient, order),
        "positive_log_q": _take(p.positive_log_q if refined else log_q_of_positives(p), order),
        "candidate_log_q": _take(log_q, candidate_order),
        "row_ids": _take(row_ids, order, torch.int64),
        "candidate_ids": _take(items, candidate_order),
        "removed": None if removed is None else removed.sum(dtype=torch.int64).view(1),
        "narrowing": narrowing,
        "refined": refined,
        "row_loss": row_loss,
        "tau_gradient": gradients.tau,
        "query_gradient": gradients.query,
        "positive_gradient": gradients.positive,
        "candidate_gradient": gradients.candidates,
        "candidate_log_q_gradient": gradients.candidate_log_q,
    }
    launch(p, call)
    return finish(p, wanted, prepared, row_grad, row_loss, gradients)


def _packed(active: Tensor) -> tuple[Tensor, Tensor]:
    """The rows with those that are no padding first, ``[B]``, and how many they are, ``[1]``."""
    order = (~active).to(torch.uint8).sort(stable=True).indices
    return order, active.sum(dtype=torch.int64).view(1)


def _packed_candidates(
    problem: SharedProblem, order: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for the candidates of a batch, of which the first B are the positives."""
    rows, n = len(order), len(problem.candidates)
    place = torch.arange(n, device=order.device)
    positives = order[place.clamp(max=rows - 1)]
    others = (place - count + rows).clamp(max=n - 1)
    return torch.where(place < count, positives, others), count + (n - rows)


def _take(
    tensor: Tensor | None, order: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor | None:
    """An array of rows or candidates in the order of places."""
    if tensor is None:
        return None
    tensor = tensor.to(dtype or tensor.dtype)
    return tensor.contiguous() if order is None else tensor[order]


def _items(
    row_ids: Tensor | None, candidate_ids: Tensor | None, removed: Tensor | None
) -> Tensor | None:
    """The ids of the candidates; in place of -1, which is no item, an id that no row has.

    So the kernel compares and asks nothing more. Of B + 1 ids the rows cannot have all. Who is
    `removed` is no hit either: the kernel counts hits, and these are counted already.
    """
    if row_ids is None or candidate_ids is None:
        return None
    rows, first = len(row_ids), torch.iinfo(torch.int64).min
    ids, candidate_ids = row_ids.long(), candidate_ids.long()
    place = torch.where(ids < first + rows + 1, ids - first, rows + 1)
    taken = torch.zeros(rows + 2, dtype=torch.uint8, device=ids.device).index_fill_(0, place, 1)
    free = taken[: rows + 1].argmin() + first
    nobody = candidate_ids == NO_ITEM
    return torch.where(nobody if removed is None else nobody | removed, free, candidate_ids)


def _narrowing(coefficient: Tensor, tau: Tensor) -> Tensor:  # [1]
    """The power of two that brings the largest ``a / tau`` to the top of float16."""
    largest = torch.where(coefficient.isfinite(), coefficient / tau, 0.0).abs().amax()
    return torch.exp2(14 - torch.ceil(torch.log2(largest.clamp(1e-30, 1e30)))).view(1)


# `Side` and `Call` of csrc/cuda/call.h. Pointers keep nothing alive, the caller does.


class Side(ctypes.Structure):
    _fields_ = (
        ("embedding", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
        ("length", ctypes.c_int64),
    )

    @classmethod
    def of(cls, embedding: Tensor, order: Tensor | None, count: Tensor | None) -> Side:
        side = cls(_pointer(embedding), _pointer(order), _pointer(count), len(embedding))
        side.tensors = (embedding, order, count)
        return side


class _Call(ctypes.Structure):
    _fields_ = (
        ("dim", ctypes.c_int64),
        ("row", Side),
        ("candidate", Side),
        *((name, ctypes.c_void_p) for name in ("positive", "own", "tau", "coefficient")),
        *((name, ctypes.c_void_p) for name in ("positive_log_q", "candidate_log_q")),
        *((name, ctypes.c_void_p) for name in ("row_ids", "candidate_ids", "removed")),
        ("narrowing", ctypes.c_void_p),
        ("refined", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("row_loss", "tau_gradient", "query_gradient")),
        *((name, ctypes.c_void_p) for name in ("positive_gradient", "candidate_gradient")),
        ("candidate_log_q_gradient", ctypes.c_void_p),
        ("space", ctypes.c_void_p),
    )


def _pointer(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, Tensor) else value


def filled_call(
    problem: SharedProblem, fields: dict[str, Any], library: ctypes.CDLL, blocks: int
) -> tuple[ctypes.Structure, Tensor]:
    """The struct of a launch of so many blocks, and the workspace that it points to."""
    rows = ctypes.c_int64(len(problem.query))
    numbers = library.dwl_space(rows, ctypes.c_int64(blocks))
    space = torch.empty(numbers, dtype=problem.dtypes.accumulate, device=problem.query.device)
    return _Call(**{k: _pointer(v) for k, v in fields.items()}, space=space.data_ptr()), space


def launch(problem: SharedProblem, fields: dict[str, Any]) -> None:
    """Write the results that a call names, by the fields of `_Call`."""
    device = problem.query.device
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        capability = torch.cuda.get_device_capability(index)
        found = cuda_tiles.variant(problem.query.dtype, problem.query.shape[1], capability)
        library = cuda_build.load(found, capability)
        blocks = _blocks(found, capability, index)
        call, _space = filled_call(problem, fields, library, blocks)
        stream = torch.cuda.current_stream(device).cuda_stream
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        failed = library.dwl_launch(
            ctypes.byref(call),
            ctypes.c_int(index),
            ctypes.c_void_p(stream),
            ctypes.c_int64(blocks),
            message,
            ctypes.c_int64(_MESSAGE_BYTES),
        )
    if failed:
        raise RuntimeError(f"backend 'cuda' on {device}: {message.value.decode()}")


@functools.cache
def _blocks(variant: Variant, capability: tuple[int, int], index: int) -> int:
    """How many blocks of the kernel the device runs at once."""
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    blocks = ctypes.c_int64()
    library = cuda_build.load(variant, capability)
    if library.dwl_blocks(
        ctypes.c_int(index), ctypes.byref(blocks), message, ctypes.c_int64(_MESSAGE_BYTES)
    ):
        raise RuntimeError(f"backend 'cuda' on cuda:{index}: {message.value.decode()}")
    if blocks.value == 0:
        raise RuntimeError(f"backend 'cuda' on cuda:{index}: no block of {variant} fits")
    return blocks.value
