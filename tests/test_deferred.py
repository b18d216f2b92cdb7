"""Modules that are built before they have memory, and the copies that frameworks make of modules.

On `meta` a model is built without memory, and gets its values later: from a checkpoint, whole or
tensor by tensor. What follows from the arguments (tables of samplers, hashes, domains of items) is
in no checkpoint, and has to be there again in each of these ways.
"""

from __future__ import annotations

import copy
import pickle

import module_inputs
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_multi_avg_fn,
)

import dwl_kernels
from dwl_kernels import DomainWeights

IDS, ITEM_DOMAINS = module_inputs.draws(), module_inputs.item_domains()
LOSSES = {
    dwl_kernels.DynamicWeightedSampledSoftmax: "table",
    dwl_kernels.DualScaleSampledSoftmax: "dual scale",
    dwl_kernels.CumulativeCrossEntropy: "cross-entropy",
}
STREAMS = (dwl_kernels.StreamingFrequency, dwl_kernels.CountMinSketch)
MODULES = {
    "domain weights": lambda: DomainWeights(3, measures=(1.0, 2.0, 0.0)),
    "constant weights": lambda: DomainWeights.constant([1.0, 2.0, 3.0]),
    "weights from interactions": lambda: DomainWeights.from_interactions(
        [0, 0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 0, 0, 1, 2]
    ),
    "unigram sampler": lambda: dwl_kernels.UnigramSampler([5.0, 1.0, 2.0, 0.0]),
    "uniform sampler": lambda: dwl_kernels.UniformSampler(5),
    "log-uniform sampler": lambda: dwl_kernels.LogUniformSampler(5),
    "frequency": lambda: dwl_kernels.StreamingFrequency(64, num_hashes=2, seed=3),
    "sketch": lambda: dwl_kernels.CountMinSketch(16, 2, seed=-5),
    **{
        f"{kind}, learned": lambda loss=loss: loss(
            item_domains=ITEM_DOMAINS,
            learn_temperature=True,
            calibration=0.5,
            backend="eager",
        )
        for loss, kind in LOSSES.items()
    },
    "table, constant": lambda: dwl_kernels.DynamicWeightedSampledSoftmax(
        weights=[1.0, 2.0, 3.0], item_domains=ITEM_DOMAINS, backend="eager"
    ),
}
EVERY = pytest.mark.parametrize("name", MODULES)


def counts_of(module):
    return {
        f"{path}.{name}".removeprefix("."): getattr(part, name)
        for path, part in module.named_modules()
        for name in getattr(part, "_counts", ())
    }


def step(module):
    """What a module gives for a batch, which its counts have seen."""
    if type(module) in LOSSES:
        query, table = module_inputs.embeddings()[0], module_inputs.table_of()
        return module_inputs.call(LOSSES[type(module)], module, query, table, IDS)
    if isinstance(module, DomainWeights):
        module.update(torch.tensor([0, 0, 1, -1]))
        return module()
    if isinstance(module, STREAMS):
        module.update(torch.tensor([1, 1, 5]))
    else:
        module.sample(3)
    return module.log_q(torch.tensor([0, 1, 2]))


def trained(name):
    module = MODULES[name]()
    step(module)
    for parameter in module.parameters():
        parameter.data += 0.25
    return module


def on_meta(make):
    with torch.device("meta"):
        module = make()
    assert all(value.is_meta for value in module.state_dict().values())
    return module


def assert_alike(module, twin):
    """The same state and constants, before a step and after it, and the same result."""
    for _ in range(2):
        assert module.state_dict().keys() == twin.state_dict().keys()
        for key, value in twin.state_dict().items():
            assert torch.equal(module.state_dict()[key], value), key
        for part, other in zip(module.modules(), twin.modules(), strict=True):
            for key in getattr(other, "_constants", ()):
                assert torch.equal(getattr(part, key), getattr(other, key)), key
        torch.testing.assert_close(step(module), step(twin), rtol=0, atol=0)


# ---------------------------------------------------------------- a device without memory


def load_into_memory(module, state):
    module.to_empty(device="cpu")
    for value in (*module.parameters(), *counts_of(module).values()):
        value.data.fill_(0)  # whatever the memory held
    module.load_state_dict(state)


def assign(module, state):
    module.load_state_dict(state, assign=True)


def assign_one_by_one(module, state):
    """As loaders of large checkpoints do, which also give memory to what is not in them."""
    for key, value in state.items():
        owner, _, name = key.rpartition(".")
        owner = module.get_submodule(owner)
        if name in owner._parameters:
            value = nn.Parameter(value)
        elif name in owner._constants:
            continue  # the checkpoint holds it to be compared
        setattr(owner, name, value)
    for key, value in list(module.named_buffers()):
        if value.is_meta:
            owner, _, name = key.rpartition(".")
            made = torch.empty_like(value, device="cpu")
            module.get_submodule(owner).register_buffer(name, made, persistent=False)


@pytest.mark.parametrize("moved", [False, True], ids=["", "and moved"])
@pytest.mark.parametrize("load", [load_into_memory, assign, assign_one_by_one])
@EVERY
def test_module_built_on_meta_is_that_of_its_checkpoint(name, load, moved):
    source = trained(name)
    loaded = on_meta(MODULES[name])
    load(loaded, copy.deepcopy(source.state_dict()))
    if moved:  # must not bring back what the constructor had left for `to_empty`
        loaded.to("cpu").double().to(torch.float32)
    assert_alike(loaded, source)


@EVERY
def test_module_built_on_meta_starts_as_any_other(name):
    assert_alike(on_meta(MODULES[name]).to_empty(device="cpu"), MODULES[name]())


