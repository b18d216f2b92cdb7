"""Candidates by id from a table, and candidates of the batch next to sampled ones."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from module_inputs import (
    DOMAINS,
    ITEMS,
    KINDS,
    B,
    D,
    N,
    assert_same,
    call,
    draws,
    embeddings,
    fixed,
    item_domains,
    table_of,
)

from dwl_kernels import (
    DynamicWeightedSampledSoftmax,
    in_batch_softmax_loss,
    indexed_sampled_softmax_loss,
    sampled_softmax_loss,
)

WEIGHTS = {"domain_weights": torch.tensor([0.5, 1.0, 3.0]), "temperature": 0.7}
SIGNATURES = {
    "__init__": "self num_domains=None * weights=None item_domains=None calibration=0.0 "
    "temperature=None learn_temperature=False normalize=False correction='standard' "
    "reduction='mean' remove_accidental_hits=True backend='auto'",
    "forward": "self query positive negative=None * domain_ids=None negative_domain_ids=None "
    "positive_ids=None negative_ids=None positive_log_q=None negative_log_q=None "
    "example_weights=None",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_documented_arguments_keep_their_names_places_and_defaults(name):
    """More may be added by keyword, with a default."""
    parameters = inspect.signature(getattr(DynamicWeightedSampledSoftmax, name)).parameters
    positional, keyword = (part.split() for part in SIGNATURES[name].split(" * "))
    wanted = [text.split("=")[0] for text in positional]
    kinds = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert kinds == wanted
    for text in positional + keyword:
        given, _, default = text.partition("=")
        assert not default or repr(parameters[given].default) == default
    known = {text.split("=")[0] for text in positional + keyword}
    for added in set(parameters) - known:
        assert parameters[added].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[added].default is not inspect.Parameter.empty


def per_row(ids):
    """The same draws, with negatives of every row's own."""
    negative_ids = (ids["negative_ids"] + torch.arange(B)[:, None]) % ITEMS
    log_q = ids["negative_log_q"] - torch.arange(B, dtype=torch.float64)[:, None]
    return ids | {"negative_ids": negative_ids, "negative_log_q": log_q}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("correction", ["standard", "refined"])
@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum", "none"])
def test_rows_of_a_table_are_the_function_of_ids(reduction, correction, shared):
    query, table = embeddings()[0], table_of()
    ids = draws() if shared else per_row(draws())
    ids["example_weights"] = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 1.0])
    got = fixed(reduction=reduction, correction=correction)(query, table=table, **ids)
    wanted = indexed_sampled_softmax_loss(
        *(query, table, ids.pop("positive_ids"), ids.pop("negative_ids")),
        **ids,
        **WEIGHTS,
        reduction=reduction,
        correction=correction,
        backend="eager",
    )
    assert_same(got, wanted, [query, table])


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"remove_accidental_hits": False}])
@pytest.mark.parametrize("in_batch", [None, True])
def test_rows_of_a_table_are_the_embeddings_that_they_hold(in_batch, options):
    query, table, ids = embeddings()[0], table_of(), draws()
    loss_fn = fixed(in_batch=in_batch, calibration=1.0, item_domains=item_domains(), **options)
    got = loss_fn(query, table=table, **ids)
    positive, negative = table[ids["positive_ids"]], table[ids["negative_ids"]]
    assert_same(got, loss_fn(query, positive, negative, **ids), [query, table])


def test_negatives_per_row_of_a_normalized_table():
    query, table, ids = embeddings()[0], table_of(), per_row(draws())
    got = fixed(normalize=True)(query, table=table, **ids)
    wanted = fixed()(F.normalize(query, dim=-1), table=F.normalize(table, dim=-1), **ids)
    assert_same(got, wanted, [query, table])


@pytest.mark.parametrize("shared", [True, False])
def test_leading_dimensions_of_ids_go_through_like_rows(shared):
    query, table = embeddings()[0], table_of()
    ids = draws() if shared else per_row(draws())
    loss_fn = fixed(reduction="none")
    flat = loss_fn(query, table=table, **ids)
    shaped = {
        k: v if shared and k.startswith("negative") else v.reshape(2, 3, *v.shape[1:])
        for k, v in ids.items()
    }
    got = loss_fn(query.reshape(2, 3, D), table=table, **shaped)
    assert_same(got, flat.reshape(2, 3), [query, table])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("given", ["ids", "domains"])
