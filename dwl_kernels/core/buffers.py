"""How samplers, frequencies, domain weights and loss modules keep and load their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from dwl_kernels.core.values import has_values


@contextmanager
def on_host() -> Iterator[None]:
    """New tensors have values, also where a model is built on `meta` or of fake tensors."""
    with torch.device("cpu"), _disable_current_modes():
        yield


class Tables(nn.Module):
    """Module whose tensors keep their dtype, and whose arguments nothing overrides.

    What follows from the arguments is a constant: an attribute on the device of the module, but no
    buffer. So no checkpoint replaces it, nothing that averages models averages it, and it is there
    again when a module built on `meta` gets memory, in whatever way.

    What is counted is an attribute that is saved and loaded as a persistent buffer is, under its
    name, but is in no ``model.buffers()``: whatever lists them would average it, as
    ``AveragedModel(use_buffers=True)`` does, or replace it by that of rank 0, as
    ``DistributedDataParallel`` does, and neither asks the module first. What goes through a model
    module by module (``buffers(recurse=False)``: FSDP, distributed checkpoints) finds it.

    A constructor builds its tensors :func:`on_host` and then calls :meth:`_settle`. When a module
    goes to `meta`, the values of its tensors are kept here until there is memory for them.
    """

    device_marker: Tensor  # [0] says where the module is

    def __init__(self) -> None:
        super().__init__()
        self._constants: dict[str, Tensor] = {}
        self._counts: list[str] = []  # attributes that are counted
        self._saved: set[str] = set()  # constants that a checkpoint holds, to be compared
        self._left: dict[str, Tensor] = {}  # values of tensors that are on `meta`
        self.register_buffer("device_marker", torch.empty(0), persistent=False)

    def _register_constant(self, name: str, value: Tensor, *, saved: bool = False) -> None:
        self._constants[name] = value
        if saved:
            self._saved.add(name)

    def _register_count(self, name: str, value: Tensor) -> None:
        self._counts.append(name)
        setattr(self, name, value)

    def _forget_counts(self, *names: str) -> None:
        self._counts = [name for name in self._counts if name not in names]
        for name in names:
            delattr(self, name)

    @contextmanager
    def _counts_as_buffers(self) -> Iterator[None]:
        """For what `nn.Module` does with buffers, its messages included."""
        self._buffers.update({name: getattr(self, name) for name in self._counts})
        try:
            yield
        finally:
            for name in self._counts:
                self.__dict__[name] = self._buffers.pop(name)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The buffers; of this module alone (``recurse=False``), also what is counted.

        Args:
            prefix, recurse, remove_duplicate: As for ``torch.nn.Module.named_buffers``.

        Returns:
            Pairs of a name and a tensor.
        """
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if not recurse:
            for name in (*self._counts, *self._saved):
                yield f"{prefix}.{name}" if prefix else name, getattr(self, name)

    def __getattr__(self, name: str) -> Any:
        # Only for what is no ordinary attribute.
        constants = self.__dict__.get("_constants")
        if constants is None or name not in constants:
            return super().__getattr__(name)
        value, marker = constants[name], self.device_marker
        ordinary = type(marker) is Tensor or torch.compiler.is_compiling()
        if ordinary and value.device == marker.device:
            return value
        if not has_values(marker):
            return marker.new_empty(value.shape, dtype=value.dtype)
        if not has_values(value):
            raise RuntimeError(
                f"{name} of {type(self).__name__} has no values: what it follows from was itself "
                "on the meta device when the module was built; give it as a list, an array or a "
                "tensor of the CPU"
            )
        constants[name] = value = value.to(marker.device)
        return value

    def _settle(self) -> None:
        """Goes from the host to where tensors are made by default."""
        blank = torch.empty(0)
        if type(blank) is Tensor:
            self._apply(lambda tensor: tensor.to(blank.device), recurse=False)
        else:  # fake
            self._apply(lambda t: torch.empty(t.shape, dtype=t.dtype), recurse=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tables:
        # `model.half()` or `model.to(torch.bfloat16)` would round probabilities to three digits.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        if recurse:
            for child in self.children():
                child._apply(fn)
        with on_host():
            before = {name: tensor.detach() for name, tensor in self._tensors()}
        with self._counts_as_buffers():
            super()._apply(keep_dtype, recurse=False)
        for name, now in self._tensors():
            if has_values(before[name]):
                self._left.pop(name, None)  # a checkpoint has put others in its place since
                if not has_values(now):
                    self._left[name] = before[name]
            elif has_values(now) and name in self._left:
                now.data.copy_(self._left.pop(name))
        for name in self._constants:
            getattr(self, name)  # moves it now, and not in the middle of a step
        return self

    def _tensors(self) -> list[tuple[str, Tensor]]:
        counts = {name: getattr(self, name) for name in self._counts}
        named = {**self._parameters, **self._buffers, **counts}
        return [(name, tensor) for name, tensor in named.items() if tensor is not None]

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in (*self._counts, *self._saved):
            value = getattr(self, name)
            destination[prefix + name] = value if keep_vars else value.detach()

    def _contradiction(self, saved: dict[str, Tensor]) -> str | None:
        """How a checkpoint contradicts the constructor's arguments, and the mend; None if not."""
        return None

    def _bring_up_to_date(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Makes a checkpoint of an earlier version one of this."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        named = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        # Tensors without values, of a subclass or on `meta`, cannot be compared.
        saved = {k: v for k, v in named.items() if type(v) in (Tensor, nn.Parameter)}
        message = self._contradiction({k: v for k, v in saved.items() if not v.is_meta})
        if message is not None:
            error_msgs: list[str] = more[-1]
            error_msgs.append(f"{prefix.removesuffix('.') or type(self).__name__}: {message}.")
            return
        self._bring_up_to_date(state_dict, prefix)
        for name in (*self._non_persistent_buffers_set, *self._constants):
            state_dict.pop(prefix + name, None)  # compared, or saved by an earlier version
        for name, own in self._tensors():
            if prefix + name in state_dict and name in saved:  # it replaces them with assign=True
                state_dict[prefix + name] = state_dict[prefix + name].to(own.dtype)
        with self._counts_as_buffers():
            super()._load_from_state_dict(state_dict, prefix, *more)
        assigns: bool = more[0].get("assign_to_params_buffers", False)
        if assigns and not has_values(self.device_marker):
            self._leave_meta([v.device for v in named.values() if isinstance(v, Tensor)])

    def _leave_meta(self, devices: list[torch.device]) -> None:
        """Puts the constants where a checkpoint was assigned, if nothing is left on `meta`.

        They are in no checkpoint, so nobody else would, and `to` takes no module from there.
        """
        own = [tensor for name, tensor in self._tensors() if name != "device_marker"]
        if all(has_values(tensor) for tensor in own):
            self.device_marker = torch.empty(0, device=devices[0] if devices else None)


def difference(
    name: str,
    saved: dict[str, Tensor],
    own: Tensor,  # [n]
) -> str | None:
    """Where a tensor of a checkpoint is not this module's own; None if it is, or is not there."""
    if name not in saved or own.is_meta:
        return None
    theirs = saved[name].to(own)
    if theirs.shape != own.shape:
        return f"{name} has shape {list(theirs.shape)} in the checkpoint but {list(own.shape)} here"
    if own.is_floating_point():
        rounding = max(torch.finfo(dtype).eps for dtype in (saved[name].dtype, own.dtype))
        differs, style = ~torch.isclose(theirs, own, rtol=max(1e-5, rounding)), ".6g"
    else:
        differs, style = theirs != own, "d"
    if not bool(differs.any()):
        return None
    place = int(differs.nonzero()[0])
    got, wanted = (format(values[place].item(), style) for values in (theirs, own))
    return f"{name}[{place}] is {got} in the checkpoint but {wanted} here"
