"""The versions that are compared: each computes the loss, and its step all embedding gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.shapes import Inputs, Shape
from dwl_kernels import (
    backends,
    full_softmax_loss,
    in_batch_softmax_loss,
    indexed_sampled_softmax_loss,
    sampled_softmax_loss,
)

Loss = Callable[[Inputs], Tensor]
Step = Callable[[Inputs], object]


def usual_loss(x: Inputs) -> Tensor:
    """Eager PyTorch as most people write it."""
    z, target = _LOGITS[x.kind](x)
    loss = F.cross_entropy(z, target, reduction="none")  # [B]
    if x.domain_ids is not None and x.domain_weights is not None:
        loss = loss * x.domain_weights[x.domain_ids]
    return loss.mean()


def _with_positive_first(
    positive: Tensor,  # [B]
    negative: Tensor,  # [B, N]
    hits: Tensor | None,  # [B, N] bool
    x: Inputs,
) -> tuple[Tensor, Tensor]:
    positive, negative = positive.float() / x.temperature, negative.float() / x.temperature
    if x.positive_log_q is not None and x.negative_log_q is not None:
        positive, negative = positive - x.positive_log_q, negative - x.negative_log_q
    if hits is not None:
        negative = negative.masked_fill(hits, -torch.inf)
    z = torch.cat([positive[:, None], negative], dim=1)
    return z, torch.zeros(len(z), dtype=torch.long, device=z.device)


def _shared(x: Inputs) -> tuple[Tensor, Tensor]:
    assert x.positive is not None
    assert x.negative is not None
    hits = None
    if x.positive_ids is not None and x.negative_ids is not None:
        hits = x.positive_ids[:, None] == x.negative_ids
    return _with_positive_first((x.query * x.positive).sum(1), x.query @ x.negative.T, hits, x)


def _per_example(x: Inputs) -> tuple[Tensor, Tensor]:
    assert x.table is not None
    assert x.positive_ids is not None
    assert x.negative_ids is not None
    positive = F.embedding(x.positive_ids, x.table)  # [B, D]
    negative = F.embedding(x.negative_ids, x.table)  # [B, K, D]
    hits = x.positive_ids[:, None] == x.negative_ids
    scores = (negative @ x.query[:, :, None])[:, :, 0]
    return _with_positive_first((x.query * positive).sum(1), scores, hits, x)


def _in_batch(x: Inputs) -> tuple[Tensor, Tensor]:
    assert x.positive is not None
    z = (x.query @ x.positive.T).float() / x.temperature
    target = torch.arange(len(z), device=z.device)
    if x.positive_log_q is not None:
        z = z - x.positive_log_q
    if x.positive_ids is not None:
        same = x.positive_ids[:, None] == x.positive_ids
        z = z.masked_fill(same & (target[:, None] != target), -torch.inf)
    return z, target


def _full(x: Inputs) -> tuple[Tensor, Tensor]:
    assert x.table is not None
    assert x.positive_ids is not None
    return (x.query @ x.table.T).float() / x.temperature, x.positive_ids


_LOGITS = {"shared": _shared, "per-example": _per_example, "in-batch": _in_batch, "full": _full}


def package_loss(x: Inputs, backend: str) -> Tensor:
    shaped: dict[str, Any] = {
        "domain_ids": x.domain_ids,
        "domain_weights": x.domain_weights,
        "example_weights": x.example_weights,
        "temperature": x.temperature,
        "backend": backend,
    }
    log_q: dict[str, Any] = {
        "positive_log_q": x.positive_log_q,
        "negative_log_q": x.negative_log_q,
    }
    if x.kind == "in-batch":
        assert x.positive is not None
        return in_batch_softmax_loss(
            x.query, x.positive, log_q=x.positive_log_q, ids=x.positive_ids, **shaped
        )
    if x.kind == "shared":
        assert x.positive is not None
        assert x.negative is not None
        ids: dict[str, Any] = {"positive_ids": x.positive_ids, "negative_ids": x.negative_ids}
        return sampled_softmax_loss(x.query, x.positive, x.negative, **log_q, **ids, **shaped)
    assert x.table is not None
    assert x.positive_ids is not None
    if x.kind == "full":
        return full_softmax_loss(x.query, x.table, x.positive_ids, **shaped)
    assert x.negative_ids is not None
    return indexed_sampled_softmax_loss(
        x.query, x.table, x.positive_ids, x.negative_ids, **log_q, **shaped
    )


def linear_loss(x: Inputs) -> Tensor:
    """PyTorch's own chunked cross-entropy of a linear layer, from torch 2.13."""
    functional: Any = F
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined,unused-ignore]
    loss: Tensor = functional.linear_cross_entropy(
        x.query / x.temperature, x.table, x.positive_ids, options=options
    )
    return loss


def compiled_loss(dynamic: bool | None = None) -> Loss:
    """`usual_loss` under `torch.compile`, whose import takes seconds: only when it is called."""
    compiled = functools.cache(lambda: torch.compile(usual_loss, dynamic=dynamic))
    return lambda x: compiled()(x)


def kernels(device: str, dry: bool = False) -> list[str]:
    """The backends of the package that are made for the device and run here."""
    names: tuple[str, ...] = ("cpu",)
    if device != "cpu" or dry:  # on a CPU interpreted and emulated
        names = tuple(name for name in backends.NAMES if name in _GPU_KERNELS)
    return [name for name in names if backends.unavailable_reason(name, device) is None]


_GPU_KERNELS = ("triton", "cuda")


def losses(shape: Shape, device: str, dry: bool = False) -> dict[str, Loss]:
    """What is compared on a shape, but for the peers. Every version computes the same."""
    found: dict[str, Loss] = {"eager": usual_loss}
    if not dry:
        found["torch.compile"] = compiled_loss()
    if shape.kind == "full" and hasattr(F, "linear_cross_entropy"):
        found["linear_cross_entropy"] = linear_loss
    for name in ("chunked", *kernels(device, dry)):
        found[name] = functools.partial(package_loss, backend=name)
    return found


def step(loss: Loss) -> Step:
    def run(x: Inputs) -> object:
        return torch.autograd.grad(loss(x), tuple(x.leaves().values()), allow_unused=True)

    return run


def bound(shape: Shape, device: str = "cpu") -> Step:
    """What no implementation can do without, into outputs that exist already.

    Candidates that rows share: the three products of `Shape.operations`. Candidates per example:
    a copy that reads and writes `Shape.gathered_bytes` together.
    """
    options: dict[str, Any] = {"dtype": shape.dtype, "device": device}
    if shape.kind == "per-example":
        numbers = int(shape.gathered_bytes / shape.dtype.itemsize) // 2  # read, and written
        source, target = torch.ones(numbers, **options), torch.empty(numbers, **options)
        return lambda x: target.copy_(source)
    # Random, not zeros: on a GPU the rate of products depends on the numbers.
    dz = torch.randn(shape.rows, shape.candidates, **options)  # [B, N]
    z = torch.empty_like(dz)
    query_grad = torch.empty(shape.rows, shape.dim, **options)
    candidate_grad = torch.empty(shape.candidates, shape.dim, **options)

    @torch.no_grad()
    def run(x: Inputs) -> object:
        candidates = {"shared": x.negative, "in-batch": x.positive, "full": x.table}[x.kind]
        assert candidates is not None
        torch.mm(x.query, candidates.T, out=z)
        torch.mm(dz, candidates, out=query_grad)
        return torch.mm(dz.T, x.query, out=candidate_grad)

    return run
