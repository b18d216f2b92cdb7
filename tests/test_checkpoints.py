"""Checkpoints carry state, and what a constructor was given stays: where they disagree, an error.

Earlier versions saved more: tables of samplers, constant weights. Such checkpoints are made here by
hand from what the modules hold.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from module_inputs import DOMAINS, KINDS, call, draws, embeddings, item_domains, table_of
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from dwl_kernels import (
    CountMinSketch,
    DomainWeights,
    DynamicWeightedSampledSoftmax,
    StreamingFrequency,
    UnigramSampler,
)

IDS = torch.tensor([0, 0, 0, 0, 1, 1, 2])


def updated(state):
    state.update(IDS)
    return state


def measured(**options):
    return updated(DomainWeights(DOMAINS, **options))


def constant(*weights):
    return updated(DomainWeights.constant(weights))


def saved_by_earlier(module):
    """Everything that was counted, constants too, and no arguments."""
    state = {**module.state_dict(), **module._constants}
    return {k: v.clone() for k, v in state.items() if k != "arguments"}


# ---------------------------------------------------------------- agreement

AGREE = {
    "measured": lambda: measured(weight_range=(0.5, 3.0), measures=(1.0, 2.0, 0.0)),
    "constant": lambda: constant(0.5, 1.0, 0.0),
    "from interactions": lambda: DomainWeights.from_interactions(
        [0, 0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 0, 0, 1, 2]
    ),
    "untouched": lambda: DomainWeights(DOMAINS),
    "no average is 1": lambda: measured(momentum=0.0, weight_range=(1.0, 1.0)),
    "sampler": lambda: UnigramSampler(torch.tensor([6.0, 0.0, 2.0]), power=0.75),
    "frequency": lambda: updated(StreamingFrequency(64, num_hashes=2, seed=3)),
    "frequency, gap": lambda: updated(StreamingFrequency(64, initial_gap=12.0)),
    "sketch": lambda: updated(CountMinSketch(16, 2, seed=-5)),
}


@pytest.mark.parametrize("name", AGREE)
@pytest.mark.parametrize("version", ["this", "earlier"])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_checkpoint_of_the_same_arguments_is_loaded(name, version, assign, strict):
    source, loaded = AGREE[name](), AGREE[name]()
    if hasattr(source, "update"):
        source.update(IDS)
    state = source.state_dict() if version == "this" else saved_by_earlier(source)
    before = {key: value.clone() for key, value in state.items()}
    parts = torch.nn.ModuleDict({"a": loaded}), {f"a.{k}": v for k, v in state.items()}
    found = parts[0].load_state_dict(parts[1], assign=assign, strict=strict)
    assert not found.missing_keys
    assert not found.unexpected_keys
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key
        assert value.dtype == source.state_dict()[key].dtype
    assert {key: value.tolist() for key, value in state.items()} == {
        key: value.tolist() for key, value in before.items()
    }


@pytest.mark.parametrize("version", ["this", "earlier"])
@pytest.mark.parametrize("assign", [False, True])
def test_module_made_on_meta_has_its_state_from_a_checkpoint(version, assign):
    source = measured()
    state = source.state_dict() if version == "this" else saved_by_earlier(source)
    with torch.device("meta"):
        loaded = DomainWeights(DOMAINS)
    if not assign:
        loaded.to_empty(device="cpu")
        loaded.arguments.fill_(torch.nan)
    loaded.load_state_dict(state, assign=assign)
    for key, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    DomainWeights(DOMAINS).load_state_dict(loaded.state_dict())


@pytest.mark.parametrize("name", AGREE)
def test_copies_and_pickles_hold_all_state(name):
    source = AGREE[name]()
    for twin in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        for key, value in twin.state_dict().items():
            assert torch.equal(value, source.state_dict()[key]), key
            assert value.data_ptr() != source.state_dict()[key].data_ptr()
        assert twin.state_dict().keys() == source.state_dict().keys()
        twin.load_state_dict(source.state_dict())


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda: UnigramSampler(torch.ones(1000)), set()),
        (lambda: constant(1.0, 2.0, 3.0), {"interactions", "shares"}),
        (measured, {"interactions", "shares", "average", "weights"}),
    ],
)
def test_what_follows_from_arguments_is_not_saved(make, keys):
    saved = make().state_dict().keys()
    assert keys <= saved
    if keys != {"interactions", "shares", "average", "weights"}:
        assert not saved & {"probability", "alias", "log_probability", "weights", "average"}


@pytest.mark.parametrize("kind", KINDS)
def test_item_domains_are_those_of_the_module(kind):
    state = KINDS[kind](item_domains=item_domains()).state_dict()
    assert not any("item_domains" in key for key in state)
    today = item_domains(seed=1)
    loss_fn = KINDS[kind](DOMAINS, item_domains=today)
    loss_fn.load_state_dict(state)
    assert torch.equal(loss_fn.item_domains, today)


def test_half_precision_checkpoint_assigned_is_float32_again():
    source = measured(measures=(1.0, 1.0, 1.0), weight_range=(0.7, 3.3))
    state = source.state_dict()
    state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}
    loaded = DomainWeights(DOMAINS, measures=(1.0, 1.0, 1.0), weight_range=(0.7, 3.3))
    loaded.load_state_dict(state, assign=True)
    for key, value in loaded.state_dict().items():
        assert value.dtype == source.state_dict()[key].dtype, key
    torch.testing.assert_close(loaded(), source(), rtol=0.01, atol=0)


# ---------------------------------------------------------------- disagreement


def ours(module):
    return module.state_dict()


DISAGREE = {
    "constant into other constant": (
        *(lambda: constant(1.0, 5.0, 2.0), saved_by_earlier, lambda: constant(1.0, 2.0, 2.0)),
        r"weights\[1\] is 5 in the checkpoint but 2 here.*delete weights and average",
    ),
    "constant into more constants": (
        *(lambda: constant(1.0, 2.0, 3.0), saved_by_earlier),
        lambda: DomainWeights.constant([1.0, 2.0]),
        r"weights has shape \[3\] in the checkpoint but \[2\] here",
    ),
    "measured into constant": (
        *(measured, ours, lambda: constant(1.0, 1.0, 1.0)),
        r"weights\[0\] is 0.99\d+ in the checkpoint but 1 here, where weights are constant",
    ),
    "fresh into constant": (
        *(lambda: DomainWeights(DOMAINS), ours, lambda: constant(1.0, 1.0, 1.0)),
        r"average\[0\] is 4 in the checkpoint but 1 here, where weights are constant",
    ),
    "measured, earlier, into constant": (
        *(measured, saved_by_earlier, lambda: constant(1.0, 2.0, 1.0)),
        "where weights are constant; build the module with the weights of the checkpoint",
    ),
    "constant into measured": (
        *(lambda: constant(1.0, 5.0, 2.0), ours, measured),
        r"written with constant weights.*measured, with weight_range=\(1.0, 4.0\)",
    ),
    "constant, earlier, into measured": (
        *(lambda: constant(1.0, 3.0, 2.0), saved_by_earlier, measured),
        "written with constant weights, but those of this module are measured",
    ),
    "constant out of range, earlier, into measured": (
        *(lambda: constant(0.2, 3.0, 2.0), saved_by_earlier, measured),
        r"average lies within \[0.2, 3\] in the checkpoint, but weight_range is \(1.0, 4.0\)",
    ),
    "wider range": (
        *(lambda: measured(weight_range=(1.0, 8.0)), ours, measured),
        r"weight_range is \(1.0, 8.0\).*in the checkpoint, but \(1.0, 4.0\)",
    ),
    "narrower range": (
        *(measured, ours, lambda: measured(weight_range=(1.0, 8.0))),
        r"weight_range is \(1.0, 4.0\).*in the checkpoint, but \(1.0, 8.0\)",
    ),
    "wider range, earlier": (
        *(lambda: measured(weight_range=(1.0, 8.0)), saved_by_earlier, measured),
        r"average lies within \[7.\d+, 8\] in the checkpoint, but weight_range is \(1.0, 4.0\)",
    ),
    "other measures": (
        *(lambda: measured(measures=(1.0, 0.0, 1.0)), ours, measured),
        r"in proportion to \(0.5, 0.0, 0.5\) in the checkpoint, but .* and \(1.0, 1.0, 1.0\)",
    ),
    "other number of domains": (
        *(measured, ours, lambda: DomainWeights(5)),
        r"size mismatch for part.interactions.*\[3\].*\[5\]",
    ),
    "other counts": (
        *(lambda: UnigramSampler(torch.tensor([1.0, 9.0])), saved_by_earlier),
        lambda: UnigramSampler(torch.tensor([9.0, 1.0])),
        r"log_probability\[0\] is -2.3\d+ in the checkpoint but -0.1\d+ here.*delete probability",
    ),
    "more counts": (
        *(lambda: UnigramSampler(torch.ones(2)), saved_by_earlier),
        lambda: UnigramSampler(torch.ones(3)),
        r"log_probability has shape \[2\] in the checkpoint but \[3\] here",
    ),
    "other seed of a sketch": (
        *(lambda: updated(CountMinSketch(8, seed=1)), ours, lambda: CountMinSketch(8)),
        r"seeds\[0\] is -?\d+ in the checkpoint but -?\d+ here.*seed and the sizes",
    ),
    "sketch of the same size and another shape": (
        *(lambda: updated(CountMinSketch(8, 2)), ours, lambda: CountMinSketch(4, 4)),
        r"seeds has shape \[2\] in the checkpoint but \[4\] here",
    ),
    "other width": (
        *(lambda: updated(CountMinSketch(8, 2)), ours, lambda: CountMinSketch(16, 2)),
        r"size mismatch for part.counts.*\[16\].*\[32\]",
    ),
    "other seed of a frequency": (
        *(lambda: updated(StreamingFrequency(8, seed=1)), ours, lambda: StreamingFrequency(8)),
        r"seeds\[0\] is -?\d+ in the checkpoint but -?\d+ here",
    ),
    "other initial gap": (
        *(lambda: updated(StreamingFrequency(64, initial_gap=10.0)), ours),
        lambda: StreamingFrequency(64, initial_gap=20.0),
        "initial_gap is 10 in the checkpoint but 20 here",
    ),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", DISAGREE)
def test_checkpoint_that_disagrees_raises_and_names_both(name, assign, strict):
    source, save, target, message = DISAGREE[name]
    module = torch.nn.ModuleDict({"part": target()})
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = {f"part.{key}": value for key, value in save(source()).items()}
    with pytest.raises(RuntimeError, match=message) as raised:
        module.load_state_dict(state, assign=assign, strict=strict)
    assert "Unexpected key" not in str(raised.value)
    if "size mismatch" not in message:
        assert "part: " in str(raised.value)
        for key, value in module.state_dict().items():
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("kind", KINDS)
def test_loss_module_raises_for_its_domain_weights(kind):
    options = {"item_domains": item_domains(), "backend": "eager"}
    source = KINDS[kind](DOMAINS, **options)
    call(kind, source, embeddings()[0], table_of(), draws()).backward()
    fixed = KINDS[kind](weights=[1.0, 5.0, 2.0], **options)
    with pytest.raises(RuntimeError, match=r"domain_weights: weights\[\d\] is .* but"):
        fixed.load_state_dict(source.state_dict())
    assert fixed.domain_weights().tolist() == [1.0, 5.0, 2.0]


def test_other_momentum_or_names_are_no_disagreement():
    source = measured(momentum=0.5)
    loaded = DomainWeights(DOMAINS, momentum=0.9, names=["a", "b", "c"])
    loaded.load_state_dict(source.state_dict())
    assert loaded.momentum == 0.9
    assert torch.equal(loaded(), source())


def test_checkpoint_without_the_module_loads_as_a_part():
    loss_fn = DynamicWeightedSampledSoftmax(DOMAINS)
    model = torch.nn.ModuleDict({"tower": torch.nn.Linear(2, 2), "loss": loss_fn})
    tower = {k: v for k, v in model.state_dict().items() if k.startswith("tower")}
    missing = model.load_state_dict(tower, strict=False).missing_keys
    assert "loss.domain_weights.average" in missing
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(tower)


# ---------------------------------------------------------------- distributed checkpoints


def test_distributed_checkpoint_carries_state(tmp_path):
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        options = {"item_domains": item_domains(), "learn_temperature": True, "backend": "eager"}
        models = [
            torch.nn.ModuleDict(
                {
                    "loss": DynamicWeightedSampledSoftmax(DOMAINS, temperature=tau, **options),
                    "sketch": CountMinSketch(16),
                    "fixed": DomainWeights.constant([1.0, 2.0]),
                    "sampler": UnigramSampler(torch.ones(4)),
                }
            )
            for tau in (0.2, 0.9)
        ]
        call("sampled", models[0]["loss"], embeddings()[0], table_of(), draws()).backward()
        models[0]["sketch"].update(IDS)
        dcp.save(get_model_state_dict(models[0]), checkpoint_id=tmp_path / "saved")
        state = get_model_state_dict(models[1])
        dcp.load(state, checkpoint_id=tmp_path / "saved")
        set_model_state_dict(models[1], state)
    finally:
        dist.destroy_process_group()
    for (name, one), (_, other) in zip(*(m.state_dict().items() for m in models), strict=True):
        assert torch.equal(one, other), name
    assert models[1]["loss"].domain_weights.interactions.sum() > 0
