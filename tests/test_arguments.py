"""What users pass: what is taken, and the sentence that names the rest."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from argument_inputs import DOMAINS, IDS, NEGATIVE, NEGATIVE_IDS, POSITIVE, QUERY, TABLE, B, V

from dwl_kernels import (
    CountMinSketch,
    CumulativeCrossEntropy,
    DomainWeights,
    DynamicWeightedSampledSoftmax,
    LogUniformSampler,
    StreamingFrequency,
    UniformSampler,
    UnigramSampler,
    dual_scale_softmax_loss,
    full_softmax_loss,
    in_batch_softmax_loss,
    indexed_sampled_softmax_loss,
    sampled_softmax_loss,
)


def loss(kind: str, ids: Any, negative_ids: Any, domain_ids: Any) -> torch.Tensor:
    """A loss whose ids and domains are given as they are."""
    weights = {"domain_ids": domain_ids, "domain_weights": torch.tensor([0.5, 2.0])}
    both = {"positive_ids": ids, "negative_ids": negative_ids}
    module = {"weights": [0.5, 2.0], "backend": "eager", "temperature": 1.0}
    if kind == "sampled":
        return sampled_softmax_loss(QUERY, POSITIVE, NEGATIVE, **both, **weights)
    if kind == "in-batch":
        named = {"ids": ids, "negative_ids": negative_ids}
        return in_batch_softmax_loss(QUERY, POSITIVE, negative=NEGATIVE, **named, **weights)
    if kind == "full":
        return full_softmax_loss(QUERY, TABLE, ids, **weights)
    if kind == "indexed":
        return indexed_sampled_softmax_loss(QUERY, TABLE, ids, negative_ids, **weights)
    if kind == "by row":
        rows = np.stack([negative_ids] * B)
        return indexed_sampled_softmax_loss(QUERY, TABLE, ids, rows, **weights)
    if kind == "dual scale":
        strengths = {"hardness": 1.0, "similarity": 1.0}
        return dual_scale_softmax_loss(QUERY, POSITIVE, NEGATIVE, **both, **weights, **strengths)
    if kind == "module":
        loss_fn = DynamicWeightedSampledSoftmax(calibration=1.0, **module)
        candidates = {"positive": POSITIVE, "negative": NEGATIVE}
        given = {"domain_ids": domain_ids, "negative_domain_ids": [0, 1]}
        given["negative_domain_ids"] = np.array(given["negative_domain_ids"])
        return loss_fn(QUERY, **candidates, **both, **given)
    if kind == "module of a table":
        loss_fn = DynamicWeightedSampledSoftmax(**module)
        return loss_fn(QUERY, table=TABLE, **both, domain_ids=domain_ids)
    assert kind == "cross-entropy"
    return CumulativeCrossEntropy(**module)(QUERY, TABLE, ids, domain_ids=domain_ids)


KINDS = [
    *("sampled", "in-batch", "full", "indexed", "by row", "dual scale"),
    *("module", "module of a table", "cross-entropy"),
]


def read_only(values: list[int]) -> np.ndarray:
    array = np.array(values)
    array.flags.writeable = False
    return array


ARRAYS = {
    "int64": np.array,
    "int32": lambda values: np.array(values, dtype=np.int32),
    "int8": lambda values: np.array(values, dtype=np.int8),
    "of another byte order": lambda values: np.array(values, dtype=">i4"),
    "reversed": lambda values: np.array(values[::-1])[::-1],
    "read-only": read_only,
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_arrays_are_taken_for_ids_and_domains(kind: str, name: str) -> None:
    wanted = loss(kind, *(torch.tensor(ids) for ids in (IDS, NEGATIVE_IDS, DOMAINS)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns of read-only arrays
        got = loss(kind, *(ARRAYS[name](ids) for ids in (IDS, NEGATIVE_IDS, DOMAINS)))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_filtered_pandas_columns_are_taken_by_place(kind: str) -> None:
    pd = pytest.importorskip("pandas")
    wanted = loss(kind, *(torch.tensor(ids) for ids in (IDS, NEGATIVE_IDS, DOMAINS)))
    frame = pd.DataFrame({"ids": [7, *IDS], "domains": [0, *DOMAINS]}, index=[9, 3, 5, 0])[1:]
    negative_ids = pd.Series(NEGATIVE_IDS, index=["a", "b"])
    assert torch.equal(loss(kind, frame.ids, negative_ids, frame.domains), wanted)
    nullable = frame.astype("Int64")
    assert torch.equal(loss(kind, nullable.ids, negative_ids, nullable.domains), wanted)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.int16])
def test_unsigned_integers_are_taken(dtype: Any) -> None:
    array = np.array(IDS, dtype=dtype)
    wanted = full_softmax_loss(QUERY, TABLE, torch.tensor(IDS))
    assert torch.equal(full_softmax_loss(QUERY, TABLE, array), wanted)
    if dtype != np.uint64:
        assert torch.equal(full_softmax_loss(QUERY, TABLE, torch.from_numpy(array)), wanted)


def test_unsigned_integers_past_int64_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ids holds 9223372036854775808, which int64 does not"):
        CountMinSketch(8).update(np.array([2**63], dtype=np.uint64))


def test_samplers_and_streams_take_arrays() -> None:
    ids, array = torch.tensor(IDS), read_only(IDS)
    for sampler in (UniformSampler(V), LogUniformSampler(V), UnigramSampler(np.arange(V) + 1)):
        assert torch.equal(sampler.log_q(array), sampler.log_q(ids))
    for make in (lambda: StreamingFrequency(64), lambda: CountMinSketch(64)):
        by_array, by_tensor = make(), make()
        by_array.update(array)
        by_tensor.update(ids)
        assert torch.equal(by_array.log_q(array), by_tensor.log_q(ids))
    assert by_array.total == len(IDS)


def test_counts_and_weights_may_be_arrays_and_lists() -> None:
    wanted = UnigramSampler(torch.tensor([3, 0, 1])).log_probability
    for counts in ([3, 0, 1], (3.0, 0.0, 1.0), read_only([3, 0, 1]), np.float32([3, 0, 1])):
        assert torch.equal(UnigramSampler(counts).log_probability, wanted)
    for weights in ([1, 3], read_only([1, 3]), np.float16([1, 3]), torch.tensor([1, 3])):
        assert DynamicWeightedSampledSoftmax(weights=weights).domain_weights().tolist() == [1, 3]


def test_domain_weights_take_arrays_and_columns() -> None:
    wanted = DomainWeights(2)
    wanted.update(torch.tensor(DOMAINS))
    got = DomainWeights(2)
    got.update(read_only(DOMAINS))
    assert torch.equal(got(), wanted())
    assert torch.equal(got.log_weight(read_only(DOMAINS)), got.log_weight(torch.tensor(DOMAINS)))


def test_interactions_may_be_filtered_columns() -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(
        {"user": [5, 1, 1, 2, 3], "item": [5, 10, 11, 10, 12], "genre": [1, 0, 0, 0, 1]}
    )[1:]
    wanted = DomainWeights.from_interactions([1, 1, 2, 3], [10, 11, 10, 12], [0, 0, 0, 1])
    for columns in (frame, frame.astype("Int64"), frame.astype("category"), frame.astype("int16")):
        got = DomainWeights.from_interactions(columns.user, columns.item, columns.genre)
        assert torch.equal(got(), wanted())
        assert torch.equal(got.users, wanted.users)


def test_item_domains_may_be_columns() -> None:
    pd = pytest.importorskip("pandas")
    slots = [[0, 2], [1, -1], [2, 1]]
    for given in (
        *(slots, np.array(slots), torch.tensor(slots)),
        *(pd.DataFrame(slots), pd.DataFrame(slots).astype("Int64"), pd.Series(slots)),
    ):
        built = DynamicWeightedSampledSoftmax(item_domains=given)
        assert built.item_domains.tolist() == slots
