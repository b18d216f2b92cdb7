"""The README's table of what works inside what: every cell is proven here, or names its test.

A cell says "yes" where losses, parameters, counts and temperature come out as without the wrapper;
"raises" where an error says what to do instead. The other words have tests of their own below.
"""

from __future__ import annotations

import ast
import functools
import io
import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from dwl_kernels import (
    CumulativeCrossEntropy,
    DomainWeights,
    DualScaleSampledSoftmax,
    DynamicWeightedSampledSoftmax,
)

README = Path(__file__).parent.parent / "README.md"
DIM, ITEMS, ROWS, NEGATIVES, STEPS, RANKS = 4, 12, 8, 6, 2, 2
ITEM_DOMAINS = torch.tensor([0] * 7 + [1] * 4 + [2])

# Column of the table: the losses that its cells are tried with.
COLUMNS = {
    "loss, gradients": ("sampled", "in-batch", "dual scale"),
    "a table": ("table", "whole table"),
    "domains counted": ("domains",),
    "temperature learned": ("temperature",),
    "`process_group=`": ("group", "group, whole table"),
}
GROUP, DOMAINS = "`process_group=`", "domains counted"


def loss_of(kind: str, temperature: float = 0.5) -> Any:
    group = {"process_group": dist.group.WORLD} if kind.startswith("group") else {}
    options: dict[str, Any] = {}
    if kind == "domains" or group:  # weights that follow the counts at once
        weights = DomainWeights(3, momentum=0.0, **group)
        options |= {"weights": weights, "item_domains": ITEM_DOMAINS, "calibration": 0.5}
    if kind == "temperature" or group:
        options |= {"temperature": temperature, "learn_temperature": True}
    if kind == "dual scale":
        return DualScaleSampledSoftmax(hardness=0.5, competition=0.5)
    if kind.endswith("whole table"):
        return CumulativeCrossEntropy(**options, **group)
    return DynamicWeightedSampledSoftmax(**options, **group)


