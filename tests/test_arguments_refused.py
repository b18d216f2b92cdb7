"""What is no tensor, no integer, no number or no option is refused in one sentence."""

from __future__ import annotations

import collections
import math
from typing import Any

import numpy as np
import pytest
import torch
from argument_inputs import DOMAINS, IDS, NEGATIVE, NEGATIVE_IDS, POSITIVE, QUERY, TABLE, B, D, V

from dwl_kernels import (
    CountMinSketch,
    CumulativeCrossEntropy,
    DomainWeights,
    DualScaleSampledSoftmax,
    DynamicWeightedSampledSoftmax,
    LogUniformSampler,
    StreamingFrequency,
    UniformSampler,
    UnigramSampler,
    dual_scale_softmax_loss,
    full_softmax_loss,
    indexed_sampled_softmax_loss,
    sampled_softmax_loss,
)

# ---------------------------------------------------------------- refused: integers and numbers

HOLDERS = {
    "item_domains": lambda value: DynamicWeightedSampledSoftmax(item_domains=value),
    "users": lambda value: DomainWeights.from_interactions(value, [1, 2], [0, 1]),
    "domains": lambda value: DomainWeights.from_interactions([1, 2], [1, 2], value),
}
NO_INTEGERS = [
    ("abc", TypeError, r"is a str; wanted .*integers, not 'abc'"),
    (None, TypeError, "is None; wanted .*integers"),
    (7, TypeError, r"is a int; wanted .*integers, not 7"),
    ({1, 2}, TypeError, "is a set; wanted .*integers"),
    ({0: 1, 1: 0}, TypeError, r"is a dict; wanted .*\.get\(k, -1\) for k in range\(n\)"),
    (collections.Counter("ab"), TypeError, "is a Counter; wanted"),
    ((i for i in (0, 1)), TypeError, "is a generator; wanted"),
    (["a", "b"], TypeError, r"holds strings such as 'a'; wanted integers, .*numpy\.unique"),
    (np.array(["a", "b"]), TypeError, r"holds strings such as 'a'"),
    (["18", "2"], TypeError, r"holds strings such as '18'; .*astype\('int64'\)"),
    ([0, "b"], TypeError, r"holds strings such as '0'; wanted integers, .*numpy\.unique"),
    ([0.0, 1.0], TypeError, r"has dtype float64; wanted integers .*astype\('int64'\)"),
    (torch.tensor([0.0, 1.0]), TypeError, r"has dtype torch\.float32; wanted integers .*\.long"),
    ([0.0, math.nan], TypeError, "has dtype float64 and holds NaN; wanted .*fill in -1"),
    ([0, None], TypeError, "holds None; wanted integers, none of them missing"),
    ([True, False], TypeError, "has dtype bool; wanted integers"),
    (torch.tensor([True, False]), TypeError, r"has dtype torch\.bool; wanted integers"),
    ([1j, 2j], TypeError, "has dtype complex128; wanted integers"),
    ([2**70, 1], ValueError, "holds integers that int64 does not"),
    (np.ma.masked_array([0, 1], [False, True]), TypeError, "has masked entries"),
]


@pytest.mark.parametrize(("value", "error", "message"), NO_INTEGERS, ids=lambda x: repr(x)[:30])
@pytest.mark.parametrize("name", HOLDERS)
def test_what_is_no_integers_is_one_sentence(
    name: str, value: Any, error: type[Exception], message: str
) -> None:
    if name == "item_domains" and value is None:
        return  # there are none
    with pytest.raises(error, match=rf"^{name} ({message})"):
        HOLDERS[name](value)


@pytest.mark.parametrize("value", [[[0], [1, 2]], np.array([[0], [1, 2]], dtype=object)])
@pytest.mark.parametrize("name", ["item_domains", "domains"])
def test_ragged_rows_say_how_to_fill_them_up(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} has rows of different lengths.*with -1 where"):
        HOLDERS[name](value)


