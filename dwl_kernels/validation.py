"""From the arguments of the public functions to a validated `Problem`.

Every loss has its builder here, and every error message of a wrong shape, dtype, device or choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor
from torch.nn import Embedding, EmbeddingBag, Parameter

from dwl_kernels.problem import (
    FLOATS,
    INTEGERS,
    Correction,
    DualScale,
    Problem,
    Reduction,
    accumulate_dtype,
    autocasting,
    checks_values,
    ids_outside,
    no_autocast,
)


def sampled_problem(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    positive_log_q: Tensor | None,
    negative_log_q: Tensor | None,
    positive_ids: Tensor | None,
    negative_ids: Tensor | None,
    domain_ids: Tensor | None,
    domain_weights: Tensor | None,
    example_weights: Tensor | None,
    temperature: float | Tensor,
    correction: Correction,
    reduction: Reduction,
    dual: DualScale | None = None,
) -> Problem:
    """The problem of ``sampled_softmax_loss``: candidates ``[N, D]`` shared by all rows."""
    query, positive, negative = _embeddings(query=query, positive=positive, negative=negative)
    leading = query.shape[:-1]
    both_or_none("positive_ids", positive_ids, "negative_ids", negative_ids)
    ids = _ids(
        query,
        positive_ids=(positive_ids, leading),
        negative_ids=(negative_ids, negative.shape[:1]),
    )
    rows = _row_arguments(
        query, domain_ids, domain_weights, example_weights, temperature, correction, reduction
    )
    return Problem(
        query=query.reshape(-1, query.shape[-1]),
        positive=positive.reshape(-1, query.shape[-1]),
        candidates=negative,
        positive_log_q=_log_q("positive_log_q", positive_log_q, leading, query),
        candidate_log_q=_log_q("negative_log_q", negative_log_q, negative.shape[:1], query),
        positive_ids=ids[0],
        candidate_ids=ids[1],
        dual=None if dual is None else effective_dual(dual),
        **rows,
    )


def effective_dual(dual: DualScale) -> DualScale | None:
    """The strengths, checked; None where they change nothing."""
    for name in ("hardness", "similarity", "competition"):
        value = getattr(dual, name)
        if isinstance(value, Tensor) or not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}; wanted a finite number that is not negative")
    if isinstance(dual.slate_size, bool) or not isinstance(dual.slate_size, int):
        raise TypeError(f"slate_size is a {type(dual.slate_size).__name__}; wanted an int")
    if dual.slate_size < 1:
        raise ValueError(f"slate_size is {dual.slate_size}; wanted at least 1")
    return dual if dual.hardness or dual.similarity or dual.competition else None


def in_batch_problem(
    query: Tensor,
    positive: Tensor,
    *,
    log_q: Tensor | None,
    ids: Tensor | None,
    negative: Tensor | None,
    negative_log_q: Tensor | None,
    negative_ids: Tensor | None,
    domain_ids: Tensor | None,
    domain_weights: Tensor | None,
    example_weights: Tensor | None,
    temperature: float | Tensor,
    correction: Correction,
    reduction: Reduction,
    dual: DualScale | None = None,
    prefix: str = "",
) -> Problem:
    """The problem of ``in_batch_softmax_loss``: the positives of the batch, then ``negative``.

    `prefix` is what the names of `log_q` and `ids` start with in the function that was called.
    """
    log_q_name, ids_name = prefix + "log_q", prefix + "ids"
    named = {"query": query, "positive": positive}
    if negative is None:
        if negative_log_q is not None or negative_ids is not None:
            raise ValueError(
                "negative_log_q and negative_ids describe `negative`, which is not given; pass "
                f"`negative`, or use {log_q_name} and {ids_name} for the in-batch candidates"
            )
        query, positive = _embeddings(**named)
    else:
        query, positive, negative = _embeddings(**named, negative=negative)
        both_or_none(ids_name, ids, "negative_ids", negative_ids)
        both_or_none(log_q_name, log_q, "negative_log_q", negative_log_q)
    leading = query.shape[:-1]
    more = () if negative is None else negative.shape[:1]
    both = _ids(query, **{ids_name: (ids, leading), "negative_ids": (negative_ids, more)})
    positive_log_q = _log_q(log_q_name, log_q, leading, query)
    rows = _row_arguments(
        query, domain_ids, domain_weights, example_weights, temperature, correction, reduction
    )
    positives = positive.reshape(-1, query.shape[-1])
    return Problem(
        query=query.reshape(-1, query.shape[-1]),
        positive=None,
        candidates=positives if negative is None else torch.cat((positives, negative)),
        positive_log_q=positive_log_q,
        candidate_log_q=_joined(
            positive_log_q, _log_q("negative_log_q", negative_log_q, more, query)
        ),
        positive_ids=both[0],
        candidate_ids=_joined(both[0], both[1]),
        dual=None if dual is None else effective_dual(dual),
        **rows,
    )


def takes_batch(in_batch: bool | None, negatives: bool) -> bool:
    """Whether the positives of the other rows are candidates; None leaves it to the negatives."""
    if in_batch is False and not negatives:
        raise ValueError(
            "there are no candidates: in_batch is False, and no negatives are given; pass them, or "
            "leave in_batch out"
        )
    return not negatives if in_batch is None else in_batch


def full_problem(
    query: Tensor,
    table: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    ignore_index: int,
    domain_ids: Tensor | None,
    domain_weights: Tensor | None,
    example_weights: Tensor | None,
    temperature: float | Tensor,
    reduction: Reduction,
    skip_threshold: float,
) -> Problem:
    """The problem of ``full_softmax_loss``: every row of the table is a candidate."""
    check_skip_threshold(skip_threshold)
    query, table = _embeddings(query=query, table=table)
    if table.shape[0] == 0:
        raise ValueError("table has no rows; wanted at least one item to score")
    leading = query.shape[:-1]
    (target,) = cast("list[Tensor]", _ids(query, target=(target, leading)))
    if bias is not None:
        _row_argument("bias", bias, table.shape[:1], query)
        bias = -_floating("bias", bias, query, differentiable=True)
    rows = _row_arguments(
        query, domain_ids, domain_weights, example_weights, temperature, "standard", reduction
    )
    return Problem(
        query=query.reshape(-1, query.shape[-1]),
        positive=None,
        candidates=table,
        target=target.long(),
        candidate_log_q=bias,
        ignore_index=ignore_index,
        skip_threshold=float(skip_threshold),
        **rows,
    )


def check_skip_threshold(skip_threshold: float) -> None:
    if not 0 <= skip_threshold < float("inf"):
        raise ValueError(
            f"skip_threshold is {skip_threshold}; wanted a finite number that is not negative, 0 "
            "to leave nothing out"
        )


def indexed_problem(
    query: Tensor,
    table: Tensor,
    positive_ids: Tensor,
    negative_ids: Tensor,
    *,
    positive_log_q: Tensor | None,
    negative_log_q: Tensor | None,
    domain_ids: Tensor | None,
    domain_weights: Tensor | None,
    example_weights: Tensor | None,
    temperature: float | Tensor,
    correction: Correction,
    reduction: Reduction,
) -> Problem:
    """The problem of ``indexed_sampled_softmax_loss`` where every row has negatives of its own.

    The ids have been through :func:`indexed_ids`.
    """
    query, table = _query_and_table(query, table)
    leading, width = query.shape[:-1], negative_ids.shape[-1]
    candidate_log_q = _log_q("negative_log_q", negative_log_q, (*leading, width), query)
    rows = _row_arguments(
        query, domain_ids, domain_weights, example_weights, temperature, correction, reduction
    )
    shape = (leading.numel(), width)
    return Problem(
        query=query.reshape(-1, query.shape[-1]),
        positive=None,
        candidates=table,
        target=positive_ids.reshape(-1),
        candidate_rows=negative_ids.reshape(shape),
        positive_log_q=_log_q("positive_log_q", positive_log_q, leading, query),
        candidate_log_q=None if candidate_log_q is None else candidate_log_q.reshape(shape),
        **rows,
    )


def indexed_ids(
    query: Tensor,
    table: Tensor,
    positive_ids: Tensor,
    negative_ids: Tensor,
    example_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The ids of ``indexed_sampled_softmax_loss``, checked, as int64 in their shapes.

    Raises:
        IndexError: shared negatives, or their positives, outside the table, where values are looked
            at. Those of negatives by row are left to :meth:`Problem.row_weights`.
    """
    _query_and_table(query, table)
    if table.shape[0] == 0:
        raise ValueError("table has no rows; wanted at least one item to draw")
    leading = query.shape[:-1]
    _row_argument("positive_ids", positive_ids, leading, query)
    _dense("negative_ids", negative_ids)
    shared = negative_ids.dim() == 1
    if not shared and (negative_ids.dim() == 0 or negative_ids.shape[:-1] != leading):
        raise ValueError(
            f"negative_ids has shape {list(negative_ids.shape)}; wanted [N], the same for all "
            f"rows, or {[*leading, 'K']}, those of each row, for query {list(query.shape)}"
        )
    _row_argument("negative_ids", negative_ids, negative_ids.shape, query)
    _integer("positive_ids", positive_ids)
    _integer("negative_ids", negative_ids)
    if shared and checks_values(query.device):
        active = None
        if example_weights is not None and example_weights.shape == leading:
            active = example_weights.reshape(-1) != 0
        ids_outside("positive_ids", positive_ids.reshape(-1), table.shape[0], active)
        ids_outside("negative_ids", negative_ids, table.shape[0])
    return positive_ids.long(), negative_ids.long()


