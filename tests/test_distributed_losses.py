"""The losses of ranks that share a batch or a table are those of one process with all of it."""

from __future__ import annotations

import math
import random
import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import CASES, MARGIN, Case, error
from torch import Tensor

import dwl_kernels
from dwl_kernels import CumulativeCrossEntropy, DynamicWeightedSampledSoftmax

PER_ROW = {
    *("query", "positive", "positive_log_q", "log_q", "ids", "positive_ids"),
    *("domain_ids", "example_weights", "target", "query_ids"),
}
KINDS = {
    "gathered": {"sampled", "rows", "in_batch", "mixed", "dual"},
    "ring": {"sampled", "in_batch", "mixed"},
    "replicated_negatives": {"sampled", "mixed", "dual"},
    "sharded": {"full", "indexed", "indexed_rows"},
    "replicated_rows": {"full", "indexed", "indexed_rows"},
}


def cuts(count: int, ranks: int, seed: int) -> list[int]:
    """Where the parts of the ranks begin and end; some may be empty."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(0, count + 1, (ranks - 1,), generator=generator)
    return [0, *inner.sort().values.tolist(), count]


def part_of(
    case: Case, name: str, value: Tensor, inputs: dict[str, Any], how: str, seed: int
) -> slice:
    """What of an input this rank holds."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    of_rows = name in PER_ROW or (name == "temperature" and value.dim() > 0)
    of_rows |= name.startswith("negative") and case.kind in ("indexed_rows", "rows")
    if of_rows and how != "replicated_rows":
        found = cuts(len(inputs["query"]), ranks, seed + 1)
    elif name.startswith("negative") and case.kind != "indexed" and how in ("gathered", "ring"):
        found = cuts(len(inputs["negative"]), ranks, seed + 2)
    elif name in ("table", "bias", "table_ids"):
        found = cuts(len(inputs["table"]), ranks, seed + 3)
    else:
        return slice(None)
    return slice(found[rank], found[rank + 1])


