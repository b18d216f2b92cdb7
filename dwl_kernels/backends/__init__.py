"""The registry of backends, and which of them a call runs on.

A backend is a module with the functions of `Kernel`; one line in `BACKENDS` adds it. Its kernel is
tested against `reference` in float64.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from dwl_kernels.backends import chunked
from dwl_kernels.backends import ranks as over_blocks
from dwl_kernels.backends.cache import BuildError
from dwl_kernels.backends.cpu import solve as cpu_backend
from dwl_kernels.backends.cuda import solve as cuda_backend
from dwl_kernels.backends.reference import ranks as reference_ranks
from dwl_kernels.backends.reference import solve as reference_backend
from dwl_kernels.backends.triton import ranks as triton_ranks
from dwl_kernels.backends.triton import solve as triton_backend
from dwl_kernels.core.problem import GradMask, Output, Problem, RankProblem, SoftmaxStatistics

Backend = Literal["auto", "eager", "chunked", "cpu", "triton", "cuda"]
NAMES = tuple(name for name in get_args(Backend) if name != "auto")

Solve = Callable[[Problem, GradMask, Tensor | None], Output]
TableGradient = Callable[
    [Tensor, list[Tensor], list[Tensor], int, torch.dtype, bool], tuple[Tensor, Tensor]
]


class Kernel(Protocol):
    """What a backend's module has."""

    @property
    def solve(self) -> Solve:
        """The loss and the wanted gradients, given the gradient of the rows of "none"."""

    @property
    def unavailable_reason(self) -> Callable[[str], str | None]:
        """Why it cannot run on a type of device here and the mend; None where it can."""

    @property
    def unsupported_reason(self) -> Callable[[Problem], str | None]:
        """Why it does not take a problem where it can run; None where it does."""


class TableKernel(Kernel, Protocol):
    """A backend that sums the gradient of a table too."""

    @property
    def table_gradient(self) -> TableGradient:
        """As `chunked.table_gradient`."""

    @property
    def takes_table(self) -> Callable[[Tensor, torch.dtype], bool]:
        """Whether it sums rows of such a source, ``[R, D]``, for a table of such a dtype."""


class RankKernel(Protocol):
    """What ranks targets among all items."""

    @property
    def rank_targets(self) -> Callable[[RankProblem], Tensor]:
        """As `ranks.rank_targets`."""

    @property
    def unsupported_ranks(self) -> Callable[[RankProblem], str | None]:
        """Why it does not take a problem where its backend can run; None where it does."""


class StatisticsKernel(Protocol):
    """What says of every row what the loss knows of it."""

    @property
    def statistics(self) -> Callable[[Problem], SoftmaxStatistics]:
        """As `ranks.statistics`."""


class Entry(NamedTuple):
    """A backend, and what does for it what it has no kernel of its own for."""

    kernel: Kernel
    table: TableKernel = chunked
    ranks: RankKernel = over_blocks
    statistics: StatisticsKernel = over_blocks


BACKENDS = {
    "eager": Entry(reference_backend, ranks=reference_ranks, statistics=reference_ranks),
    "chunked": Entry(chunked),
    "cpu": Entry(cpu_backend, table=cpu_backend, ranks=cpu_backend, statistics=cpu_backend),
    "triton": Entry(triton_backend, table=triton_backend, ranks=triton_ranks),
    "cuda": Entry(cuda_backend),
}
_AUTO = {"cpu": ("cpu", "chunked"), "cuda": ("triton", "cuda", "chunked")}

_warned: set[str] = set()
_broken: dict[str, str] = {}  # backends whose kernel did not compile when it was called


def check_name(name: str, source: str = "") -> None:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend is {name!r}{source}; wanted one of {('auto', *NAMES)}")


def unavailable_reason(name: str, device_type: str) -> str | None:
    """Why backend `name` cannot run on such a device here and the mend; None where it can."""
    if name in _broken:
        return _broken[name]
    return BACKENDS[name].kernel.unavailable_reason(device_type)


def unsupported_reason(name: str, problem: Problem) -> str | None:
    """Why a backend that can run here does not take this problem; None where it does."""
    return BACKENDS[name].kernel.unsupported_reason(problem)


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
    if name == "auto":
        name = chosen(name)
    device = problem.query.device.type
    if name != "auto":
        reason = unavailable_reason(name, device)
        reason = reason or unsupported_reason(name, problem)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run: {reason}")
        return _solve_of(name, problem)
    for candidate in order(device):
        if unsupported_reason(candidate, problem) is not None:
            continue
        reason = unavailable_reason(candidate, device)
        if reason is None:
            return functools.partial(_solve_or_next, candidate)
        _warn(candidate, reason)
    return chunked.solve