def _query_and_table(query: Tensor, table: Tensor) -> list[Tensor]:
    """Both, checked. Autocast leaves a table as it is: a cast would read and write all of it."""
    for name, value in (("query", query), ("table", table)):
        _dense(name, value)
    if _autocast_dtype(query) is None:
        return _embeddings(query=query, table=table)
    with no_autocast(query.device.type):
        return _embeddings(query=query.to(table.dtype), table=table)


def _joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None:
        return None
    # A view, because torch.compile refuses one tensor in two places of an autograd.Function.
    return first.view_as(first) if second is None else torch.cat((first, second))


def _embeddings(**named: Tensor) -> list[Tensor]:
    """Query and what it is compared with, cast to the autocast dtype if there is one."""
    for name, value in named.items():
        _dense(name, value)
        if value.dtype not in FLOATS:
            raise TypeError(
                f"{name} has dtype {value.dtype}; wanted float32, float64, bfloat16 or float16"
            )
    query = named["query"]
    if query.dim() < 2:
        raise ValueError(
            f"query has shape {list(query.shape)}; wanted [B, D], or [..., D] with leading "
            "dimensions; a single query is query[None]"
        )
    if query.shape[-1] == 0:
        raise ValueError("query has embeddings of size 0; wanted at least 1")
    wanted = {
        "positive": list(query.shape),
        "negative": f"[N, {query.shape[-1]}]",
        "table": f"[V, {query.shape[-1]}]",
    }
    for name, value in named.items():
        if value.device != query.device:
            raise ValueError(
                f"{name} is on {value.device} but query is on {query.device}; move one of them"
            )
        if name in ("negative", "table"):
            fits = value.dim() == 2 and value.shape[-1] == query.shape[-1]
        else:
            fits = value.shape == query.shape
        if not fits:
            raise ValueError(
                f"{name} has shape {list(value.shape)}; wanted {wanted[name]} to match query "
                f"{list(query.shape)}"
            )
    dtype = _autocast_dtype(query)
    if dtype is not None:
        return [value.to(dtype) for value in named.values()]
    for name, value in named.items():
        if value.dtype != query.dtype:
            raise TypeError(
                f"{name} has dtype {value.dtype} but query has {query.dtype}; cast one of them, or "
                "run under torch.autocast"
            )
    return list(named.values())


