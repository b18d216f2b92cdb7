"""Modules of the losses inside models: functional calls, ensembles, slices of vmap."""

from __future__ import annotations

import copy

import module_inputs
import pytest
import torch
from differentiated import IDS, assert_all_close
from torch.func import functional_call

import dwl_kernels

# ---------------------------------------------------------------- modules in a model


class Model(torch.nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.kind, self.tower = kind, torch.nn.Linear(4, 4).double()
        self.loss_fn = module_inputs.KINDS[kind](
            item_domains=module_inputs.item_domains(),
            learn_temperature=True,
            backend="eager",
            **options,
        )

    def forward(self, query, table):
        return module_inputs.call(self.kind, self.loss_fn, self.tower(query), table, IDS)


def copies_of_state(model):
    """Parameters, and what is counted: all that ``state_dict`` has besides."""
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    parameters = {key: state.pop(key) for key, _ in model.named_parameters()}
    return parameters, state


@pytest.mark.parametrize("given", [False, True], ids=["", "counts given"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalize"])
@pytest.mark.parametrize("kind", module_inputs.KINDS)
def test_functional_call_gives_gradients_and_counts(kind, normalize, training, given):
    model = Model(kind, normalize=normalize).train(training)
    twin = copy.deepcopy(model)
    before = copies_of_state(model)[1]
    query, table = module_inputs.embeddings()[0].detach(), module_inputs.table_of().detach()
    parameters, counts = copies_of_state(model)
    if given:
        got = torch.func.grad(lambda p, b: functional_call(model, (p, b), (query, table)))(
            parameters, counts
        )
        assert all(
            torch.equal(value, before[key]) for key, value in copies_of_state(model)[1].items()
        )
    else:
        got = torch.func.grad(lambda p: functional_call(model, p, (query, table)))(parameters)
        counts = copies_of_state(model)[1]
    wanted = torch.autograd.grad(twin(query, table), list(twin.parameters()))
    assert_all_close(got.values(), wanted)
    assert all(torch.equal(value, counts[key]) for key, value in copies_of_state(twin)[1].items())
    assert training == any(not torch.equal(counts[key], before[key]) for key in counts)


def stacked_state(models):
    """As ``torch.func.stack_module_state``, with what the models count."""
    parameters, buffers = torch.func.stack_module_state(models)
    counts = [copies_of_state(model)[1] for model in models]
    stacked = {key: torch.stack([one[key] for one in counts]) for key in counts[0]}
    return parameters, buffers | stacked


@pytest.mark.parametrize("kind", module_inputs.KINDS)
def test_ensemble_of_models(kind):
    models = [Model(kind, normalize=True).eval() for _ in range(2)]
    skeleton = copy.deepcopy(models[0]).to("meta")
    query, table = module_inputs.embeddings()[0].detach(), module_inputs.table_of().detach()
    state = stacked_state(models)
    got = torch.func.vmap(lambda *s: functional_call(skeleton, s, (query, table)))(*state)
    torch.testing.assert_close(got, torch.stack([model(query, table) for model in models]))


BATCHES_OF_IDS = {
    "domain_ids": torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 0, 0, 0, 1]]),
    "ids": torch.tensor([[3, 8, 3], [3, 9, 7]]),
}


@pytest.mark.parametrize("of", ["vmap", "vmap of grad", "vmap in vmap"])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 3.0]], ids=["measured", "constant"])
def test_vmap_counts_no_domains_of_its_slices(weights, of):
    counted = None if weights else 3
    loss_fn = dwl_kernels.DynamicWeightedSampledSoftmax(counted, weights=weights, backend="eager")
    query, positive, negative = (x.detach() for x in module_inputs.embeddings())
    batch = BATCHES_OF_IDS["domain_ids"]

    def loss(query, ids):
        return loss_fn(query, positive, negative, domain_ids=ids)

    function = {
        "vmap": torch.func.vmap(loss, (None, 0)),
        "vmap of grad": torch.func.vmap(torch.func.grad(loss), (None, 0)),
        "vmap in vmap": lambda query, batch: torch.func.vmap(
            torch.func.vmap(loss, (0, None)), (None, 0)
        )(query[None], batch),
    }[of]
    before = copy.deepcopy(loss_fn.state_dict())
    with pytest.raises(RuntimeError, match=r"vmap cannot count .* loss_fn\.eval\(\) and, outside"):
        function(query, batch)
    assert all(torch.equal(value, before[key]) for key, value in loss_fn.state_dict().items())
    loss_fn.eval()
    loss_fn.domain_weights.update(batch.flatten())
    assert function(query, batch).isfinite().all()
    assert loss_fn.domain_weights.interactions.tolist() == [7, 3, 2]


@pytest.mark.parametrize("kind", [dwl_kernels.StreamingFrequency, dwl_kernels.CountMinSketch])
def test_vmap_counts_no_ids_of_its_slices(kind):
    stream, batch = kind(64), BATCHES_OF_IDS["ids"]
    before = copy.deepcopy(stream.state_dict())
    with pytest.raises(RuntimeError, match=r"vmap cannot count .* call update outside of vmap"):
        torch.func.vmap(stream.update)(batch)
    assert all(torch.equal(value, before[key]) for key, value in stream.state_dict().items())
    stream.update(batch)
    wanted = torch.stack([stream.log_q(ids) for ids in batch])
    torch.testing.assert_close(torch.func.vmap(stream.log_q)(batch), wanted, rtol=0, atol=0)


def test_ensemble_counts_each_its_own():
    """A vmap whose slices have counts of their own."""
    query, positive, negative = (x.detach() for x in module_inputs.embeddings())
    models = [dwl_kernels.DynamicWeightedSampledSoftmax(3, backend="eager") for _ in range(2)]
    state, batch = stacked_state(models), BATCHES_OF_IDS["domain_ids"]

    def loss(parameters, buffers, ids):
        call = (query, positive, negative), {"domain_ids": ids}
        return functional_call(models[0], (parameters, buffers), *call)

    got = torch.func.vmap(loss)(*state, batch)
    assert state[1]["domain_weights.interactions"].tolist() == [[2, 2, 2], [5, 1, 0]]
    each = zip(models, batch, strict=True)
    wanted = [model(query, positive, negative, domain_ids=ids) for model, ids in each]
    torch.testing.assert_close(got, torch.stack(wanted))