def upstream_of(loss: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(loss.shape, generator=generator, dtype=torch.float64)


def compared(case: Case, how: str, dtype: torch.dtype, backend: str, seed: int = 0) -> list[str]:
    """What of a case differs from one process, by more than the margin of `dtype`."""
    inputs = case.inputs(dtype)
    exact = {
        k: v.detach().double().requires_grad_(v.requires_grad)
        if isinstance(v, Tensor) and v.is_floating_point()
        else v
        for k, v in inputs.items()
    }
    loss = case.loss(exact, "eager")
    upstream = upstream_of(loss)
    loss.backward(upstream)
    alone = case.loss(inputs, "eager")
    alone.backward(upstream.to(alone.dtype))
    places = {
        name: part_of(case, name, value, inputs, how, seed) if value.dim() else ...
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    }
    own = {
        name: inputs[name].detach()[place].clone().requires_grad_(inputs[name].requires_grad)
        for name, place in places.items()
    }
    options = {"process_group": dist.group.WORLD}
    if how in ("ring", "replicated_negatives", "replicated_rows"):
        options[how] = True
    got = case.loss({**inputs, **own, **options}, backend)
    mine = places["query"] if loss.dim() else ...
    got.backward(upstream[mine].to(got.dtype))
    ranks = dist.get_world_size()
    wrong = []

    def check(name: str, value: Tensor, same_dtype: Tensor, reference: Tensor) -> None:
        allowed = 2 * error(same_dtype.double(), reference) + MARGIN[dtype]
        if reference.numel() and not error(value.double(), reference) <= allowed:
            wrong.append(f"{case.name}, {how}: {name}")

    check("loss", got.detach(), alone.detach()[mine], loss.detach()[mine])
    for name, leaf in own.items():
        if not leaf.requires_grad:
            continue
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        place = places[name]
        if name not in ("table", "bias") and how != "replicated_rows":
            if place in (..., slice(None)):  # the average over ranks
                dist.all_reduce(gradient)
            gradient = gradient / ranks
        grads = inputs[name].grad, exact[name].grad
        grads = tuple(g.to_dense() if g.is_sparse else g for g in grads)
        # Relative to the largest entry of the whole.
        whole = gradient.new_zeros(grads[1].shape, dtype=torch.float64) + grads[1]
        whole[place] = gradient.double()
        check(name, whole, *grads)
    return wrong


def all_cases(how: str, dtype: torch.dtype, backend: str, words: str = "") -> list[str]:
    found = []
    for case in CASES:
        if re.search(words, case.name) is None:
            continue
        if case.kind in KINDS[how] and case.inputs(dtype)["query"].dim() == 2:
            try:
                found += compared(case, how, dtype, backend)
            except Exception as problem:
                raise AssertionError(case.name) from problem
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", [*KINDS])
def test_ranks_are_one_process(two_ranks, how, dtype):
    assert two_ranks(all_cases, how, dtype, "auto") == [[], []]


@pytest.mark.parametrize("how", [*KINDS])
def test_three_ranks_are_one_process(three_ranks, how):
    some = "everything|refined|NaN|hit"  # cases of everything at once, and of what goes wrong
    assert three_ranks(all_cases, how, torch.float64, "chunked", some) == [[], [], []]


def drawn_at_random(seed: int) -> list[str]:
    """Twenty cases, each shared in some way and split somewhere."""
    draw = random.Random(seed)
    found = []
    for _ in range(20):
        how = draw.choice([*KINDS])
        case = draw.choice([c for c in CASES if c.kind in KINDS[how]])
        if case.inputs(torch.float64)["query"].dim() == 2:
            backend = draw.choice(["chunked", "cpu"])
            found += compared(case, how, torch.float64, backend, draw.randrange(1000))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_any_split_of_any_problem_is_one_process(ranks, seed):
    assert ranks(drawn_at_random, seed) == [[] for _ in range(ranks.size)]


def infinite_bias(place: int, value: float) -> tuple[list[Tensor], list[Tensor]]:
    """Rows and gradients of this rank, and the same parts of those of one process."""
    generator = torch.Generator().manual_seed(0)
    query, table = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    bias, target = torch.randn(6, generator=generator, dtype=torch.float64), torch.arange(6)
    bias[place] = value
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows, items = slice(rank, None, ranks), slice(rank * 6 // ranks, (rank + 1) * 6 // ranks)

    def solved(rows: slice, items: slice, **options: Any) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (query[rows], table[items], bias[items])]
        options |= {"reduction": "none", "bias": leaves[2]}
        loss = dwl_kernels.full_softmax_loss(*leaves[:2], target[rows], **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.ones_like(loss))]

    loss, d_query, *others = solved(rows, items, process_group=dist.group.WORLD)
    whole = solved(slice(None), slice(None), backend="eager")
    parts = rows, rows, items, items
    alone = [tensor[part] for tensor, part in zip(whole, parts, strict=True)]
    return [loss, d_query / ranks, *others], alone


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 4])
def test_infinite_bias_stays_in_its_rows(two_ranks, place, value):
    for mine, alone in two_ranks(infinite_bias, place, value):
        torch.testing.assert_close(mine, alone, equal_nan=True)


def repeats(how: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    leaves = [torch.randn(9, 8, generator=generator).requires_grad_() for _ in range(3)]
    options: dict[str, Any] = {"process_group": dist.group.WORLD}
    if how == "sharded":
        target = torch.randint(0, 9 * dist.get_world_size(), (9,), generator=generator)
        loss = dwl_kernels.full_softmax_loss(*leaves[:2], target, **options)
    else:
        options["ring"] = how == "ring"
        loss = dwl_kernels.in_batch_softmax_loss(*leaves[:2], negative=leaves[2], **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)]


@pytest.mark.parametrize("how", ["gathered", "ring", "sharded"])
def test_repeats_are_bitwise_the_same(three_ranks, how):
    first, second = three_ranks(repeats, how), three_ranks(repeats, how)
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a is b is None or torch.equal(a, b)
    assert len({float(found[0]) for found in first}) == 1  # the same bits on all ranks


# ---------------------------------------------------------------- mistakes