def test_calibration_of_rows_of_a_table_is_explicit_log_q(given, shared):
    query, table, domains = embeddings()[0], table_of(), item_domains()[:, 0]
    ids = draws() if shared else per_row(draws())
    ids["domain_ids"] = domains[ids["positive_ids"]]
    log_w = torch.tensor([0.5, 1.0, 3.0, 1.0], dtype=torch.float64).log()  # last: no domain
    if given == "ids":
        loss_fn, more = fixed(calibration=1.0, item_domains=domains), {}
    else:
        loss_fn = fixed(calibration=1.0)
        more = {"negative_domain_ids": domains[ids["negative_ids"]]}
    got = loss_fn(query, table=table, **ids, **more)
    for side in ("positive", "negative"):
        ids[f"{side}_log_q"] = ids[f"{side}_log_q"] - log_w[domains[ids[f"{side}_ids"]]]
    wanted = fixed()(query, table=table, **ids)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)  # log w is float32 in the module


def test_ids_of_padding_are_not_looked_at():
    query, table = embeddings()[0], table_of()
    for ids in (draws(), per_row(draws())):
        ids["example_weights"] = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
        loss_fn = fixed(calibration=1.0, item_domains=item_domains())
        wanted = loss_fn(query, table=table, **ids)
        ids |= {name: ids[name].clone() for name in ("positive_ids", "negative_ids")}
        ids["positive_ids"][2] = 1 << 40
        if ids["negative_ids"].dim() == 2:
            ids["negative_ids"][2] = -7
        assert_same(loss_fn(query, table=table, **ids), wanted, [query, table])


@pytest.mark.parametrize("shared", [True, False])
def test_sparse_gradient_of_the_table_is_its_dense_one(shared):
    query, table = embeddings()[0], table_of()
    ids = draws() if shared else per_row(draws())
    options = {"normalize": True} if shared else {}
    gradients = [
        torch.autograd.grad(fixed(sparse_grad=sparse, **options)(query, table=table, **ids), table)[
            0
        ]
        for sparse in (True, False)
    ]
    assert gradients[0].is_sparse
    torch.testing.assert_close(gradients[0].to_dense(), gradients[1])
    optimiser = torch.optim.SparseAdam([table])
    table.grad = gradients[0]
    optimiser.step()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("negatives", [True, False])
def test_ids_of_padding_are_not_in_a_sparse_gradient(negatives, shared):
    """Zeros there would have SparseAdam move their rows on old momentum."""
    query, table = embeddings()[0], table_of()
    ids = draws() if shared else per_row(draws())
    if not negatives:
        ids = {k: v for k, v in draws().items() if not k.startswith("negative")}
    ids["example_weights"] = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    padded = ids["example_weights"] == 0
    ids["positive_ids"] = torch.tensor([18, 3, 19, 4, 4, 5])
    if negatives:
        ids["negative_ids"] = ids["negative_ids"].clamp(max=15)
        if not shared:
            ids["negative_ids"][padded] = 17
    outcomes = []
    for sparse in (True, False):
        loss = fixed(sparse_grad=sparse)(query, table=table, **ids)
        outcomes.append([loss, *torch.autograd.grad(loss, [query, table])])
    assert not {17, 18, 19} & {*outcomes[0][2].indices()[0].tolist()}
    outcomes[0][2] = outcomes[0][2].to_dense()
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_example_weights_of_another_shape_are_named_with_a_sparse_gradient_too(shared, sparse):
    query, table = embeddings()[0], table_of()
    ids = draws() if shared else per_row(draws())
    positive_ids, negative_ids = ids["positive_ids"], ids["negative_ids"]
    with pytest.raises(ValueError, match=r"example_weights has shape \[7\]; wanted \[6\]"):
        indexed_sampled_softmax_loss(
            *(query, table, positive_ids, negative_ids),
            example_weights=torch.ones(B + 1),
            sparse_grad=sparse,
        )


def test_sparse_gradient_of_padding_alone_is_zero():
    query, table = embeddings()[0], table_of()
    for ids in (draws(), per_row(draws())):
        ids["example_weights"] = torch.zeros(B)
        loss = fixed(sparse_grad=True)(query, table=table, **ids)
        (gradient,) = torch.autograd.grad(loss, table)
        assert loss == 0
        assert not gradient.to_dense().any()


# ---------------------------------------------------------------- the batch and more