def _autocast_dtype(query: Tensor) -> torch.dtype | None:
    if query.dtype == torch.float64 or not autocasting(query.device.type):
        return None
    return torch.get_autocast_dtype(query.device.type)


def check_tensor(name: str, value: object) -> Tensor:
    if isinstance(value, Tensor):
        return value
    mend = ": pass its .weight" if isinstance(value, (Embedding, EmbeddingBag)) else ""
    raise TypeError(f"{name} is a {type(value).__name__}; wanted a torch.Tensor{mend}")


def _dense(name: str, value: object) -> None:
    value = check_tensor(name, value)
    if value.layout != torch.strided:
        raise TypeError(
            f"{name} has layout {value.layout}; wanted a dense tensor: call .to_dense()"
        )
    if value.is_quantized:
        raise TypeError(f"{name} is quantised; call .dequantize() first")
    # By name, so that importing the package does not import torch.distributed; and not of a
    # Parameter, whose bases torch.compile does not trace.
    if type(value) not in (Tensor, Parameter) and any(
        kind.__name__ == "DTensor" for kind in type(value).__mro__
    ):
        raise TypeError(f"{name} is a DTensor; pass the local part, {name}.to_local()")


def _row_argument(name: str, value: Tensor, shape: Sequence[int], query: Tensor) -> None:
    _dense(name, value)
    if list(value.shape) != list(shape):
        raise ValueError(
            f"{name} has shape {list(value.shape)}; wanted {list(shape)} for query "
            f"{list(query.shape)}"
        )
    if value.device != query.device:
        raise ValueError(
            f"{name} is on {value.device} but query is on {query.device}; move one of them"
        )


