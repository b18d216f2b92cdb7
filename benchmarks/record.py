"""What a figure needs to count: commit, machine and versions, in a file never half-written."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dwl_kernels

ROOT = Path(__file__).resolve().parents[1]


def record(**figures: Any) -> dict[str, Any]:
    """The figures with all that one has to know to judge them."""
    return {
        "commit": _commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu_name(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": _cores(),
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "blas": "mkl" if torch.backends.mkl.is_available() else "other",
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
            "numpy": np.__version__,
            "dwl_kernels": dwl_kernels.__version__,
        },
        **figures,
    }


def busy() -> str:
    """A warning where other processes have kept this machine at work; else nothing."""
    if not hasattr(os, "getloadavg"):
        return ""
    # The mean of the last minute, to which this process has added the time that it has computed.
    others = os.getloadavg()[0] - time.process_time() / 60
    if others < 0.5:
        return ""
    return (
        f"This machine is busy: in the last minute other processes kept {others:.1f} of its "
        f"{_cores()} processors at work. Times come out longer and less certain; for good ones "
        "let the others end first, and wait a minute."
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, or on failure nothing."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def append_line(path: Path, **figures: Any) -> None:
    """Add a line of JSON, at once on disk: what comes next may end the process."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    line = json.dumps({"gpu": device, "commit": _commit(), **figures}, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path` that takes its place in one step, or disappears on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@functools.cache
def _commit() -> str | None:
    """HEAD, marked where files differ from it; outside a checkout what ``COMMIT`` says, or None."""
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain"])
    try:
        head, changes = (
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT")
    return head.strip() + ("-dirty" if changes.strip() else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _cores() -> int | None:
    """Those that this process may use, which a container limits."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
