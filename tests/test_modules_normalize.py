"""normalize=True: rows of zeros, tiny and huge rows, padding, in every dtype and under autocast."""

import math

import pytest
import torch
import torch.nn.functional as F
from module_inputs import ITEMS, KINDS, B, D, N, call, draws, item_domains, table_of

import dwl_kernels
from dwl_kernels.modules.normalize import normalised

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def exact(rows, upstream):
    """Rows of length 1 and their gradient, in float64 and over the largest entry."""
    x = rows.detach().double()
    scale = x.abs().amax(-1, keepdim=True)
    x = x / scale
    length = x.norm(dim=-1, keepdim=True)
    u, g = x / length, upstream.double()
    return u, (g - u * (u * g).sum(-1, keepdim=True)) / length / scale


def extremes(dtype):
    """Rows from subnormal to nearly infinite, flat and of one large entry."""
    info = torch.finfo(dtype)
    sizes = {
        torch.float16: [info.smallest_normal / 512, 1e-7, 6e-5, 1e-3, 1.0, 300.0, 6e4],
        torch.bfloat16: [1e-38, 1e-20, 1e-3, 1.0, 1e3, 1e30, 3e38],
        torch.float32: [1e-44, 1e-38, 1e-20, 1e-3, 1.0, 1e3, 1e30, 3e38],
        torch.float64: [1e-320, 1e-300, 1e-160, 1.0, 1e160, 1e307],
    }[dtype]
    generator = torch.Generator().manual_seed(0)
    shapes = torch.rand(3, 16, generator=generator, dtype=torch.float64) - 0.5
    shapes[0] = torch.tensor([1.0, -1.0]).repeat(8)
    shapes[1, 5] = 1.0
    shapes[1, :5] = 0.0
    scaled = torch.tensor(sizes, dtype=torch.float64)[:, None, None] * shapes
    return scaled.to(dtype).flatten(0, 1)


@EVERY_DTYPE
@pytest.mark.parametrize("autocast", [False, True])
def test_rows_of_any_size_have_length_one_and_the_right_gradient(dtype, autocast):
    rows = extremes(dtype)
    rows = rows[rows.abs().amax(1) > 0].requires_grad_()
    # Small for small rows, so that most of the gradients are numbers that the dtype holds.
    size = rows.detach().double().abs().amax(1, keepdim=True).sqrt().clamp(max=1)
    upstream = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    upstream = (upstream * size).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = normalised(rows)
    (gradient,) = torch.autograd.grad(got, rows, upstream)
    wanted, wanted_gradient = exact(rows, upstream)
    rounding = max(torch.finfo(dtype).eps, 1e-15)
    assert got.dtype == gradient.dtype == dtype
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2 * rounding)
    scale = wanted_gradient.abs().amax(1, keepdim=True)
    assert bool((scale < torch.finfo(dtype).max).all())
    error = (gradient.double() - wanted_gradient).abs()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert bool((error <= 20 * rounding * scale + smallest).all())


@EVERY_DTYPE
@pytest.mark.parametrize("autocast", [False, True])
def test_row_of_zeros_stays_zero_and_takes_no_gradient(dtype, autocast):
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[1], rows[3] = 0.0, -0.0
    rows.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = normalised(rows)
    (gradient,) = torch.autograd.grad(got, rows, torch.ones_like(got))
    assert not got[[1, 3]].any()
    assert not gradient[[1, 3]].any()
    assert gradient.isfinite().all()
    assert gradient[[0, 2]].any(1).all()


def test_ordinary_rows_are_those_of_torch():
    rows = table_of()
    wanted = F.normalize(rows, dim=-1)
    torch.testing.assert_close(normalised(rows), wanted)
    pair = [
        torch.autograd.grad((out * torch.arange(D)).sum(), rows)[0]
        for out in (normalised(rows), wanted)
    ]
    torch.testing.assert_close(*pair)


