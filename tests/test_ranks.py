"""Ranks of targets among all items, on every backend, against a count over dense scores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dwl_kernels import backends, rank_targets
from dwl_kernels.examples.data import Interactions, load

Seen = tuple[Tensor, Tensor]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Past a tile of the interpreter, 16, and with two products a score in it, 32 dimensions of float32;
# one of everything; sizes that no tile divides.
SIZES = [(1, 1, 1), (3, 7, 5), (21, 53, 40)]


def by_count(
    query: Tensor,
    table: Tensor,
    target: Tensor,
    seen: Seen | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The formula, in float64: one score is the same sum wherever the item stands."""
    ranks = []
    for row, (q, y) in enumerate(zip(query.double(), target.tolist(), strict=True)):
        if y == ignore_index:
            ranks.append(0)
            continue
        scores = (table.double() * q).sum(1)
        if bias is not None:
            scores = scores + bias.double()
        scores = scores.tolist()
        gone = {y}
        if seen is not None:
            gone |= set(seen[1][seen[0][row] : seen[0][row + 1]].tolist())
        ahead = [v for v in range(len(table)) if v not in gone and not scores[v] < scores[y]]
        ranks.append(1 + len(ahead))
    return torch.tensor(ranks)


def integers(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Their products are exact in every dtype, and many are the same."""
    return torch.randint(-3, 4, shape, generator=g).to(dtype)


def seen_by(rows: int, items: int, g: torch.Generator) -> Seen:
    """Up to 8 items a row in no order, some twice, some -1."""
    count = torch.randint(0, 9, (rows,), generator=g)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), count.cumsum(0)))
    return offsets, torch.randint(-1, items, (int(offsets[-1]),), generator=g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_seen", [False, True])
def test_rank_is_a_count_with_ties(
    backend: str, dtype: torch.dtype, size: tuple[int, int, int], with_bias: bool, with_seen: bool
) -> None:
    rows, items, dim = size
    g = torch.Generator().manual_seed(rows)
    query, table = integers((rows, dim), g, dtype), integers((items, dim), g, dtype)
    table[items // 2 :] = table[: items - items // 2].clone()  # every item twice
    target = torch.randint(items, (rows,), generator=g)
    target[1::5] = -100
    bias = None
    if with_bias:
        bias = integers((items,), g, torch.float64 if dtype == torch.float64 else torch.float32)
        bias[:2] = -torch.inf
    seen = seen_by(rows, items, g) if with_seen else None
    found = rank_targets(query, table, target, seen=seen, bias=bias, backend=backend)
    assert found.dtype == torch.int64
    assert torch.equal(found, by_count(query, table, target, seen, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_items_of_one_embedding_tie_wherever_they_stand(backend: str, dtype: torch.dtype) -> None:
    """Of random numbers, whose products are rounded: a last bit more or less would change ranks."""
    g = torch.Generator().manual_seed(0)
    items = 40 if backend in ("triton", "eager") else 1400  # tiles of 512 and a rest
    once = torch.randn(items, 33, generator=g).to(dtype)
    query, table = torch.randn(18, 33, generator=g).to(dtype), torch.cat((once, once, once))
    target = torch.randint(items, (18,), generator=g)
    ranks = [
        rank_targets(query, table, target + copy * items, backend=backend) for copy in range(3)
    ]
    assert torch.equal(ranks[0], ranks[1])
    assert torch.equal(ranks[0], ranks[2])
    alone = rank_targets(query, once, target, backend=backend)
    assert torch.equal(ranks[0], 3 * alone)  # those ahead three times, and two ties


@pytest.mark.parametrize("backend", ["chunked", "cpu"], indirect=True)
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_scores_that_differ_by_less_than_rounding_are_told_apart(
    backend: str, precision: str
) -> None:
    """Sums of large numbers that cancel: float32 sees 0 or noise, the exact ones go up by 1."""
    g = torch.Generator().manual_seed(0)
    large = torch.randint(1 << 20, 1 << 22, (600, 8), generator=g).float() * 1024
    last = torch.randperm(600, generator=g).float()[:, None]
    table = torch.cat((large, -large, last, torch.zeros(600, 3)), 1)
    query = torch.ones(5, 20)
    target = torch.tensor([3, 14, 15, 92, 599])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = rank_targets(query, table, target, backend=backend)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found, 600 - last[target, 0].long())


def test_seen_target_is_ranked_among_the_unseen(backend: str) -> None:
    query, table = torch.ones(1, 1), torch.tensor([[3.0], [1.0], [2.0], [0.0]])
    seen = torch.tensor([0, 4]), torch.tensor([1, 0, -1, 0])
    assert rank_targets(query, table, torch.tensor([1]), seen=seen, backend=backend).tolist() == [2]


def test_nan_is_ahead_and_a_target_of_nan_is_last(backend: str) -> None:
    query = torch.tensor([[1.0], [1.0], [torch.nan], [0.0]])
    table = torch.tensor([[3.0], [1.0], [torch.nan], [0.0], [torch.inf]])
    seen = torch.tensor([0, 0, 0, 2, 2]), torch.tensor([0, 0])
    target = torch.tensor([0, 2, 1, 1])
    found = rank_targets(query, table, target, seen=seen, backend=backend)
    assert found.tolist() == [3, 5, 4, 5]


def test_nan_stays_in_its_row_and_padding_may_hold_it(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    query, table = torch.randn(20, 6, generator=g), torch.randn(30, 6, generator=g)
    target = torch.randint(30, (20,), generator=g)
    expected = rank_targets(query, table, target, backend=backend)
    query[3], target[3], query[7] = torch.nan, 5, torch.nan
    expected[3], expected[7], target[3] = 0, 30, 5
    found = rank_targets(query, table, target, ignore_index=5, backend=backend)
    expected[target == 5] = 0
    assert torch.equal(found, expected)


def test_target_that_a_bias_puts_last_is_behind_all(backend: str) -> None:
    query, table = torch.ones(2, 1), torch.tensor([[3.0], [1.0], [2.0], [0.0]])
    bias = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf])
    target, seen = torch.tensor([1, 2]), (torch.tensor([0, 2, 2]), torch.tensor([0, 3]))
    found = rank_targets(query, table, target, bias=bias, backend=backend)
    assert found.tolist() == [4, 2]
    found = rank_targets(query, table, target, bias=bias, seen=seen, backend=backend)
    assert found.tolist() == [2, 2]


def test_infinite_and_equal_scores_are_ties(backend: str) -> None:
    query, table = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.zeros(40, 2)
    table[5:9, 0] = torch.inf
    found = rank_targets(query[1:], table, torch.tensor([6]), backend=backend)
    assert found.tolist() == [4]
    found = rank_targets(query[:1], torch.ones(40, 2), torch.tensor([6]), backend=backend)
    assert found.tolist() == [40]


def test_leading_dimensions_strides_and_every_form_of_seen(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    query = integers((6, 5, 4), g, torch.float32).permute(1, 2, 0)  # [5, 4, 6]
    table = integers((6, 30), g, torch.float32).T
    target = torch.randint(30, (4, 5), generator=g).T.int()
    mask = torch.rand(20, 30, generator=g) < 0.2
    csr = mask.float().to_sparse_csr()
    pair = csr.crow_indices(), csr.col_indices()
    expected = by_count(query.reshape(20, 6), table, target.reshape(-1), pair).view(5, 4)
    arrays = tuple(part.int().numpy() for part in pair)
    for seen in (csr, pair, list(pair), arrays):
        given: Any = seen
        assert torch.equal(
            rank_targets(query, table, target, seen=given, backend=backend), expected
        )


def test_no_rows_have_no_ranks(backend: str) -> None:
    nobody = torch.zeros(0, dtype=torch.int64)
    assert rank_targets(torch.ones(0, 2), torch.ones(3, 2), nobody, backend=backend).shape == (0,)


def test_ranks_have_no_gradient_and_autocast_changes_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(9, 8, generator=g, requires_grad=True)
    table, target = torch.randn(40, 8, generator=g), torch.arange(9)
    expected = rank_targets(query, table, target)
    assert not expected.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rank_targets(query, table, target), expected)
        rank_targets(query.bfloat16(), table, target)  # as a model under autocast makes it


def test_more_threads_give_the_same_ranks() -> None:
    g = torch.Generator().manual_seed(0)
    query, table = torch.randn(400, 8, generator=g), torch.randn(700, 8, generator=g)
    target = torch.randint(700, (400,), generator=g)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(rank_targets(query, table, target))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_compiled_and_batched_calls_are_the_call() -> None:
    g = torch.Generator().manual_seed(0)
    query, table = torch.randn(3, 5, 4, generator=g), torch.randn(9, 4, generator=g)
    target = torch.randint(9, (3, 5), generator=g)
    expected = rank_targets(query, table, target)
    found = torch.func.vmap(lambda q, y: rank_targets(q, table, y))(query, target)
    assert torch.equal(found, expected)
    compiled = torch.compile(rank_targets, backend="aot_eager")
    assert torch.equal(compiled(query, table, target), expected)


def test_registered_op_passes_opcheck() -> None:
    query, table, target = torch.randn(5, 4), torch.randn(9, 4), torch.tensor([0, 8, -100, 3, 3])
    seen = torch.tensor([0, 1, 1, 3, 3, 3]), torch.tensor([2, 4, -1])
    for bias, pair in ((None, (None, None)), (torch.randn(9), seen)):
        arguments = (query, table, target, bias, *pair, -100, "auto")
        torch.library.opcheck(torch.ops.dwl_kernels.rank_targets.default, arguments)


@pytest.mark.parametrize("backend", ["eager", "chunked", "cpu", "triton"], indirect=True)
def test_op_ranks_last_what_is_no_item_and_leaves_out_what_is_none(backend: str) -> None:
    """Where values are not looked at, as on a GPU, nothing is read out of bounds."""
    query, table = torch.ones(3, 1), torch.tensor([[3.0], [1.0], [2.0]])
    target = torch.tensor([1 << 40, -7, 1])
    found = torch.ops.dwl_kernels.rank_targets(
        query, table, target, None, None, None, -100, backend
    )
    assert found.tolist() == [4, 4, 3]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"table": torch.ones(0, 2)}, ValueError, "table has no rows"),
        ({"table": torch.ones(4, 3)}, ValueError, "table has shape"),
        ({"table": torch.ones(4, 2).double()}, TypeError, "table has dtype"),
        ({"target": torch.tensor([0, 4])}, IndexError, "target holds 4, but table has 4 rows"),
        ({"target": torch.tensor([0, -1])}, IndexError, "or ignore_index"),
        ({"target": torch.ones(2)}, TypeError, "target has dtype torch.float32"),
        ({"target": torch.tensor([0])}, ValueError, r"target has shape \[1\]; wanted \[2\]"),
        ({"bias": torch.ones(3)}, ValueError, r"bias has shape \[3\]; wanted \[4\]"),
        ({"bias": torch.ones(4, dtype=torch.int64)}, TypeError, "bias has dtype"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index is a float"),
        ({"seen": torch.ones(2, 4)}, TypeError, "mask.to_sparse_csr"),
        ({"seen": torch.ones(4, 2).to_sparse_csr()}, ValueError, r"wanted \[2, 4\]"),
        ({"seen": (torch.tensor([0, 1]), torch.tensor([0]))}, ValueError, r"seen\[0\] has shape"),
        ({"seen": (torch.tensor([0, 1, 1]),)}, TypeError, "seen is 1 parts"),
        ({"seen": (torch.tensor([0, 2, 1]), torch.tensor([0]))}, ValueError, "never fall"),
        ({"seen": (torch.tensor([0, 1, 1]), torch.tensor([0, 1]))}, ValueError, "for 2 ids"),
        ({"seen": (torch.tensor([0, 1, 1]), torch.tensor([4]))}, IndexError, "seen.1. holds 4"),
        ({"seen": (torch.tensor([0, 1, 1]), torch.tensor([-2]))}, IndexError, "or -1, no item"),
        ({"seen": (torch.tensor([0, 1, 1]), torch.ones(1))}, TypeError, "seen.1. has dtype"),
        ({"seen": (torch.tensor([0, 1, 1]), torch.ones(1, 1).long())}, ValueError, "nnz"),
        ({"backend": "none"}, ValueError, "backend is 'none'"),
    ],
)
def test_bad_input_is_named(changed: dict[str, Any], error: type, message: str) -> None:
    arguments = {"query": torch.ones(2, 2), "table": torch.ones(4, 2), "target": torch.arange(2)}
    rank_targets(**arguments)  # all else is right
    with pytest.raises(error, match=message):
        rank_targets(**{**arguments, **changed})


def test_backend_that_cannot_run_is_named_and_auto_takes_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends.cpu.solve, "unsupported_ranks", lambda problem: "it does not rank")
    ones = torch.ones(2, 3)
    if backends.unavailable_reason("cpu", "cpu") is None:
        with pytest.raises(RuntimeError, match="backend 'cpu' cannot run: it does not rank"):
            rank_targets(ones, ones, torch.arange(2), backend="cpu")
    assert rank_targets(ones, ones, torch.arange(2)).tolist() == [2, 2]


# ---------------------------------------------------------------- on real data

DATA = os.environ.get("DWL_KERNELS_DATA", "")


@pytest.fixture(params=["ml-1m", "amazon-beauty"])
def interactions(request: pytest.FixtureRequest) -> Interactions:
    folder = Path(DATA) / request.param
    if not DATA or not folder.is_dir():
        pytest.skip(f"DWL_KERNELS_DATA={DATA!r} names no folder with {request.param} in it")
    return load(folder)


@pytest.mark.parametrize("whole", [True, False], ids=["integers", "floats"])
@pytest.mark.parametrize("backend", ["chunked", "cpu"], indirect=True)
def test_ranks_of_real_users_are_those_of_dense_scores(
    backend: str, interactions: Interactions, whole: bool
) -> None:
    """The last item of every user among all that the user had not taken before."""
    data, g = interactions, torch.Generator().manual_seed(0)
    ends = data.offsets[1:]
    target = torch.from_numpy(data.items[ends - 1])
    history = np.concatenate([data.sequence(user)[:-1] for user in range(data.num_users)])
    seen = torch.from_numpy(data.offsets - np.arange(len(data.offsets))), torch.from_numpy(history)

    def embeddings(count: int) -> Tensor:
        if whole:
            return torch.randint(-4, 5, (count, 32), generator=g).float()
        return torch.randn(count, 32, generator=g)

    query, table = embeddings(data.num_users), embeddings(data.num_items)
    table[: data.num_items // 3] = table[-(data.num_items // 3) :].clone()  # ties of rounded scores
    found = rank_targets(query, table, target, seen=seen, backend=backend)
    rows = torch.arange(data.num_users).repeat_interleave(seen[0].diff())
    for start in range(0, data.num_users, 2048):
        part = slice(start, start + 2048)
        scores = query[part].double() @ table.double().T
        own = scores.gather(1, target[part, None])
        # A product rounds equal sums apart; nothing else is as near in float64.
        ahead = scores >= own - 1e-10
        mine = (rows >= start) & (rows < part.stop)
        ahead[rows[mine] - start, seen[1][mine]] = False
        ahead.scatter_(1, target[part, None], False)
        assert torch.equal(found[part], 1 + ahead.sum(1))
