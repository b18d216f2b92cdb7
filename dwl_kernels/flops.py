"""How many operations the registered ops are, for ``torch.utils.flop_counter.FlopCounterMode``.

Counted as PyTorch counts: the products of matrices, an addition and a multiplication being two. A
loss is the product of the logits, 2 B N D, and one as large for the gradient of the queries (or of
the temperature) and for that of the candidates, so that a step with all of them is 6 B N D. The
dual scale with a similarity has one product more. The rows of reduction "none" are solved once more
in the backward, and count once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _python_dispatch

from dwl_kernels.core.problem import GradMask
from dwl_kernels.ops import ARGUMENTS

_modes: Any = getattr(_python_dispatch, "_get_current_dispatch_mode_stack", lambda: [])


def tell_counters() -> None:
    """Give the formulas to the counters that are at work.

    Registering them for all would import the counter, a quarter of a second of every import of this
    package; and a counter keeps the formulas that there were when it was made.
    """
    for mode in _modes():
        formulas = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if isinstance(formulas, dict):
            formulas.setdefault(torch.ops.dwl_kernels.softmax_loss, _softmax_loss)
            formulas.setdefault(torch.ops.dwl_kernels.table_gradient, _table_gradient)


def _softmax_loss(*args: Any, **_: Any) -> int:
    *fields, _row_grad, wanted, _backend = args
    given = dict(zip((argument.name for argument in ARGUMENTS), fields, strict=True))
    want, dual = GradMask(*wanted), given["dual"]
    products = 1 + (want.query or want.temperature)
    if given["candidate_rows"] is None:
        competing = given["candidates"].shape[0]
        products += want.candidates + (dual is not None and dual[1] != 0)
    else:
        competing = given["candidate_rows"].shape[1]  # the table's gradient counts its own
    return int(2 * given["query"].numel() * competing * products)


def _table_gradient(
    source: Tensor,  # [R, D]
    ids: Sequence[Tensor],
    coefficients: Sequence[Tensor],  # each [R, J]
    *_: Any,
    **__: Any,
) -> int:
    """Two operations for each place that has a coefficient; a sum alone is no product."""
    return sum(2 * one.numel() for one in coefficients) * source.shape[1]
