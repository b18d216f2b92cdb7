"""The temperature of the modules: its default, setting it, and learning it in any model."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.distributed as dist
from module_inputs import KINDS, call, draws, embeddings, fixed, table_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import dwl_kernels
from dwl_kernels import CumulativeCrossEntropy, DynamicWeightedSampledSoftmax

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
FUNCTIONS = [name for name in dwl_kernels.__all__ if name.endswith("_loss")]


# ---------------------------------------------------------------- default


@EVERY_KIND
@pytest.mark.parametrize(("normalize", "wanted"), [(False, 1.0), (True, 0.05)])
@pytest.mark.parametrize("learned", [False, True])
def test_default_is_one_and_a_twentieth_of_cosines(kind, normalize, wanted, learned):
    query, table = embeddings()[0], table_of()
    options = {"normalize": normalize, "learn_temperature": learned, "backend": "eager"}
    losses = [
        call(kind, KINDS[kind](**options, **given), query, table)
        for given in ({}, {"temperature": None}, {"temperature": wanted})
    ]
    temperature = torch.as_tensor(KINDS[kind](**options).temperature)
    torch.testing.assert_close(temperature.detach(), torch.tensor(wanted))
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_default_of_every_function_is_one(name):
    query, positive, negative = embeddings()
    ids = draws()
    arguments = {
        "in_batch_softmax_loss": (query, positive),
        "full_softmax_loss": (query, table_of(), ids["positive_ids"]),
        "indexed_sampled_softmax_loss": (
            *(query, table_of()),
            *(ids["positive_ids"], ids["negative_ids"]),
        ),
    }.get(name, (query, positive, negative))
    function = getattr(dwl_kernels, name)
    assert inspect.signature(function).parameters["temperature"].default is None
    losses = [
        function(*arguments, backend="eager", **given)
        for given in ({}, {"temperature": None}, {"temperature": 1.0})
    ]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


def test_first_loss_of_the_default_is_that_of_guessing():
    """Embeddings as PyTorch initialises them, scores of a standard deviation of sqrt(D)."""
    torch.manual_seed(0)
    query, positive = torch.nn.Embedding(512, 16), torch.nn.Embedding(512, 16)
    loss = DynamicWeightedSampledSoftmax(backend="eager")(query.weight, positive.weight)
    assert loss < 3 * torch.tensor(512.0).log()


# ---------------------------------------------------------------- setting it


@EVERY_KIND
@pytest.mark.parametrize("value", [0.1, 2, torch.tensor(0.3), torch.tensor([0.3])])
def test_set_temperature_is_the_one_in_use(kind, value):
    query, table = embeddings()[0], table_of()
    loss_fn = KINDS[kind](backend="eager")
    loss_fn.temperature = value
    assert loss_fn.temperature == pytest.approx(float(value))
    assert f"temperature={float(value)}" in repr(loss_fn)
    wanted = KINDS[kind](temperature=float(value), backend="eager")
    assert torch.equal(call(kind, loss_fn, query, table), call(kind, wanted, query, table))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0.0, ValueError, "temperature is 0.0; wanted a positive finite number"),
        (-1, ValueError, "temperature is -1"),
        (float("nan"), ValueError, "temperature is nan"),
        (float("inf"), ValueError, "temperature is inf"),
        (torch.tensor(-0.5), ValueError, "temperature is -0.5"),
        ("hot", TypeError, "temperature is .*; wanted a positive finite number"),
        ("0.1", TypeError, "temperature is .*; wanted a positive finite number"),
        (True, TypeError, "temperature is .*; wanted a positive finite number"),
        ([0.1], TypeError, "temperature is .*; wanted a positive finite number"),
        (torch.ones(3), TypeError, "temperature is .*; wanted a positive finite number"),
        (torch.ones((), requires_grad=True), ValueError, "pass learn_temperature=True, or"),
    ],
)
def test_wrong_temperature_is_named_by_constructor_and_setter(value, error, message):
    loss_fn = fixed()
    with pytest.raises(error, match=message):
        loss_fn.temperature = value
    assert loss_fn.temperature == 0.7
    with pytest.raises(error, match=message):
        fixed(temperature=value)


def test_nothing_is_no_temperature_to_set():
    with pytest.raises(TypeError, match=r"temperature is .*None"):
        fixed().temperature = None


def test_setting_a_learned_temperature_says_what_to_do():
    loss_fn = fixed(learn_temperature=True)
    with pytest.raises(AttributeError, match=r"learns it; build the module with it"):
        loss_fn.temperature = 0.1
    assert loss_fn.temperature.item() == pytest.approx(0.7)


# ---------------------------------------------------------------- learned, in any dtype

CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "to dtype": lambda module: module.to(torch.bfloat16),
    "to dtype and device": lambda module: module.to("cpu", torch.float16),
    "to a tensor's": lambda module: module.to(torch.zeros((), dtype=torch.float16)),
    "type": lambda module: module.type(torch.float16),
}


class Recommender(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.item = torch.nn.Embedding(50, 8)
        self.loss_fn = DynamicWeightedSampledSoftmax(**options)

    def forward(self, x, y):
        return self.loss_fn(self.item(x), self.item(y), positive_ids=y)


@EVERY_KIND
@pytest.mark.parametrize("cast", CASTS)
def test_learned_temperature_is_float32_under_every_cast(kind, cast):
    alone = KINDS[kind](learn_temperature=True, temperature=0.07)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ModuleList([alone]))
    before = alone.temperature_logit.detach().clone()
    CASTS[cast](model)
    assert model[0].weight.dtype != torch.float32
    assert alone.temperature_logit.dtype == torch.float32
    assert alone.temperature_logit.shape == (1,)
    assert torch.equal(alone.temperature_logit.detach(), before)
    assert isinstance(alone.temperature_logit, torch.nn.Parameter)
    assert alone.temperature.shape == ()


def test_cast_keeps_the_gradient_and_moves_children_of_a_subclass():
    class WithTower(DynamicWeightedSampledSoftmax):
        def __init__(self):
            super().__init__(learn_temperature=True)
            self.tower = torch.nn.Linear(2, 2)

    loss_fn = WithTower()
    loss_fn.temperature.backward()
    before = loss_fn.temperature_logit.grad.clone()
    loss_fn.bfloat16()
    assert torch.equal(loss_fn.temperature_logit.grad, before)
    assert loss_fn.tower.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_learned_temperature_moves_in_a_model_of_any_dtype(dtype):
    model = Recommender(learn_temperature=True, temperature=0.7, backend="chunked").to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.arange(50)
    trace = [model.loss_fn.temperature.item()]
    for _ in range(5):  # steps that bfloat16 would round away
        optimizer.zero_grad()
        model(x, x.flip(0)).backward()
        optimizer.step()
        trace.append(model.loss_fn.temperature.item())
    assert len(set(trace)) == 6


def test_no_decay_parameters_are_the_learned_temperature():
    loss_fn = DynamicWeightedSampledSoftmax(learn_temperature=True)
    assert loss_fn.no_decay_parameters() == [loss_fn.temperature_logit]
    assert DynamicWeightedSampledSoftmax().no_decay_parameters() == []


def test_temperature_without_gradient_stays_where_it_is_in_its_group():
    model = Recommender(learn_temperature=True, temperature=0.05)
    whole = set(model.loss_fn.no_decay_parameters())
    decayed = [p for p in model.parameters() if p not in whole]
    assert len(decayed) == 1
    groups = [{"params": [*whole], "weight_decay": 0.0}, {"params": decayed}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
    norm = model.item.weight.norm().item()
    for _ in range(100):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert model.loss_fn.temperature.item() == pytest.approx(0.05, rel=1e-5)
    assert model.item.weight.norm().item() < 0.95 * norm


# ---------------------------------------------------------------- sharded


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


POLICIES = {
    "float32": MixedPrecisionPolicy(),
    "bfloat16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("alone", [False, True])
def test_sharded_model_learns_its_temperature(mesh, policy, alone):
    model = Recommender(learn_temperature=True, temperature=0.7, backend="chunked")
    if alone:
        fully_shard(model.loss_fn, mesh=mesh, mp_policy=POLICIES[policy])
    fully_shard(model, mesh=mesh, mp_policy=POLICIES[policy])
    assert model.loss_fn.no_decay_parameters()[0] is model.loss_fn.temperature_logit
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    plain = Recommender(learn_temperature=True, temperature=0.7, backend="chunked")
    x = torch.arange(50)
    plain(x, x.flip(0)).backward()
    model(x, x.flip(0)).backward()
    logit = model.loss_fn.temperature_logit
    assert logit.dtype == logit.grad.dtype == torch.float32
    got, wanted = logit.grad.full_tensor(), plain.loss_fn.temperature_logit.grad
    torch.testing.assert_close(got, wanted, rtol=0.05 if policy == "bfloat16" else 1e-5, atol=0)
    before = logit.full_tensor().clone()
    optimizer.step()
    torch.testing.assert_close(logit.full_tensor(), before - 1e-2 * got)


# ---------------------------------------------------------------- checkpoints


@EVERY_KIND
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scalar_of_an_earlier_version_is_loaded(kind, assign, dtype):
    source = KINDS[kind](learn_temperature=True, temperature=0.2)
    state = source.state_dict()
    state["temperature_logit"] = state["temperature_logit"][0].to(dtype)
    loaded = KINDS[kind](learn_temperature=True)
    model = torch.nn.ModuleDict({"loss": loaded})
    model.load_state_dict({f"loss.{k}": v for k, v in state.items()}, assign=assign)
    assert loaded.temperature_logit.shape == (1,)
    assert loaded.temperature_logit.dtype == torch.float32
    assert loaded.temperature.item() == pytest.approx(0.2, rel=1e-2)


def test_checkpoint_that_learns_and_module_that_does_not_disagree():
    learned, given = fixed(learn_temperature=True), fixed()
    for into, state in ((given, learned.state_dict()), (learned, given.state_dict())):
        with pytest.raises(RuntimeError, match="temperature_logit"):
            into.load_state_dict(state)


def test_copies_and_pickles_keep_the_temperature():
    for loss_fn in (CumulativeCrossEntropy(learn_temperature=True, temperature=0.3), fixed()):
        for twin in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
            both = [torch.as_tensor(fn.temperature) for fn in (twin, loss_fn)]
            assert torch.equal(*both)
