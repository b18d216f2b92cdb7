"""Errors for the derivatives that the losses do not have: second ones, and forward mode.

A gradient is computed together with its loss and is a constant to PyTorch, and a kernel knows
nothing of tangents. Without an error both derivatives would come out as 0.
Used by `autograd`, `gather` and `modules.normalize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dwl_kernels.core.batching import by_slices


def refuse() -> NoReturn:
    raise RuntimeError(
        "the losses of dwl_kernels are differentiable once, in reverse mode: no gradient of their "
        "gradients (double backward, functional.jvp) and no forward mode (jvp, jacfwd, hessian); "
        "write the loss in plain PyTorch for these"
    )


# Whether one of the transforms of `torch.func` is at work.
transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


class ReverseOnly(torch.autograd.Function):
    """A function for the transforms of ``torch.func``: ``vmap`` by slices, and no forward mode.

    ``torch.compile`` traces no function that defines a `jvp`, and gets one without.
    """

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return by_slices(cls.apply, info, in_dims, args)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        refuse()


def refuse_tangents(tensors: Sequence[Tensor | None]) -> None:
    """RuntimeError where one of `tensors` carries a tangent; transforms find those of their own."""
    # Only inside a `dual_level` can there be one. The attribute is no promise of PyTorch's.
    if getattr(forward_ad, "_current_level", 0) >= 0 and not transforms_active():
        for tensor in tensors:
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                refuse()


def refuse_jit() -> None:
    """RuntimeError under ``torch.jit.trace``, whose graphs hold no gradients that are computed."""
    if torch.jit.is_tracing() and not torch.compiler.is_compiling():  # type: ignore[attr-defined]
        raise RuntimeError(
            "torch.jit.trace (and TensorBoard's add_graph) cannot record the losses of "
            "dwl_kernels; trace the model without its loss, or use torch.export or torch.compile"
        )


def tracked(tensor: Tensor) -> bool:
    """Whether `tensor` requires a gradient, of autograd or of any of the transforms at work."""
    while not tensor.requires_grad:
        if not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return True


def once(gradient: Tensor, *sources: Tensor) -> Tensor:
    """`gradient`, tied to what it depends on: differentiating it by them raises and is not just 0.

    PyTorch's `once_differentiable` looks at the upstream gradient alone, often a constant here.
    """
    if torch.compiler.is_compiling():  # raises of its own
        return gradient
    if torch.is_grad_enabled() or transforms_active():
        return _Once.apply(gradient, *sources)
    return gradient


class _Once(ReverseOnly):
    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.detach() if gradient.is_sparse else gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> NoReturn:
        refuse()