@pytest.mark.parametrize("drawn", [False, True])
def test_gradient_is_that_of_finite_differences(drawn):
    rows = table_of()[:3].detach().requires_grad_()
    padded = torch.tensor([False, True, False])
    for mask in (None, padded):
        assert torch.autograd.gradcheck(lambda x, m=mask: normalised(x, m, drawn=drawn), rows)


def test_gradient_of_the_gradient_raises():
    rows = table_of()
    loss = (normalised(rows) * torch.arange(D)).sum()
    (gradient,) = torch.autograd.grad(loss, rows, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_row_of_a_table_that_is_not_finite_is_nan_and_leaves_the_others_alone(bad):
    rows = table_of().detach().clone()
    clean = normalised(rows)
    rows[2, 1] = bad
    rows.requires_grad_()
    got = normalised(rows, drawn=True)
    assert got[2].isnan().all()
    others = torch.arange(ITEMS) != 2
    torch.testing.assert_close(got[others], clean[others])
    upstream = torch.ones_like(got).masked_fill(~others[:, None], 0.0)  # nobody uses it
    (gradient,) = torch.autograd.grad(got, rows, upstream)
    assert not gradient[2].any()
    assert gradient.isfinite().all()


# ---------------------------------------------------------------- through the losses


@EVERY_KIND
@EVERY_DTYPE
def test_padding_row_of_a_table_takes_no_gradient(kind, dtype):
    """As nn.Embedding with padding_idx gives none: it is among the candidates and is zero."""
    table = torch.nn.Embedding(ITEMS, D, padding_idx=0).to(dtype)
    query = torch.randn(B, D, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    ids = draws()
    ids["positive_ids"] = ids["positive_ids"].clamp(min=1)
    ids["negative_ids"] = ids["negative_ids"].clone()
    ids["negative_ids"][:2] = 0
    loss_fn = KINDS[kind](normalize=True, backend="chunked")
    loss = call(kind, loss_fn, query, table.weight, ids)
    assert loss.isfinite()
    loss.backward()
    assert not table.weight.grad[0].any()
    assert table.weight.grad.isfinite().all()
    assert query.grad.isfinite().all()
    assert table.weight.grad.abs().max() < 100


@EVERY_KIND
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("row", [0.0, 1e-25, 1e30])
def test_loss_of_rows_of_any_size_is_that_of_ordinary_ones(kind, row, autocast):
    """The length of a row changes nothing, and its gradient in inverse proportion."""
    sizes = torch.ones(ITEMS, 1)
    sizes[3:6] = row
    outcomes = []
    for scale in (torch.ones(ITEMS, 1) if row else sizes, sizes):
        base = table_of(torch.float32).detach()
        table = (base * scale).requires_grad_()
        query = torch.randn(B, D, generator=torch.Generator().manual_seed(0))
        loss_fn = KINDS[kind](normalize=True, temperature=0.5, backend="chunked")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = call(kind, loss_fn, query, table)
        loss.backward()
        outcomes.append([loss.detach(), table.grad * scale])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2 if autocast else 1e-5, atol=1e-6)


@EVERY_KIND
def test_padded_ids_never_touch_the_gradient_of_the_table(kind):
    """Their row of the table may hold anything, unless it is a candidate of other rows."""
    outcomes = []
    for held in (0.0, 5.0, torch.nan, torch.inf):
        if kind == "cross-entropy" and held != 0:  # every row is a candidate there
            continue
        table = table_of().detach().clone()
        table[0] = held
        table.requires_grad_()
        query = torch.randn(B, D, generator=torch.Generator().manual_seed(0)).double()
        query[2] = torch.nan
        query.requires_grad_()
        ids = draws()
        ids["positive_ids"] = ids["positive_ids"].clamp(min=1)
        ids["positive_ids"][2] = 0
        ids["negative_ids"] = ids["negative_ids"].clamp(min=7)  # by row: shifted by up to 5
        if kind == "by row":
            ids["negative_ids"] = ids["negative_ids"].clamp(max=14)
        weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5, 1.0])
        loss_fn = KINDS[kind](
            *(() if kind == "cross-entropy" else (3,)),
            normalize=True,
            backend="chunked",
            **({} if kind == "cross-entropy" else {"item_domains": item_domains()}),
        )
        loss = call(kind, loss_fn, query, table, ids, example_weights=weights)
        loss.backward()
        assert not table.grad[0].any()
        assert not query.grad[2].any()
        outcomes.append([loss.detach(), query.grad, table.grad])
    for other in outcomes[1:]:
        for one, two in zip(outcomes[0], other, strict=True):
            assert torch.equal(one, two)