def test_ragged_columns_and_missing_values_of_pandas_are_named() -> None:
    pd = pytest.importorskip("pandas")
    with pytest.raises(ValueError, match="item_domains has rows of different lengths"):
        HOLDERS["item_domains"](pd.Series([[0], [1, 2]]))
    with pytest.raises(TypeError, match=r"domains .*fill in -1"):
        HOLDERS["domains"](pd.Series([0, None], dtype="Int64"))
    with pytest.raises(TypeError, match="users holds strings such as 'a'"):
        HOLDERS["users"](pd.Series(["a", "b"], dtype="category"))
    with pytest.raises(TypeError, match="users has dtype datetime64"):
        HOLDERS["users"](pd.Series(pd.to_datetime(["2020-01-01", "2020-01-02"])))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("ab", TypeError, "is a str; wanted .*numbers, not 'ab'"),
        (None, TypeError, "is None; wanted .*numbers"),
        (3.0, TypeError, r"is a float; wanted .*numbers, not 3\.0"),
        ({"a": 1.0}, TypeError, r"is a dict; wanted an array of numbers, .*\.get\(k, 0\)"),
        (["1", "2"], TypeError, "holds strings such as '1'; wanted numbers"),
        ([True, False], TypeError, "is bool; wanted integers or floats"),
        (torch.ones(2, dtype=torch.bool), TypeError, r"is torch\.bool; wanted integers or floats"),
        ([1, None], TypeError, "holds None"),
        ([[1], [1, 2]], ValueError, "has rows of different lengths"),
        ([], ValueError, r"is \(0,\)|has shape \[0\]"),
    ],
    ids=lambda x: repr(x)[:30],
)
@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("counts", UnigramSampler),
        ("weights", DomainWeights.constant),
        ("weights", lambda value: DynamicWeightedSampledSoftmax(weights=value)),
    ],
)
def test_what_is_no_numbers_is_one_sentence(
    name: str, use: Any, value: Any, error: type[Exception], message: str
) -> None:
    if value is None and use not in (UnigramSampler, DomainWeights.constant):
        return  # there are none
    with pytest.raises(error, match=f"^{name} ({message})"):
        use(value)


