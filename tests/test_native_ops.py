"""The registered ops of the CPU kernels raise, or are right, whatever they are given."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dwl_kernels.backends.cpu import solve as cpu


@pytest.fixture(autouse=True)
def _kernel() -> None:
    if cpu.does_not_build() is not None:
        pytest.skip(f"no CPU kernel: {cpu.does_not_build()}")


def sampled_softmax(**changed: Any) -> tuple[Tensor, ...]:
    """The op on 3 rows, their positives and 5 candidates, every gradient wanted."""
    arguments = {
        "query": torch.ones(3, 4),
        "positive": torch.ones(3, 4),
        "candidates": torch.ones(5, 4),
        "target": None,
        "tau": torch.ones(3),
        "coefficient": torch.ones(3),
        "positive_log_q": None,
        "candidate_log_q": torch.zeros(5),
        "score": None,
        "shift": None,
        "row_ids": [],
        "candidate_ids": [],
        "skip_below": None,
        "active": None,
        "refined": False,
        **dict.fromkeys(("want_query", "want_positive", "want_candidates", "want_log_q"), True),
        "want_statistics": True,
    }
    return torch.ops.dwl_kernels_native.sampled_softmax(**{**arguments, **changed})  # type: ignore[no-any-return]


def indexed_softmax(**changed: Any) -> tuple[Tensor, ...]:
    """The op on 3 rows with 2 candidates each, of a table of 5 rows."""
    arguments = {
        "query": torch.ones(3, 4),
        "table": torch.ones(5, 4),
        "positive": None,
        "positive_ids": torch.tensor([0, 1, 2]),
        "candidate_ids": torch.tensor([[3, 4], [3, 4], [3, 4]]),
        "tau": torch.ones(3),
        "coefficient": torch.ones(3),
        "positive_log_q": None,
        "candidate_log_q": None,
        "active": None,
        "refined": False,
        "want_query": True,
        "want_table": True,
        "want_statistics": True,
    }
    return torch.ops.dwl_kernels_native.indexed_softmax(**{**arguments, **changed})  # type: ignore[no-any-return]


def table_gradient(**changed: Any) -> tuple[Tensor, ...]:
    """The op on 3 rows with 2 places each in a table of 5 rows."""
    arguments = {
        "source": torch.ones(3, 4),
        "ids": [torch.tensor([[0, 1], [1, 2], [2, 3]])],
        "coefficients": [torch.ones(3, 2)],
        "table_rows": 5,
        "compact": False,
    }
    return torch.ops.dwl_kernels_native.table_gradient(**{**arguments, **changed})  # type: ignore[no-any-return]


def rank_targets(**changed: Any) -> Tensor:
    """The op on 3 rows and a table of 5, of which the last row has seen two."""
    arguments = {
        "query": torch.ones(3, 4),
        "table": torch.ones(5, 4),
        "target": torch.tensor([0, 4, 1]),
        "padded": torch.tensor([False, True, False]),
        "nowhere": torch.tensor([False, False, True]),
        "bias": torch.zeros(5),
        "offsets": torch.tensor([0, 0, 0, 3]),
        "seen": torch.tensor([1, 4, 4]),
    }
    return torch.ops.dwl_kernels_native.rank_targets(**{**arguments, **changed})  # type: ignore[no-any-return]


IN_BATCH = {"positive": None, "want_positive": False}
NOTHING = {"query": torch.ones(3, 0)}
WRONG: dict[Callable[..., Any], list[tuple[dict[str, Any], str]]] = {
    rank_targets: [
        ({"query": torch.ones(4)}, "must be matrices"),
        ({"query": torch.ones(3, 0), "table": torch.ones(5, 0)}, "have no embeddings"),
        ({"table": torch.ones(0, 4)}, "have no embeddings"),
        ({"table": torch.ones(5, 3)}, "table: wanted"),
        ({"table": torch.ones(5, 4).double()}, "got Double in Float"),
        ({"target": torch.tensor([5, 0, 0])}, "target out of range in row 0"),
        ({"target": torch.tensor([0, 0])}, "target: wanted"),
        ({"padded": torch.zeros(3)}, "padded: wanted"),
        ({"nowhere": torch.zeros(2, dtype=torch.bool)}, "nowhere: wanted"),
        ({"bias": torch.zeros(3)}, "bias: wanted"),
        ({"offsets": None}, "wanted offsets and seen"),
        ({"offsets": torch.tensor([0, 0, 3])}, "offsets: wanted"),
        ({"offsets": torch.tensor([0, 2, 1, 3])}, "never fall"),
        ({"offsets": torch.tensor([1, 1, 1, 3])}, "must begin at 0"),
        ({"offsets": torch.tensor([0, 0, 0, 4])}, "end at the number of ids"),
        ({"seen": torch.zeros(3).int()}, "seen: wanted"),
    ],
    sampled_softmax: [
        (
            {**NOTHING, "positive": torch.ones(3, 0), "candidates": torch.ones(5, 0)},
            "embeddings of size 0",
        ),
        ({"query": torch.ones(4)}, "must be matrices"),
        ({"query": torch.ones(3, 4).int()}, "got Int in Float"),
        ({"query": torch.ones(3, 4).half()}, "positive: wanted"),
        ({"query": torch.ones(3, 4).bfloat16()}, "positive: wanted"),
        ({"query": torch.ones(4, 3).T}, "query: wanted a contiguous"),
        ({"positive": torch.ones(2, 4)}, "positive: wanted"),
        ({"positive": torch.ones(3, 4).double()}, "positive: wanted"),
        ({"candidates": torch.ones(5, 3)}, "candidates: wanted"),
        ({"tau": torch.ones(2)}, "tau: wanted"),
        ({"tau": torch.zeros(3)}, "tau is 0 in row 0"),
        ({"tau": torch.tensor([1.0, 1.0, -2.0])}, "tau is -2 in row 2"),
        ({"coefficient": torch.ones(3, 1)}, "coefficient: wanted"),
        ({"positive_log_q": torch.ones(5)}, "positive_log_q: wanted"),
        ({"candidate_log_q": torch.ones(3)}, "candidate_log_q: wanted"),
        ({"candidate_log_q": None}, "no candidate_log_q to differentiate"),
        ({"score": torch.ones(3, 5)}, "score: wanted"),
        ({"shift": torch.ones(4)}, "shift: wanted"),
        ({"row_ids": [torch.arange(3)]}, "row_ids and candidate_ids"),
        ({"candidate_ids": [torch.arange(5)]}, "row_ids and candidate_ids"),
        (
            {"row_ids": [torch.arange(3)], "candidate_ids": [torch.arange(5).int()]},
            "candidate_ids: wanted",
        ),
        ({"skip_below": torch.ones(5)}, "skip_below: wanted"),
        ({"active": torch.ones(3)}, "active: wanted"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, "not both"),
        ({"positive": None}, "the positive is a candidate"),
        ({**IN_BATCH, "target": torch.tensor([0, 4, 5])}, "target out of range in row 2"),
        ({**IN_BATCH, "target": torch.tensor([0, -1, 4])}, "target out of range in row 1"),
        ({**IN_BATCH, "target": torch.zeros(2, dtype=torch.int64)}, "target: wanted"),
        ({**IN_BATCH, "candidates": torch.ones(2, 4)}, "in-batch"),
    ],
    indexed_softmax: [
        ({**NOTHING, "table": torch.ones(5, 0)}, "embeddings of size 0"),
        ({"table": torch.ones(5, 3)}, "table: wanted"),
        ({"table": torch.ones(5, 4).double()}, "got Double in Float"),
        ({"table": torch.ones(0, 4)}, "positive_ids out of range in row 0"),
        ({"positive_ids": torch.tensor([0, 1, 5])}, "positive_ids out of range in row 2"),
        (
            {"candidate_ids": torch.tensor([[3, 4], [-2, 4], [3, 4]])},
            "candidate_ids out of range in row 1",
        ),
        ({"candidate_ids": torch.zeros(2, 2, dtype=torch.int64)}, "candidate_ids: wanted"),
        ({"candidate_ids": torch.zeros(3, dtype=torch.int64)}, "must be matrices"),
        ({"candidate_log_q": torch.zeros(2)}, "candidate_log_q: wanted"),
        ({"positive": torch.ones(3, 4)}, "wanted positive or positive_ids"),
        ({"positive": torch.ones(2, 4), "positive_ids": None}, "positive: wanted"),
        ({"tau": torch.zeros(3)}, "tau is 0 in row 0"),
    ],
    table_gradient: [
        ({"ids": [], "coefficients": []}, "ids is an empty list"),
        ({"coefficients": [torch.ones(3, 2)] * 2}, "coefficients for all ids"),
        ({"coefficients": [torch.ones(3, 3)]}, "coefficients: wanted"),
        ({"coefficients": [torch.ones(3, 2).double()]}, "coefficients: wanted"),
        ({"ids": [torch.zeros(2, 2, dtype=torch.int64)]}, "ids: wanted"),
        ({"ids": [torch.zeros(3, dtype=torch.int64)]}, "must be matrices"),
        ({"table_rows": -1}, "table_rows is -1"),
        ({"source": torch.ones(3, 4).double()}, "coefficients: wanted"),
        ({"source": torch.ones(3, 4).long()}, "got Long in Float"),
        ({"source": torch.ones(4)}, "source must be a matrix"),
    ],
}


@pytest.mark.parametrize(
    ("op", "changed", "message"),
    [
        pytest.param(op, changed, message, id=f"{op.__name__}: {message}")
        for op, cases in WRONG.items()
        for changed, message in cases
    ],
)
def test_op_names_what_it_does_not_take(
    op: Callable[..., Any], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises((RuntimeError, IndexError, ValueError), match=re.escape(message)):
        op(**changed)


def test_ids_that_are_no_items_were_not_seen() -> None:
    assert rank_targets().tolist() == [5, 0, 4]
    assert rank_targets(target=torch.tensor([0, 1 << 40, -7])).tolist() == [5, 0, 4]
    assert rank_targets(seen=torch.tensor([-1, 1 << 40, 4])).tolist() == [5, 0, 5]


def test_op_looks_at_no_id_or_temperature_of_padding() -> None:
    padded: dict[str, Any] = {"active": torch.tensor([True, True, False])}
    tau = torch.tensor([1.0, 1.0, 0.0])
    target = torch.tensor([0, 4, -100])
    full = sampled_softmax(**IN_BATCH, **padded, target=target, tau=tau)
    torch.testing.assert_close(full[0], torch.tensor([math.log(5)] * 2 + [0.0]))
    drawn = torch.tensor([[3, 4], [3, 4], [-1, 9]])
    ids = torch.tensor([0, 1, 1 << 40])
    per_row = indexed_softmax(**padded, tau=tau, positive_ids=ids, candidate_ids=drawn)
    torch.testing.assert_close(per_row[0], torch.tensor([math.log(3)] * 2 + [0.0]))
    assert not full[1][2].any()
    assert not any(gradient[2].any() for gradient in per_row[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [1, 64])  # one number at a time, and registers of them
def test_kernel_reads_every_number_of_a_narrow_dtype(dtype: torch.dtype, dim: int) -> None:
    """The logit of a sole candidate is its number. What float32 calls subnormal is left out."""
    table = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    table = table[~(table.float().abs() < torch.finfo(torch.float32).smallest_normal)]
    if dim > 1:  # beside 0, infinity makes NaN
        table = table[table.isfinite()]
    ids = torch.arange(len(table))
    rows = torch.zeros(len(table), dim, dtype=dtype)
    rows[ids, ids % dim] = table
    query = torch.zeros(len(table), dim)
    query[ids, ids % dim] = 1
    ones = torch.ones(len(table))
    read = indexed_softmax(
        **{"query": query, "table": rows, "positive_ids": ids, "candidate_ids": ids[:, None]},
        **{"tau": ones, "coefficient": ones, "refined": True},
    )[4]
    torch.testing.assert_close(read, table.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernel_rounds_to_a_narrow_dtype_as_pytorch_does(dtype: torch.dtype) -> None:
    """Every exponent, ties, the largest numbers and what is beyond them."""
    exponents = torch.arange(0, 1 << 9, dtype=torch.int64)[:, None] << 23
    ends = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x8000, 0x18000, 0x7FF000, 0x7FFFFF])
    wide = (exponents + ends).reshape(-1, 1).to(torch.int32).view(torch.float32)
    places = torch.arange(len(wide))[:, None]
    for dim in (1, 41):  # one by one, and a register at a time
        ones = torch.ones(len(wide), dim, dtype=dtype)
        values, _ = table_gradient(
            source=ones, ids=[places], coefficients=[wide], table_rows=len(wide)
        )
        expected = wide.to(dtype).expand_as(ones)
        torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


def test_op_writes_the_gradients_of_empty_problems() -> None:
    none, no_rows = torch.ones(0, 4), {"tau": torch.ones(0), "coefficient": torch.ones(0)}
    alone = sampled_softmax(candidates=none, candidate_log_q=torch.ones(0))
    assert not any(value.any() for value in alone[:5])
    assert alone[7].tolist() == [1, 1, 1]
    nobody = sampled_softmax(query=none, positive=none, **no_rows)
    assert nobody[3].shape == (5, 4)
    assert not any(value.any() for value in nobody)
    no_draws = indexed_softmax(candidate_ids=torch.zeros(3, 0, dtype=torch.int64))
    assert no_draws[2].shape == (3,)
    assert not any(value.any() for value in no_draws[:4])
    assert no_draws[6].tolist() == [1, 1, 1]
    places = [torch.zeros(3, 0, dtype=torch.int64)]
    for compact in (False, True):
        values, ids = table_gradient(ids=places, coefficients=[], compact=compact)
        assert values.shape == (0 if compact else 5, 4)
        assert not values.any()
        assert ids.shape == (0,)
    assert table_gradient(table_rows=0)[0].shape == (0, 4)


def test_memory_of_a_large_gradient_is_taken_over_when_nobody_holds_it() -> None:
    """One of 16 MB and more, whose pages the system would have to clear for every step."""

    def gradient(value: float) -> Tensor:
        coefficients = [torch.full((3, 2), value)]
        values, _ = table_gradient(table_rows=1 << 20, coefficients=coefficients)
        assert float(values.sum()) == 4 * 6 * value
        return values

    first = gradient(1.0)
    second = gradient(2.0)
    assert float(first.sum()) == 24
    place = second.data_ptr()
    del second
    assert gradient(3.0).data_ptr() == place
