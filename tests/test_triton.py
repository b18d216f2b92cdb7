"""What only the Triton kernel has: tiles, splits, references, packed rows. Runs interpreted."""

from __future__ import annotations

import dataclasses

import cases
import pytest
import torch

import dwl_kernels
from dwl_kernels import backends
from dwl_kernels.backends.triton import solve as host
from dwl_kernels.backends.triton.tiles import Tiles
from dwl_kernels.core import build as builders
from dwl_kernels.core.problem import GradMask

REASON = backends.unavailable_reason("triton", "cpu")
interpreted = pytest.mark.skipif(REASON is not None, reason=str(REASON))
BY_NAME = {case.name: case for case in cases.CASES}


def use(monkeypatch: pytest.MonkeyPatch, tiles: tuple[int, ...], workers: int) -> None:
    chosen = host.Interpreter(Tiles(*tiles, 1, 1, 4, 1), workers)
    monkeypatch.setattr(host, "INTERPRETER", chosen)


@interpreted
@pytest.mark.parametrize("workers", [1, 2, 7, 40])
@pytest.mark.parametrize("tiles", [(16, 32, 32, 16), (32, 16, 16, 64)], ids=str)
@pytest.mark.parametrize("name", ["mixed, everything", "refined, everything", "by row, refined"])
def test_tile_shapes_and_splits_do_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch, name: str, tiles: tuple[int, ...], workers: int
) -> None:
    """1 worker splits nothing, 40 split every tile; blocks of 64 are wider than some inputs."""
    use(monkeypatch, tiles, workers)
    cases.check(BY_NAME[name], "triton", torch.float64)


@interpreted
@pytest.mark.parametrize("tiles", [(16, 32, 32, 16), (32, 16, 16, 32)], ids=str)
@pytest.mark.parametrize("name", ["in-batch", "mixed without ids"])
def test_own_positive_is_found_in_tiles_that_are_no_squares(
    monkeypatch: pytest.MonkeyPatch, name: str, tiles: tuple[int, ...]
) -> None:
    """Ids do not find it there, and it lies in blocks that begin elsewhere than their tile."""
    use(monkeypatch, tiles, 3)
    case = dataclasses.replace(BY_NAME[name], rows=35)
    cases.check(case, "triton", torch.float64)


@interpreted
@pytest.mark.parametrize("workers", [3, 40])
@pytest.mark.parametrize("name", ["full softmax, past the tile", "dual scale, everything"])
def test_targets_and_slates_may_stand_anywhere_in_the_tiles(
    monkeypatch: pytest.MonkeyPatch, name: str, workers: int
) -> None:
    use(monkeypatch, (16, 32, 64, 16), workers)
    cases.check(BY_NAME[name], "triton", torch.float64)


@interpreted
@pytest.mark.parametrize("slate_size", [1, 3, 32, 33, 40])
def test_groups_of_the_slate_may_be_smaller_than_blocks_and_empty(slate_size: int) -> None:
    case = BY_NAME["dual scale, mixed, NaN in the padding"]
    options = {**case.options, "slate_size": slate_size}
    cases.check(dataclasses.replace(case, options=options), "triton", torch.float64)


