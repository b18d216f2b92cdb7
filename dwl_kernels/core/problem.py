"""The problem that every loss builds and every backend solves: pure data.

`build` makes a `SharedProblem` or a `PerRowProblem` of the arguments of a public function,
`autograd` adds which gradients are wanted (`GradMask`), and a backend returns an `Output`. It may
rely on the shapes and dtypes that stand here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_type_hints

import torch
from torch import Tensor

Reduction = Literal["mean", "weighted_mean", "sum", "none"]
Correction = Literal["standard", "refined"]

NO_ITEM = -1  # the id of what is no item: it is nobody's hit
INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint32, torch.uint16, torch.uint8),
)


class Dtypes(NamedTuple):
    """What follows from the dtype of the embeddings."""

    accumulate: torch.dtype  # of logits, sums and the loss
    # Of embedding gradients before the upstream gradient is applied. float16 cannot hold them yet:
    # a mean over a large batch underflows, and what a loss scaler multiplies later cannot be
    # brought back.
    gradient: torch.dtype


DTYPES = {
    torch.float32: Dtypes(torch.float32, torch.float32),
    torch.float64: Dtypes(torch.float64, torch.float64),
    torch.bfloat16: Dtypes(torch.float32, torch.bfloat16),
    torch.float16: Dtypes(torch.float32, torch.float32),
}
FLOATS = tuple(DTYPES)


class GradMask(NamedTuple):
    """Which gradients a call needs; nothing else is computed."""

    query: bool
    positive: bool
    candidates: bool
    candidate_log_q: bool
    temperature: bool
    domain_weights: bool


NO_GRADIENTS = GradMask(*(False,) * len(GradMask._fields))


class DualScale(NamedTuple):
    """Strengths of the dual-scale softmax."""

    hardness: float  # weighs candidates by <q_i, c_j> / tau
    similarity: float  # weighs candidates by <p_i, c_j> / tau
    slate_size: int  # groups of candidates, whose strongest make the row's slate
    competition: float  # moves tau_i by how hard the slate competes


class RowOptions(NamedTuple):
    """What every loss takes per row. Tensors are in `Dtypes.accumulate`."""

    domain_ids: Tensor | None = None  # [B, G] int32 or int64, -1 = no domain
    domain_weights: Tensor | None = None  # [num_domains]
    example_weights: Tensor | None = None  # [B], 0 marks a padded row
    temperature: Tensor | None = None  # [] or [B], multiplies `tau`
    competition_factor: Tensor | None = None  # [B] f_i / mean f, where other rows have a say in it
    tau: float = 1.0
    ignore_index: int = -100  # the target of a padded row in the full softmax
    correction: Correction = "standard"
    reduction: Reduction = "mean"


class SharedProblem(NamedTuple):
    """``B`` queries, their positives, and ``N`` candidates that all rows share.

    Row ``i`` scores candidate ``j`` by ``z_ij = <q_i, c_j> / tau_i - log Q_j`` and its positive by
    ``z_i+ = <q_i, p_i> / tau_i - log Q+_i``. With ``positive=None`` the positive of row ``i`` *is*
    a candidate, its own: ``target[i]`` (full softmax), or without ``target`` candidate ``i``
    (in-batch). That column is then no candidate of row ``i``, and the gradient of ``candidates``
    holds both roles.
    """

    query: Tensor  # [B, D]
    positive: Tensor | None  # [B, D], of the dtype and device of the query, as the candidates
    candidates: Tensor  # [N, D]
    target: Tensor | None = None  # [B] int64, `ignore_index` marks a padded row
    positive_log_q: Tensor | None = None  # [B]
    candidate_log_q: Tensor | None = None  # [N]; or minus a bias, with a gradient
    positive_ids: Tensor | None = None  # [B] int32 or int64, both or none of the two
    candidate_ids: Tensor | None = None  # [N]
    query_ids: Tensor | None = None  # [B] int32 or int64, both or none of the two
    candidate_query_ids: Tensor | None = None  # [N], of the row whose positive a candidate is
    rows: RowOptions = RowOptions()
    skip_threshold: float = 0.0  # see `rows.skippable_below`
    dual: DualScale | None = None

    @property
    def per_row(self) -> bool:
        """Whether every row has candidates of its own."""
        return False

    @property
    def num_candidates(self) -> int:
        """How many candidates a row has."""
        return self.candidates.shape[0]

    @property
    def in_batch(self) -> bool:
        return self.positive is None and self.target is None

    @property
    def dtypes(self) -> Dtypes:
        return DTYPES[self.query.dtype]

    @property
    def candidate_gradient(self) -> torch.dtype:
        """The dtype of the gradients of positive and candidates."""
        return self.dtypes.gradient

    def tensors(self) -> tuple[Any, ...]:
        """All tensors, in the order of the fields; None where there is none."""
        return (*self[:_SHARED], *self.rows[:_ROW])

    def choices(self) -> tuple[Any, ...]:
        """All fields that hold no tensor but `tau`."""
        return (*self.rows[_ROW + 1 :], *self[_SHARED + 1 :])

    def with_tensors(self, tensors: Sequence[Any]) -> SharedProblem:
        """The same problem with the tensors that `tensors` would give."""
        rows = RowOptions(*tensors[_SHARED:], *self.rows[_ROW:])
        mine = (*tensors[:_SHARED], rows, *self[_SHARED + 1 :])
        return SharedProblem._make(mine)

    def sources(self) -> tuple[Tensor | None, ...]:
        """What `GradMask` speaks of, in its order."""
        rows = self.rows
        mine = self.query, self.positive, self.candidates, self.candidate_log_q
        return (*mine, rows.temperature, rows.domain_weights)

    def id_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Ids of rows ``[B]`` and of candidates ``[N]``, of items, of queries, as far as given.

        A candidate that has an id of the row, and not -1, is no candidate of it.
        """
        items = self.positive_ids, self.candidate_ids
        queries = self.query_ids, self.candidate_query_ids
        pairs = [(a, b) for a, b in (items, queries) if a is not None and b is not None]
        return pairs

    def own_columns(self) -> Tensor:
        """Which candidate is the positive of each row where there is no ``positive``, ``[B]``."""
        if self.target is None:
            return torch.arange(self.query.shape[0], device=self.query.device)
        return self.target.clamp(0, self.candidates.shape[0] - 1)