@pytest.mark.parametrize("remove_hits", [True, False])
def test_mixed_negatives_are_the_batch_and_the_sampled(remove_hits):
    inputs, ids = embeddings(), draws()
    got = fixed(in_batch=True, remove_accidental_hits=remove_hits)(*inputs, **ids)
    positive_ids, negative_ids = ids.pop("positive_ids"), ids.pop("negative_ids")
    wanted = in_batch_softmax_loss(
        *inputs[:2],
        ids=positive_ids if remove_hits else None,
        log_q=ids.pop("positive_log_q"),
        negative=inputs[2],
        negative_ids=negative_ids if remove_hits else None,
        **ids,
        **WEIGHTS,
        backend="eager",
    )
    assert_same(got, wanted, inputs)


def test_a_table_without_negatives_provides_the_candidates_of_the_batch():
    query, table, ids = embeddings()[0], table_of(), draws()
    ids = {k: v for k, v in ids.items() if not k.startswith("negative")}
    got = fixed()(query, table=table, **ids)
    assert_same(got, fixed()(query, table[ids["positive_ids"]], **ids), [query, table])


def test_calibration_reaches_both_kinds_of_mixed_negatives():
    inputs, ids = embeddings(), draws()
    log_w = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64).log()
    negative_domain_ids = torch.arange(N) % DOMAINS
    got = fixed(in_batch=True, calibration=1.0)(
        *inputs, **ids, negative_domain_ids=negative_domain_ids
    )
    ids["positive_log_q"] = ids["positive_log_q"] - log_w[ids["domain_ids"]]
    ids["negative_log_q"] = ids["negative_log_q"] - log_w[negative_domain_ids]
    wanted = fixed(in_batch=True)(*inputs, **ids)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("in_batch", [None, True])
def test_ids_of_minus_one_go_to_the_function_as_they_are(in_batch):
    """What they mean, nobody's hit, is the function's to know; hashes below 0 are ids."""
    inputs, ids = embeddings(), draws()
    ids["positive_ids"] = torch.tensor([-1, 5, -1, -7, 5, 3])
    ids["negative_ids"] = torch.tensor([-1, 7, 5, -7, -1, 3, 0, -7, -2])
    domains = item_domains(seed=1)[:8]
    got = fixed(in_batch=in_batch, item_domains=domains)(*inputs, **ids)
    log_q = {k: v for k, v in ids.items() if k.endswith("log_q")}
    if in_batch:
        wanted = in_batch_softmax_loss(
            *inputs[:2],
            ids=ids["positive_ids"],
            log_q=log_q.pop("positive_log_q"),
            negative=inputs[2],
            negative_ids=ids["negative_ids"],
            domain_ids=ids["domain_ids"],
            **(log_q | WEIGHTS),
            backend="eager",
        )
    else:
        wanted = sampled_softmax_loss(*inputs, **(ids | WEIGHTS), backend="eager")
    assert_same(got, wanted, inputs)


@pytest.mark.parametrize("side", ["positive_ids", "negative_ids"])
def test_minus_one_has_no_domain_and_other_negative_ids_index_nothing(side):
    inputs, ids = embeddings(), draws()
    del ids["domain_ids"]
    losses = []
    for unknown in (-1, -2):
        ids[side] = ids[side].clone()
        ids[side][3] = unknown
        loss_fn = fixed(item_domains=item_domains(), calibration=0.5, remove_accidental_hits=False)
        if unknown == -1:
            losses.append(loss_fn(*inputs, **ids))
        else:
            with pytest.raises(IndexError, match=f"{side} holds -2, but there are {ITEMS} items"):
                loss_fn(*inputs, **ids)
    assert losses[0].isfinite()


# ---------------------------------------------------------------- what does not go together


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, {"negative": torch.zeros(N, D)}, "table is given together with embeddings; leave"),
        ({}, {"positive_ids": None}, "table is given without positive_ids"),
        ({}, {"negative_ids": None}, "negative_log_q is given without negative_ids; pass both"),
        ({"in_batch": True}, {"negative_log_q": None}, "positive_log_q is given without negative"),
        (
            {"in_batch": False},
            {"negative_ids": None, "negative_log_q": None},
            "no candidates: in_batch is False.*leave in_batch out",
        ),
        ({}, {"table": torch.zeros(ITEMS, D + 1).double()}, r"wanted \[V, 4\]"),
        ({}, {"negative_ids": torch.zeros(B + 1, 2).long()}, r"\[N\], the same for all rows, or"),
        (
            {"in_batch": True},
            {"negative_ids": torch.zeros(B, 2).long()},
            "in_batch=True.*pass \\[N",
        ),
        (
            {"normalize": True, "sparse_grad": True},
            {"negative_ids": torch.zeros(B, 2).long()},
            r"pass \[N\], or sparse_grad=False",
        ),
    ],
)
def test_arguments_that_do_not_go_together_are_named(options, change, message):
    arguments = {"table": table_of(), **draws()} | change
    if arguments["negative_ids"] is not None and arguments["negative_ids"].dim() == 2:
        arguments["positive_log_q"] = arguments["negative_log_q"] = None
    with pytest.raises(ValueError, match=message):
        fixed(**options)(embeddings()[0], **arguments)