def both_or_none(first: str, a: Tensor | None, second: str, b: Tensor | None) -> None:
    if (a is None) != (b is None):
        got, missing = (first, second) if b is None else (second, first)
        raise ValueError(f"{got} is given without {missing}; pass both, or neither")


def _ids(query: Tensor, **named: tuple[Tensor | None, Sequence[int]]) -> list[Tensor | None]:
    """Ids flattened, in one common dtype: a kernel compares them bit by bit."""
    for name, (value, shape) in named.items():
        if value is not None:
            _row_argument(name, value, shape, query)
            _integer(name, value)
    dtypes = {value.dtype for value, _ in named.values() if value is not None}
    dtype = torch.int32 if dtypes == {torch.int32} else torch.int64
    return [None if v is None else v.reshape(-1).to(dtype) for v, _ in named.values()]


def _integer(name: str, value: Tensor) -> None:
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name} has dtype {value.dtype}; wanted integers, int64 or int32")


def _floating(name: str, value: Tensor, query: Tensor, *, differentiable: bool = False) -> Tensor:
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {value.dtype}; wanted a floating dtype such as float32")
    if value.requires_grad and not differentiable and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which this loss does not give: detach it")
    return value.to(accumulate_dtype(query.dtype))


def _log_q(name: str, value: Tensor | None, shape: Sequence[int], query: Tensor) -> Tensor | None:
    if value is None:
        return None
    _row_argument(name, value, shape, query)
    return _floating(name, value, query).reshape(-1)


def check_choice(name: str, value: str, choices: Any) -> None:
    """ValueError for what is none of the choices of a Literal."""
    if value not in get_args(choices):
        raise ValueError(f"{name} is {value!r}; wanted one of {get_args(choices)}")


def _row_arguments(
    query: Tensor,
    domain_ids: Tensor | None,
    domain_weights: Tensor | None,
    example_weights: Tensor | None,
    temperature: float | Tensor,
    correction: str,
    reduction: str,
) -> dict[str, Any]:
    """What every loss takes per row, as keyword arguments of `Problem`."""
    leading = list(query.shape[:-1])
    check_choice("correction", correction, Correction)
    check_choice("reduction", reduction, Reduction)
    if domain_ids is not None:
        if domain_weights is None:
            raise ValueError(
                "domain_ids is given without domain_weights; pass the weight of every domain, "
                "[num_domains]"
            )
        _dense("domain_ids", domain_ids)
        shape = leading
        if list(domain_ids.shape) != leading:
            # [B, G]: the number of slots is free
            shape = [*leading, domain_ids.shape[-1] if domain_ids.dim() else 0]
        _row_argument("domain_ids", domain_ids, shape, query)
        _integer("domain_ids", domain_ids)
        if domain_ids.dtype != torch.int32:
            domain_ids = domain_ids.to(torch.int64)
        slots = 1 if shape == leading else shape[-1]
        domain_ids = domain_ids.reshape(query.shape[:-1].numel(), slots)
    elif domain_weights is not None:
        raise ValueError(
            "domain_weights is given without domain_ids; pass the domains, [B] or [B, G]"
        )
    if domain_weights is not None:
        _dense("domain_weights", domain_weights)
        if domain_weights.dim() != 1 or domain_weights.shape[0] == 0:
            raise ValueError(
                f"domain_weights has shape {list(domain_weights.shape)}; wanted [num_domains] with "
                "at least one domain"
            )
        _row_argument("domain_weights", domain_weights, domain_weights.shape, query)
        domain_weights = _floating("domain_weights", domain_weights, query, differentiable=True)
    if example_weights is not None:
        _row_argument("example_weights", example_weights, leading, query)
        if example_weights.dtype in (torch.bool, *INTEGERS):  # a mask is a weight of 0 or 1
            example_weights = example_weights.to(torch.float32)
        example_weights = _floating("example_weights", example_weights, query).reshape(-1)
    tau = 1.0
    if isinstance(temperature, Tensor):
        if temperature.dim():
            _row_argument("temperature", temperature, leading, query)
        else:
            _row_argument("temperature", temperature, [], query)
        temperature = _floating("temperature", temperature, query, differentiable=True)
        if temperature.dim():
            temperature = temperature.reshape(-1)
    else:
        tau, temperature = float(temperature), cast("Tensor", None)
        if not 0 < tau < float("inf"):
            raise ValueError(f"temperature is {tau}; wanted a positive, finite number")
    return {
        "domain_ids": domain_ids,
        "domain_weights": domain_weights,
        "example_weights": example_weights,
        "temperature": temperature,
        "tau": tau,
        "correction": correction,
        "reduction": reduction,
    }