def _solve_of(name: str, problem: Problem) -> Solve:
    """A kernel has nothing to do where there is no row or no candidate."""
    if not problem.query.shape[0] or not problem.num_candidates:
        name = name if name == "eager" else "chunked"
    return BACKENDS[name].kernel.solve


def _solve_or_next(
    name: str, problem: Problem, wanted: GradMask, row_grad: Tensor | None = None
) -> Output:
    """Solve on backend `name`; on the next one, from now on, if its kernel does not compile."""
    try:
        return _solve_of(name, problem)(problem, wanted, row_grad)
    except Exception as error:
        if not _is_of_compiler(error):
            raise
        _breaks(name, error)
    return pick("auto", problem)(problem, wanted, row_grad)


def _breaks(name: str, error: Exception) -> None:
    _broken[name] = f"its kernel does not compile: {type(error).__name__}: {error}"
    _warn(name, _broken[name])


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
    for candidate in order(device) if name == "auto" else (name,):
        table = BACKENDS[candidate].table
        if table.takes_table(source, dtype) and table.unavailable_reason(device) is None:
            return table.table_gradient
    return chunked.table_gradient


def _runnable(device_type: str, unsupported: Callable[[str], str | None]) -> Iterator[str]:
    """The backends that "auto" may take, the fastest first; warns of those that cannot run."""
    for candidate in order(device_type):
        if unsupported(candidate) is not None:
            continue
        if (reason := unavailable_reason(candidate, device_type)) is None:
            yield candidate
        else:
            _warn(candidate, reason)


def rank_targets(name: str, problem: RankProblem) -> Tensor:  # [B] int64
    """The rank of every target, on the backend that a call runs on.

    Raises:
        RuntimeError: the backend asked for by name cannot run; the message says why and the mend.
    """
    name, device = chosen(name), problem.query.device.type
    if not len(problem.query):
        return problem.target
    if name != "auto":
        kernel = BACKENDS[name].ranks
        reason = unavailable_reason(name, device) or kernel.unsupported_ranks(problem)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run: {reason}")
        return kernel.rank_targets(problem)
    for candidate in _runnable(device, lambda one: BACKENDS[one].ranks.unsupported_ranks(problem)):
        try:
            return BACKENDS[candidate].ranks.rank_targets(problem)
        except Exception as error:
            if not _is_of_compiler(error):
                raise
            _breaks(candidate, error)
    return over_blocks.rank_targets(problem)


def statistics(name: str, problem: Problem) -> SoftmaxStatistics:
    """What the loss knows of every row, on the backend on which it would be solved."""
    name, device = chosen(name), problem.query.device.type
    if name != "auto":
        pick(name, problem)  # which raises
    else:
        fits = _runnable(device, lambda one: unsupported_reason(one, problem))
        name = next(fits, "chunked")
    if not problem.query.shape[0] or not problem.num_candidates:
        name = name if name == "eager" else "chunked"
    return BACKENDS[name].statistics.statistics(problem)


def scaled(
    gradients: Sequence[Tensor], upstream: Tensor, dtypes: list[torch.dtype], in_place: bool = False
) -> list[Tensor]:
    """``gradient * upstream`` for all gradients, `in_place` where nobody needs them any more.

    The product is made in float32: a loss scaler's 65536 is infinite in float16.
    """
    if upstream.is_cuda and unavailable_reason("triton", "cuda") is None:
        return triton_backend.scaled(gradients, upstream, dtypes, in_place)
    # As `loss.backward()` has it. Looking costs nothing on a CPU, a pass over the gradients does.
    if in_place and upstream.device.type == "cpu" and upstream.dim() == 0 and upstream.item() == 1:
        return [g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
    products = []
    for gradient, dtype in zip(gradients, dtypes, strict=True):
        if in_place and gradient.dtype == dtype == upstream.dtype:
            products.append(gradient.mul_(upstream))
            continue
        wide = gradient if gradient.dtype == torch.float64 else gradient.float()
        products.append((wide * upstream).to(dtype))
    return products
