"""Backends: functions from a problem and the wanted gradients to an `Output`.

They are interchangeable, and each is tested against `eager` in float64.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from dwl_kernels.backends import chunked, eager
from dwl_kernels.backends.cache import BuildError
from dwl_kernels.backends.cpu import solve as native
from dwl_kernels.backends.cuda import solve as cuda
from dwl_kernels.backends.triton import solve as triton
from dwl_kernels.core.problem import Output, Problem, Wanted

Backend = Literal["auto", "eager", "chunked", "cpu", "triton", "cuda"]
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
    "cuda": cuda.solve,
}
_AUTO = {"cpu": ("cpu", "chunked"), "cuda": ("triton", "cuda", "chunked")}

_warned: set[str] = set()
_broken: dict[str, str] = {}  # backends whose kernel did not compile when it was called


def check_name(name: str, source: str = "") -> None:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend is {name!r}{source}; wanted one of {('auto', *NAMES)}")


def why_not(name: str, device_type: str) -> str | None:
    """Why backend `name` cannot run on such a device here and the mend; None where it can."""
    if name in _broken:
        return _broken[name]
    if name == "cpu":
        if device_type != "cpu":
            return f"it runs on CPU tensors, and these are on {device_type}"
        return native.why_not()
    if name == "triton":
        return triton.why_not(device_type)
    if name == "cuda":
        return cuda.why_not(device_type)
    return None


def refuses(name: str, problem: Problem) -> str | None:
    """Why a backend that can run here does not take this problem; None where it does."""
    if name == "cpu":
        return native.refuses(problem)
    if name == "triton":
        return triton.refuses(problem)
    if name == "cuda":
        return cuda.refuses(problem)
    return None


def chosen(name: str) -> str:
    """`name`, or for "auto" what ``DWL_KERNELS_BACKEND`` says."""
    if name == "auto":
        name = os.environ.get("DWL_KERNELS_BACKEND", "auto")
        check_name(name, ", as DWL_KERNELS_BACKEND says")
    return name


def order(device_type: str) -> tuple[str, ...]:
    """The backends that "auto" tries for tensors on such a device, the fastest first."""
    return _AUTO.get(device_type, ("chunked",))


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
    for candidate in order(device):
        if refuses(candidate, problem) is not None:
            continue
        reason = why_not(candidate, device)
        if reason is None:
            return functools.partial(_solve_or_next, candidate)
        _warn(candidate, reason)
    return chunked.solve


def _solve_or_next(
    name: str, problem: Problem, wanted: Wanted, row_grad: Tensor | None = None
) -> Output:
    """Solve on backend `name`; on the next one, from now on, if its kernel does not compile."""
    try:
        return _SOLVE[name](problem, wanted, row_grad)
    except Exception as error:
        if not _is_of_compiler(error):
            raise
        _broken[name] = f"its kernel does not compile: {type(error).__name__}: {error}"
        _warn(name, _broken[name])
    return pick("auto", problem)(problem, wanted, row_grad)


def _is_of_compiler(error: Exception) -> bool:
    """Whether a kernel did not compile, in contrast to a problem that cannot be solved."""
    if isinstance(error, (BuildError, ImportError, OSError, subprocess.CalledProcessError)):
        return True
    # Triton's own errors, and what it says where it finds no C compiler for its launcher.
    return type(error).__module__.startswith("triton.") or (
        type(error) is RuntimeError and "compiler" in str(error)
    )


def _warn(name: str, reason: str) -> None:
    if name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"dwl_kernels: backend {name!r} cannot run, a slower one does: {reason}",
            stacklevel=_stacklevel(),
        )


def _stacklevel() -> int:
    """How far the user's line is above the caller, past frames of this package and of PyTorch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _is_library(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    return level


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in ("dwl_kernels", "torch")


def pick_table_gradient(name: str, source: Tensor, dtype: torch.dtype) -> TableGradient:
    """What sums the gradient of a table in a call of backend `name`."""
    name, device = chosen(name), source.device.type
    compiled = device == "cpu" and dtype in native.DTYPES
    if compiled and name in ("auto", "cpu") and native.why_not() is None:
        return native.table_gradient
    wide = source.shape[1] > triton.MAX_TABLE_D
    asked = name == "triton" or (name == "auto" and device == "cuda")
    if asked and not wide and why_not("triton", device) is None:
        return triton.table_gradient
    return chunked.table_gradient
