"""Modules and functions: negatives per row, items in several rows, padding by id, hits that stay,
positives of one query. What they compute the cases of `test_backends` show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from module_inputs import ITEMS, B, D, N, draws, embeddings, fixed, item_domains, table_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dwl_kernels
from dwl_kernels import (
    CumulativeCrossEntropy,
    DualScaleSampledSoftmax,
    DynamicWeightedSampledSoftmax,
    full_softmax_loss,
    in_batch_softmax_loss,
    indexed_sampled_softmax_loss,
    sampled_softmax_loss,
)

K = 5
PLAIN: dict[str, Any] = {"backend": "eager"}


def per_row(seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """Ids of negatives of every row's own, two of them no items, and log-Q of both sides."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, ITEMS, (B, K), generator=g)
    ids[0, 1] = ids[3, 4] = -1
    given = draws()
    return ids, {
        "positive_log_q": given["positive_log_q"],
        "negative_log_q": -1.5 - torch.rand(B, K, generator=g, dtype=torch.float64),
    }


def same(one: Tensor, other: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(one, other)
    pair = (torch.autograd.grad(loss.sum(), leaves, retain_graph=True) for loss in (one, other))
    for got, wanted in zip(*pair, strict=True):
        torch.testing.assert_close(got, wanted)


# ---------------------------------------------------------------- negatives per row


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("calibration", [0.0, 0.5])
def test_embeddings_per_row_are_rows_of_a_table(
    backend: str, normalize: bool, calibration: float
) -> None:
    if backend == "cuda":
        pytest.skip("it does not take candidates by row")
    query, table = embeddings()[0], table_of()
    ids, log_q = per_row()
    ids.clamp_(min=0)  # by its embedding, what is no item is a candidate
    options = {"item_domains": item_domains(), "calibration": calibration}
    loss_fn = fixed(normalize=normalize, backend=backend, **options).eval()
    named = {"positive_ids": draws()["positive_ids"], "negative_ids": ids, **log_q}
    of_rows = loss_fn(query, table[named["positive_ids"]], table[ids], **named)
    same(of_rows, loss_fn(query, table=table, **named), [query, table])


def test_embeddings_per_row_take_leading_dimensions_and_views() -> None:
    g = torch.Generator().manual_seed(0)
    query, positive = (torch.randn(2, 3, D, generator=g, requires_grad=True) for _ in range(2))
    negative = torch.randn(2, 3, D, K, generator=g).transpose(2, 3).requires_grad_()
    loss = sampled_softmax_loss(query, positive, negative, reduction="none")
    z_positive = (query * positive).sum(-1, keepdim=True)
    z = torch.cat((z_positive, (negative @ query[..., None])[..., 0]), 2)
    same(loss, z.logsumexp(2) - z[..., 0], [query, positive, negative])


def test_gradient_of_negatives_per_row_is_transformed_and_compiled() -> None:
    g = torch.Generator().manual_seed(0)
    query, positive = torch.randn(B, D, generator=g), torch.randn(B, D, generator=g)
    negative = torch.randn(B, K, D, generator=g)
    given = query, positive, negative.requires_grad_()

    def loss(query: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return sampled_softmax_loss(query, positive, negative, **PLAIN)

    wanted = torch.autograd.grad(loss(*given), negative)[0]
    torch.testing.assert_close(torch.func.grad(loss, argnums=2)(*given), wanted)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(*given), negative)[0], wanted)
    both = torch.func.vmap(torch.func.grad(loss, argnums=2))(*(torch.stack((t, t)) for t in given))
    torch.testing.assert_close(both, torch.stack((wanted, wanted)))