class PerRowProblem(NamedTuple):
    """``B`` queries, each with a positive and ``K`` candidates of its own, rows of a table.

    ``c_ij`` is row ``candidate_rows[i, j]`` of the table, and -1 stands in the place of what is no
    candidate: a hit, or no item. The positive is row ``positive_rows[i]``, or ``positive[i]`` where
    the table has none, because its rows are the embeddings that a user gave, ``B K`` of them. A
    backend gives the gradients of the products, ``dL/d<q_i, c_ij>``, from which those of the
    embeddings follow.
    """

    query: Tensor  # [B, D]
    item_table: Tensor  # [V, D], of the dtype and device of the query
    positive_rows: Tensor | None  # [B] int64
    candidate_rows: Tensor  # [B, K] int64
    positive: Tensor | None = None  # [B, D], in the place of `positive_rows`
    positive_log_q: Tensor | None = None  # [B]
    candidate_log_q: Tensor | None = None  # [B, K]
    rows: RowOptions = RowOptions()

    @property
    def per_row(self) -> bool:
        """Whether every row has candidates of its own."""
        return True

    @property
    def in_batch(self) -> bool:
        return False

    @property
    def num_candidates(self) -> int:
        """How many candidates a row has."""
        return self.candidate_rows.shape[1]

    @property
    def dtypes(self) -> Dtypes:
        return DTYPES[self.query.dtype]

    @property
    def candidate_gradient(self) -> torch.dtype:
        """The dtype of the gradients of the products of positive and candidates."""
        return self.dtypes.accumulate

    def tensors(self) -> tuple[Any, ...]:
        """All tensors, in the order of the fields; None where there is none."""
        return (*self[:_PER_ROW], *self.rows[:_ROW])

    def choices(self) -> tuple[Any, ...]:
        """All fields that hold no tensor but `tau`."""
        return self.rows[_ROW + 1 :]

    def with_tensors(self, tensors: Sequence[Any]) -> PerRowProblem:
        """The same problem with the tensors that `tensors` would give."""
        rows = RowOptions(*tensors[_PER_ROW:], *self.rows[_ROW:])
        return PerRowProblem._make((*tensors[:_PER_ROW], rows))

    def sources(self) -> tuple[Tensor | None, ...]:
        """What `GradMask` speaks of; the gradient of positives in the table is part of its own."""
        rows = self.rows
        mine = self.query, self.positive, self.item_table, None
        return (*mine, rows.temperature, rows.domain_weights)

    def positives(self) -> Tensor:
        """The positive of each row, ``[B, D]``."""
        if self.positive_rows is None:
            assert self.positive is not None
            return self.positive
        return self.item_table[self.positive_rows.clamp(0, self.item_table.shape[0] - 1)]


Problem: TypeAlias = SharedProblem | PerRowProblem


def tensor_fields(struct: type) -> tuple[str, ...]:
    """The fields of a struct that hold tensors; they come first."""
    hints = get_type_hints(struct)
    return tuple(name for name, hint in hints.items() if hint in (Tensor, Tensor | None))


ROW_TENSORS = tensor_fields(RowOptions)  # the options of a row that are tensors
_SHARED, _PER_ROW = (len(tensor_fields(struct)) for struct in (SharedProblem, PerRowProblem))
_ROW = len(ROW_TENSORS)


class Output(NamedTuple):
    """What a backend returns; a gradient that is not wanted is None."""

    loss: Tensor  # [] or [B] for reduction "none"
    query: Tensor | None = None  # [B, D]
    positive: Tensor | None = None  # [B, D]; per row dL/d<q_i, p_i> [B]
    candidates: Tensor | None = None  # [N, D]; per row dL/d<q_i, c_ij> [B, K]
    candidate_log_q: Tensor | None = None  # [N]
    temperature: Tensor | None = None  # [] or [B]
    domain_weights: Tensor | None = None  # [num_domains]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else: what is no embedding, a loss refuses."""
    return DTYPES[dtype].accumulate if dtype in DTYPES else torch.float32


class RankProblem(NamedTuple):
    """Targets to be ranked among the items of a table, with what each row has seen left out."""

    query: Tensor  # [B, D]
    item_table: Tensor  # [V, D], of the dtype and device of the query
    target: Tensor  # [B] int64, `ignore_index` marks a padded row
    bias: Tensor | None = None  # [V] in `Dtypes.accumulate`, added to the score of every item
    seen_offsets: Tensor | None = None  # [B + 1] int64, both or none of the two
    seen_ids: Tensor | None = None  # [nnz] int64, row i has seen those from offset i on; -1 = none
    ignore_index: int = -100


class SoftmaxStatistics(NamedTuple):
    """What a loss knows of its rows, as :func:`softmax_statistics` returns it.

    Args:
        log_sum_exp: ``[B]``, ``lse_i``, the logarithm of the denominator of each row.
        log_probability: ``[B]``, ``z_i+ - lse_i``, minus the loss of the row before its weight.
        rank: ``[B]`` int64, the place of the positive among its candidates, 1 the best; 0 where the
            row is padding.
    """

    log_sum_exp: Tensor
    log_probability: Tensor
    rank: Tensor
