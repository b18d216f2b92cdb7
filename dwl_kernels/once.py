"""Gradients that say so when they are differentiated again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def once(gradient: Tensor, anchor: Tensor) -> Tensor:
    """`gradient`; in a backward with ``create_graph=True`` tied to the graph of `anchor`.

    Differentiating it again then raises and is not just zero. PyTorch's `once_differentiable` looks
    at the upstream gradient alone, which is a constant here.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Once.apply(gradient, anchor)
    return gradient


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.detach() if gradient.is_sparse else gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "the losses of dwl_kernels are differentiable once; for double backward write the loss "
            "in plain PyTorch"
        )
