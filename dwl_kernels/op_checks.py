"""What the registered ops ask of arguments that no public function has looked at.

``torch.ops.dwl_kernels`` is open to anybody. On the way from the public functions nothing of this
can fail, so a call that goes straight to its backend leaves it out. Fake tensors are not checked:
comparisons of their sizes would hold a graph to what was true once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dwl_kernels.backends import check_name
from dwl_kernels.core.checks import check_choice
from dwl_kernels.core.problem import (
    FLOATS,
    ROW_TENSORS,
    Correction,
    DualScale,
    GradMask,
    RankProblem,
    Reduction,
    accumulate_dtype,
)

IDS = (torch.int64, torch.int32)


def check_problem(
    fields: dict[str, Any], row_grad: Tensor | None, wanted: Sequence[bool], backend: str
) -> None:
    """ValueError, TypeError for a call that is none of the problems of this package."""
    p = SimpleNamespace(**fields)
    check_name(backend)
    check_choice("correction", p.correction, Correction)
    check_choice("reduction", p.reduction, Reduction)
    _is("query", p.query, ("B", "D"), FLOATS, p.query)
    rows, dim = p.query.shape
    if dim == 0:
        raise ValueError("query has embeddings of size 0; wanted at least 1")
    same, wide = (p.query.dtype,), (accumulate_dtype(p.query.dtype),)
    _is("candidates", p.candidates, ("N", dim), same, p.query)
    n = p.candidates.shape[0]
    _is("positive", p.positive, (rows, dim), same, p.query)
    _is("target", p.target, (rows,), (torch.int64,), p.query)
    _is("candidate_rows", p.candidate_rows, (rows, "K"), (torch.int64,), p.query)
    per_candidate = (n,) if p.candidate_rows is None else tuple(p.candidate_rows.shape)
    _is("positive_log_q", p.positive_log_q, (rows,), wide, p.query)
    _is("candidate_log_q", p.candidate_log_q, per_candidate, wide, p.query)
    _is("positive_ids", p.positive_ids, (rows,), IDS, p.query)
    _is("candidate_ids", p.candidate_ids, (n,), IDS, p.query)
    _is("query_ids", p.query_ids, (rows,), IDS, p.query)
    _is("candidate_query_ids", p.candidate_query_ids, (n,), IDS, p.query)
    scalar = p.temperature is not None and p.temperature.dim() == 0
    others: dict[str, tuple[Any, Any]] = {
        "domain_ids": ((rows, "G"), IDS),
        "domain_weights": (("num_domains",), wide),
        "temperature": (() if scalar else (rows,), wide),
    }
    for name in ROW_TENSORS:  # a number for every row, but for these
        shape, dtypes = others.get(name, ((rows,), wide))
        _is(name, fields[name], shape, dtypes, p.query)
    _is("row_grad", row_grad, (rows,), wide, p.query)

    per_row = p.candidate_rows is not None
    full = p.target is not None and not per_row
    in_batch = p.positive is None and p.target is None and not per_row
    pairs = ("positive_ids", "candidate_ids"), ("query_ids", "candidate_query_ids")
    ids = {name: fields[name] for pair in pairs for name in pair if fields[name] is not None}
    for wrong, what in (
        (p.positive is not None and p.target is not None, "positive and target are both given"),
        (
            per_row and p.target is None and p.positive is None,
            "candidate_rows is given without target or positive",
        ),
        (
            in_batch and n < rows,
            f"in a batch {n} candidates are less than {rows} positives",
        ),
        (full and n == 0, "candidates has no rows for target to name"),
        *(
            (
                (first in ids) != (second in ids),
                f"one of {first} and {second} is given without the other",
            )
            for first, second in pairs
        ),
        (bool(ids) and per_row, "ids are given together with candidate_rows"),
        *(
            (
                len({ids[name].dtype for name in (first, second) if name in ids}) > 1,
                f"{first} and {second} have different dtypes",
            )
            for first, second in pairs
        ),
        (
            (p.domain_ids is None) != (p.domain_weights is None),
            "one of domain_ids and domain_weights is given without the other",
        ),
        (
            p.domain_weights is not None and p.domain_weights.shape[0] == 0,
            "domain_weights has no domains",
        ),
        (full and p.positive_log_q is not None, "positive_log_q is given together with target"),
        (full and p.correction == "refined", "the full softmax has no log-Q to refine"),
        (not 0 < p.tau < math.inf, f"tau is {p.tau}; wanted a positive, finite number"),
        (p.temperature is not None and p.tau != 1, "tau and temperature are both given"),
        (
            not 0 <= p.skip_threshold < math.inf or (p.skip_threshold > 0 and not full),
            f"skip_threshold is {p.skip_threshold}; wanted a finite number that is not negative, "
            "and 0 without target",
        ),
        (p.dual is not None and p.target is not None, "the dual scale takes no target"),
        (
            row_grad is not None and p.reduction != "none",
            f"row_grad is given with reduction {p.reduction!r}; wanted 'none'",
        ),
        (
            row_grad is None and p.reduction == "none" and any(wanted),
            "gradients of reduction 'none' are wanted without row_grad",
        ),
    ):
        if wrong:
            raise ValueError(what)
    if p.dual is not None:
        if len(p.dual) != len(DualScale._fields):
            raise ValueError(f"dual has {len(p.dual)} numbers; wanted {len(DualScale._fields)}")
        dual = DualScale(*p.dual)
        numbers = (dual.hardness, dual.similarity, dual.competition)
        if not all(map(math.isfinite, numbers)) or dual.slate_size < 1:
            raise ValueError(
                f"dual is {tuple(p.dual)}; wanted finite strengths, and a slate of at least 1"
            )
    if len(wanted) != len(GradMask._fields):
        raise ValueError(f"wanted has {len(wanted)} entries; wanted {len(GradMask._fields)}")
    for name, want in zip(GradMask._fields, wanted, strict=True):
        product = name == "positive" and per_row and p.positive is None  # dL/d<q, p>
        if want and fields[name] is None and not product:
            raise ValueError(f"the gradient of {name} is wanted, which is not given")
    if per_row and GradMask(*wanted).candidate_log_q:
        raise ValueError("candidates by row have no gradient of candidate_log_q")


def check_table(
    source: Tensor,
    ids: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    table_rows: int,
    dtype: torch.dtype,
    backend: str,
) -> None:
    """ValueError, TypeError unless there are ids, and coefficients of all of them or of none."""
    check_name(backend)
    _is("source", source, ("R", "D"), FLOATS, source)
    rows, dim = source.shape
    if not ids:
        raise ValueError("ids is an empty list; wanted at least one tensor, [R, J]")
    if coefficients and len(coefficients) != len(ids):
        raise ValueError(
            f"there are {len(ids)} tensors of ids and {len(coefficients)} of coefficients; wanted "
            "as many, or none"
        )
    if dim == 0 or table_rows < 0:
        raise ValueError(f"source has {dim} columns and table_rows is {table_rows}; wanted more")
    if dtype not in FLOATS:
        raise TypeError(f"dtype is {dtype}; wanted a floating dtype such as torch.float32")
    for place, one in enumerate(ids):
        _is(f"ids[{place}]", one, (rows, "J"), (torch.int64,), source)
    for place, one in enumerate(coefficients):
        _is(f"coefficients[{place}]", one, tuple(ids[place].shape), FLOATS, source)


def check_ranks(problem: RankProblem, backend: str) -> None:
    """ValueError, TypeError, IndexError for a call that ranks nothing."""
    p = problem
    check_name(backend)
    _is("query", p.query, ("B", "D"), FLOATS, p.query)
    rows, dim = p.query.shape
    _is("item_table", p.item_table, ("V", dim), (p.query.dtype,), p.query)
    items = p.item_table.shape[0]
    if dim == 0 or items == 0:
        raise ValueError(f"item_table has shape {[items, dim]}; wanted at least 1 of each")
    _is("target", p.target, (rows,), (torch.int64,), p.query)
    _is("bias", p.bias, (items,), (accumulate_dtype(p.query.dtype),), p.query)
    _is("seen_offsets", p.seen_offsets, (rows + 1,), (torch.int64,), p.query)
    _is("seen_ids", p.seen_ids, ("nnz",), (torch.int64,), p.query)
    if (p.seen_offsets is None) != (p.seen_ids is None):
        raise ValueError("one of seen_offsets and seen_ids is given without the other")


def check_scale(
    gradients: Sequence[Tensor], upstream: Tensor, places: Sequence[int], dtypes: Sequence[Any]
) -> None:
    """ValueError unless there is a dtype for every gradient, and one upstream gradient for all."""
    if len(gradients) != len(places) or not all(0 <= place < len(dtypes) for place in places):
        raise ValueError(
            f"dtypes is {list(places)}; wanted a number from 0 to {len(dtypes) - 1} for each of "
            f"the {len(gradients)} gradients"
        )
    if upstream.dim() != 0 or not upstream.is_floating_point():
        raise ValueError(
            f"upstream has shape {list(upstream.shape)} and dtype {upstream.dtype}; wanted a "
            "scalar of floats"
        )
    for place, gradient in enumerate(gradients):
        _is(f"gradients[{place}]", gradient, None, FLOATS, upstream)


def _is(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int | str, ...] | None,  # a name: any size
    dtypes: tuple[torch.dtype, ...],
    like: Tensor,
) -> None:
    if tensor is None:
        return
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {tensor.dtype}; wanted one of {dtypes}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}; wanted {like.device}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; wanted a dense tensor")
    if shape is None:
        return
    fits = tensor.dim() == len(shape) and all(
        isinstance(wanted, str) or got == wanted
        for got, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} has shape {list(tensor.shape)}; wanted [{wanted}]")