class Sizes(TorchDispatchMode):
    """How many bytes every new tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in given:
                self.sizes.append(one.untyped_storage().nbytes())
        return out


def test_negatives_per_row_need_no_memory_but_their_gradient() -> None:
    query, positive = torch.randn(64, D), torch.randn(64, D)
    leaves = [t.requires_grad_() for t in (query, positive, torch.randn(64, 50, D))]
    with Sizes() as seen:
        sampled_softmax_loss(*leaves).backward()
    of_negatives = leaves[2].numel() * leaves[2].itemsize
    assert sorted(seen.sizes)[-1] == of_negatives
    assert sorted(seen.sizes)[-2] <= of_negatives / D * 2  # int64 places


def test_gradient_in_16_bits_is_made_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [torch.randn(*shape, D).bfloat16() for shape in ((B,), (B,), (B, K))]
    gradients = []
    for most in (1, 2 * K * D, 1 << 20):
        monkeypatch.setattr("dwl_kernels.autograd.BLOCK_ELEMENTS", {"cpu": most})
        given = [t.clone().requires_grad_() for t in leaves]
        sampled_softmax_loss(*given).backward()
        gradients.append(given[2].grad)
    assert all(torch.equal(one, gradients[0]) for one in gradients)
    assert gradients[0].all()


# ---------------------------------------------------------------- items in several rows


def cache() -> tuple[Tensor, Tensor]:
    """A table of the rows of items, each twice and in another order, and the item of each row."""
    table_ids = torch.cat((torch.arange(ITEMS), torch.arange(ITEMS).flip(0)))
    return table_of().detach()[table_ids].requires_grad_(), table_ids


@pytest.mark.parametrize("calibration", [0.0, 0.5])
@pytest.mark.parametrize("width", [0, N, K])
def test_items_in_two_rows_are_the_items(width: int, calibration: float) -> None:
    """By whichever row they are named; weights and calibration are those of the items."""
    query, (cached, table_ids) = embeddings()[0], cache()
    given, weigh = draws(), {"item_domains": item_domains(), "calibration": calibration}
    ids: dict[str, Tensor] = {"positive_ids": given["positive_ids"]}
    if width == N:
        ids["negative_ids"] = given["negative_ids"]
    elif width:
        ids["negative_ids"] = per_row()[0]
    rows = {name: torch.where(one < 0, one, 2 * ITEMS - 1 - one) for name, one in ids.items()}
    rows["positive_ids"] = ids["positive_ids"]  # negatives by their second row
    loss_fn = fixed(**weigh).eval()
    loss = loss_fn(query, table=cached, table_ids=table_ids, **rows)
    same(loss, loss_fn(query, table=cached[:ITEMS], **ids), [query])
    if width:  # without the items its hits would be others
        wrong = torch.arange(2 * ITEMS) % ITEMS
        assert loss != loss_fn(query, table=cached, table_ids=wrong, **rows)


def test_row_that_is_no_item_is_left_out() -> None:
    query, table, given = embeddings()[0], table_of(), draws()
    table_ids = torch.arange(ITEMS).masked_fill(torch.arange(ITEMS) == 7, -1)
    positive_ids = given["positive_ids"].masked_fill(given["positive_ids"] == 7, 8)
    drawn = torch.tensor([7, 3, 7, 11, 2])
    for negative_ids in (drawn, drawn.expand(B, 5)):
        ids = positive_ids, negative_ids
        loss = indexed_sampled_softmax_loss(query, table, *ids, table_ids=table_ids, **PLAIN)
        few = positive_ids, negative_ids[..., [1, 3, 4]]
        same(loss, indexed_sampled_softmax_loss(query, table, *few, **PLAIN), [query, table])
    few_items = [i for i in range(ITEMS) if i != 7]
    target = positive_ids - (positive_ids > 7).long()
    loss = full_softmax_loss(query, table, positive_ids, table_ids=table_ids, **PLAIN)
    same(loss, full_softmax_loss(query, table[few_items], target, **PLAIN), [query, table])


# ---------------------------------------------------------------- padding by id


@pytest.mark.parametrize("ignore_index", [0, -1, -100])
@pytest.mark.parametrize("kind", ["shared", "rows", "in-batch", "table", "table rows", "dual"])
def test_padding_by_id_is_padding_by_weight(kind: str, ignore_index: int) -> None:
    """Neither domains nor losses of padded rows count, and ignored negatives are not there."""
    query, positive, negative = embeddings()
    given, options = draws(), {"num_domains": 3, "item_domains": item_domains(), **PLAIN}
    ids = given["positive_ids"].clamp(min=1)
    padded = torch.tensor([False, True, False, False, True, False])
    kept = torch.tensor([True, False, True, True, False])
    negative_ids = torch.tensor([3, ignore_index, 5, 11, ignore_index])
    table, module = table_of(), DynamicWeightedSampledSoftmax
    if kind == "dual":
        module, options["slate_size"] = DualScaleSampledSoftmax, 1
    inputs: list[dict[str, Any]] = []
    for own, few in ((ids.masked_fill(padded, ignore_index), slice(None)), (ids, kept)):
        drawn = negative_ids[few]
        call: dict[str, Any] = {"positive_ids": own}
        if kind.startswith("table"):
            call |= {"table": table, "negative_ids": drawn}
            if kind == "table rows":
                call["negative_ids"] = drawn.expand(B, -1)
        else:
            call["positive"] = positive
            if kind == "rows":
                call["negative"] = negative[:5][few].expand(B, -1, -1)
                call["negative_ids"] = drawn.expand(B, -1)
            elif kind != "in-batch":
                call |= {"negative": negative[:5][few], "negative_ids": drawn}
        inputs.append(call)
    by_id, by_weight = module(ignore_index=ignore_index, **options), module(**options)
    loss = by_id(query, **inputs[0])
    expected = by_weight(query, **inputs[1], example_weights=(~padded).double())
    same(loss, expected, [query])
    counts = [one.domain_weights.interactions for one in (by_id, by_weight)]
    assert torch.equal(*counts)


def test_padding_by_id_goes_with_weights_of_examples() -> None:
    query, positive, negative = embeddings()
    ids, weight = torch.tensor([4, 0, 5, 0, 6, 7]), torch.tensor([2.0, 3, 0, 1, 1, 0]).double()
    both = {"positive_ids": ids, "negative_ids": torch.arange(N) + 4}
    loss = sampled_softmax_loss(
        query, positive, negative, **both, ignore_index=0, example_weights=weight, **PLAIN
    )
    weight = weight * (ids != 0)
    wanted = sampled_softmax_loss(
        query, positive, negative, **both, example_weights=weight, **PLAIN
    )
    same(loss, wanted, [query, positive, negative])


# ---------------------------------------------------------------- hits that stay


@pytest.mark.parametrize("width", [N, K])
def test_hits_stay_where_they_are_not_removed(width: int) -> None:
    query, table, given = embeddings()[0], table_of(), draws()
    ids = given["positive_ids"], per_row()[0] if width == K else given["negative_ids"]
    ids[1].view(-1)[:3] = ids[0][:3]
    named = {"positive_ids": ids[0], "negative_ids": ids[1]}
    loss = fixed(weights=None, temperature=1.0, remove_accidental_hits=False)(
        query, table=table, **named
    )
    s = query @ table.T
    drawn = s.gather(1, ids[1].clamp(min=0).expand(B, -1)).masked_fill(ids[1] == -1, -torch.inf)
    z = torch.cat((s.gather(1, ids[0][:, None]), drawn), 1)
    same(loss, (z.logsumexp(1) - z[:, 0]).mean(), [query, table])


# ---------------------------------------------------------------- positives of one query


@pytest.mark.parametrize("with_table", [False, True])
@pytest.mark.parametrize("with_ids", [False, True])
def test_positives_of_a_query_are_no_candidates_of_it(with_ids: bool, with_table: bool) -> None:
    query, positive, _ = embeddings()
    users = torch.tensor([5, 6, 5, -1, -1, 5])
    given = draws()
    ids, call = given["positive_ids"], {"positive": positive}
    if with_table:
        call = {"table": table_of(), "positive_ids": ids}
        positive = call["table"][ids]
    elif with_ids:
        call["positive_ids"] = ids
    loss_fn = fixed(weights=None, temperature=1.0, remove_accidental_hits=with_ids)
    loss = loss_fn(query, query_ids=users, **call)
    gone = ((users[:, None] == users) & (users != -1)) | torch.eye(B, dtype=torch.bool)
    gone = gone | (ids[:, None] == ids) if with_ids else gone
    z = (query @ positive.T).masked_fill(gone, -torch.inf)
    own = (query * positive).sum(1)
    wanted = (torch.cat((own[:, None], z), 1).logsumexp(1) - own).mean()
    same(loss, wanted, [query])


# ---------------------------------------------------------------- what does not fit


QUERY, ROWS = torch.ones(B, D), torch.ones(B, K, D)
IDS, TABLE = torch.arange(B), torch.ones(ITEMS, D)
OWN = torch.zeros(B, K, dtype=torch.int64)
sampled, dynamic = sampled_softmax_loss, DynamicWeightedSampledSoftmax


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: sampled(QUERY, QUERY, torch.ones(B + 1, K, D)),
            ValueError,
            r"negative has shape \[7, 5, 4\]; wanted \[N, 4\], or \[6, K, 4\] of every row's own",
        ),
        (lambda: sampled(QUERY, QUERY, ROWS[..., 1:]), ValueError, r"or \[6, K, 4\]"),
        (
            lambda: sampled(QUERY, QUERY, ROWS, positive_ids=IDS, negative_ids=torch.arange(K)),
            ValueError,
            r"negative_ids has shape \[5\]; wanted \[6, 5\]",
        ),
        (
            lambda: sampled(QUERY, QUERY, ROWS, negative_ids=OWN),
            ValueError,
            "negative_ids is given without positive_ids; pass both",
        ),
        (
            lambda: in_batch_softmax_loss(QUERY, QUERY, negative=ROWS),
            ValueError,
            r"negatives per row, and in-batch candidates take .* pass \[N, D\]",
        ),
        (
            lambda: dwl_kernels.dual_scale_softmax_loss(QUERY, QUERY, ROWS),
            ValueError,
            r"negatives per row, and the dual scale",
        ),
        (
            lambda: DualScaleSampledSoftmax()(QUERY, QUERY, ROWS),
            ValueError,
            "negative names negatives per row, but DualScale",
        ),
        (
            lambda: sampled(QUERY, QUERY, ROWS, ignore_index=0),
            ValueError,
            "ignore_index is given without positive_ids.* or example_weights",
        ),
        (
            lambda: in_batch_softmax_loss(QUERY, QUERY, ignore_index=0),
            ValueError,
            "ignore_index is given without ids",
        ),
        (lambda: dynamic(ignore_index=0.5), TypeError, "ignore_index is a float"),
        (lambda: dynamic(ignore_index=2**63), ValueError, "an integer that int64 holds"),
        (
            lambda: in_batch_softmax_loss(QUERY, QUERY, query_ids=torch.arange(3)),
            ValueError,
            r"query_ids has shape \[3\]; wanted \[6\]",
        ),
        (
            lambda: in_batch_softmax_loss(QUERY, QUERY, query_ids=torch.ones(B)),
            TypeError,
            "query_ids has dtype torch.float32; wanted integers",
        ),
        (lambda: dynamic()(QUERY, QUERY, QUERY, query_ids=IDS), ValueError, "pass in_batch=True"),
        (
            lambda: dwl_kernels.dual_scale_softmax_loss(QUERY, QUERY, QUERY, query_ids=IDS),
            ValueError,
            "query_ids tell which positives",
        ),
        (
            lambda: full_softmax_loss(QUERY, TABLE, IDS, table_ids=torch.arange(3)),
            ValueError,
            r"table_ids has shape \[3\]; wanted \[20\]",
        ),
        (
            lambda: indexed_sampled_softmax_loss(QUERY, TABLE, IDS, OWN, table_ids=torch.ones(20)),
            TypeError,
            "table_ids has dtype torch.float32; wanted integers",
        ),
        (
            lambda: dynamic()(QUERY, QUERY, table_ids=torch.arange(20)),
            ValueError,
            "table_ids are the items of the rows of a table, which is not given",
        ),
        (
            lambda: indexed_sampled_softmax_loss(
                QUERY, TABLE, IDS, OWN, remove_accidental_hits="no"
            ),
            TypeError,
            "remove_accidental_hits is a str; wanted True or False",
        ),
        (
            lambda: indexed_sampled_softmax_loss(
                QUERY, TABLE, IDS, OWN + ITEMS, table_ids=torch.zeros(20).long()
            ),
            IndexError,
            "negative_ids holds 20, but table has 20 rows",
        ),
    ],
)
def test_what_does_not_fit_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("layer", [torch.nn.Linear(D, ITEMS), torch.nn.Embedding(ITEMS, D)])
@pytest.mark.parametrize(
    "call",
    [
        lambda table: full_softmax_loss(QUERY, table, IDS),
        lambda table: indexed_sampled_softmax_loss(QUERY, table, IDS, OWN),
        lambda table: indexed_sampled_softmax_loss(QUERY, table, IDS, IDS),
        lambda table: dwl_kernels.rank_targets(QUERY, table, IDS),
        lambda table: dwl_kernels.softmax_statistics(full_softmax_loss, QUERY, table, IDS),
        lambda table: sampled(QUERY, QUERY, table),
        lambda table: dynamic()(QUERY, table=table, positive_ids=IDS),
        lambda table: dynamic()(QUERY, table=table, positive_ids=IDS, negative_ids=OWN),
        lambda table: CumulativeCrossEntropy(item_domains=[0] * ITEMS)(QUERY, table, IDS),
    ],
)
def test_layer_in_the_place_of_a_table_is_told_to_give_its_weight(layer: Any, call: Any) -> None:
    with pytest.raises(TypeError, match=f"{type(layer).__name__}; wanted .*: pass its .weight"):
        call(layer)
