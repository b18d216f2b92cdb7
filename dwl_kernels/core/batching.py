"""Batches of problems and of upstream gradients, slice by slice: ``vmap``, ``is_grads_batched``.

For every `autograd.Function` and registered op of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def register_by_slices(
    library: torch.library.Library, name: str, sparse: Callable[..., bool] = lambda *args: False
) -> None:
    """The rule of ``vmap`` for an op of `library`, which raises for arguments that are `sparse`."""
    op = getattr(torch.ops.dwl_kernels, name)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if sparse(*args):
            raise RuntimeError(
                "gradients of a batch are stacked, which sparse ones of a table cannot be; pass "
                "sparse_grad=False"
            )
        return by_slices(op, info, in_dims, args)

    torch.library.register_vmap(f"dwl_kernels::{name}", rule, lib=library)


def by_slices(
    function: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """A call of `function` for every slice, their outputs stacked, as a rule of ``vmap``."""
    calls = [function(*_slice(args, in_dims, place)) for place in range(info.batch_size)]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    outputs = tuple(torch.stack(output) for output in zip(*calls, strict=True))
    return outputs, (0,) * len(outputs)


def _slice(value: Any, dim: Any, place: int) -> Any:
    if isinstance(value, Tensor):
        return value if dim is None else value.select(dim, place)
    if not any(one is not None for one in tree_leaves(dim)):
        return value
    return [_slice(v, d, place) for v, d in zip(value, dim, strict=True)]


# Whether ``is_grads_batched`` (``jacobian(vectorize=True)``) made a tensor. Its batches are of an
# older kind than those of `torch.func.vmap`, and no op can have a rule for them.
is_legacy_batched: Callable[[Tensor], bool] = getattr(
    torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: False
)


def is_batched(upstream: Tensor) -> bool:
    """`is_legacy_batched`, as ``torch.compile`` can trace it."""
    return not torch.compiler.is_compiling() and is_legacy_batched(upstream)


def backward_by_slices(
    backward: Callable[..., tuple[Tensor | None, ...]], ctx: Any, upstream: Tensor
) -> tuple[Tensor | None, ...]:
    """What `backward` gives for a batch of upstream gradients, by ``torch.func.vmap``."""
    # The level of a batch is that of the innermost vmap; threads of autograd do not know it.
    level = max(torch._C._vmapmode_increment_nesting() - 1, 1)
    torch._C._vmapmode_decrement_nesting()
    plain = torch._remove_batch_dim(upstream, level, 0, 0)
    missing: list[bool] = []

    def gradients(grad: Tensor) -> tuple[Tensor, ...]:
        found = backward(ctx, grad)
        missing[:] = [g is None for g in found]
        return tuple(g for g in found if g is not None)

    stacked = iter(torch.func.vmap(gradients)(plain))
    return tuple(
        None if absent else torch._add_batch_dim(next(stacked), 0, level) for absent in missing
    )


def counting(ids: Tensor, state: Tensor, mend: str) -> tuple[Tensor, AbstractContextManager[Any]]:
    """`ids` and a context, to write to a `state` that may be no argument of a transform.

    A transform such as ``torch.func.grad`` refuses to write to what it was not given, and counts
    are in no ``model.named_buffers()`` that ``functional_call`` could be given. They have no
    gradient to lose, so where they are not given they are counted outside of it.

    Raises:
        RuntimeError: a batch of ``vmap`` would be written to a state that is none; with the `mend`.
    """
    functorch = torch._C._functorch
    if torch.compiler.is_compiling() or functorch.peek_interpreter_stack() is None:
        return ids, nullcontext()
    if _levels(ids) - _levels(state):
        raise RuntimeError(
            "a vmap cannot count the ids of its slices, because the counts they would go to are "
            f"one state and no batch of them; {mend}"
        )
    if functorch.is_functorch_wrapped_tensor(state):
        return ids, nullcontext()
    while functorch.is_functorch_wrapped_tensor(ids):
        ids = functorch.get_unwrapped(ids)
    # There is no public way to step outside of a transform.
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return ids, temporarily_clear_interpreter_stack()


def _levels(tensor: Tensor) -> set[int]:
    """The levels of the transforms that made a batch of `tensor`."""
    functorch = torch._C._functorch
    levels = set()
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            levels.add(functorch.maybe_get_level(tensor))
        tensor = functorch.get_unwrapped(tensor)
    return levels