def test_series_labelled_by_something_else_than_its_places_is_refused() -> None:
    pd = pytest.importorskip("pandas")
    counts = pd.Series([7, 7, 9]).value_counts()
    with pytest.raises(
        ValueError, match=r"counts has an index .*numpy\.bincount\(items, minlength"
    ):
        UnigramSampler(counts)
    by_count = pd.Series([1, 1, 0]).value_counts()  # 1 before 0: the items would change places
    with pytest.raises(ValueError, match="counts has an index"):
        UnigramSampler(by_count)
    probability = UnigramSampler(by_count.reindex(range(3), fill_value=0)).log_probability.exp()
    assert probability.tolist() == pytest.approx([1 / 3, 2 / 3, 0])
    with pytest.raises(ValueError, match=r"item_domains has an index .*fill_value=-1"):
        DynamicWeightedSampledSoftmax(item_domains=pd.Series([0, 1], index=[10, 11]))
    with pytest.raises(ValueError, match=r"weights has an index .*entry k .*that of domain k"):
        DomainWeights.constant(pd.Series([1.0, 2.0], index=["drama", "noir"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive_ids": IDS}, r"positive_ids is a list; .*torch\.tensor\(positive_ids\)"),
        ({"positive_ids": "abc"}, "positive_ids is a str; wanted a torch.Tensor or an array"),
        ({"negative_ids": {4: 1}}, "negative_ids is a dict"),
        ({"domain_ids": "abc"}, "domain_ids is a str"),
        ({"domain_ids": [0, 1, 1]}, "domain_ids is a list"),
        ({"query": np.zeros((B, D))}, r"query is a ndarray; wanted a torch\.Tensor: .*as_tensor"),
        ({"negative": None}, r"negative is None; wanted a torch\.Tensor"),
        ({"negative": torch.nn.Linear(D, 2)}, r"negative is a Linear; .*pass its \.weight"),
        ({"negative": torch.nn.EmbeddingBag(2, D)}, r"a EmbeddingBag; .*pass its \.weight"),
        ({"negative": torch.nn.ReLU()}, r"negative is a ReLU; wanted a torch\.Tensor$"),
        ({"example_weights": [1, 1, 1]}, r"example_weights is a list; wanted a torch\.Tensor"),
        ({"positive_log_q": [0, 0, 0]}, r"positive_log_q is a list; wanted a torch\.Tensor"),
        ({"temperature": "0.1"}, r"temperature is a str; wanted .*number.* not '0\.1'"),
        ({"temperature": True}, "temperature is a bool"),
        ({"temperature": [0.1] * B}, "temperature is a list"),
        ({"temperature": np.full(B, 0.1)}, "temperature is a ndarray"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_arguments_of_a_loss_of_another_type_are_named(change: dict, message: str) -> None:
    arguments = {
        **{"query": QUERY, "positive": POSITIVE, "negative": NEGATIVE},
        **{"positive_ids": torch.tensor(IDS), "negative_ids": torch.tensor(NEGATIVE_IDS)},
        **{"domain_ids": torch.tensor(DOMAINS), "domain_weights": torch.ones(2)},
    }
    with pytest.raises(TypeError, match=message):
        sampled_softmax_loss(**{**arguments, **change})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: full_softmax_loss(QUERY, TABLE, None), "target is None"),
        (lambda: full_softmax_loss(QUERY, None, torch.tensor(IDS)), "table is None"),
        (lambda: full_softmax_loss(QUERY, torch.nn.Linear(D, V), torch.tensor(IDS)), "its .weight"),
        (lambda: CumulativeCrossEntropy()(QUERY, torch.nn.Embedding(V, D), None), "its .weight"),
        (lambda: CumulativeCrossEntropy()(QUERY, TABLE, None), "target is None"),
        (
            lambda: full_softmax_loss(QUERY, TABLE, torch.tensor(IDS), ignore_index=None),
            "ignore_index is None; wanted an integer",
        ),
        (
            lambda: full_softmax_loss(QUERY, TABLE, torch.tensor(IDS), skip_threshold="auto"),
            "skip_threshold is a str; wanted a number, not 'auto'",
        ),
        (
            lambda: indexed_sampled_softmax_loss(QUERY, TABLE, None, torch.tensor(NEGATIVE_IDS)),
            "positive_ids is None",
        ),
        (
            lambda: indexed_sampled_softmax_loss(
                *(QUERY, TABLE, torch.tensor(IDS), torch.tensor(NEGATIVE_IDS)),
                example_weights=[1] * B,
            ),
            "example_weights is a list",
        ),
        (
            lambda: indexed_sampled_softmax_loss(
                *(QUERY, TABLE, torch.tensor(IDS), torch.tensor(NEGATIVE_IDS)), sparse_grad="no"
            ),
            "sparse_grad is a str; wanted True or False",
        ),
        (
            lambda: dual_scale_softmax_loss(QUERY, POSITIVE, NEGATIVE, hardness="1"),
            "hardness is a str; wanted a number",
        ),
        (
            lambda: dual_scale_softmax_loss(QUERY, POSITIVE, NEGATIVE, slate_size=True),
            "slate_size is a bool; wanted an integer",
        ),
        (
            lambda: dual_scale_softmax_loss(QUERY, POSITIVE, NEGATIVE, in_batch="yes"),
            "in_batch is a str; wanted True or False",
        ),
    ],
)
def test_arguments_of_the_other_losses_of_another_type_are_named(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


# ---------------------------------------------------------------- refused: options


@pytest.mark.parametrize("value", ["18", 18.0, None, True, torch.tensor([1, 2]), [18]])
@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("num_domains", DomainWeights),
        ("num_domains", DynamicWeightedSampledSoftmax),
        ("num_items", UniformSampler),
        ("num_items", LogUniformSampler),
        ("num_buckets", StreamingFrequency),
        ("num_hashes", lambda value: StreamingFrequency(8, num_hashes=value)),
        ("batch_size", lambda value: StreamingFrequency(8, batch_size=value)),
        ("seed", lambda value: StreamingFrequency(8, seed=value)),
        ("width", CountMinSketch),
        ("depth", lambda value: CountMinSketch(8, value)),
        ("slate_size", lambda value: DualScaleSampledSoftmax(slate_size=value)),
        ("ignore_index", lambda value: CumulativeCrossEntropy(ignore_index=value)),
    ],
)
def test_what_is_no_integer_is_named(name: str, use: Any, value: Any) -> None:
    if value is None and (use is DynamicWeightedSampledSoftmax or name == "batch_size"):
        return  # it may be left out
    kind = "None" if value is None else f"a {type(value).__name__}"
    with pytest.raises(TypeError, match=f"^{name} is {kind}; wanted an integer"):
        use(value)


