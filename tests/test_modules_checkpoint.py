"""Forwards that activation checkpointing runs again: counted once, and weighed as at first."""

import copy
import gc
import pickle

import pytest
import torch
from module_inputs import DOMAINS, KINDS, B, D, N, call, draws, item_domains, table_of
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from dwl_kernels import DomainWeights, DynamicWeightedSampledSoftmax

REENTRANT = pytest.mark.parametrize("reentrant", [True, False])


class OwnCheckpoint(torch.autograd.Function):
    """Checkpointing as the trainers write it that bring their own."""

    @staticmethod
    def forward(ctx, function, query):
        ctx.function = function
        ctx.save_for_backward(query)
        with torch.no_grad():
            return function(query)

    @staticmethod
    def backward(ctx, upstream):
        query = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            loss = ctx.function(query)
        torch.autograd.backward(loss, upstream)
        return None, query.grad


def plain(function, query):
    return function(query)


def checkpointed(reentrant, **options):
    return lambda function, query: checkpoint(
        function, query, use_reentrant=reentrant, preserve_rng_state=False, **options
    )


def nested(outer, inner):
    return lambda function, query: outer(lambda x: inner(function, x), query)


WAYS = {
    "hooks": checkpointed(False),
    "reentrant": checkpointed(True),
    "own": OwnCheckpoint.apply,
    "hooks in hooks": nested(checkpointed(False), checkpointed(False)),
    "reentrant in hooks": nested(checkpointed(False), checkpointed(True)),
    "hooks in reentrant": nested(checkpointed(True), checkpointed(False)),
    "reentrant in reentrant": nested(checkpointed(True), checkpointed(True)),
}
EVERY_WAY = pytest.mark.parametrize("way", WAYS)


def query_of(seed=0, rows=B):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, D, generator=generator, dtype=torch.float64).requires_grad_()


def make(kind="sampled", **options):
    """Weights that follow the counts at once, so that a second count or an old weight shows."""
    weights = DomainWeights(DOMAINS, momentum=0.0)
    options = {"item_domains": item_domains(), "backend": "eager", "calibration": 0.5} | options
    return KINDS[kind](weights=weights, **options)


def losses_of(wrap, loss_fn, batches, kind="sampled"):
    """The losses of batches of (query, ids), all before a backward."""
    table = table_of()
    return [
        wrap(lambda x, ids=ids: call(kind, loss_fn, x, table, ids), query) for query, ids in batches
    ]


def assert_as_without(wrap, batches, backward, kind="sampled"):
    """Losses, gradients and counts are those of plain calls."""
    outcomes = []
    for way in (plain, wrap):
        for query, _ in batches:
            query.grad = None
        loss_fn = make(kind)
        losses = losses_of(way, loss_fn, batches, kind)
        backward(losses)
        state = loss_fn.domain_weights
        outcomes.append(
            [*losses, *(query.grad for query, _ in batches), state.interactions, state()]
        )
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def together(losses):
    sum(losses).backward()


def first_to_last(losses):
    for loss in losses:
        loss.backward()


def last_to_first(losses):
    first_to_last(losses[::-1])


@EVERY_WAY
@pytest.mark.parametrize("kind", KINDS)
def test_second_run_neither_counts_nor_reweighs(kind, way):
    assert_as_without(WAYS[way], [(query_of(), draws())], together, kind)


@EVERY_WAY
@pytest.mark.parametrize("order", [together, first_to_last, last_to_first])
def test_micro_batches_in_flight_keep_their_own_weights(order, way):
    batches = [(query_of(seed), draws(seed)) for seed in range(4)]
    assert_as_without(WAYS[way], batches, order)


@EVERY_WAY
@pytest.mark.parametrize("order", [together, first_to_last, last_to_first])
def test_micro_batches_of_one_domain_are_told_apart_by_their_queries(order, way):
    assert_as_without(WAYS[way], [(query_of(seed), draws()) for seed in range(3)], order)


@EVERY_WAY
def test_one_query_of_several_domains_is_told_apart_by_them(way):
    query = query_of()
    assert_as_without(WAYS[way], [(query, draws(seed)) for seed in range(3)], together)


