"""The gradient of a table: a row's is the sum, over its places, of coefficient times source row.

Places are sorted by id (`torch.sort`, stable), so that those of one id lie in a range. A program
owns ROWS ids and adds up their ranges, LANES places of every id at a time. Each row is written
once, in an order that depends on nothing but the ids.

An id drawn a hundred thousand times must not keep one program for so long. Where a chunk of SPAN
sorted places has one id throughout, a program of its own sums it beforehand, and where SPAN such
chunks do, once more. A range then is its chunks of SPAN², of SPAN, and less than 4 SPAN others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwl_kernels.backends.triton.launch import entry_of, launch, specialised
from dwl_kernels.core.problem import accumulate_dtype

BLOCK = 1024  # places that a program lists
SPAN = 64


class Form(NamedTuple):
    """What the kernels that sum are compiled for; every field a `tl.constexpr`."""

    D: Any
    BLOCK_D: Any  # the power of two that holds D
    ROWS: Any  # ids of a program
    LANES: Any  # places of each that are added at a time
    SPAN: Any
    NUM: Any  # pieces
    NARROW: Any  # places fit into 32 bits


@triton.jit(do_not_specialize=["table_rows"])
def list_kernel(
    ids,  # tuple of pointers, each [R, J]
    coefficients,  # the same, or ()
    lengths,  # R J of each
    keys,  # [M] ids of all places, one after the other; `table_rows` where a place goes nowhere
    weights,  # [M] their coefficients, or None
    table_rows,
    BLOCK: tl.constexpr,
    NUM: tl.constexpr,
):
    program = tl.program_id(0)
    first = 0
    start = tl.cast(0, tl.int64)
    for k in tl.static_range(NUM):
        blocks = tl.cdiv(lengths[k], BLOCK)
        if (program >= first) & (program < first + blocks):
            at = tl.cast(program - first, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = at < lengths[k]
            id = tl.load(ids[k] + at, mask=inside, other=-1)
            counts = (id >= 0) & (id < table_rows)
            if weights is not None:
                weight = tl.load(coefficients[k] + at, mask=inside, other=0.0)
                tl.store(weights + start + at, weight, mask=inside)
                counts = counts & (weight != 0)
            key = tl.where(counts, id, table_rows).to(keys.dtype.element_ty)
            tl.store(keys + start + at, key, mask=inside)
        first += blocks
        start += lengths[k]


@triton.jit
def add_range(total, first, last, source, order, weights, lengths, widths, form):
    """`total` ``[ROWS, BLOCK_D]`` plus the source rows at ``first : last`` of each range.

    The source rows are those of the sorted places, or without `order` the next ones.
    """
    column = tl.arange(0, form.BLOCK_D)[None, None, :]
    longest = tl.max(last - first, 0)
    for turn in range(0, longest, form.LANES):
        at = first[None, :] + turn + tl.arange(0, form.LANES)[:, None]
        inside = at < last[None, :]
        if order is None:
            row = at
        else:
            place = tl.load(order + at, mask=inside, other=0)
            if form.NARROW:
                place = place.to(tl.int32)
            row = source_row(place, lengths, widths, form.NUM)
        pointer = source + row.to(tl.int64)[:, :, None] * form.D + column
        keep = inside[:, :, None] & (column < form.D)
        value = tl.load(pointer, mask=keep, other=0.0).to(total.dtype)
        if weights is not None:
            weight = tl.load(weights + place, mask=inside, other=0.0).to(total.dtype)
            value *= weight[:, :, None]
        total += tl.sum(value, 0)
    return total


@triton.jit
def source_row(place, lengths, widths, NUM: tl.constexpr):
    """The row of the source that a place belongs to: pieces of `widths` places a row."""
    row = place // widths[0]
    start = lengths[0]
    for k in tl.static_range(1, NUM):
        row = tl.where(place < start, row, (place - start) // widths[k])
        start += lengths[k]
    return row


@triton.jit(do_not_specialize=["num", "table_rows"])
def chunk_kernel(
    keys,  # [M] sorted
    parts,  # [num, D] the sums of the chunks that have one id throughout
    source,  # [R, D], or the parts of the chunks of a SPAN-th of the size
    order,  # [M] the place that each key came from, or None
    weights,  # [M] by place, or None
    num,
    table_rows,
    lengths,
    widths,
    form,
    SIZE: tl.constexpr,  # keys of a chunk
):
    chunk = tl.cast(tl.program_id(0), tl.int64) * form.ROWS + tl.arange(0, form.ROWS)
    inside = chunk < num
    low = tl.load(keys + chunk * SIZE, mask=inside, other=0)
    high = tl.load(keys + chunk * SIZE + SIZE - 1, mask=inside, other=-1)
    whole = (low == high) & (low < table_rows)
    first = chunk * form.SPAN
    last = tl.where(whole, first + form.SPAN, first)
    total = tl.zeros([form.ROWS, form.BLOCK_D], parts.dtype.element_ty)
    total = add_range(total, first, last, source, order, weights, lengths, widths, form)
    column = tl.arange(0, form.BLOCK_D)[None, :]
    keep = whole[:, None] & (column < form.D)
    tl.store(parts + chunk[:, None] * form.D + column, total, mask=keep)


@triton.jit(do_not_specialize=["num", "table_rows"])
def sum_kernel(
    values,  # [num, D]
    bounds,  # [num + 1] row i is the sum of the sorted places bounds[i] : bounds[i + 1]
    source,  # [R, D]
    order,  # [M]
    weights,  # [M], or None
    parts,  # [M // SPAN, D]
    sums,  # [M // SPAN ** 2, D]
    num,
    table_rows,
    lengths,
    widths,
    form,
):
    SPAN: tl.constexpr = form.SPAN
    r = tl.cast(tl.program_id(0), tl.int64) * form.ROWS + tl.arange(0, form.ROWS)
    inside = r < num
    first = tl.load(bounds + r, mask=inside, other=0)
    last = tl.load(bounds + r + 1, mask=inside, other=0)
    total = tl.zeros([form.ROWS, form.BLOCK_D], parts.dtype.element_ty)
    # Whole chunks of a range, [a, b), and of these the whole chunks of chunks, [c, d).
    a = (first + SPAN - 1) // SPAN
    b = last // SPAN
    some = a < b
    head = tl.where(some, a * SPAN, last)
    total = add_range(total, first, head, source, order, weights, lengths, widths, form)
    if tl.max(some.to(tl.int32), 0) > 0:
        b = tl.maximum(a, b)
        c = (a + SPAN - 1) // SPAN
        d = b // SPAN
        many = c < d
        head = tl.where(many, c * SPAN, b)
        total = add_range(total, a, head, parts, None, None, lengths, widths, form)
        end = tl.where(many, d, c)
        total = add_range(total, c, end, sums, None, None, lengths, widths, form)
        head = tl.where(many, d * SPAN, b)
        total = add_range(total, head, b, parts, None, None, lengths, widths, form)
        head = tl.where(some, b * SPAN, last)
        total = add_range(total, head, last, source, order, weights, lengths, widths, form)
    column = tl.arange(0, form.BLOCK_D)[None, :]
    keep = inside[:, None] & (column < form.D)
    value = total.to(values.dtype.element_ty)
    tl.store(values + r[:, None] * form.D + column, value, mask=keep)


def table_gradient(
    source: Tensor,  # [R, D]
    ids: list[Tensor],  # each [R, J]
    coefficients: list[Tensor],  # each [R, J], or none at all for 1
    table_rows: int,
    dtype: torch.dtype,
    compact: bool,
) -> tuple[Tensor, Tensor]:
    """As :func:`dwl_kernels.backends.chunked.table_gradient`."""
    wide = accumulate_dtype(dtype)
    lengths = tuple(one.numel() for one in ids)
    widths = tuple(one.shape[1] for one in ids)
    keys, weights = _listed(ids, coefficients, lengths, table_rows, wide)
    keys, order = keys.sort(stable=True)
    bounds, distinct = _bounds(keys, table_rows, compact, ids[0].dtype)
    source, d = source.contiguous(), source.shape[1]
    # The interpreter cuts bits off where bfloat16 is to be rounded.
    held = wide if source.device.type == "cpu" else dtype
    values = source.new_empty((len(bounds) - 1, d), dtype=held)
    if values.numel() == 0 or len(keys) == 0:
        return values.zero_().to(dtype), distinct
    form = _form(d, SPAN, len(ids), len(keys) < 2**31)

    def run(kernel: Any, rows: int, tensors: Sequence[Tensor | None], *constants: int) -> None:
        numbers = (rows, table_rows, lengths, widths, form, *constants)
        long = (rows >= 2**31, table_rows >= 2**31)
        programs = triton.cdiv(rows, form.ROWS.value)
        key = (id(form), long, specialised(lengths), specialised(widths), constants)
        entry = entry_of(kernel, key, tensors)
        launch(kernel, programs, entry, tensors, lambda t: (*t, *numbers), {"num_warps": 1})

    parts = []
    below: tuple[Tensor | None, ...] = (source, order, weights)
    for size in (SPAN, SPAN * SPAN):
        sums = source.new_empty((len(keys) // size, d), dtype=wide)
        if len(sums):
            run(chunk_kernel, len(sums), (keys, sums, *below), size)
        parts.append(sums)
        below = (sums, None, None)
    run(sum_kernel, len(values), (values, bounds, source, order, weights, *parts))
    return values.to(dtype), distinct


def _listed(
    ids: list[Tensor],
    coefficients: list[Tensor],
    lengths: tuple[int, ...],
    table_rows: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """The id and the coefficient of every place; the table's length where a place goes nowhere."""
    keys = ids[0].new_empty(sum(lengths), dtype=_key_dtype(table_rows))
    weights = keys.new_empty(len(keys), dtype=dtype) if coefficients else None
    blocks = sum(triton.cdiv(n, BLOCK) for n in lengths)
    if blocks:
        pieces = tuple(one.contiguous() for one in ids)
        factors = tuple(one.contiguous() for one in coefficients)
        tensors = (*pieces, *factors, keys, weights)
        num = len(ids)
        entry = entry_of(list_kernel, (table_rows >= 2**31, specialised(lengths)), tensors)

        def arguments(t: Sequence[Any]) -> tuple[Any, ...]:
            # Without coefficients the places stand for them, unread.
            pair = tuple(t[:num]), tuple(t[num:-2]) or tuple(t[:num])
            return *pair, lengths, t[-2], t[-1], table_rows, BLOCK, num

        launch(list_kernel, blocks, entry, tensors, arguments, {})
    return keys, weights