def test_counts_and_weights_in_the_place_of_a_size_are_sent_where_they_belong() -> None:
    with pytest.raises(TypeError, match=r"num_items is a Tensor; .*UnigramSampler takes counts"):
        UniformSampler(torch.tensor([1, 2]))  # type: ignore[arg-type]
    for weights in ([1.0, 2.0], DomainWeights(2)):
        with pytest.raises(TypeError, match=r"num_domains is a .*weights go in by name, weights="):
            DynamicWeightedSampledSoftmax(weights)  # type: ignore[arg-type]


def test_integers_of_numpy_and_of_one_element_are_taken() -> None:
    for value in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert DomainWeights(value).num_domains == 3
        assert UniformSampler(value).num_items == 3


@pytest.mark.parametrize("value", ["0.5", None, True, [0.5], torch.tensor(0.5)])
@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("momentum", lambda value: DomainWeights(3, momentum=value)),
        ("calibration", lambda value: DynamicWeightedSampledSoftmax(3, calibration=value)),
        ("power", lambda value: UnigramSampler([1, 2], value)),
        ("learning_rate", lambda value: StreamingFrequency(8, learning_rate=value)),
        ("initial_gap", lambda value: StreamingFrequency(8, initial_gap=value)),
        ("skip_threshold", lambda value: CumulativeCrossEntropy(skip_threshold=value)),
        ("hardness", lambda value: DualScaleSampledSoftmax(hardness=value)),
        ("similarity", lambda value: DualScaleSampledSoftmax(similarity=value)),
        ("competition", lambda value: DualScaleSampledSoftmax(competition=value)),
    ],
)
def test_what_is_no_number_is_named(name: str, use: Any, value: Any) -> None:
    if value is None and name == "initial_gap":
        return  # it may be left out
    kind = "None" if value is None else f"a {type(value).__name__}"
    with pytest.raises(TypeError, match=f"^{name} is {kind}; wanted .*number"):
        use(value)


def test_numbers_of_numpy_are_taken() -> None:
    assert DomainWeights(3, momentum=np.float32(0.5)).momentum == 0.5
    assert UnigramSampler([1, 4], np.float64(0.5)).log_probability.exp().tolist() == pytest.approx(
        [1 / 3, 2 / 3]
    )
    got = sampled_softmax_loss(QUERY, POSITIVE, NEGATIVE, temperature=np.float32(0.5))
    assert torch.equal(got, sampled_softmax_loss(QUERY, POSITIVE, NEGATIVE, temperature=0.5))


@pytest.mark.parametrize("value", ["False", 1, None])
@pytest.mark.parametrize(
    "name",
    ["learn_temperature", "normalize", "remove_accidental_hits", "in_batch", "sparse_grad"],
)
def test_what_is_no_bool_is_named(name: str, value: Any) -> None:
    if value is None and name == "in_batch":
        return
    with pytest.raises(TypeError, match=f"^{name} is .*; wanted True or False"):
        DynamicWeightedSampledSoftmax(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_range": 4}, r"weight_range is a int; wanted finite \(w_min, w_max\).* not 4"),
        ({"weight_range": None}, "weight_range is None; wanted finite"),
        ({"weight_range": "14"}, "weight_range is a str"),
        ({"weight_range": (1, "4")}, r"weight_range\[1\] is a str; wanted a number, not '4'"),
        ({"measures": 1}, "measures is a int; wanted three finite numbers"),
        ({"measures": (1, None, 1)}, r"measures\[1\] is None; wanted a number"),
        ({"names": "abc"}, "names is a str; wanted a list with a name per domain"),
        ({"names": 3}, "names is a int; wanted a list"),
        ({"names": {"a": 0, "b": 1, "c": 2}}, "names is a dict; wanted a list"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_options_of_domain_weights_of_another_type_are_named(options: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        DomainWeights(3, **options)
    with pytest.raises(TypeError, match=message):
        DomainWeights.from_interactions([1], [1], [2], **options)


def test_generator_of_another_type_is_named() -> None:
    with pytest.raises(TypeError, match=r"generator is a int; wanted a torch\.Generator, not 0"):
        UniformSampler(4).sample(2, generator=0)  # type: ignore[arg-type]
