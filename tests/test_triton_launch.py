"""Launching what has been compiled before, with kernels that only take notes."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from dwl_kernels.backends.triton import launch as triton_launch
from dwl_kernels.backends.triton import solve as host
from dwl_kernels.backends.triton.kernels import scale_gradients as triton_scale
from dwl_kernels.backends.triton.kernels import table_gradient as triton_table
from dwl_kernels.backends.triton.launch import entry_of, launch, workspace
from dwl_kernels.core.problem import GradMask, PerRowProblem, RowOptions, SharedProblem


class Compiled:
    function, packed_metadata = 1, (4, 1, 0)

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def run(self, x: int, y: int, z: int, *others: Any) -> None:
        assert others[:3] == (STREAM, self.function, self.packed_metadata)
        assert others[3:6] == (None,) * 3
        self.calls.append(("direct", (x, y, z), others[6:]))


STREAM = 7


class Kernel:
    """As a jitted function: looks at the arguments, compiles and launches."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.fn = object()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> Compiled:
            self.calls.append(("looked", grid, arguments))
            return Compiled(self.calls)

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(triton_launch, "_compiled", {})
    monkeypatch.setattr(triton_launch, "_stream", lambda: STREAM)
    return Kernel()


def launched(kernel: Kernel, programs: int, key: str, *tensors: torch.Tensor | None) -> None:
    entry = entry_of(kernel, key, tensors)
    launch(kernel, programs, entry, tensors, lambda t: (tuple(t), 7), {"num_warps": 4})


def ways(kernel: Kernel) -> list[str]:
    return [way for way, *_ in kernel.calls]


def test_second_call_goes_straight_to_the_compiled_kernel_with_addresses(kernel: Kernel) -> None:
    x = torch.zeros(8)
    for _ in range(3):
        launched(kernel, 5, "key", x, None)
    direct = ("direct", (5, 1, 1), ((x.data_ptr(), None), 7))
    assert kernel.calls == [("looked", (5, 1, 1), ((x, None), 7)), direct, direct]


def test_another_key_dtype_or_absence_is_another_kernel(kernel: Kernel) -> None:
    x = torch.zeros(8)
    for key, tensors in (("a", (x,)), ("b", (x,)), ("a", (x.double(),)), ("a", (x, None))):
        launched(kernel, 1, key, *tensors)
    assert ways(kernel) == ["looked"] * 4


def test_pointers_that_are_not_aligned_take_the_slow_way_and_leave_no_trace(kernel: Kernel) -> None:
    x = torch.zeros(9)
    for tensor in (x[1:], x[:8], x[1:], x[:8]):
        launched(kernel, 1, "key", tensor)
    assert ways(kernel) == ["looked", "looked", "looked", "direct"]


def test_hooks_of_triton_see_every_launch(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its profiler adds some; they are called on Triton's own way."""
    x = torch.zeros(8)
    launched(kernel, 1, "key", x)
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [print])
    launched(kernel, 1, "key", x)
    assert ways(kernel) == ["looked", "looked"]


class Binder:
    """In place of `launch`: asks Triton what it would compile, and launches nothing."""

    def __init__(self) -> None:
        self.found: dict[Any, str] = {}

    def __call__(
        self, kernel: Any, programs: int, entry: Any, tensors: Any, arguments: Any, *others: Any
    ) -> None:
        marked = getattr(kernel, "do_not_specialize", None)
        if marked is None:  # the interpreter's, where it is on
            marked = kernel.kwargs["do_not_specialize"]
        jitted = JITFunction(kernel.fn, do_not_specialize=marked)
        backend = make_backend(GPUTarget("cuda", 90, 32))
        bind = create_function_from_signature(jitted.signature, jitted.params, backend)
        _, specialization, _ = bind(*arguments(tensors))
        assert self.found.setdefault(entry, str(specialization)) == str(specialization)


@pytest.fixture
def binder(monkeypatch: pytest.MonkeyPatch) -> Binder:
    """Fails where one entry would take two compiled kernels."""
    found = Binder()
    for module in (host, triton_scale, triton_table):
        monkeypatch.setattr(module, "launch", found)
    return found


NUMBERS = (1, 2, 8, 15, 16, 17, 32, 33)


def test_gradients_of_other_lengths_may_be_another_kernel(binder: Binder) -> None:
    """Triton takes a length of 1 for a constant, and one of 16 for a promise about addresses."""
    upstream = torch.tensor(2.0)
    for first in NUMBERS:
        for second in NUMBERS:
            gradients = [torch.zeros(first), torch.zeros(second)]
            triton_scale.scaled(gradients, upstream, [torch.float32] * 2)
    assert len(binder.found) == 9


def test_places_of_other_numbers_may_be_another_kernel(binder: Binder) -> None:
    for rows in NUMBERS:
        for width in NUMBERS:
            ids = [torch.zeros(rows, 1, dtype=torch.int64), torch.zeros(rows, width).long()]
            call = (torch.zeros(rows, 16), ids, [torch.zeros(x.shape) for x in ids], 50)
            triton_table.table_gradient(*call, torch.float32, False)
    assert binder.found


@pytest.mark.parametrize("per_row", [False, True])
def test_problems_of_other_sizes_may_be_another_kernel(binder: Binder, per_row: bool) -> None:
    for rows in NUMBERS:
        for candidates in NUMBERS:
            for domains in (1, 2, 16, 17):
                options = RowOptions(
                    domain_ids=torch.zeros(rows, 1, dtype=torch.int64),
                    domain_weights=torch.zeros(domains),
                )
                query = torch.zeros(rows, 16)
                if per_row:
                    drawn = torch.zeros(rows, candidates, dtype=torch.int64)
                    problem = PerRowProblem(
                        *(query, torch.zeros(domains, 16), drawn[:, 0].contiguous(), drawn),
                        rows=options,
                    )
                else:
                    problem = SharedProblem(
                        query, query.clone(), torch.zeros(candidates, 16), rows=options
                    )
                wanted = GradMask(True, True, True, False, False, True)
                plan = host.plan_of(problem, wanted, None, *host.INTERPRETER)
                host._launch(problem, wanted, None, plan)
    assert binder.found


def test_workspace_that_is_kept_is_no_memory_of_a_graph_that_is_being_warmed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While `torch.compile` warms a graph, what its thread allocates must be gone at the end."""
    threads = []
    zeros = torch.zeros

    def allocated(*size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        threads.append(threading.get_ident())
        return zeros(*size, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", allocated)
    monkeypatch.setattr(torch, "empty", allocated)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(triton_launch, "_stream", lambda: STREAM)
    monkeypatch.setattr(triton_launch, "_spaces", {})

    def space(floats: int, integers: int) -> triton_launch.Space:
        found = workspace(torch.device("cuda", 0), torch.float32, floats, integers)
        assert found.barrier.item() == 0
        return found

    first = space(8, 4)
    assert space(5, 4) is space(8, 1) is first
    assert len(threads) == 3
    larger = space(9, 1)
    assert (larger.floats.numel(), larger.integers.numel()) == (9, 4)
    assert threading.get_ident() not in threads
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert space(1, 1).barrier is not larger.barrier
    assert space(9, 4).floats is not larger.floats