def mistake(kind: str) -> str:
    """The error of a call in which the last rank does something else than the others."""
    last = dist.get_rank() == dist.get_world_size() - 1
    query = torch.randn(4, 8)
    call: dict[str, Any] = {"query": query, "positive": query, "process_group": dist.group.WORLD}
    table: dict[str, Any] = {"table": torch.randn(5, 8), "target": torch.arange(4)}
    function: Any = dwl_kernels.in_batch_softmax_loss
    if kind in ("target", "shard"):
        function = dwl_kernels.full_softmax_loss
        call = {"query": query, **table, "process_group": dist.group.WORLD}
    if last:
        if kind == "dtype":
            call |= {"query": query.double(), "positive": query.double()}
        elif kind == "width":
            call |= {"query": torch.randn(4, 6), "positive": torch.randn(4, 6)}
        elif kind == "option":
            call |= {"reduction": "sum"}
        elif kind == "temperature":
            call |= {"temperature": 0.5}
        elif kind == "ids":
            call |= {"ids": torch.arange(4)}
        elif kind == "gradient":
            call |= {"positive": query.clone().requires_grad_()}
        elif kind == "loss":
            function = dwl_kernels.sampled_softmax_loss
            call |= {"negative": query}
        elif kind == "shape":
            call |= {"positive": torch.randn(3, 8)}
        elif kind == "backend":
            call |= {"backend": "nope"}
        elif kind == "flag":
            call |= {"ring": "yes"}
        elif kind == "none":
            call |= {"query": None}
        elif kind == "weights":
            call |= {"example_weights": -torch.ones(4)}
        elif kind == "target":
            call |= {"target": torch.tensor([0, 1, 2, 99])}
        elif kind == "shard":
            call |= {"table": torch.randn(5, 6)}
    try:
        function(**call)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return "nothing"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("dtype", "query: .*float32.* on rank 0 .*float64.* on rank 1"),
        ("width", r"query: \[B, 8\].* on rank 0 .*\[B, 6\].* on rank 1"),
        ("option", "reduction: mean on rank 0 .*sum on rank 1"),
        ("temperature", "temperature.*: 1.0 on rank 0 .*0.5 on rank 1"),
        ("ids", "ids: None on rank 0 .*int64 on rank 1"),
        ("gradient", r"gradient: \[\] on rank 0 .*\['candidates'\] on rank 1"),
        ("loss", "loss: in_batch_softmax_loss on rank 0 .*sampled_softmax_loss on rank 1"),
        ("shape", "positive has shape"),
        ("weights", "weight of row 0 is -1|example_weights: None on rank 0"),
        ("target", "target holds 99 on rank 1"),
        ("backend", "backend is 'nope'; wanted one of"),
        ("flag", "ring is a str; wanted True or False"),
        ("none", "query is None; wanted a torch.Tensor"),
        ("shard", "table has shape"),
    ],
)
def test_mistake_of_one_rank_raises_on_all(two_ranks, kind, words):
    found = two_ranks(mistake, kind, seconds=20.0)
    for rank, message in enumerate(found):
        assert message != "nothing", rank
        assert re.search(words, message), message


# ---------------------------------------------------------------- bytes


