"""A machine on which something is missing: a loss still comes out, and one warning says why.

Also what `import dwl_kernels` does not import, so that it is quick and needs none of it.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dwl_kernels
from dwl_kernels import backends
from dwl_kernels.backends.cpu import solve as cpu


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DWL_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(cpu, "does_not_build", lambda: "no compiler found")


def by_function(query: Tensor) -> Tensor:
    return dwl_kernels.in_batch_softmax_loss(query, query)  # the user's line


def by_module(query: Tensor) -> Tensor:
    return dwl_kernels.DynamicWeightedSampledSoftmax()(query, query)  # the user's line


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss = dwl_kernels.CumulativeCrossEntropy()

    def forward(self, query: Tensor) -> Tensor:
        target = torch.arange(len(query))
        return self.loss(query, query.detach(), target)  # the user's line


def by_module_in_a_model(query: Tensor) -> Tensor:
    return Model()(query)


def by_keyword(query: Tensor) -> Tensor:
    return dwl_kernels.full_softmax_loss(  # the user's line
        table=query, target=torch.zeros(len(query), dtype=torch.int64), query=query
    )


@pytest.mark.parametrize("loss", [by_function, by_module, by_module_in_a_model, by_keyword])
def test_warning_points_at_the_users_line(
    no_kernel: None, loss: Callable[[Tensor], Tensor]
) -> None:
    with pytest.warns(UserWarning, match="'cpu' cannot run") as caught:
        loss(torch.randn(4, 3, requires_grad=True)).backward()
    (warning,) = caught
    assert warning.filename == __file__
    line = inspect.getsource(sys.modules[__name__]).splitlines()[warning.lineno - 1]
    assert line.endswith("# the user's line")


def test_user_without_a_home_gets_one_warning_that_names_the_mend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_entry(_: object) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", no_entry)
    for name in ("HOME", "XDG_CACHE_HOME", "DWL_KERNELS_CACHE", "DWL_KERNELS_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dwl_kernels.backends.cpu.build, "_loaded", False)
    monkeypatch.setattr(cpu, "does_not_build", cpu.does_not_build.__wrapped__)
    monkeypatch.setattr(backends, "_warned", set())
    query = torch.randn(4, 3)
    with pytest.warns(UserWarning, match=r"no home folder.*set DWL_KERNELS_CACHE") as caught:
        loss = by_function(query)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_function(query)
    eager = dwl_kernels.in_batch_softmax_loss(query, query, backend="eager")
    torch.testing.assert_close(loss, eager)


def after(program: str) -> list[str]:
    """What a fresh process prints."""
    program = textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_import_takes_nothing_that_torch_has_not_but_this_package() -> None:
    added = after(
        """
        import sys, torch
        before = set(sys.modules)
        import dwl_kernels
        print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}), sep="\\n")
        """
    )
    # The first is small. `filelock`, `setuptools`, `triton` and `torch.utils.cpp_extension`, which
    # is a part of torch that torch does not import, take 40 to 200 ms.
    assert set(added) <= {"shlex", "dwl_kernels"}


def test_without_triton_nothing_speaks_of_it() -> None:
    said = after(
        """
        import os, sys, torch
        os.environ.update(DWL_KERNELS_BACKEND="auto")
        sys.modules["triton"] = None  # importing it raises
        import dwl_kernels
        query = torch.randn(4, 3, requires_grad=True)
        dwl_kernels.in_batch_softmax_loss(query, query).backward()
        print(query.grad is not None)
        """
    )
    assert said == ["True"]