@EVERY_KIND
def test_batches_of_sequences_are_normalised_step_by_step(kind):
    """[batch, time, D] with padding that holds NaN: rows of length 1, made by hand, one by one."""
    leading, reduction = (2, B // 2), "none"
    options = {"temperature": 0.5, "reduction": reduction, "backend": "eager"}
    table, ids = table_of(), draws()
    table = (table.detach() * torch.arange(1, ITEMS + 1)[:, None]).requires_grad_()
    query = torch.randn(B, D, generator=torch.Generator().manual_seed(0)).double()
    query = (query * torch.arange(1, B + 1)[:, None]).requires_grad_()
    weights = torch.tensor([1.0, 1.0, 0.0, 2.0, 0.5, 1.0])
    broken = torch.where(weights[:, None] == 0, torch.nan, query.detach()).requires_grad_()

    def shaped(x):
        return x.reshape(*leading, *x.shape[1:])

    per_row = {"positive_ids", "positive_log_q", "domain_ids"}
    stepped = {name: shaped(x) if name in per_row else x for name, x in ids.items()}
    if kind == "by row":  # `call` makes negatives of every row's own for [B]
        rows = torch.arange(B)[:, None]
        own = {"negative_ids": (ids["negative_ids"] + rows) % ITEMS}
        own["negative_log_q"] = ids["negative_log_q"].expand(B, N)
        named = {**stepped, **{name: shaped(x) for name, x in own.items()}}
        del named["domain_ids"]
        got = KINDS[kind](normalize=True, **options)(
            shaped(broken), table=table, example_weights=shaped(weights), **named
        )
    else:
        loss_fn = KINDS[kind](normalize=True, **options)
        got = call(kind, loss_fn, shaped(broken), table, stepped, example_weights=shaped(weights))
    assert got.shape == leading
    unit = torch.stack([row / sum(x * x for x in row) ** 0.5 for row in query])
    units = torch.stack([row / sum(x * x for x in row) ** 0.5 for row in table])
    wanted = call(kind, KINDS[kind](**options), unit, units, ids, example_weights=weights)
    torch.testing.assert_close(got, shaped(wanted))
    gradients = torch.autograd.grad(got.sum(), (broken, table))
    for one, other in zip(
        gradients, torch.autograd.grad(wanted.sum(), (query, table)), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_wrong_dtype_is_named_as_without_normalising(dtype: torch.dtype) -> None:
    loss_fn = dwl_kernels.DynamicWeightedSampledSoftmax(normalize=True)
    with pytest.raises(TypeError, match=r"positive has dtype .*; wanted float32"):
        loss_fn(torch.ones(2, 3), torch.ones(2, 3, dtype=dtype))


@pytest.mark.parametrize("shape", [(3,), (4, 3)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_negatives_that_are_left_out_take_no_gradient(shape: tuple[int, ...], value: float) -> None:
    torch.manual_seed(0)
    query, positive, negative = torch.randn(4, 8), torch.randn(4, 8), torch.randn(*shape, 8)
    negative[..., 1, :] = value
    ids = torch.tensor([6, 7, 2]).expand(shape)
    leaves = [one.requires_grad_() for one in (query, positive, negative)]
    module = dwl_kernels.DynamicWeightedSampledSoftmax(
        normalize=True, ignore_index=7, backend="eager"
    )
    loss = module(*leaves, positive_ids=torch.arange(4), negative_ids=ids)
    found = torch.autograd.grad(loss, leaves)
    assert all(one.isfinite().all() for one in (loss, *found))
    assert not found[2][..., 1, :].any()