def test_dual_scale_names_what_it_takes_in_place_of_negatives_per_row():
    ids = per_row(draws())
    loss_fn = KINDS["dual scale"](weights=[1.0] * DOMAINS, backend="eager")
    with pytest.raises(ValueError, match=r"DualScaleSampledSoftmax takes negatives .*pass \[N\]"):
        loss_fn(embeddings()[0], table=table_of(), **ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.nn.Embedding(ITEMS, D)}, "table is a Embedding.*pass its .weight"),
        ({"query": [0.0]}, "query is a list; wanted a torch.Tensor"),
        ({"negative_ids": [1, 2]}, "negative_ids is a list"),
    ],
)
def test_what_is_no_tensor_is_named(change, message):
    with pytest.raises(TypeError, match=message):
        fixed()(**{"query": embeddings()[0], "table": table_of(), **draws()} | change)


def test_ids_on_another_device_than_the_module_are_named():
    ids = draws()
    del ids["domain_ids"]
    ids["positive_ids"] = ids["positive_ids"].to("meta")
    with pytest.raises(ValueError, match=r"move the module, loss_fn.to\('meta'\)"):
        fixed(item_domains=item_domains())(embeddings()[0], table=table_of(), **ids)


def test_ids_of_one_side_alone_find_no_hits():
    inputs, ids = embeddings(), draws()
    del ids["negative_ids"]
    with pytest.raises(ValueError, match="pass both, or remove_accidental_hits=False"):
        fixed()(*inputs, **ids)
    fixed(remove_accidental_hits=False)(*inputs, **ids)


@pytest.mark.parametrize("calibration", [0.0, 1.0])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("rows", [ITEMS - 1, ITEMS + 1])
@pytest.mark.parametrize("kind", ["table", "by row", "cross-entropy"])
def test_table_and_item_domains_are_of_the_same_items(kind, rows, given, calibration):
    domains = torch.arange(rows) % DOMAINS
    more = {"domain_ids": draws()["domain_ids"]} if given else {}
    loss_fn = KINDS[kind](item_domains=domains, calibration=calibration, backend="eager")
    message = f"table has {ITEMS} rows but item_domains has {rows}; .*-1 for a row that is no item"
    with pytest.raises(ValueError, match=message):
        call(kind, loss_fn, embeddings()[0], table_of(), **more)
    assert loss_fn.domain_weights.interactions.sum() == 0


def test_table_of_the_dual_scale_is_of_the_items_of_item_domains_too():
    loss_fn = KINDS["dual scale"](item_domains=[0, 1], backend="eager")
    ids = {k: v for k, v in draws().items() if k.endswith("_ids") and k != "domain_ids"}
    with pytest.raises(ValueError, match=f"table has {ITEMS} rows but item_domains has 2"):
        loss_fn(embeddings()[0], table=table_of(), **ids)


def test_flags_of_negatives_are_refused_by_their_name():
    flags = torch.eye(N, 4, dtype=torch.int64)
    loss_fn = fixed(calibration=1.0)
    with pytest.raises(ValueError, match="negative_domain_ids names domain 0 twice in row 0"):
        loss_fn(*embeddings(), **draws(), negative_domain_ids=flags)
    by_rows = flags.expand(B, N, 4)
    with pytest.raises(ValueError, match="negative_domain_ids names domain 0 twice in row 0"):
        loss_fn(embeddings()[0], table=table_of(), **per_row(draws()), negative_domain_ids=by_rows)


def test_id_outside_the_table_is_named():
    query, table, ids = embeddings()[0], table_of(), draws()
    ids["negative_ids"] = ids["negative_ids"].clone()
    ids["negative_ids"][3] = ITEMS
    with pytest.raises(IndexError, match=f"negative_ids holds {ITEMS}, but table has {ITEMS} rows"):
        fixed()(query, table=table, **ids)
