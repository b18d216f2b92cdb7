"""The problem that every loss builds and every backend solves.

One tuple of named fields travels from the public functions to the kernels. `validation` builds it,
with the checks of shapes and dtypes in `checks`; a backend may rely on what they guarantee. Checks
of tensor *values* would wait for the device, so they stand in :meth:`Problem.row_weights`, which
backends call, and cost a CUDA device nothing.
"""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dwl_kernels.core.double_backward import transforms_active

Reduction = Literal["mean", "weighted_mean", "sum", "none"]
Correction = Literal["standard", "refined"]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NO_ITEM = -1  # the id of what is no item: it is nobody's hit
INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint32, torch.uint16, torch.uint8),
)


class Wanted(NamedTuple):
    """Which gradients a call needs; nothing else is computed."""

    query: bool
    positive: bool
    candidates: bool
    candidate_log_q: bool
    temperature: bool
    domain_weights: bool


class DualScale(NamedTuple):
    """Strengths of the dual-scale softmax."""

    hardness: float  # weighs candidates by <q_i, c_j> / tau
    similarity: float  # weighs candidates by <p_i, c_j> / tau
    slate_size: int  # groups of candidates, whose strongest make the row's slate
    competition: float  # moves tau_i by how hard the slate competes


class RowWeights(NamedTuple):
    """What the rows weigh. ``a_i = weight_i r_i / norm``."""

    weight: Tensor  # [B] w_i, example weight times the mean of the row's domain weights
    active: Tensor | None  # [B] bool, False for padding; None where no row can be padding
    norm: Tensor | None  # [] divisor of the reduction; None for "sum" and "none"


class Output(NamedTuple):
    """What a backend returns; a gradient that is not wanted is None."""

    loss: Tensor  # [] or [B] for reduction "none"
    query: Tensor | None = None  # [B, D]
    positive: Tensor | None = None  # [B, D]; dL/d<q_i, p_i> [B] where candidates are by row
    candidates: Tensor | None = None  # [N, D]; dL/d<q_i, c_ij> [B, K] where candidates are by row
    candidate_log_q: Tensor | None = None  # [N]
    temperature: Tensor | None = None  # [] or [B]
    domain_weights: Tensor | None = None  # [num_domains]