@interpreted
@pytest.mark.parametrize("wanted", [("bias",), ("table",), ("query", "bias"), ("temperature",)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bias_and_table_need_no_other_gradient(wanted: tuple[str, ...], reduction: str) -> None:
    case = BY_NAME["full softmax, weighted_mean"]
    results = []
    for backend in ("triton", "eager"):
        inputs = {**case.inputs(torch.float64), "reduction": reduction}
        for name in ("query", "table", "bias", "temperature", "domain_weights"):
            inputs[name].requires_grad_(name in wanted)
        loss = case.loss(inputs, backend)
        results.append(torch.autograd.grad(loss.sum(), [inputs[name] for name in wanted]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@interpreted
def test_log_q_of_a_batch_gets_the_gradient_of_both_roles() -> None:
    """The public losses take log-Q without a gradient; the kernel gives it for any problem."""
    inputs = BY_NAME["mixed, everything"].inputs(torch.float64)
    inputs = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    problem = builders.in_batch_problem(**inputs, correction="standard", reduction="mean")
    wanted = GradMask(False, False, False, True, False, False)
    ours, theirs = (backends.pick(b, problem)(problem, wanted, None) for b in ("triton", "eager"))
    assert ours.candidates is ours.query is None
    torch.testing.assert_close(ours.candidate_log_q, theirs.candidate_log_q, rtol=1e-9, atol=1e-12)


@interpreted
@pytest.mark.parametrize(
    ("name", "skip_threshold"),
    [
        *(("mixed, everything", 0.0), ("in-batch, NaN in the padding", 0.0)),
        *(("everything, none", 0.0), ("refined, everything", 0.0), ("dual scale, everything", 0.0)),
        *(("full softmax, NaN in the padding", t) for t in (0.0, 0.02)),
        ("by row, everything", 0.0),
    ],
)
def test_what_the_workspace_held_before_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, name: str, skip_threshold: float
) -> None:
    """Blocks read places past the last row, which nobody has written."""
    triton_access = pytest.importorskip("triton_access")
    use(monkeypatch, (16, 16, 16, 16), 3)
    case, results = BY_NAME[name], []
    if skip_threshold:
        options = {**case.options, "skip_threshold": skip_threshold}
        case = dataclasses.replace(case, options=options)
    try:
        for fill in ((0.0, 0), *triton_access.FILLS):
            triton_access.CHECKER.fill_with(fill)
            results.append(cases.loss_and_gradients(case, "triton", torch.float32))
    finally:
        triton_access.CHECKER.fill_with()
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], rtol=0, atol=0, equal_nan=True)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_candidate_far_above_the_positive_starts_the_tile_again(dtype: torch.dtype) -> None:
    """Logits from -300 to 300: with the positive as reference a total overflows float32."""
    query = torch.linspace(-1, 1, 33)[:, None].to(dtype).requires_grad_()
    positive = -10 * query.detach()
    negative = torch.linspace(-300, 300, 40)[:, None].to(dtype).requires_grad_()
    losses = {}
    for backend in ("triton", "eager"):
        loss = dwl_kernels.sampled_softmax_loss(query, positive, negative, backend=backend)
        losses[backend] = (loss, *torch.autograd.grad(loss, (query, negative)))
    for ours, theirs in zip(losses["triton"], losses["eager"], strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.01, atol=0.01)


@interpreted
def test_tf32_products_pass_at_lower_matmul_precision() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        cases.check(BY_NAME["log-Q"], "triton", torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


@interpreted
def test_padding_reaches_neither_the_tiles_nor_the_losses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every second row is padding: the result is that of the other rows alone."""
    use(monkeypatch, (16, 16, 16, 16), 3)
    generator = torch.Generator().manual_seed(5)
    query, positive = (torch.randn(70, 8, generator=generator) for _ in range(2))
    weights = torch.arange(70) % 2
    query[weights == 0] = torch.nan
    loss = dwl_kernels.in_batch_softmax_loss(
        query, positive, example_weights=weights, backend="triton"
    )
    expected = dwl_kernels.in_batch_softmax_loss(query[1::2], positive[1::2], backend="eager")
    torch.testing.assert_close(loss, expected)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_launch_scales_all_gradients(dtype: torch.dtype) -> None:
    """Lengths around the block of 4096; a factor that float16 cannot hold."""
    generator = torch.Generator().manual_seed(3)
    gradients = [
        torch.randn(n, generator=generator).mul(1e-3).to(torch.float32 if n == 1 else dtype)
        for n in (1, 4095, 4097, 0, 9000)
    ]
    dtypes = [g.dtype for g in gradients]
    products = host.scaled(gradients, torch.tensor(70000.0), dtypes)
    for gradient, product in zip(gradients, products, strict=True):
        assert product.dtype == gradient.dtype
        torch.testing.assert_close(product, (gradient.float() * 70000.0).to(gradient.dtype))


@interpreted
@pytest.mark.parametrize(
    ("change", "error"),
    [({"domain_ids": torch.tensor([0, 9])}, IndexError),
     ({"domain_weights": torch.tensor([1.0, -1.0])}, ValueError)],
    ids=["domain id", "negative weight"],
)  # fmt: skip
def test_bad_values_raise_on_a_cpu(change: dict, error: type[Exception]) -> None:
    arguments = {
        "domain_ids": torch.tensor([0, 1]),
        "domain_weights": torch.tensor([1.0, 2.0]),
    }
    with pytest.raises(error):
        dwl_kernels.sampled_softmax_loss(
            torch.ones(2, 3), torch.ones(2, 3), torch.ones(4, 3),
            backend="triton", **{**arguments, **change},
        )  # fmt: skip


@interpreted
def test_bad_values_give_nan_where_nothing_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the row's loss is NaN, no other row's is."""
    monkeypatch.setattr(host, "checks_values", lambda device: False)
    loss = dwl_kernels.sampled_softmax_loss(
        torch.ones(4, 3),
        torch.ones(4, 3),
        torch.ones(5, 3),
        domain_ids=torch.tensor([0, 7, 1, -9]),
        domain_weights=torch.tensor([1.0, -1.0]),
        reduction="none",
        backend="triton",
    )
    assert loss.isnan().tolist() == [False, True, True, True]


@interpreted
@pytest.mark.parametrize("bad", [-2, 41, 1 << 40], ids=str)
@pytest.mark.parametrize("name", ["positive_ids", "negative_ids"])
def test_id_outside_the_table_gives_nan_and_reads_nothing_outside(
    monkeypatch: pytest.MonkeyPatch, name: str, bad: int
) -> None:
    """As on a GPU. Two rows, one of weight zero and one padded: nobody looks at the ids of that."""
    monkeypatch.setattr(host, "checks_values", lambda device: False)
    inputs = BY_NAME["by row, none"].inputs(torch.float32)
    inputs["example_weights"][:5] = 1.0
    inputs["example_weights"][4] = 0.0
    inputs["domain_ids"][3] = 0
    with torch.no_grad():
        inputs["domain_weights"][0] = 0.0
    for row in (2, 3, 4):
        inputs[name].view(17, -1)[row, -1] = bad
    loss = BY_NAME["by row, none"].loss(inputs, "triton")
    assert loss.isnan().nonzero()[:, 0].tolist() == [2, 3]
    (gradient,) = torch.autograd.grad(loss, [inputs["query"]], torch.ones_like(loss))
    assert gradient.isnan().any(1).nonzero()[:, 0].tolist() == [2, 3]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_candidate_by_row_far_above_the_positive_overflows_nothing(dtype: torch.dtype) -> None:
    """Logits from -300 to 300, the largest in the last of three steps."""
    query = torch.linspace(-1, 1, 33)[:, None].to(dtype).requires_grad_()
    table = torch.linspace(-300, 300, 41)[:, None].to(dtype).requires_grad_()
    ids = torch.arange(33) % 41, torch.arange(40).expand(33, 40) + 1
    losses = {}
    for backend in ("triton", "eager"):
        loss = dwl_kernels.indexed_sampled_softmax_loss(query, table, *ids, backend=backend)
        losses[backend] = (loss, *torch.autograd.grad(loss, (query, table)))
    for ours, theirs in zip(losses["triton"], losses["eager"], strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.01, atol=0.01)


@interpreted
@pytest.mark.parametrize("bad", [41, -1, 1 << 40])
def test_target_outside_the_table_gives_nan_where_nothing_checks(
    monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    monkeypatch.setattr(host, "checks_values", lambda device: False)
    loss = dwl_kernels.full_softmax_loss(
        torch.ones(4, 3),
        torch.ones(41, 3),
        torch.tensor([0, bad, -100, 2]),
        reduction="none",
        backend="triton",
    )
    assert loss.isnan().tolist() == [False, True, False, False]
    assert loss[2] == 0
