"""Forwards that activation checkpointing runs twice.

The first run gives the loss; the second, in the middle of a backward, gives the gradients. It must
not count its rows again, and must weigh them as the first run did, although the weights have moved
on. So a first run leaves its weights here, and the second takes those of the first run whose query
and domains look most like its own. This needs no help from whatever runs the forward twice, so it
works for `torch.utils.checkpoint` in both its forms, nested or not, and for others.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from dwl_kernels.core.untraced import untraced
from dwl_kernels.core.values import no_autocast
from dwl_kernels.domains import DomainWeights


class _FirstRun(NamedTuple):
    owner: Callable[[], Any]  # see _owner; gives None when no backward can come any more
    kind: tuple[Any, ...]  # shapes of query and weights, their device
    traits: Tensor  # [2]
    weights: Tensor  # [num_domains]
    uses: Tensor  # [] int64, second runs that have taken these weights


class Runs:
    """Counts the domains of forwards and says what they weigh, in every run of a forward alike."""

    def __init__(self) -> None:
        self.first: list[_FirstRun] = []
        self.handle = next(_handles)  # a compiled graph holds no objects
        _by_handle[self.handle] = self

    def __reduce__(self) -> tuple[type[Runs], tuple[()]]:
        return Runs, ()  # a copy has nothing in flight

    def weigh(
        self,
        domain_weights: DomainWeights,
        domain_ids: Tensor,  # [B, G]
        query: Tensor,  # [..., D]
    ) -> Tensor:  # [num_domains]
        """The weights of a forward in training mode, whose rows count in its first run."""
        recording = torch.is_grad_enabled()
        ids, query = domain_ids.detach(), query.detach()
        if domain_weights.process_group is not None:
            return self._weigh_apart(domain_weights, ids, query, recording)
        if not torch.compiler.is_compiling():
            return self._weigh(domain_weights, ids, query, recording)
        # What is known only when the graph runs, the ops find out.
        ids_to_count, counted = torch.ops.dwl_kernels.rows_to_count(ids, recording)
        domain_weights._update(domain_weights._checked_ids(ids_to_count), counted)
        weights = domain_weights()
        if domain_weights.fixed:
            return weights
        call = (weights, ids, query, self.handle, recording)
        return torch.ops.dwl_kernels.weights_of_run(*call)

    def _weigh(
        self, domain_weights: DomainWeights, ids: Tensor, query: Tensor, recording: bool
    ) -> Tensor:
        if _counts(recording):
            domain_weights.update(ids)
        weights = domain_weights()
        return weights if domain_weights.fixed else self.settle(weights, ids, query, recording)

    # A second run must not take part in an exchange of ranks, which no graph can decide.
    _weigh_apart = untraced(_weigh)

    @torch.no_grad()
    def settle(self, weights: Tensor, ids: Tensor, query: Tensor, recording: bool) -> Tensor:
        """`weights`, or in a second run those of its first."""
        second = _backward_runs()
        owner = None if second else _owner(recording)
        if not second and owner is None:
            return weights
        traits = _traits(query, ids)
        self.first = [run for run in self.first if run.owner() is not None]
        kind = query.shape, weights.shape, weights.device
        if not second:
            uses = torch.zeros((), dtype=torch.int64, device=weights.device)
            self.first.append(_FirstRun(_weak(owner), kind, traits, weights.clone(), uses))
            return weights
        alike = [run for run in reversed(self.first) if run.kind == kind]
        if not alike:
            return weights
        # Of runs that are alike altogether the one used least, then the newest. On the device: a
        # look at the values would wait for it.
        distance = (torch.stack([run.traits for run in alike]) - traits).abs().sum(1)
        uses = torch.stack([run.uses for run in alike])
        uses = torch.where(distance <= distance.min(), uses, torch.iinfo(torch.int64).max)
        found = uses.argmin(keepdim=True)
        taken = torch.arange(len(alike), device=found.device) == found
        torch._foreach_add_([run.uses for run in alike], [*taken.long().unbind()])
        return torch.stack([run.weights for run in alike]).index_select(0, found)[0]


_handles = itertools.count()
_by_handle: weakref.WeakValueDictionary[int, Runs] = weakref.WeakValueDictionary()


def _backward_runs() -> bool:
    # There is no public way to ask; 0.1 us.
    return torch._C._current_graph_task_id() != -1


def _counts(recording: bool) -> bool:
    """Whether this is the first run of a forward whose gradients are wanted."""
    return not _backward_runs() and (recording or _function() is not None)


def _owner(recording: bool) -> Any:
    """What may run this forward again, an object that lives until its backward; None if nothing."""
    if not recording:
        return _function()
    # Checkpointing by hooks on saved tensors: the tensors that are saved hold the one that unpacks
    # them. Without this question every step would take the traits of its query, 0.1 to 3 ms on a
    # CPU.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[1]


def _weak(owner: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(owner)
    except TypeError:  # hooks of the user's, of a class without room for weak references
        return lambda: owner


def _function() -> Any:
    """The context of an autograd.Function that runs this and will have a backward, or None.

    Gradients are off in its forward, as they are in a validation. What tells the two apart is its
    context: it is on the stack, and part of a graph if gradients were on around it.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            context = frame.f_locals.get(code.co_varnames[0])
            if isinstance(context, BackwardCFunction) and context.next_functions:
                return context
    return None


def _traits(
    query: Tensor,  # [..., D]
    ids: Tensor,  # [B, G]
) -> Tensor:  # [2] float32
    """Two numbers that tell one forward from another: sums with weights of no period."""
    rows = query.reshape(-1, query.shape[-1]).float()
    along, across = (
        (torch.arange(1, size + 1, device=rows.device).float() * 0.6180339887).frac() - 0.5
        for size in rows.shape
    )
    with no_autocast(rows.device.type):
        sums = along @ (rows @ across), along @ ids.sum(1).float()
    return torch.stack(sums).nan_to_num()


# The same questions, asked by a compiled graph when it runs.


def _rows_to_count(ids: Tensor, recording: bool) -> tuple[Tensor, Tensor]:
    counts = _counts(recording)
    counted = torch.full((), int(counts), dtype=torch.int64, device=ids.device)
    return ids.clone() if counts else torch.full_like(ids, -1), counted


def _weights_of_run(
    weights: Tensor, ids: Tensor, query: Tensor, handle: int, recording: bool
) -> Tensor:
    runs = _by_handle.get(handle)  # None in a graph that outlived its module, an exported one
    return weights.clone() if runs is None else runs.settle(weights, ids, query, recording).clone()


_library = torch.library.Library("dwl_kernels", "FRAGMENT")
for _schema, _op, _fake in (
    (
        "rows_to_count(Tensor ids, bool recording) -> (Tensor, Tensor)",
        _rows_to_count,
        lambda ids, recording: (torch.empty_like(ids), ids.new_empty((), dtype=torch.int64)),
    ),
    (
        "weights_of_run(Tensor weights, Tensor ids, Tensor query, int handle, bool recording) "
        "-> Tensor",
        _weights_of_run,
        lambda weights, *_: torch.empty_like(weights),
    ),
):
    _name = _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dwl_kernels::{_name}", _fake)
