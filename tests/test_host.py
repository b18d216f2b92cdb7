"""What a call costs the host, in functions called: unlike times, the same on every machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import host
from dwl_kernels import in_batch_softmax_loss

ROOT = Path(__file__).parent.parent
# A little above what the calls take; those of Triton's launcher and of autograd are among them.
MOST = {("in-batch", "plain"): 265, ("shared", "domain weights"): 345}

RECORD = """
import ctypes, json, torch
from benchmarks import host
from benchmarks.recorder import recording
from benchmarks.speed.baselines import package_loss, step
found = {}
with recording() as driver:
    launches = ctypes.c_int.in_dll(driver, "launches")
    for kind, level in (("in-batch", "plain"), ("shared", "domain weights")):
        x = host.inputs_of(kind, level, "cpu")
        run = step(lambda x: package_loss(x, "triton"))
        calls, before = host.function_calls(lambda: run(x)), launches.value
        run(x)
        found[f"{kind}, {level}"] = calls, launches.value - before
    x = host.inputs_of("in-batch", "plain", "cpu")
    ctypes.c_int.in_dll(driver, "wanted").value = 3
    with torch.no_grad():
        for _ in range(2):
            loss = package_loss(x, "triton")
    addresses = [t.data_ptr() for t in (x.query, x.positive, loss)]
    found["in order"] = addresses == list((ctypes.c_ulonglong * 3).in_dll(driver, "parameters"))
    found["cooperative"] = ctypes.c_int.in_dll(driver, "attributes").value
print(json.dumps(found))
"""


def test_repeated_step_is_two_launches_and_few_function_calls_and_hands_over_addresses() -> None:
    """In a process of its own: this one may have Triton's interpreter on."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", RECORD]
    done = subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["in order"]
    assert found["cooperative"] == 1
    for (kind, level), most in MOST.items():
        calls, launches = found[f"{kind}, {level}"]
        assert launches == 2
        assert calls <= most


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.ops.add(str(func))
        return func(*args, **(kwargs or {}))


def test_mode_that_watches_sees_the_registered_ops() -> None:
    query, positive = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    expected = in_batch_softmax_loss(query, positive, backend="eager")
    with Watching() as watching:
        loss = in_batch_softmax_loss(query, positive, backend="eager")
        loss.backward()
    assert torch.equal(loss, expected)
    assert {"dwl_kernels.softmax_loss.default", "dwl_kernels.scale.default"} <= watching.ops


def test_call_that_nobody_watches_goes_past_the_dispatcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.ops, "dwl_kernels", None)
    query, positive = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    in_batch_softmax_loss(query, positive, backend="eager").backward()
    assert query.grad is not None


def test_tensors_without_memory_get_a_loss_without_memory() -> None:
    query, positive = (torch.empty(5, 4, device="meta", requires_grad=True) for _ in range(2))
    loss = in_batch_softmax_loss(query, positive)
    assert loss.is_meta
    loss.backward()
    assert query.grad is not None
    assert query.grad.is_meta


def test_eager_is_measured_at_the_same_problem() -> None:
    x = host.inputs_of("in-batch", "domain weights", "cpu")
    assert x.domain_ids is not None
    assert x.positive_log_q is not None
    assert x.positive_ids is not None