@pytest.mark.parametrize("way", ["hooks", "reentrant", "own"])
@pytest.mark.parametrize("order", [together, first_to_last])
def test_batches_that_are_alike_altogether_have_the_right_sum_of_gradients(order, way):
    query = query_of()
    assert_as_without(WAYS[way], [(query, draws())] * 3, order)


@EVERY_WAY
def test_same_batch_in_every_step_has_the_weights_of_its_step(way):
    outcomes = []
    for wrap in (plain, WAYS[way]):
        loss_fn, query, outcome = make(), query_of(), []
        loss_fn.domain_weights.update(torch.tensor([0] * 50 + [1]))
        for step in range(4):
            query.grad = None
            (loss,) = losses_of(wrap, loss_fn, [(query, draws())])
            if step != 1:  # a step that is skipped leaves a first run without a second
                loss.backward()
                outcome.append(query.grad)
        outcomes.append([*outcome, loss_fn.domain_weights.interactions])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


@EVERY_WAY
def test_tower_and_two_losses_in_one_region(way):
    outcomes = []
    for wrap in (plain, WAYS[way]):
        torch.manual_seed(0)
        tower, table = torch.nn.Linear(D, D, dtype=torch.float64), table_of()
        losses = [make(), make("cross-entropy")]
        losses[1].domain_weights = losses[0].domain_weights

        def step(x, tower=tower, table=table, losses=losses):
            hidden = tower(x).tanh()
            first = call("sampled", losses[0], hidden, table)
            return first * call("cross-entropy", losses[1], hidden, table, draws(1))

        query = query_of()
        wrap(step, query).backward()
        counts = losses[0].domain_weights.interactions
        outcomes.append([query.grad, *(p.grad for p in tower.parameters()), table.grad, counts])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_backward_twice_runs_forward_three_times_and_counts_once():
    query, loss_fn = query_of(), make()
    (loss,) = losses_of(WAYS["hooks"], loss_fn, [(query, draws())])
    counts = loss_fn.domain_weights.interactions.clone()
    first, second = (torch.autograd.grad(loss, query, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(loss_fn.domain_weights.interactions, counts)


@REENTRANT
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_and_default_dtype_change_nothing(reentrant, dtype):
    torch.set_default_dtype(dtype)
    try:
        outcomes = []
        for wrap in (plain, checkpointed(reentrant)):
            loss_fn, queries = make(), [query_of(seed).detach().float() for seed in range(3)]
            for query in queries:
                query.requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                losses = losses_of(wrap, loss_fn, [(query, draws()) for query in queries])
            together(losses)
            outcomes.append([*losses, *(query.grad for query in queries)])
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_region_that_is_not_stopped_early_counts_once():
    with set_checkpoint_early_stop(False):
        assert_as_without(WAYS["hooks"], [(query_of(s), draws(s)) for s in range(2)], together)


def test_rows_of_pipelined_micro_batches_keep_their_weights():
    """One forward, one backward: a batch is on its way while the one before comes back."""
    outcomes = []
    for wrap in (plain, WAYS["hooks"], WAYS["reentrant"]):
        loss_fn, queries, flying = make(), [query_of(seed) for seed in range(5)], []
        for seed, query in enumerate(queries):
            flying += losses_of(wrap, loss_fn, [(query, draws(seed))])
            if len(flying) == 3:
                flying.pop(0).backward()
        first_to_last(flying)
        outcomes.append([*(query.grad for query in queries), loss_fn.domain_weights.interactions])
    for other in outcomes[1:]:
        for one, two in zip(outcomes[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-14)


# ---------------------------------------------------------------- what does not train


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_validation_without_gradients_counts_nothing(kind, without):
    loss_fn = make(kind)
    before = copy.deepcopy(loss_fn.state_dict())
    with without():
        call(kind, loss_fn, query_of().detach(), table_of().detach())
    for name, value in loss_fn.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("way", ["hooks", "reentrant", "own", "reentrant in reentrant"])
def test_validation_of_a_checkpointed_model_counts_nothing(way):
    loss_fn = make()
    with torch.no_grad():
        losses_of(WAYS[way], loss_fn, [(query_of(), draws())])
    assert loss_fn.domain_weights.interactions.sum() == 0


@REENTRANT
def test_validation_between_forward_and_backward_changes_nothing(reentrant):
    query, loss_fn = query_of(), make()
    (loss,) = losses_of(checkpointed(reentrant), loss_fn, [(query, draws())])
    with torch.no_grad():
        losses_of(plain, loss_fn, [(query_of(seed), draws(seed)) for seed in range(3)])
    loss.backward()
    got, query.grad = query.grad, None
    together(losses_of(plain, make(), [(query, draws())]))
    torch.testing.assert_close(got, query.grad, rtol=0, atol=1e-14)


# ---------------------------------------------------------------- compiled


@REENTRANT
@pytest.mark.parametrize("inside", [True, False])
def test_compiled_module_counts_once(inside, reentrant):
    torch._dynamo.reset()
    outcomes = []
    for compiled in (False, True):
        loss_fn = DynamicWeightedSampledSoftmax(
            weights=DomainWeights(DOMAINS, momentum=0.0), calibration=0.5, backend="eager"
        )
        domain_ids, negative_domain_ids = draws()["domain_ids"], torch.arange(N) % DOMAINS
        positive, negative = table_of()[:B].detach(), table_of()[:N].detach()

        def run(x, loss_fn=loss_fn, rows=(domain_ids, negative_domain_ids, positive, negative)):
            domain_ids, negative_domain_ids, positive, negative = rows
            return loss_fn(
                *(x, positive, negative),
                domain_ids=domain_ids,
                negative_domain_ids=negative_domain_ids,
            )

        step = run
        if compiled and inside:  # the checkpoint runs a compiled function
            run = torch.compile(run, fullgraph=True, backend="aot_eager")
        if compiled:
            step = lambda x, run=run: checkpoint(run, x, use_reentrant=reentrant)  # noqa: E731
        if compiled and not inside:
            step = torch.compile(step, backend="aot_eager")
        # Of a checkpoint inside the graph one at a time: with more PyTorch refuses the backward,
        # because the graph has saved the counts, which have moved on.
        queries = [query_of(seed) for seed in range(2 if inside else 1)]
        sum(step(query) for query in queries).backward()
        outcomes.append([*(query.grad for query in queries), loss_fn.domain_weights.interactions])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------- what is kept


def test_nothing_is_kept_where_no_forward_runs_twice():
    loss_fn = make()
    together(losses_of(plain, loss_fn, [(query_of(), draws())]))
    assert not loss_fn.runs.first
    constant = DynamicWeightedSampledSoftmax(weights=[1.0] * DOMAINS, item_domains=item_domains())
    together(losses_of(WAYS["hooks"], constant, [(query_of(), draws())]))
    assert not constant.runs.first
    assert constant.domain_weights.interactions.sum() > 0


@pytest.mark.parametrize("way", WAYS)
def test_first_runs_are_forgotten_with_their_graphs(way):
    loss_fn, query = make(), query_of()
    for step in range(5):
        (loss,) = losses_of(WAYS[way], loss_fn, [(query, draws())])
        if step % 2:
            loss.backward()
        del loss
        gc.collect()
        assert len(loss_fn.runs.first) <= 1
    flying = losses_of(WAYS[way], loss_fn, [(query, draws())] * 3)
    assert len(loss_fn.runs.first) == len(flying)


def test_copies_have_nothing_in_flight():
    loss_fn = make()
    flying = losses_of(WAYS["hooks"], loss_fn, [(query_of(), draws())])
    for twin in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
        assert len(loss_fn.runs.first) == len(flying)
        assert not twin.runs.first
        assert twin.runs.handle != loss_fn.runs.handle
        assert torch.equal(twin.domain_weights(), loss_fn.domain_weights())


def test_registered_ops_pass_opcheck():
    ids, weights = torch.tensor([[0, -1], [2, 1]]), torch.tensor([1.0, 2.0, 0.5])
    for recording in (True, False):
        torch.library.opcheck(torch.ops.dwl_kernels.rows_to_count.default, (ids, recording))
        for handle in (make().runs.handle, 1 << 40):
            call = (weights, ids, torch.randn(2, D), handle, recording)
            torch.library.opcheck(torch.ops.dwl_kernels.weights_of_run.default, call)
