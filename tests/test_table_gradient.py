"""The gradient of a table: sums of rows by id, on every backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dwl_kernels import gather as table
from dwl_kernels import (
    indexed_sampled_softmax_loss,
)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_sum_by_id_is_index_add(backend: str, compact: bool, weighted: bool) -> None:
    """Past 4,096 entries the compiled sum takes several threads; 3,000 ids take two passes."""
    g = torch.Generator().manual_seed(0)
    source = torch.randn(700, 3, generator=g, dtype=torch.float64)
    source[5] = torch.nan  # nothing of it is used
    ids = [torch.randint(0, 3000, (700, k), generator=g) for k in (1, 30)]
    for one in ids:
        one[5] = -1
        one[7] = 3000
    weights = [torch.randn(one.shape, generator=g, dtype=torch.float64) for one in ids]
    for one in weights:
        one[9] = 0.0
    if not weighted:
        weights = []
        ids[0][9] = ids[1][9] = -1
    expected = torch.zeros(3000, 3, dtype=torch.float64)
    used = torch.zeros(3000, dtype=torch.bool)
    for k, one in enumerate(ids):
        for r, j in ((r, j) for r in range(700) for j in range(one.shape[1])):
            if r not in (5, 7, 9):
                expected[one[r, j]] += source[r] * (weights[k][r, j] if weights else 1)
                used[one[r, j]] = True
    got = table.table_gradient(source, ids, weights, 3000, torch.float64, compact, backend)
    if compact:
        assert torch.equal(got.indices()[0], used.nonzero()[:, 0])
        got = got.to_dense()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compact", [False, True])
def test_padded_row_of_nan_reaches_no_row_of_the_table(backend: str, compact: bool) -> None:
    """Its ids are of the table, and its coefficients are 0."""
    source = torch.ones(3, 4)
    source[1] = torch.nan
    ids, coefficients = torch.tensor([[0, 2], [2, 4], [2, 5]]), torch.ones(3, 2)
    coefficients[1] = 0
    call = (source, [ids], [coefficients], 6, torch.float32, compact, backend)
    values, distinct = torch.ops.dwl_kernels.table_gradient(*call)
    if compact:
        assert distinct.tolist() == [0, 2, 5]
    expected = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 1.0])[:, None].expand(6, 4)
    assert torch.equal(values, expected[distinct] if compact else expected)


def test_ids_past_32_bits_are_sorted_and_summed(backend: str) -> None:
    big = 1 << 40
    ids = torch.tensor([[big - 1], [3], [big - 1], [1 << 33], [big]])
    source = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    got = table.table_gradient(source, [ids], [], big, torch.float32, True, backend)
    assert got.shape == (big, 1)
    assert got.indices()[0].tolist() == [3, 1 << 33, big - 1]
    assert got.values()[:, 0].tolist() == [2.0, 8.0, 5.0]


@pytest.mark.parametrize(
    ("rows", "queries"),
    [(1 << 40, count) for count in (1, 7, 8, 9, 600)]
    + [(big, count) for big in (1 << 62, (1 << 63) - 1) for count in (1023, 1024, 8193, 20000)],
)
def test_queries_of_a_huge_table_are_not_mixed_up(backend: str, rows: int, queries: int) -> None:
    """`cpu` packs a query and the place of an id in its bucket into a word of 32 or 64 bits."""
    ids = torch.tensor([rows - 1, (1 << 39) + 1, (1 << 29) - 1, 0])[torch.arange(queries) % 4, None]
    source = torch.arange(1, queries + 1, dtype=torch.float64)[:, None]
    got = table.table_gradient(source, [ids], [], rows, torch.float64, True, backend)
    expected = {int(id): 0.0 for id in ids}
    for id, value in zip(ids[:, 0].tolist(), source[:, 0].tolist(), strict=True):
        expected[id] += value
    assert got.indices()[0].tolist() == sorted(expected)
    assert got.values()[:, 0].tolist() == [expected[id] for id in sorted(expected)]


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("rows", [2**15 - 2, 2**15 - 1, 2**15, 2**15 + 1])
def test_last_row_and_no_row_are_told_apart_at_every_width_of_the_keys(
    backend: str, rows: int, compact: bool
) -> None:
    ids = torch.tensor([[rows - 1], [rows], [0], [-1], [rows - 1], [1 << 15], [rows - 2]])
    source = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0], [32.0], [64.0]])
    got = table.table_gradient(source, [ids], [], rows, torch.float32, compact, backend)
    expected = torch.zeros(rows, 1)
    for id, value in zip(ids[:, 0].tolist(), source, strict=True):
        if 0 <= id < rows:
            expected[id] += value
    assert torch.equal(got.to_dense() if compact else got, expected)


@pytest.mark.parametrize("compact", [False, True])
def test_table_gradient_passes_opcheck(backend: str, compact: bool) -> None:
    ids = [torch.arange(9)[:, None] % 7, torch.arange(45).reshape(9, 5) % 7]
    weights = [torch.rand(9, 1), torch.rand(9, 5)]
    arguments = (torch.randn(9, 4), ids, weights, 7, torch.float32, compact, backend)
    torch.library.opcheck(torch.ops.dwl_kernels.table_gradient.default, arguments)


def test_rows_past_two_to_the_31_elements_are_the_right_ones(backend: str, tmp_path: Path) -> None:
    """A sparse file of 8.6 GB stands for a table that no test could hold; three pages are used."""
    rows, dim = (1 << 25) + 3, 64
    try:
        items = torch.from_file(str(tmp_path / "table"), shared=True, size=rows * dim)
    except RuntimeError as error:
        pytest.skip(f"no sparse file of that size here: {error}")
    items = items.reshape(rows, dim)
    used = torch.tensor([0, 1, 2, rows - 3, rows - 2, rows - 1])
    items[used] = torch.randn(6, dim, generator=torch.Generator().manual_seed(0))
    query = torch.randn(2, dim, generator=torch.Generator().manual_seed(1))
    small = items[used].clone().requires_grad_()
    items.requires_grad_()
    for negative in ([4, 0, 3], [[4, 0, 3], [1, 2, 5]]):
        near, far = torch.tensor([5, 0]), torch.tensor(negative)
        a = indexed_sampled_softmax_loss(query, small, near, far, backend=backend)
        b = indexed_sampled_softmax_loss(
            query, items, used[near], used[far], sparse_grad=True, backend=backend
        )
        assert torch.equal(a, b)
        (expected,), (got,) = torch.autograd.grad(a, [small]), torch.autograd.grad(b, [items])
        touched = expected.abs().sum(1) > 0
        assert got.indices()[0].tolist() == used[touched].tolist()
        assert torch.equal(got.values(), expected[touched])


@pytest.mark.parametrize("backend", ["chunked", "cpu"], indirect=True)
def test_row_outside_the_table_is_read_as_nan_and_gets_no_gradient(backend: str) -> None:
    """Where values are looked at, such an id is an error before anything is read."""
    items = torch.randn(4, 3, requires_grad=True)
    ids = torch.tensor([0, 3, 4, -1, 1 << 40])
    rows = table.gather_rows(items, ids, False, backend)
    assert torch.equal(rows[:2], items[[0, 3]])
    assert rows[2:].isnan().all()
    (gradient,) = torch.autograd.grad(rows, items, torch.ones(5, 3))
    assert gradient.tolist() == [[1.0] * 3, [0.0] * 3, [0.0] * 3, [1.0] * 3]


def test_gradient_of_no_places_is_zero(backend: str) -> None:
    source, ids = torch.ones(0, 3), [torch.zeros(0, 2, dtype=torch.int64)]
    for compact in (False, True):
        got = table.table_gradient(source, ids, [], 5, torch.float32, compact, backend)
        assert got.shape == (5, 3)
        assert torch.equal(got.to_dense() if compact else got, torch.zeros(5, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_an_id_drawn_very_often_is_summed_in_a_fixed_order(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Triton sum takes chunks of 4 places, and chunks of 4 chunks, beforehand."""
    if backend == "triton":
        triton_table = pytest.importorskip("dwl_kernels.backends.triton.kernels.table_gradient")
        monkeypatch.setattr(triton_table, "SPAN", 4)
    g = torch.Generator().manual_seed(0)
    source = torch.randn(90, 20, generator=g, dtype=torch.float64).to(dtype)
    hot = torch.randint(0, 7, (90, 9), generator=g).clamp(max=3)  # 5 of 9 places are id 3
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(90, 9, generator=g, dtype=torch.float64).to(wide)
    expected = torch.zeros(7, 20, dtype=torch.float64)
    spread = (weight.double()[:, :, None] * source.double()[:, None]).flatten(0, 1)
    expected.index_add_(0, hot.flatten(), spread)
    got = [
        table.table_gradient(source, [hot], [weight], 7, dtype, False, backend) for _ in range(2)
    ]
    assert torch.equal(*got)
    tolerance = 1e-12 if dtype == torch.float64 else 8e-3
    torch.testing.assert_close(got[0].double(), expected, rtol=tolerance, atol=tolerance)
