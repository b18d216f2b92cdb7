"""The versions that are compared: each computes the loss and the gradients of all embeddings."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.shapes import TEMPERATURE, Inputs, Shape
from dwl_kernels import sampled_softmax_loss

Loss = Callable[[Inputs], Tensor]
Step = Callable[[Inputs], object]


def usual_loss(x: Inputs) -> Tensor:
    """Eager PyTorch as most people write it."""
    positive = (x.query * x.positive).sum(1, keepdim=True) / TEMPERATURE  # [B, 1]
    negative = x.query @ x.negative.T / TEMPERATURE  # [B, N]
    if x.positive_log_q is not None and x.negative_log_q is not None:
        positive = positive - x.positive_log_q[:, None]
        negative = negative - x.negative_log_q
    if x.positive_ids is not None and x.negative_ids is not None:
        negative = negative.masked_fill(x.positive_ids[:, None] == x.negative_ids, -torch.inf)
    logits = torch.cat([positive, negative], dim=1)
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    loss = F.cross_entropy(logits, target, reduction="none")  # [B]
    if x.domain_ids is not None and x.domain_weights is not None:
        loss = loss * x.domain_weights[x.domain_ids]
    return loss.mean()


def package_loss(x: Inputs, backend: str) -> Tensor:
    return sampled_softmax_loss(
        x.query,
        x.positive,
        x.negative,
        positive_log_q=x.positive_log_q,
        negative_log_q=x.negative_log_q,
        positive_ids=x.positive_ids,
        negative_ids=x.negative_ids,
        domain_ids=x.domain_ids,
        domain_weights=x.domain_weights,
        temperature=TEMPERATURE,
        backend=backend,  # type: ignore[arg-type]
    )


def linear_loss(x: Inputs) -> Tensor:
    """PyTorch's chunked linear cross-entropy.

    It has neither hits nor weights, and its target has to be one of the candidates, so it computes
    less than the others.
    """
    target = torch.arange(len(x.query), device=x.query.device) % len(x.negative)
    bias = None if x.negative_log_q is None else -x.negative_log_q
    return F.linear_cross_entropy(  # type: ignore[attr-defined,no-any-return,unused-ignore]
        x.query / TEMPERATURE,
        x.negative,
        target,
        linear_bias=bias,
        options=torch.nn.LinearCrossEntropyOptions(),  # type: ignore[attr-defined,unused-ignore]
    )


@functools.cache
def _compiled() -> Loss:
    return torch.compile(usual_loss)  # importing the compiler takes seconds, so only when asked for


LOSSES: dict[str, Loss] = {
    "eager": usual_loss,
    "torch.compile": lambda x: _compiled()(x),
    "specification": functools.partial(package_loss, backend="eager"),
    "chunked": functools.partial(package_loss, backend="chunked"),
    "cpu": functools.partial(package_loss, backend="cpu"),
}
if hasattr(F, "linear_cross_entropy"):  # torch 2.13
    LOSSES["linear_cross_entropy"] = linear_loss


def step(loss: Loss) -> Step:
    def run(x: Inputs) -> object:
        wanted = (x.query, x.positive, x.negative)
        return torch.autograd.grad(loss(x), wanted, allow_unused=True)

    return run


def bound(shape: Shape) -> Step:
    """The three products that any implementation must do, into outputs that exist already."""
    logits = torch.empty(shape.rows, shape.candidates, dtype=shape.dtype)  # [B, N]
    query_grad = torch.empty(shape.rows, shape.dim, dtype=shape.dtype)
    negative_grad = torch.empty(shape.candidates, shape.dim, dtype=shape.dtype)

    @torch.no_grad()
    def run(x: Inputs) -> object:
        torch.mm(x.query, x.negative.T, out=logits)
        torch.mm(logits, x.negative, out=query_grad)
        return torch.mm(logits.T, x.query, out=negative_grad)

    return run
