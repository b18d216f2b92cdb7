"""The losses of ranks that share a batch or a table are those of one process with all of it."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import CASES, MARGIN, Case, error
from torch import Tensor

import dwl_kernels

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


def drawn_at_random(seed: int, count: int = 20) -> list[str]:
    """So many cases, each shared in some way and split somewhere."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        how = draw.choice([*KINDS])
        case = draw.choice([c for c in CASES if c.kind in KINDS[how]])
        if case.inputs(torch.float64)["query"].dim() == 2:
            backend = draw.choice(["chunked", "cpu"])
            found += compared(case, how, torch.float64, backend, draw.randrange(1000))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_any_split_of_any_problem_is_one_process(ranks, seed):
    assert ranks(drawn_at_random, seed) == [[] for _ in range(ranks.size)]


def test_any_split_over_four_ranks_is_one_process(four_ranks):
    assert four_ranks(drawn_at_random, 3, 8) == [[]] * 4


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
    if kind in ("sparse", "indexed backend"):
        function = dwl_kernels.indexed_sampled_softmax_loss
        ids = {"positive_ids": torch.arange(4), "negative_ids": torch.arange(5)}
        call = {"query": query, "table": query, **ids, "process_group": dist.group.WORLD}
    if kind == "bias":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, distribute_tensor

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        split_otherwise = distribute_tensor(torch.zeros(10), mesh, [Replicate()])
        function = dwl_kernels.full_softmax_loss
        call = {"query": query, **table, "process_group": mesh, "bias": torch.zeros(5)}
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
        elif kind in ("backend", "indexed backend"):
            call |= {"backend": "nope"}
        elif kind == "sparse":
            call |= {"sparse_grad": 1}
        elif kind == "bias":
            call |= {"bias": split_otherwise}
        elif kind == "twice":
            call |= {"ids": torch.arange(4), "positive_ids": torch.arange(4)}
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
        ("indexed backend", "backend is 'nope'; wanted one of"),
        ("sparse", "sparse_grad is a int; wanted True or False"),
        ("bias", r"bias is a DTensor that is not split.*redistribute\(placements=\[Shard"),
        ("twice", "ids and positive_ids are the same argument"),
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