def _key_dtype(table_rows: int) -> torch.dtype:
    """The narrowest of the ids up to `table_rows`: a radix sort passes once for each of its bytes.

    PyTorch's carries a place of 64 bits beside the key, so that with 16 bits it moves 5 / 12 of
    what it does with 32, and with those 3 / 8 of what it does with 64.
    """
    if table_rows < 2**15:
        return torch.int16
    return torch.int32 if table_rows < 2**31 - 1 else torch.int64


def _bounds(
    keys: Tensor, table_rows: int, compact: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Where the range of each output row begins and ends, and the ids if they are `compact`."""
    short = len(keys) < 2**31
    if not compact:
        rows = torch.arange(table_rows + 1, dtype=keys.dtype, device=keys.device)
        return torch.searchsorted(keys, rows, out_int32=short), keys.new_empty(0, dtype=dtype)
    distinct, counts = keys.unique_consecutive(return_counts=True)
    distinct = distinct[: int((distinct < table_rows).sum())]
    bounds = counts.cumsum(0, dtype=torch.int32 if short else torch.int64)[: len(distinct)]
    return torch.nn.functional.pad(bounds, (1, 0)), distinct.to(dtype)


@functools.cache
def _form(d: int, span: int, pieces: int, narrow: bool) -> Form:
    """A warp loads 1,024 elements at a time, 4 places of every id, as most ids have few."""
    block_d = triton.next_power_of_2(d)
    lanes = min(4, max(1, 1024 // block_d))
    rows = min(64, max(1, 1024 // (block_d * lanes)))
    values = (d, block_d, rows, lanes, span, pieces, narrow)
    return Form(*(tl.constexpr(value) for value in values))
