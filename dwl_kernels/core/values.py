"""Looking at the values of tensors: where no device has to be waited for, and what is wrong.

Called by `rows`, `build`, the reference and the modules. Where values are not looked at, a row that
holds something impossible gets NaN instead of an error.
"""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dwl_kernels.core.double_backward import transforms_active
from dwl_kernels.core.problem import NO_ITEM, Problem, SharedProblem


def checks_values(tensor: Tensor) -> bool:
    """Whether looking at values is free, or asked for by ``DWL_KERNELS_CHECK=1``.

    Never where there are none: in a graph, under a transform or a mode that traces, in a fake or a
    meta tensor.
    """
    if torch.compiler.is_compiling() or transforms_active() or not has_values(tensor):
        return False
    if torch._C._len_torch_dispatch_stack() > 0 and _traced():
        return False
    return tensor.device.type == "cpu" or os.environ.get("DWL_KERNELS_CHECK") == "1"


def has_values(tensor: Tensor) -> bool:
    """Whether `tensor` is neither fake nor on the device `meta`."""
    return not tensor.is_meta and type(tensor).__name__ != "FakeTensor"


def _traced() -> bool:
    """Whether a mode of fake tensors, of tracing or of functionalisation is at work."""
    key = torch._C._TorchDispatchModeKey
    modes = (key.FAKE, key.PROXY, key.FUNCTIONAL)
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in modes)


def autocasting(device_type: str) -> bool:
    """Whether autocast is on for such devices."""
    # By name: PyTorch 2.11 cannot trace `torch.amp.is_autocast_available`.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A context without autocast. Entering one takes time, so it is nothing where it is off."""
    if autocasting(device_type):
        return torch.autocast(device_type, enabled=False)
    return _NOTHING


_NOTHING = nullcontext()


def ids_outside(
    name: str,
    ids: Tensor,  # [B] or [B, K]
    table_rows: int,
    active: Tensor | None = None,  # [B] bool, ids of other rows are not looked at
    least: int = 0,
) -> Tensor | None:  # [B] bool
    """Which rows hold an id that is no row of the table; None where none can.

    Raises:
        IndexError: there is one, where values are looked at.
    """
    checks = checks_values(ids)
    if checks and ids.numel():
        low, high = ids.aminmax()
        if int(low) >= least and int(high) < table_rows:
            return None
    outside = (ids < least) | (ids >= table_rows)
    if active is not None:
        outside &= active.view(-1, *(1,) * (ids.dim() - 1))
    if checks:
        if bool(outside.any()):
            otherwise = ", or ignore_index" if name == "target" else ""
            otherwise = ", or -1, no item" if name in ("negative_ids", "seen[1]") else otherwise
            raise IndexError(
                f"{name} holds {int(ids[outside][0])}, but table has {table_rows} rows: ids must "
                f"be in [0, {table_rows}){otherwise}"
            )
        return None
    return outside if ids.dim() == 1 else outside.any(1)


def check_distinct(
    name: str,
    domain_ids: Tensor,  # [M, G], -1 = none
) -> None:
    """ValueError for a domain that a row names twice, as flags of 0 and 1 taken for ids do."""
    if domain_ids.shape[1] < 2:
        return
    # NumPy takes a third of the time that PyTorch does for so little.
    slots = np.ascontiguousarray(domain_ids.cpu().numpy().T)  # [G, M]
    named = slots >= 0
    for apart in range(1, len(slots)):
        twice = (slots[apart:] == slots[:-apart]) & named[apart:]
        if twice.any():
            row, slot = np.argwhere(twice.T)[0]
            raise ValueError(
                f"{name} names domain {slots[slot, row]} twice in row {row}, which looks multi-hot;"
                " pass ids, each domain once and -1 for none, or domains_from_multi_hot(flags)"
            )


_LEAST = {"negative_ids": NO_ITEM}


def wrong_rows(problem: Problem, active: Tensor | None) -> Tensor | None:  # [B] bool
    """Which rows have an id outside the table or an impossible temperature; None where none can.

    Raises:
        IndexError, ValueError: there is one, where values are looked at.
    """
    named: dict[str, Tensor | None]
    if isinstance(problem, SharedProblem):
        named, table_rows = {"target": problem.target}, problem.candidates.shape[0]
    else:
        named = {"positive_ids": problem.positive_rows, "negative_ids": problem.candidate_rows}
        table_rows = problem.item_table.shape[0]
    found = [
        None if ids is None else ids_outside(name, ids, table_rows, active, _LEAST.get(name, 0))
        for name, ids in named.items()
    ]
    found.append(wrong_temperatures(problem.rows.temperature, active))
    wrong = None
    for one in found:
        if one is not None:
            wrong = one if wrong is None else wrong | one
    return wrong


def wrong_temperatures(tau: Tensor | None, active: Tensor | None) -> Tensor | None:
    """Which rows, [] or [B], have a temperature that is not a positive finite number, likewise."""
    if tau is None:
        return None
    checks = checks_values(tau)
    if checks and tau.numel():
        low, high = tau.detach().aminmax()  # of NaN, NaN
        if float(low) > 0 and float(high) < math.inf:
            return None
    wrong = ~((tau > 0) & (tau < torch.inf))
    if tau.dim() and active is not None:
        wrong &= active
    if checks and bool(wrong.any()):
        where = f" in row {int(wrong.nonzero()[0])}" if tau.dim() else ""
        raise ValueError(
            f"temperature is {float(tau.detach()[wrong].flatten()[0]):g}{where}; wanted a "
            "positive, finite number"
        )
    return None if checks else wrong


def not_negative(weight: Tensor) -> Tensor:  # [B]
    """`weight`; ValueError for a negative one, NaN where values are not looked at."""
    if not checks_values(weight):
        return weight.masked_fill(weight < 0, torch.nan)
    # The smallest may be NaN, and others negative.
    if not weight.numel() or float(weight.detach().min()) >= 0 or not (weight < 0).any():
        return weight
    row = int((weight < 0).nonzero()[0])
    raise ValueError(
        f"the weight of row {row} is {float(weight.detach()[row]):g}, and weights must not be "
        "negative; check example_weights and domain_weights"
    )


def wrong_domains(domain_ids: Tensor, num_domains: int) -> tuple[Tensor | None, bool]:
    """Which ids are no domains, bool ``[B, G]``, and whether all are known to be domains.

    None, or an error, where values are looked at.
    """
    if not checks_values(domain_ids):
        return (domain_ids < -1) | (domain_ids >= num_domains), False
    low = -1
    if domain_ids.numel():
        low, high = (int(extreme) for extreme in domain_ids.aminmax())
        if low < -1 or high >= num_domains:
            bad = domain_ids[(domain_ids < -1) | (domain_ids >= num_domains)][0]
            raise IndexError(
                f"domain_ids holds {int(bad)}, but domain_weights has {num_domains} entries: ids "
                f"must be in [0, {num_domains}), or -1 for none"
            )
        check_distinct("domain_ids", domain_ids)
    return None, low >= 0
