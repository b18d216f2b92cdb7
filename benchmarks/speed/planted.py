"""Versions with a fault, which a dry run of the GPU round must outlive and report."""

from __future__ import annotations

import os
import time

from torch import Tensor

from benchmarks.speed.shapes import Inputs


def crash(x: Inputs) -> Tensor:
    os.abort()


def hang(x: Inputs) -> Tensor:
    time.sleep(3600)
    raise AssertionError("nothing ended it")


def nan(x: Inputs) -> Tensor:
    return x.query.sum() * float("nan")


FAULTS = {"crash": crash, "hang": hang, "nan": nan}