class Model(nn.Module):
    """A tower, a table of items, and the loss in the forward."""

    def __init__(self, kind: str, **options: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        shards = dist.get_world_size() if kind == "group, whole table" else 1
        self.tower, self.items = nn.Linear(DIM, DIM), nn.Embedding(ITEMS // shards, DIM)
        self.loss_fn = loss_of(kind, **options)

    def forward(self, features: Tensor, items: Tensor, negatives: Tensor) -> Tensor:
        query, table = self.tower(features), self.items.weight
        if self.kind.endswith("whole table"):
            return self.loss_fn(query, table, items)
        if self.kind in ("in-batch", "group"):
            return self.loss_fn(query, self.items(items), positive_ids=items)
        if self.kind == "table":
            per_row = (negatives + torch.arange(len(items))[:, None]) % ITEMS
            return self.loss_fn(query, table=table, positive_ids=items, negative_ids=per_row)
        ids = {"positive_ids": items, "negative_ids": negatives}
        return self.loss_fn(query, self.items(items), self.items(negatives), **ids)


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features and items of every row, and negatives that they share."""
    generator = torch.Generator().manual_seed(step)
    items = torch.randint(ITEMS, (ROWS + NEGATIVES,), generator=generator)
    return torch.randn(ROWS, DIM, generator=generator), items[:ROWS], items[ROWS:]


def part(step: int, place: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of a rank, or of a micro-batch."""
    features, items, negatives = batch(step)
    return features.chunk(RANKS)[place], items.chunk(RANKS)[place], negatives


def in_parts(model: Model, step: int) -> Tensor:
    """What ranks make of a batch that know nothing of each other."""
    return torch.stack([model(*part(step, place)) for place in range(RANKS)]).mean()


def trained(model: Any, loss_at: Any, steps: Any = range(STEPS)) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_at(step)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def state_of(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {
        k: v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for k, v in state.items()
    }


@functools.cache
def plain(kind: str, parts: bool = False) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and state after a training without any wrapper; in parts, as DDP computes them."""
    model = Model(kind)
    loss_at = (lambda step: in_parts(model, step)) if parts else lambda step: model(*batch(step))
    return trained(model, loss_at), state_of(model)


def assert_as_plain(
    kind: str, losses: Any, state: dict[str, Tensor], parts: bool = False, **tolerance: Any
) -> None:
    wanted, wanted_state = plain(kind, parts)
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-6}
    if losses is not None:
        torch.testing.assert_close(losses, wanted, **tolerance)
    torch.testing.assert_close(state, wanted_state, **tolerance)


# ---------------------------------------------------------------- rows of the table


def checkpointed(kind: str) -> None:
    for reentrant in (False, True):
        model = Model(kind)
        run = functools.partial(checkpoint, model, use_reentrant=reentrant)
        # A reentrant checkpoint wants an input that requires a gradient.
        losses = trained(
            model, lambda step, run=run: run(batch(step)[0].requires_grad_(), *batch(step)[1:])
        )
        assert_as_plain(kind, losses, state_of(model))


def autocast(kind: str) -> None:
    """Gradients go through a scaler, which they leave finite."""
    for dtype in (torch.bfloat16, torch.float16):
        model, scaler = Model(kind), torch.amp.GradScaler("cpu", init_scale=2.0**12)
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
        for step in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = model(*batch(step))
            assert loss.dtype == torch.float32
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
        assert scaler.get_scale() == 2.0**12
        assert_as_plain(kind, losses, state_of(model), rtol=0.05, atol=0.05)


def accumulated(kind: str) -> None:
    model = Model(kind)

    def last_part(step: int) -> Tensor:
        first, last = (model(*part(step, place)) / RANKS for place in range(RANKS))
        first.backward()
        return last

    trained(model, last_part)
    assert_as_plain(kind, None, state_of(model), parts=True)


def accumulated_counts(kind: str) -> None:
    """The weights of domains after micro-batches are those after the batch."""
    model, wanted = Model(kind), plain(kind)[1]
    for step in range(STEPS):
        in_parts(model, step)
    for name in ("interactions", "shares", "average", "weights"):
        key = f"loss_fn.domain_weights.{name}"
        torch.testing.assert_close(state_of(model)[key], wanted[key])
    # What a schedule calls a step is a forward.
    assert model.loss_fn.domain_weights.steps == STEPS * RANKS


def resumed(kind: str) -> None:
    source, file = Model(kind), io.BytesIO()
    losses = trained(source, lambda step: source(*batch(step)), range(1))
    torch.save(source.state_dict(), file)
    file.seek(0)
    model = Model(kind, temperature=0.9)
    model.load_state_dict(torch.load(file, weights_only=True))
    losses += trained(model, lambda step: model(*batch(step)), range(1, STEPS))
    assert_as_plain(kind, losses, state_of(model))


def averaged(kind: str) -> None:
    model = Model(kind)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    wanted = {key: value.detach().clone() for key, value in model.named_parameters()}
    for step in range(STEPS):
        trained(model, lambda step: model(*batch(step)), [step])
        average.update_parameters(model)
        for key, value in model.named_parameters():
            wanted[key] = value.detach().clone() if step == 0 else (wanted[key] + value) / 2
    assert_as_plain(kind, None, state_of(model))
    torch.testing.assert_close(dict(average.module.named_parameters()), wanted)
    assert average.module.eval()(*batch(0)).isfinite()


def func_grad(kind: str) -> None:
    model, twin = Model(kind), Model(kind)
    parameters = dict(model.named_parameters())
    found = torch.func.grad(lambda p: functional_call(model, p, batch(0)))(parameters)
    twin(*batch(0)).backward()
    torch.testing.assert_close(found, {key: p.grad for key, p in twin.named_parameters()})
    torch.testing.assert_close(state_of(model), state_of(twin))


def vmap(kind: str) -> None:
    model = Model(kind)
    slices = [torch.stack(both) for both in zip(batch(0), batch(1), strict=True)]
    wanted = torch.stack([model(*batch(step)) for step in range(2)])
    torch.testing.assert_close(torch.func.vmap(model)(*slices), wanted)


def second_derivative(kind: str) -> None:
    model = Model(kind)
    gradients = torch.autograd.grad(
        model(*batch(0)), list(model.parameters()), create_graph=True, allow_unused=True
    )
    torch.autograd.grad(sum(g.square().sum() for g in gradients), list(model.parameters()))


def forward_mode(kind: str) -> None:
    model, (features, *others) = Model(kind), batch(0)
    torch.func.jvp(lambda x: model(x, *others), (features,), (features,))


def traced(kind: str) -> None:
    torch.jit.trace(Model(kind), batch(0))


def over_ranks(kind: str) -> Any:
    """On each of two ranks: what DDP and FSDP2 make of its part."""
    from torch.distributed.device_mesh import init_device_mesh  # 2 s, which only ranks need
    from torch.distributed.fsdp import fully_shard

    found = {}
    for name in ("DDP", "FSDP2"):
        model: Any = Model(kind)
        run: Any = DistributedDataParallel(model) if name == "DDP" else model
        if name == "FSDP2":
            fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
        losses = trained(run, lambda step, run=run: run(*part(step, dist.get_rank())))
        found[name] = losses, state_of(model)
    return found


# ---------------------------------------------------------------- the table


class Row(NamedTuple):
    proof: Any  # functions of a kind, or the name of a test
    refusal: str = ""  # what an error says in the cells that raise
    raises: tuple[str, ...] = ()  # columns
    other: dict[str, tuple[str, Any]] = {}  # noqa: RUF012  claim and proof, by column


ONCE = r"differentiable once, in reverse mode|transforms of torch\.func .* by autograd"
COMMON = "test_modules_common.py::test_compiled_training_step_equals_eager"
RANK_STEPS = "test_distributed_training.py::test_training_of_ranks_follows_that_of_one_process"
EXPORT = "test_export.py::test_exported_program_takes_any_batch_of_sequences"
EXPORT_COUNTS = "test_export.py::test_exported_program_counts_what_its_module_would"
EXPORT_GROUP = "test_export.py::test_loss_over_a_process_group_is_not_exported"
COPIED = "test_deferred.py::test_average_of_models_leaves_counts_and_constants_alone"

TABLE = {
    "DDP": Row("ranks", other={DOMAINS: ("own rank", "ranks")}),
    "FSDP2": Row("ranks", other={DOMAINS: ("own rank", "ranks")}),
    "`torch.compile`": Row(COMMON, other={GROUP: ("graph breaks", RANK_STEPS)}),
    "`torch.export`": Row(
        EXPORT, other={DOMAINS: ("yes", EXPORT_COUNTS), GROUP: ("raises", EXPORT_GROUP)}
    ),
    "activation checkpointing": Row(checkpointed),
    "autocast, `GradScaler`": Row(autocast),
    "accumulated gradients": Row(accumulated, other={DOMAINS: ("yes", accumulated_counts)}),
    "resume": Row(resumed),
    "`AveragedModel`": Row(averaged, other={DOMAINS: ("as copied", COPIED)}),
    "`torch.func.grad`": Row(func_grad, "by autograd, or set process_group", (GROUP,)),
    "`torch.func.vmap`": Row(
        vmap, r"loss_fn\.eval\(\) and, outside|by autograd, or set process_group", (DOMAINS, GROUP)
    ),
    "second derivatives, forward mode, `torch.jit.trace`": Row(
        (second_derivative, forward_mode, traced), f"{ONCE}|use torch.export or", (*COLUMNS,)
    ),
    "CUDA graphs": Row(None, other=dict.fromkeys(COLUMNS, ("not measured", None))),
}
CELLS = [(row, column) for row in TABLE for column in COLUMNS]


def claim(row: str, column: str) -> tuple[str, Any]:
    said = "raises" if column in TABLE[row].raises else "yes"
    return TABLE[row].other.get(column, (said, TABLE[row].proof))


def functions(row: str, column: str) -> tuple[Any, ...]:
    proof = claim(row, column)[1]
    return (proof,) if callable(proof) else proof if isinstance(proof, tuple) else ()


def of_readme() -> dict[tuple[str, str], str]:
    text = README.read_text("utf-8").partition("<!-- trainers -->\n")[2].partition("<!-- /")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    (_, *columns), _, *rows = lines
    return {
        (row, column): cell for row, *of in rows for column, cell in zip(columns, of, strict=True)
    }


def test_table_of_the_readme_is_the_one_that_is_proven() -> None:
    assert of_readme() == {cell: claim(*cell)[0] for cell in CELLS}


@pytest.fixture
def group(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    ("row", "column"),
    [pytest.param(*cell, id=", ".join(cell)) for cell in CELLS if functions(*cell)],
)
def test_cell(row: str, column: str, request: pytest.FixtureRequest) -> None:
    if column == GROUP:
        request.getfixturevalue("group")
    refused = claim(row, column)[0] == "raises"
    for kind, proof in itertools.product(COLUMNS[column], functions(row, column)):
        with pytest.raises(RuntimeError, match=TABLE[row].refusal) if refused else nullcontext():
            proof(kind)


def test_tests_that_cells_name_are_there() -> None:
    named = {proof for _, proof in (claim(*cell) for cell in CELLS) if "::" in str(proof)}
    assert named
    for name in named:
        file, _, test = name.partition("::")
        tree = ast.parse((Path(__file__).parent / file).read_text("utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


# ---------------------------------------------------------------- cells of several ranks


@pytest.mark.parametrize("column", COLUMNS)
def test_cells_of_ddp_and_fsdp2(two_ranks: Any, column: str) -> None:
    for kind in COLUMNS[column]:
        if kind == "group, whole table":  # of a rank that is a shard, and no parameter of the model
            continue
        answers = two_ranks(over_ranks, kind)
        for wrapper in ("DDP", "FSDP2"):
            every, states = zip(*(answer[wrapper] for answer in answers), strict=True)
            losses = [torch.stack(of_step).mean() for of_step in zip(*every, strict=True)]
            if kind == "domains":  # a rank weighs by what it has seen itself
                for place, state in enumerate(states):
                    items = torch.cat([part(step, place)[1] for step in range(STEPS)])
                    counted = torch.bincount(ITEM_DOMAINS[items], minlength=3)
                    assert torch.equal(state["loss_fn.domain_weights.interactions"], counted)
                continue
            for state in states:
                assert_as_plain(kind, losses, state, parts=column != GROUP)


def second_derivative_over_ranks(kind: str) -> None:
    with pytest.raises(RuntimeError, match=ONCE):
        second_derivative(kind)


@pytest.mark.parametrize("kind", COLUMNS[GROUP])
def test_second_derivatives_raise_over_ranks_too(two_ranks: Any, kind: str) -> None:
    two_ranks(second_derivative_over_ranks, kind)