@EVERY
def test_copy_of_a_module_on_meta_gets_its_values_too(name):
    module = on_meta(MODULES[name])
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module):
        assert_alike(twin.to_empty(device="cpu"), MODULES[name]())


def test_model_with_all_of_them_is_loaded_as_a_whole():
    def model():
        parts = {str(place): make() for place, make in enumerate(MODULES.values())}
        return nn.ModuleDict({"tower": nn.Linear(2, 2), **parts})

    source = model()
    for part in list(source.values())[1:]:
        step(part)
    state = copy.deepcopy(source.state_dict())
    for load in (load_into_memory, assign, assign_one_by_one):
        loaded = on_meta(model)
        load(loaded, copy.deepcopy(state))
        loaded.to("cpu")
        for key in map(str, range(len(MODULES))):
            assert_alike(loaded[key], copy.deepcopy(source[key]))


def test_part_that_is_not_in_the_checkpoint_stays_on_meta():
    """It is no whole module yet: `to_empty` gives it what its constructor left."""
    make = MODULES["domain weights"]
    loaded = nn.ModuleDict({"tower": nn.Linear(2, 2), "weights": on_meta(make)})
    tower = {k: v for k, v in loaded.state_dict().items() if k.startswith("tower")}
    loaded.load_state_dict(tower, assign=True, strict=False)
    assert loaded["weights"].weights.is_meta
    assert_alike(loaded["weights"].to_empty(device="cpu"), make())


def test_domains_that_have_no_values_are_named():
    with torch.device("meta"):
        items = torch.zeros(5, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"item_domains is on the meta device .* num_domains"):
            dwl_kernels.DynamicWeightedSampledSoftmax(item_domains=items)
        loss_fn = dwl_kernels.DynamicWeightedSampledSoftmax(2, item_domains=items)
    with pytest.raises(RuntimeError, match=r"item_domains of .* has no values"):
        loss_fn.to_empty(device="cpu")


# ---------------------------------------------------------------- tensors without values


def fake_step(module):
    """A step of fake tensors, with its backward where there is one."""

    def like(value):
        return torch.empty(value.shape, dtype=value.dtype)

    if type(module) not in LOSSES:
        return step(module)
    query, table = (torch.empty(n, 4, requires_grad=True) for n in (6, module_inputs.ITEMS))
    ids = {key: like(value) for key, value in IDS.items()}
    loss = module_inputs.call(LOSSES[type(module)], module, query, table, ids)
    loss.backward()
    assert query.grad.shape == query.shape
    assert table.grad.shape == table.shape
    return loss


@EVERY
def test_module_is_built_and_called_with_fake_tensors(name):
    with FakeTensorMode():
        module = MODULES[name]()
        result = fake_step(module)
    assert type(result).__name__ == "FakeTensor"


# ---------------------------------------------------------------- copies


AVERAGES = pytest.mark.parametrize(
    "average",
    [
        {},
        {"avg_fn": get_ema_avg_fn(0.9)},
        {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
        {"multi_avg_fn": get_swa_multi_avg_fn()},
        {"avg_fn": lambda own, other, count: torch.lerp(own.double(), other.double(), 0.5)},
    ],
    ids=["", "ema", "ema of lists", "swa of lists", "lerp"],
)


@AVERAGES
@pytest.mark.parametrize("use_buffers", [False, True])
@EVERY
def test_average_of_models_leaves_counts_and_constants_alone(name, use_buffers, average):
    """Of what hashes, draws or counts, an average is nonsense: the counts are a real count."""
    model, alone = nn.Sequential(MODULES[name](), nn.Linear(1, 1)), MODULES[name]()
    step(model[0])
    step(alone)
    averaged = AveragedModel(model, use_buffers=use_buffers, **average)
    at_the_copy = copy.deepcopy(counts_of(model))
    for _ in range(4):
        step(model[0])
        step(alone)
        for parameter in (*model.parameters(), *alone.parameters()):
            parameter.data += 0.25
        averaged.update_parameters(model)
        for key, value in counts_of(averaged.module).items():
            assert torch.equal(at_the_copy[key], value), key
            assert at_the_copy[key].dtype == value.dtype
    for parameter, own in zip(averaged.module.parameters(), model.parameters(), strict=True):
        assert not torch.equal(parameter, own)  # that is an average
    for part, copied in zip(model.modules(), averaged.module.modules(), strict=True):
        for key, value in getattr(part, "_constants", {}).items():
            assert torch.equal(getattr(copied, key), value), key
    assert step(averaged.module[0]).isfinite().all()
    assert_alike(model[0], alone)


@EVERY
def test_counts_are_in_no_list_of_buffers(name):
    """Where whole models are averaged or broadcast; module by module they are found."""
    model = nn.Sequential(MODULES[name]())
    assert all(value.numel() == 0 for value in model.buffers())
    found = {}
    for path, part in model.named_modules():
        found |= part.named_buffers(prefix=path, recurse=False)
    assert all(found[key] is value for key, value in counts_of(model).items())


@EVERY
def test_averaged_model_takes_the_counts_of_its_source_when_told(name):
    model = nn.Sequential(MODULES[name]())
    averaged = AveragedModel(model)
    step(model[0])
    for part, copied in zip(model.modules(), averaged.module.modules(), strict=True):
        if isinstance(part, (DomainWeights, *STREAMS)):
            copied.load_state_dict(part.state_dict())
    for key, value in counts_of(model).items():
        assert torch.equal(counts_of(averaged.module)[key], value), key


@pytest.mark.parametrize("name", [name for name in MODULES if "," in name])
def test_copies_and_pickles_of_losses_are_alike_and_apart(name):
    source = trained(name)
    for make in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))):
        twin = make(source)
        assert_alike(twin, copy.deepcopy(source))
        assert twin.domain_weights.steps > source.domain_weights.steps