class Counter:
    """Bytes that a rank hands to the collectives for other ranks."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def __enter__(self) -> Counter:
        ranks, rank = dist.get_world_size(), dist.get_rank()
        gather = "all_gather_single"
        gather = gather if hasattr(dist, gather) else "all_gather_into_tensor"
        names = gather, "all_to_all_single", "batch_isend_irecv"
        self.kept = {name: getattr(dist, name) for name in names}

        def gathered(every: Tensor, own: Tensor, **more: Any) -> Any:
            self.sent.append(own.nbytes * (ranks - 1))
            return self.kept[gather](every, own, **more)

        def exchanged(taken: Tensor, given: Tensor, received: Any, sent: Any, **more: Any) -> Any:
            self.sent.append(sum(sent) - sent[rank])
            return self.kept["all_to_all_single"](taken, given, received, sent, **more)

        def passed_on(moves: list[Any]) -> Any:
            self.sent += [move.tensor.nbytes for move in moves if move.op is dist.isend]
            return self.kept["batch_isend_irecv"](moves)

        for name, function in zip(names, (gathered, exchanged, passed_on), strict=True):
            setattr(dist, name, function)
        return self

    def __exit__(self, *_: Any) -> None:
        for name, function in self.kept.items():
            setattr(dist, name, function)


ROWS, DIM, ITEMS = 6, 8, 10  # of every rank
IDS = [0, 3, 3, 9, 11, 19]


def bytes_of(how: str) -> tuple[list[int], list[int]]:
    """Bytes of the forward and of the backward."""
    query, positive = (torch.randn(ROWS, DIM).requires_grad_() for _ in range(2))
    table = torch.randn(ITEMS, DIM).requires_grad_()
    group: dict[str, Any] = {"process_group": dist.group.WORLD}
    with Counter() as forward:
        if how in ("gathered", "ring"):
            log_q, ids = torch.full((ROWS,), -1.0), torch.arange(ROWS)
            options = {"log_q": log_q, "ids": ids, "ring": how == "ring", **group}
            loss = dwl_kernels.in_batch_softmax_loss(query, positive, **options)
        elif how == "sharded":
            loss = dwl_kernels.full_softmax_loss(query, table, torch.arange(ROWS), **group)
        else:
            ids = torch.tensor(IDS)
            loss = dwl_kernels.indexed_sampled_softmax_loss(query, table, ids, ids[:2], **group)
    with Counter() as backward:
        loss.backward()
    return forward.sent, backward.sent


def aligned(size: int) -> int:
    return math.ceil(size / 16) * 16


@pytest.mark.parametrize("how", ["gathered", "ring", "sharded", "indexed"])
def test_bytes_sent_are_those_of_the_formulas(ranks, how):
    """The formulas of the README, in which a block of a tensor ends at a multiple of 16 bytes."""
    others, embedded = ranks.size - 1, ROWS * DIM * 4
    header, scalars = 40 * others, 16 * others
    block = aligned(embedded) + aligned(ROWS * 8)
    log_q, pairs = aligned(ROWS * 4), ROWS * 16
    asked = [[ids for ids in {*IDS} if ids // ITEMS == rank] for rank in range(ranks.size)]
    for rank, found in enumerate(ranks(bytes_of, how)):
        elsewhere = sum(len(ids) for r, ids in enumerate(asked) if r != rank)
        counts, row = aligned(ranks.size * 8) * others, DIM * 4
        sent = len(asked[rank]) * others  # rows of this shard that the others want
        assert (
            found
            == {
                "gathered": (
                    [header, (block + log_q) * others, scalars],
                    [embedded * others],
                ),
                "ring": (
                    [header, *[block + log_q] * others, scalars],
                    [*[block + log_q, embedded] * others, embedded],
                ),
                "sharded": (
                    [header, block * others, pairs * others, scalars],
                    [aligned(pairs) * others, embedded * others],
                ),
                "indexed": (
                    [header, counts, elsewhere * 8, sent * row, scalars],
                    [elsewhere * row],
                ),
            }[how]
        )


# ---------------------------------------------------------------- modules and trainers


def batch_of(step: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    features = torch.randn(rows, 6, generator=generator)
    items = torch.randint(0, 12, (rows,), generator=generator)
    return features, items, items % 3


class Model(torch.nn.Module):
    def __init__(self, group: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.tower, self.items = torch.nn.Linear(6, 8), torch.nn.Embedding(12, 8)
        self.unused = torch.nn.Linear(2, 2)
        self.loss_fn = DynamicWeightedSampledSoftmax(
            item_domains=torch.arange(12) % 3,
            calibration=0.5,
            normalize=True,
            learn_temperature=True,
            process_group=group,
        )

    def forward(self, features: Tensor, items: Tensor) -> Tensor:
        return self.loss_fn(self.tower(features), self.items(items), positive_ids=items)


def trained(group: Any, micro: int, compiled: bool = False) -> list[Tensor]:
    """The losses of a training, in which every step accumulates the gradients of `micro` parts."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if group is not None else (0, 1)
    model = Model(group)
    run: Any = model
    if group is not None:
        run = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    call = torch.compile(run, backend="aot_eager") if compiled else run
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        for part in range(micro):
            features, items, _ = batch_of(step * micro + part, 12)
            own = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
            last = part == micro - 1
            with run.no_sync() if group is not None and not last else nullcontext():
                loss = call(features[own], items[own]) / micro
                loss.backward()
            losses.append(loss.detach())
        optimizer.step()
    return [*losses, model.items.weight.detach(), model.loss_fn.domain_weights.weights]


