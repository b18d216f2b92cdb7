"""The sums over rows: the loss, and the gradients of a scalar temperature and of domain weights.

`worker_sum` serves the prologue too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dwl_kernels.backends.triton.kernels.common import (
    BLOCK,
    CHUNK,
    D_TAU,
    LOSS_SUM,
    ROW_LOSS,
    TAU_SUM,
    TERM,
)
from dwl_kernels.backends.triton.kernels.memory import row_at
from dwl_kernels.backends.triton.kernels.schedule import slice_of


@triton.jit
def worker_sum(which, ctx):
    """The sum over all workers of what each left, in a fixed order."""
    worker = tl.arange(0, ctx.form.WORKERS)
    left = tl.load(
        ctx.space.sums + which * ctx.sizes.workers + worker,
        mask=worker < ctx.sizes.workers,
        other=0.0,
    )
    return tl.sum(left, 0)


@triton.jit
def sum_rows(worker, ctx):
    """The sums over the worker's slice: loss, dL/dtau, and for every domain."""
    sizes = ctx.sizes
    space = ctx.space
    first, stop = slice_of(worker, sizes.count, sizes.workers)
    dtype: tl.constexpr = ctx.form.DTYPE
    loss = tl.zeros([BLOCK], dtype)
    d_tau = tl.zeros([BLOCK], dtype)
    for start in range(first, stop, BLOCK):
        place = start + tl.arange(0, BLOCK)
        arrays = space.rows + place
        if ctx.form.REDUCTION != "none":
            loss += tl.load(arrays + TERM * sizes.stride, mask=place < stop, other=0.0)
        if (ctx.outputs.temperature is not None) and (ctx.form.TEMPERATURE == "scalar"):
            d_tau += tl.load(arrays + D_TAU * sizes.stride, mask=place < stop, other=0.0)
    tl.store(space.sums + LOSS_SUM * sizes.workers + worker, tl.sum(loss, 0))
    tl.store(space.sums + TAU_SUM * sizes.workers + worker, tl.sum(d_tau, 0))
    if ctx.outputs.domain_weights is not None:
        for start in range(0, sizes.domains, ctx.form.DOMAINS):
            domain = start + tl.arange(0, ctx.form.DOMAINS)
            losses, rows = sum_domains(domain, first, stop, ctx)
            pointer = space.domains + worker * sizes.domains + domain
            tl.store(pointer, losses, mask=domain < sizes.domains)
            pointer += sizes.workers * sizes.domains
            tl.store(pointer, rows, mask=domain < sizes.domains)


@triton.jit
def sum_domains(domain, first, stop, ctx):
    """For some domains: the sum of ``share l`` and of ``share`` over the rows of a slice."""
    dtype: tl.constexpr = ctx.form.DTYPE
    losses = tl.zeros([ctx.form.DOMAINS], dtype)
    rows = tl.zeros([ctx.form.DOMAINS], dtype)
    for start in range(first, stop, CHUNK):
        place = start + tl.arange(0, CHUNK)
        inside = place < stop
        row = row_at(tl.minimum(place, stop - 1), ctx)
        share = tl.where(inside, 1.0, 0.0).to(dtype)
        if ctx.inputs.example_weights is not None:
            share *= tl.load(ctx.inputs.example_weights + row)
        if ctx.inputs.row_grad is not None:
            share *= tl.load(ctx.inputs.row_grad + row)
        present = tl.zeros([CHUNK], dtype)
        slots = ctx.inputs.domain_ids + row.to(tl.int64) * ctx.form.SLOTS
        for slot in range(ctx.form.SLOTS):
            given = tl.load(slots + slot)
            present += tl.where((given >= 0) & (given < ctx.sizes.domains), 1.0, 0.0)
        share /= tl.maximum(present, 1.0)
        loss = share * tl.load(
            ctx.space.rows + ROW_LOSS * ctx.sizes.stride + place, mask=inside, other=0.0
        )
        for slot in range(ctx.form.SLOTS):
            here = (tl.load(slots + slot)[:, None] == domain[None, :]) & inside[:, None]
            losses += tl.sum(tl.where(here, loss[:, None], 0.0), 0)
            rows += tl.sum(tl.where(here, share[:, None], 0.0), 0)
    return losses, rows


@triton.jit
def finish_sums(worker, ctx):
    """Worker 0 writes the loss and dL/dtau; the domains are shared out."""
    sizes = ctx.sizes
    loss = worker_sum(LOSS_SUM, ctx)
    if (ctx.form.REDUCTION == "mean") or (ctx.form.REDUCTION == "weighted_mean"):
        loss = tl.where(sizes.norm == 0, 0.0, loss / sizes.norm)
    if worker == 0:
        if ctx.form.REDUCTION != "none":
            tl.store(ctx.outputs.loss, loss)
        if (ctx.outputs.temperature is not None) and (ctx.form.TEMPERATURE == "scalar"):
            tl.store(ctx.outputs.temperature, worker_sum(TAU_SUM, ctx))
    if ctx.outputs.domain_weights is not None:
        for number in range(worker, tl.cdiv(sizes.domains, ctx.form.DOMAINS), sizes.workers):
            domain = number * ctx.form.DOMAINS + tl.arange(0, ctx.form.DOMAINS)
            inside = domain < sizes.domains
            losses = tl.zeros([ctx.form.DOMAINS], loss.dtype)
            rows = tl.zeros([ctx.form.DOMAINS], loss.dtype)
            for start in range(0, sizes.workers, CHUNK):
                other = start + tl.arange(0, CHUNK)
                keep = (other < sizes.workers)[:, None] & inside[None, :]
                pointer = ctx.space.domains + other[:, None] * sizes.domains + domain[None, :]
                losses += tl.sum(tl.load(pointer, mask=keep, other=0.0), 0)
                if ctx.form.REDUCTION == "weighted_mean":
                    pointer += sizes.workers * sizes.domains
                    rows += tl.sum(tl.load(pointer, mask=keep, other=0.0), 0)
            if ctx.form.REDUCTION == "weighted_mean":
                losses -= loss * rows  # the norm moves with the weights
            if (ctx.form.REDUCTION == "mean") or (ctx.form.REDUCTION == "weighted_mean"):
                losses = tl.where(sizes.norm == 0, 0.0, losses / sizes.norm)
            tl.store(ctx.outputs.domain_weights + domain, losses, mask=inside)
