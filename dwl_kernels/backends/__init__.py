"""Backends: functions from a problem and the wanted gradients to an `Output`.

They are interchangeable, and each is tested against `eager` in float64.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from dwl_kernels.backends import chunked, eager, native, triton
from dwl_kernels.problem import Output, Problem, Wanted

Backend = Literal["auto", "eager", "chunked", "cpu", "triton"]
NAMES = tuple(name for name in get_args(Backend) if name != "auto")

Solve = Callable[[Problem, Wanted, Tensor | None], Output]
TableGradient = Callable[
    [Tensor, list[Tensor], list[Tensor], int, torch.dtype, bool], tuple[Tensor, Tensor]
]
_SOLVE: dict[str, Solve] = {
    "eager": eager.solve,
    "chunked": chunked.solve,
    "cpu": native.solve,
    "triton": triton.solve,
}
_AUTO = {"cpu": ("cpu", "chunked"), "cuda": ("triton", "chunked")}

_warned: set[str] = set()


def check_name(name: str) -> None:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend is {name!r}; wanted one of {('auto', *NAMES)}")


def why_not(name: str, device_type: str) -> str | None:
    """Why backend `name` cannot run on such a device here and the mend; None where it can."""
    if name == "cpu":
        if device_type != "cpu":
            return f"it runs on CPU tensors, and these are on {device_type}"
        return native.why_not()
    if name == "triton":
        return triton.why_not(device_type)
    return None


def refuses(name: str, problem: Problem) -> str | None:
    """Why a backend that can run here does not take this problem; None where it does."""
    if name == "cpu":
        return native.refuses(problem)
    if name == "triton":
        return triton.refuses(problem)
    return None


def chosen(name: str) -> str:
    """`name`, or for "auto" what ``DWL_KERNELS_BACKEND`` says."""
    if name == "auto":
        name = os.environ.get("DWL_KERNELS_BACKEND", "auto")
        check_name(name)
    return name


def pick(name: str, problem: Problem) -> Solve:
    """The backend that a call runs on.

    Raises:
        RuntimeError: the backend asked for by name cannot run; the message says why and the mend.
    """
    name = chosen(name)
    device = problem.query.device.type
    if name != "auto":
        reason = why_not(name, device) or refuses(name, problem)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run: {reason}")
        return _SOLVE[name]
    for candidate in _AUTO.get(device, ("chunked",)):
        if refuses(candidate, problem) is not None:
            continue
        reason = why_not(candidate, device)
        if reason is None:
            return _SOLVE[candidate]
        if candidate not in _warned:
            _warned.add(candidate)
            warnings.warn(
                f"dwl_kernels: backend {candidate!r} cannot run, a slower one does: {reason}",
                stacklevel=2,
            )
    return chunked.solve


def pick_table_gradient(name: str, source: Tensor, dtype: torch.dtype) -> TableGradient:
    """What sums the gradient of a table in a call of backend `name`."""
    name, device = chosen(name), source.device.type
    compiled = device == "cpu" and dtype in native.DTYPES
    if compiled and name in ("auto", "cpu") and native.why_not() is None:
        return native.table_gradient
    wide = source.shape[1] > triton.MAX_TABLE_D
    asked = name == "triton" or (name == "auto" and device == "cuda")
    if asked and not wide and triton.why_not(device) is None:
        return triton.table_gradient
    return chunked.table_gradient