class Problem(NamedTuple):
    """``B`` queries, their positives and ``N`` candidates, with everything that shapes the loss.

    Row ``i`` scores candidate ``j`` by ``z_ij = <q_i, c_j> / tau_i - log Q_j`` and its positive by
    ``z_i+ = <q_i, p_i> / tau_i - log Q+_i``. With ``positive=None`` the positive of row ``i`` *is*
    a candidate, its own: ``target[i]`` (full softmax), or without ``target`` candidate ``i``
    (in-batch). That column is then no candidate of row ``i``, and the gradient of ``candidates``
    holds both roles.

    With ``candidate_rows`` the candidates are a table and every row has its own ``K`` of them,
    drawn by id: ``c_ij`` is row ``candidate_rows[i, j]`` of the table, a hit where that is
    ``target[i]``, and the positive is row ``target[i]``. A backend then gives the gradient of the
    products, ``dL/d<q_i, c_ij>``, from which that of the table follows.
    """

    query: Tensor  # [B, D]
    positive: Tensor | None  # [B, D]
    candidates: Tensor  # [N, D], same dtype and device as query
    target: Tensor | None = None  # [B] int64; without candidate_rows `ignore_index` marks padding
    candidate_rows: Tensor | None = None  # [B, K] int64, rows of the table `candidates`
    positive_log_q: Tensor | None = None  # [B] in `accumulate` dtype, as all that follow
    candidate_log_q: Tensor | None = None  # [N] or [B, K]; or minus a bias, with a gradient
    positive_ids: Tensor | None = None  # [B] int32 or int64, both or none of the two
    candidate_ids: Tensor | None = None  # [N]
    domain_ids: Tensor | None = None  # [B, G] int32 or int64, -1 = no domain
    domain_weights: Tensor | None = None  # [num_domains]
    example_weights: Tensor | None = None  # [B], 0 marks a padded row
    temperature: Tensor | None = None  # [] or [B], multiplies `tau`
    tau: float = 1.0
    ignore_index: int = -100
    correction: Correction = "standard"
    reduction: Reduction = "mean"
    skip_threshold: float = 0.0  # see skippable_below
    dual: DualScale | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields from ``query`` to ``temperature``."""
        return self[:NUM_TENSORS]  # type: ignore[return-value]

    def sources(self) -> tuple[Tensor | None, ...]:
        """What `Wanted` speaks of, in its order."""
        p = self
        return p.query, p.positive, p.candidates, p.candidate_log_q, p.temperature, p.domain_weights

    def choices(self) -> tuple[Any, ...]:
        """The fields after ``tau``."""
        return self[NUM_TENSORS + 1 :]

    @property
    def in_batch(self) -> bool:
        return self.positive is None and self.target is None

    @property
    def by_row(self) -> bool:
        """Whether every row has candidates of its own, drawn from a table."""
        return self.candidate_rows is not None

    @property
    def positive_competes(self) -> bool:
        """Whether the positive of a row is one of the candidates, its own column."""
        return self.positive is None and not self.by_row

    def own_columns(self) -> Tensor:
        """Which candidate is the positive of each row where there is no ``positive``, ``[B]``."""
        if self.target is None:
            return torch.arange(self.query.shape[0], device=self.query.device)
        return self.target.clamp(0, self.candidates.shape[0] - 1)

    @property
    def accumulate(self) -> torch.dtype:
        """The dtype of logits, sums and the loss."""
        return accumulate_dtype(self.query.dtype)

    @property
    def gradient(self) -> torch.dtype:
        """The dtype of embedding gradients before the upstream gradient is applied.

        float16 cannot hold them yet: a mean over a large batch underflows, and what a loss scaler
        multiplies later cannot be brought back.
        """
        return torch.float32 if self.query.dtype == torch.float16 else self.query.dtype

    @property
    def candidate_gradient(self) -> torch.dtype:
        """The dtype of the gradients of positive and candidates, by row those of their products."""
        return self.accumulate if self.by_row else self.gradient

    def temperatures(self, active: Tensor | None) -> Tensor:
        """``tau_i`` for every row, ``[B]``; 1 where it is not `active`: padding holds anything."""
        rows = self.query.shape[0]
        if self.temperature is None:
            return self.query.new_full((rows,), self.tau, dtype=self.accumulate)
        tau = (self.temperature * self.tau).expand(rows)
        if active is None or self.temperature.dim() == 0:
            return tau
        return torch.where(active, tau, 1.0)

    def skippable_below(self, weights: RowWeights) -> Tensor | None:
        """The probability ``p_ij`` under which the gradient of a pair may be left out, ``[B]``.

        ``w_i r_i p_ij < skip_threshold``, with ``r_i = 1``: only the full softmax has a threshold.
        A backend leaves out blocks of (rows x candidates) in which every pair is below, or nothing,
        never the row's positive. None where everything counts.
        """
        return self.skip_threshold / weights.weight if self.skip_threshold > 0 else None

    def row_weights(self) -> RowWeights:
        """``w_i``, which rows are padding, and the norm.

        Raises:
            IndexError: a domain id or a target out of range, on a CPU. On other devices such a row
                weighs NaN instead, unless ``DWL_KERNELS_CHECK=1`` asks for the error.
            ValueError: a negative weight, or a tensor of temperatures that are not positive and
                finite, under the same conditions.
        """
        rows = self.query.shape[0]
        if self.example_weights is None:
            example, active = self.query.new_ones(rows, dtype=self.accumulate), None
        else:
            example, active = self.example_weights, self.example_weights != 0
        if self.target is not None and not self.by_row:
            kept = self.target != self.ignore_index
            active = kept if active is None else active & kept
        weight = example
        if self.domain_ids is not None:
            weight = example * mean_domain_weight(self.domain_ids, self._weights(), active)
        weight = self._weight_inside(weight, active)
        weight = self._weight_of_temperatures(weight, active)
        if active is not None:
            weight = torch.where(active, weight, 0.0)
        negative = weight < 0
        if checks_values(weight):
            if bool(negative.any()):
                row = int(negative.nonzero()[0])
                raise ValueError(
                    f"the weight of row {row} is {float(weight[row]):g}, and weights must not be "
                    "negative; check example_weights and domain_weights"
                )
        else:
            weight = weight.masked_fill(negative, torch.nan)
        norm: Tensor | None = None
        if self.reduction == "weighted_mean":
            norm = weight.sum()
        elif self.reduction == "mean":
            norm = weight.new_full((), rows) if active is None else active.sum().to(weight.dtype)
        return RowWeights(weight, active, norm)

    def _weight_inside(self, weight: Tensor, active: Tensor | None) -> Tensor:
        """`weight`, NaN in rows whose target or candidates lie outside the table."""
        named = {"target": self.target}
        if self.by_row:
            named = {"positive_ids": self.target, "negative_ids": self.candidate_rows}
        for name, ids in named.items():
            if ids is not None:
                outside = ids_outside(name, ids, self.candidates.shape[0], active)
                weight = weight if outside is None else weight.masked_fill(outside, torch.nan)
        return weight

    def _weight_of_temperatures(self, weight: Tensor, active: Tensor | None) -> Tensor:
        """`weight`, NaN in rows whose temperature is not a positive finite number."""
        tau = self.temperature
        if tau is None:
            return weight
        checks = checks_values(tau)
        if checks and tau.numel():
            low, high = tau.detach().aminmax()  # of NaN, NaN
            if float(low) > 0 and float(high) < math.inf:
                return weight
        wrong = ~((tau > 0) & (tau < torch.inf))
        if tau.dim() and active is not None:
            wrong &= active
        if not checks:
            return weight.masked_fill(wrong, torch.nan)
        if bool(wrong.any()):
            where = f" in row {int(wrong.nonzero()[0])}" if tau.dim() else ""
            raise ValueError(
                f"temperature is {float(tau[wrong].flatten()[0]):g}{where}; wanted a positive, "
                "finite number"
            )
        return weight

    def _weights(self) -> Tensor:
        assert self.domain_weights is not None  # checked by _row_arguments
        return self.domain_weights


NUM_TENSORS = 13  # the first fields of `Problem`
# The places of `Problem.sources` among them.
SOURCES = tuple(Problem._fields.index(name) for name in Wanted._fields)


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
            otherwise = ", or -1, no item" if name == "negative_ids" else otherwise
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


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def mean_domain_weight(
    domain_ids: Tensor,  # [B, G], -1 = none
    domain_weights: Tensor,  # [num_domains]
    active: Tensor | None = None,  # [B] bool, ids of other rows are not looked at
) -> Tensor:  # [B]
    """Mean of ``W[d]`` over the domains of each row; 1 for a row that has none.

    Raises:
        IndexError: an id out of range, where values are looked at; elsewhere the row gets NaN.
        ValueError: a domain twice in a row, where values are looked at.
    """
    num_domains = domain_weights.shape[0]
    if active is not None:
        domain_ids = domain_ids.masked_fill(~active[:, None], -1)
    outside = None
    if not checks_values(domain_ids):
        outside = (domain_ids < -1) | (domain_ids >= num_domains)
    elif domain_ids.numel():
        low, high = (int(extreme) for extreme in domain_ids.aminmax())
        if low < -1 or high >= num_domains:
            bad = domain_ids[(domain_ids < -1) | (domain_ids >= num_domains)][0]
            raise IndexError(
                f"domain_ids holds {int(bad)}, but domain_weights has {num_domains} entries: ids "
                f"must be in [0, {num_domains}), or -1 for none"
            )
        check_distinct("domain_ids", domain_ids)
        if low >= 0:  # no row without a domain, in a fifth of the time
            weights = domain_weights.index_select(0, domain_ids.reshape(-1))
            slots = domain_ids.shape[1]
            return weights if slots == 1 else weights.view(-1, slots).sum(1) / slots
    present = domain_ids >= 0
    if outside is not None:
        domain_ids = domain_ids.clamp(0, num_domains - 1)
    gathered = domain_weights[domain_ids.long()]  # -1 reads the last, which then does not count
    gathered = torch.where(present, gathered, 0.0)
    count = present.sum(1)
    known = count > 0
    if outside is not None:
        gathered, known = gathered.masked_fill(outside, torch.nan), known | outside.any(1)
    return torch.where(known, gathered.sum(1) / count.clamp(min=1), 1.0)
