"""Checks of the arguments of a loss, one by one: shape, dtype, device, choice, log-Q.

Called by `build`, and for choices by the modules and the registered ops.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwl_kernels.core.arguments import check_dense, ignored_id, integers, number
from dwl_kernels.core.double_backward import refuse_jit
from dwl_kernels.core.problem import (
    DTYPES,
    FLOATS,
    INTEGERS,
    Correction,
    Reduction,
    RowOptions,
)
from dwl_kernels.core.values import autocasting, checks_values, no_autocast


def check_embeddings(query: Tensor, **others: Tensor) -> list[Tensor]:
    """Query and what it is compared with, cast to the autocast dtype if there is one."""
    refuse_jit()  # before PyTorch finds a reason of its own
    given = {"query": query, **others}
    for name, value in given.items():
        check_dense(name, value)
        if value.dtype not in FLOATS:
            raise TypeError(
                f"{name} has dtype {value.dtype}; wanted {', '.join(_NAMES[:-1])} or {_NAMES[-1]}"
            )
    shape, device = query.shape, query.device
    if len(shape) < 2:
        raise ValueError(
            f"query has shape {list(shape)}; wanted [B, D], or [..., D] with leading "
            "dimensions; a single query is query[None]"
        )
    if shape[-1] == 0:
        raise ValueError("query has embeddings of size 0; wanted at least 1")
    for name, value in others.items():
        if value.device != device:
            raise _other_device(name, value, query)
        letter = _LETTERS.get(name)
        if letter is None:
            fits = value.shape == shape
        else:
            fits = value.dim() == 2 and value.shape[-1] == shape[-1]
            if name == "negative":  # or every row has its own
                fits |= value.shape[:-2] == shape[:-1] and value.shape[-1] == shape[-1]
        if not fits:
            wanted = f"{list(shape)}" if letter is None else f"[{letter}, {shape[-1]}]"
            if name == "negative" and value.dim() > 2:
                own = ", ".join(map(str, (*shape[:-1], "K", shape[-1])))
                wanted += f", or [{own}] of every row's own,"
            raise ValueError(
                f"{name} has shape {list(value.shape)}; wanted {wanted} to match query "
                f"{list(shape)}"
            )
    dtype = autocast_dtype(query)
    if dtype is not None:
        return [value.to(dtype) for value in given.values()]
    for name, value in others.items():
        if value.dtype != query.dtype:
            raise TypeError(
                f"{name} has dtype {value.dtype} but query has {query.dtype}; cast one of them, or "
                "run under torch.autocast"
            )
    return [*given.values()]


def query_and_table(query: Tensor, table: Tensor) -> list[Tensor]:
    """Both, checked. Autocast leaves a table as it is: a cast would read and write all of it."""
    for name, value in (("query", query), ("table", table)):
        check_dense(name, value)
    if autocast_dtype(query) is None:
        return check_embeddings(query, table=table)
    with no_autocast(query.device.type):
        return check_embeddings(query.to(table.dtype), table=table)


_NAMES = [str(dtype).removeprefix("torch.") for dtype in FLOATS]
_LETTERS = {"negative": "N", "table": "V"}  # embeddings whose number is free


def autocast_dtype(query: Tensor) -> torch.dtype | None:
    device_type = query.device.type
    if not autocasting(device_type) or query.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device_type)


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], query: Tensor) -> None:
    check_dense(name, value)
    _check_fits(name, value, shape, query)


def _check_fits(name: str, value: Tensor, shape: tuple[int, ...], query: Tensor) -> None:
    if value.shape != shape:
        raise ValueError(
            f"{name} has shape {list(value.shape)}; wanted {list(shape)} for query "
            f"{list(query.shape)}"
        )
    check_device(name, value, query)


def check_device(name: str, value: Tensor, query: Tensor) -> None:
    if value.device != query.device:
        raise _other_device(name, value, query)


def _other_device(name: str, value: Tensor, query: Tensor) -> ValueError:
    return ValueError(
        f"{name} is on {value.device} but query is on {query.device}; move one of them"
    )


def either(name: str, value: Any, other_name: str, other: Any) -> Any:
    """One argument under two names."""
    if value is not None and other is not None:
        raise ValueError(f"{name} and {other_name} are the same argument; pass one of them")
    return other if value is None else value


def both_or_none(first: str, a: Tensor | None, second: str, b: Tensor | None) -> None:
    if (a is None) != (b is None):
        got, missing = (first, second) if b is None else (second, first)
        raise ValueError(f"{got} is given without {missing}; pass both, or neither")


def flat_ids(query: Tensor, **named: tuple[Tensor | None, tuple[int, ...]]) -> list[Tensor | None]:
    """Ids flattened, in one common dtype: a kernel compares them bit by bit."""
    dtype = torch.int32
    flattened: list[Tensor | None] = []
    for name, (value, shape) in named.items():
        if value is not None:
            value = integers(name, value, query.device)
            _check_fits(name, value, shape, query)
            value = flat(value)
            if value.dtype != torch.int32:
                dtype = torch.int64
        flattened.append(value)
    return [None if value is None else cast_to(dtype, value) for value in flattened]


def floating(name: str, value: Tensor, query: Tensor, *, differentiable: bool = False) -> Tensor:
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {value.dtype}; wanted a floating dtype such as float32")
    if value.requires_grad and not differentiable and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which this loss does not give: detach it")
    return cast_to(DTYPES[query.dtype].accumulate, value)


# Calls of an op that change nothing take longer than the question whether they would.


def cast_to(dtype: torch.dtype, value: Tensor) -> Tensor:
    return value if value.dtype == dtype else value.to(dtype)


def flat(value: Tensor) -> Tensor:
    return value if value.dim() == 1 else value.reshape(-1)


def flat_rows(value: Tensor) -> Tensor:  # [B, D]
    return value if value.dim() == 2 else value.reshape(-1, value.shape[-1])


class Calibrated(NamedTuple):
    """``log Q - tilt``, apart from each other, because log-Q is checked as the user gave it."""

    log_q: Tensor | None
    tilt: Tensor  # of the shape of log_q


def as_given(log_q: Any) -> Any:
    """Log-Q as the user gave it."""
    return log_q.log_q if isinstance(log_q, Calibrated) else log_q


def flat_log_q(
    name: str,
    value: Tensor | Calibrated | None,
    shape: tuple[int, ...],
    query: Tensor,
    example_weights: Tensor | None = None,  # [B], of the rows that the entries belong to
) -> Tensor | None:
    """Log-Q flattened, in the dtype of the logits.

    Raises:
        ValueError: an entry above 0 in a row that is not padded, where values are looked at.
    """
    if isinstance(value, Calibrated):
        log_q = flat_log_q(name, value.log_q, shape, query, example_weights)
        tilt = flat(cast_to(DTYPES[query.dtype].accumulate, value.tilt))
        # A candidate whose domains weigh 0 is left out, also where its log-Q is -inf as well.
        return -tilt if log_q is None else torch.where(tilt == -math.inf, math.inf, log_q - tilt)
    if value is None:
        return None
    check_shape(name, value, shape, query)
    log_q = flat(floating(name, value, query))
    _check_log_q(name, log_q, example_weights)
    return log_q


def leave_out(absent: Tensor, negative_log_q: Any) -> Calibrated:  # [N] bool
    """Log-Q of negatives, perhaps calibrated, that leaves some of them out."""
    tilt = torch.zeros_like(absent, dtype=torch.float32)
    if isinstance(negative_log_q, Calibrated):
        negative_log_q, tilt = negative_log_q
    return Calibrated(negative_log_q, tilt.masked_fill(absent, -torch.inf))


def padded_by_id(
    name: str,
    ids: Tensor | None,
    query: Tensor,
    ignore_index: int | None,
    example_weights: Tensor | None,
) -> Tensor | None:
    """Example weights that are 0 where the id of the positive is `ignore_index`."""
    if ignore_index is None:
        return example_weights
    ignore_index = ignored_id(ignore_index)
    if ids is None:
        raise ValueError(
            f"ignore_index is given without {name}, in which it marks padding; pass both, or "
            "example_weights that are 0 in padded rows"
        )
    ids, leading = integers(name, ids, query.device), query.shape[:-1]
    check_shape(name, ids, leading, query)
    kept = ids.long() != ignore_index
    if example_weights is None:
        return kept
    check_shape("example_weights", example_weights, leading, query)
    return example_weights.masked_fill(~kept, 0)


# What rounding may leave of the log of a probability of nearly 1.
_ROUNDING = 1e-5


def _check_log_q(name: str, log_q: Tensor, example_weights: Tensor | None) -> None:
    if not (checks_values(log_q) and log_q.numel()) or float(log_q.max()) <= 0:
        return
    if example_weights is not None:
        log_q = log_q.reshape(len(example_weights), -1)[example_weights != 0]
    log_q = log_q[log_q < math.inf]  # +inf takes a candidate out, and NaN shows in the loss
    if not log_q.numel():
        return
    low, high = (float(extreme) for extreme in log_q.aminmax())
    # Probabilities may all be as small as rounding errors, but then none of them is below 0.
    if high > _ROUNDING or (high > 0 and low >= 0):
        raise ValueError(
            f"{name} holds {high:g}, and the log of a probability is at most 0: pass the log of "
            "the probability that one draw has of giving the item, not a probability, a count or "
            "minus the log; from the log of an expected count subtract the log of the number of "
            "draws"
        )


def check_choice(name: str, value: str, choices: Any) -> None:
    """ValueError for what is none of the choices of a Literal."""
    if value not in choices.__args__:
        raise ValueError(f"{name} is {value!r}; wanted one of {choices.__args__}")


def row_arguments(
    query: Tensor,
    *,
    domain_ids: Tensor | None,
    domain_weights: Tensor | None,
    example_weights: Tensor | None,
    temperature: float | Tensor | None,
    correction: Correction,
    reduction: Reduction,
) -> RowOptions:
    """What every loss takes per row, checked."""
    leading = query.shape[:-1]
    check_choice("correction", correction, Correction)
    check_choice("reduction", reduction, Reduction)
    if domain_ids is not None:
        if domain_weights is None:
            raise ValueError(
                "domain_ids is given without domain_weights; pass the weight of every domain, "
                "[num_domains]"
            )
        domain_ids = integers("domain_ids", domain_ids, query.device)
        slots = 1
        if domain_ids.shape != leading:
            # [B, G]: the number of slots is free
            slots = domain_ids.shape[-1] if domain_ids.dim() else 0
            check_shape("domain_ids", domain_ids, (*leading, slots), query)
        check_device("domain_ids", domain_ids, query)
        if domain_ids.dtype != torch.int32:
            domain_ids = cast_to(torch.int64, domain_ids)
        domain_ids = domain_ids.reshape(math.prod(leading), slots)
    elif domain_weights is not None:
        raise ValueError(
            "domain_weights is given without domain_ids; pass the domains, [B] or [B, G]"
        )
    if domain_weights is not None:
        check_dense("domain_weights", domain_weights)
        if domain_weights.dim() != 1 or domain_weights.shape[0] == 0:
            raise ValueError(
                f"domain_weights has shape {list(domain_weights.shape)}; wanted [num_domains] with "
                "at least one domain"
            )
        check_device("domain_weights", domain_weights, query)
        domain_weights = floating("domain_weights", domain_weights, query, differentiable=True)
    if example_weights is not None:
        check_shape("example_weights", example_weights, leading, query)
        if example_weights.dtype in (torch.bool, *INTEGERS):  # a mask is a weight of 0 or 1
            example_weights = example_weights.to(torch.float32)
        example_weights = flat(floating("example_weights", example_weights, query))
    tau, per_row = 1.0, None
    if isinstance(temperature, Tensor):
        check_dense("temperature", temperature)
        # As models keep a parameter: one for all rows, if there is more than one.
        if temperature.shape == (1,) and leading != (1,):
            temperature = temperature.reshape(())
        if temperature.dim() and temperature.shape != leading:
            raise ValueError(
                f"temperature has shape {list(temperature.shape)}; wanted {list(leading)}, one per "
                "row, or [] or [1], one for all"
            )
        check_device("temperature", temperature, query)
        per_row = floating("temperature", temperature, query, differentiable=True)
        if per_row.dim():
            per_row = flat(per_row)
    elif temperature is not None:
        tau = number("temperature", temperature, "a positive number, or a torch.Tensor")
        if not 0 < tau < math.inf:
            raise ValueError(f"temperature is {tau}; wanted a positive, finite number")
    return RowOptions(
        domain_ids=domain_ids,
        domain_weights=domain_weights,
        example_weights=example_weights,
        temperature=per_row,
        tau=tau,
        correction=correction,
        reduction=reduction,
    )