def trained_here(micro: int, compiled: bool) -> list[Tensor]:
    return trained(dist.group.WORLD, micro, compiled)


@pytest.mark.parametrize(("micro", "compiled"), [(1, False), (2, False), (1, True)])
def test_training_of_ranks_follows_that_of_one_process(ranks, micro, compiled):
    alone = trained(None, micro)
    for found in ranks(trained_here, micro, compiled):
        for mine, whole in zip(found, alone, strict=True):
            torch.testing.assert_close(mine, whole, rtol=1e-5, atol=1e-6)


def sharded_module(calibration: float) -> tuple[Tensor, Tensor, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    states, table, target, options = sequence()
    shard = distribute_tensor(table, mesh, [Shard(0)]).requires_grad_()
    loss_fn = CumulativeCrossEntropy(
        **options, calibration=calibration, process_group=dist.group.WORLD
    )
    own = slice(dist.get_rank(), None, dist.get_world_size())
    states = states[own].clone().requires_grad_()
    loss = loss_fn(states, shard, target[own])
    loss.backward()
    assert isinstance(shard.grad, DTensor)
    return loss.detach(), states.grad / dist.get_world_size(), shard.grad.full_tensor()


def sequence() -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(6, 4, 8, generator=generator, dtype=torch.float64)
    table = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 11, (6, 4), generator=generator)
    target[:, -1] = -100
    return states, table, target, {"item_domains": torch.arange(11) % 3, "temperature": 0.7}


def with_dtensor() -> list[Tensor]:
    """Losses of a table that is a DTensor, and its gradients, whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    states, table, target, _ = sequence()
    found = []
    for per_row in (False, True):
        shard = distribute_tensor(table, mesh, [Shard(0)]).requires_grad_()
        loss = loss_of_table(states[:, 0], shard, target[:, 0], per_row)
        loss.backward()
        found += [loss.detach(), shard.grad.full_tensor()]
    whole = distribute_tensor(table, mesh, [Replicate()])
    with pytest.raises(TypeError, match=r"table is a DTensor; pass all of it, table\.full_tensor"):
        loss_of_table(states[:, 0], whole, target[:, 0], False)
    return found


def loss_of_table(query: Tensor, table: Tensor, target: Tensor, per_row: bool) -> Tensor:
    if not per_row:
        return dwl_kernels.full_softmax_loss(query, table, target)
    negative = (target[:, None] + torch.arange(1, 4)) % 11
    return dwl_kernels.indexed_sampled_softmax_loss(query, table, target, negative)


def test_functions_take_a_dtensor(two_ranks):
    states, table, target, _ = sequence()
    wanted = []
    for per_row in (False, True):
        leaf = table.clone().requires_grad_()
        loss = loss_of_table(states[:, 0], leaf, target[:, 0], per_row)
        loss.backward()
        wanted += [loss.detach(), leaf.grad]
    for found in two_ranks(with_dtensor):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("calibration", [0.0, 1.0])
def test_cumulative_cross_entropy_takes_a_table_in_shards(ranks, calibration):
    states, table, target, options = sequence()
    states.requires_grad_(), table.requires_grad_()
    loss = CumulativeCrossEntropy(**options, calibration=calibration)(states, table, target)
    loss.backward()
    for rank, (mine, of_states, of_table) in enumerate(ranks(sharded_module, calibration)):
        torch.testing.assert_close(mine, loss.detach())
        torch.testing.assert_close(of_states, states.grad[rank :: ranks.size])
        torch.testing.assert_close(of_table, table.grad)


def streams() -> list[Tensor]:
    sampler = dwl_kernels.UniformSampler(1000)
    group = dist.group.WORLD
    own = sampler.generator(3, process_group=group)
    same = sampler.generator(3, process_group=group, same_on_all_ranks=True)
    return [sampler.sample(64, generator=g)[0] for g in (own, same)]


def test_samplers_draw_apart_or_alike(three_ranks):
    found, again = three_ranks(streams), three_ranks(streams)
    assert len({tuple(own.tolist()) for own, _ in found}) == 3
    assert len({tuple(same.tolist()) for _, same in found}) == 1
    for one, other in zip(found, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
