"""Bad input: every message names the argument, what was got and what is wanted."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from good_arguments import B, D, N, good, ids

import dwl_kernels
from dwl_kernels import (
    dual_scale_softmax_loss,
    full_softmax_loss,
    in_batch_softmax_loss,
    indexed_sampled_softmax_loss,
    sampled_softmax_loss,
)

WRONG_TYPE = [
    ({"query": [[1.0]]}, r"query is a list; wanted a torch\.Tensor"),
    ({"query": torch.ones(B, D, dtype=torch.int64)}, r"query has dtype torch\.int64; wanted float"),
    ({"positive": torch.ones(B, D).double()}, r"positive has dtype .*float64 but query .*float32"),
    ({"negative": torch.ones(N, D).half()}, r"negative has dtype .*float16 but query .*float32"),
    ({"negative": torch.eye(N)[:, :D].to_sparse()}, r"negative has layout .*\.to_dense\(\)"),
    ({"positive_ids": torch.ones(B), "negative_ids": ids(N)}, r"positive_ids has dtype .*integers"),
    (
        {"domain_ids": torch.ones(B), "domain_weights": torch.ones(2)},
        r"domain_ids has dtype .*integers",
    ),
    ({"positive_log_q": ids(B)}, r"positive_log_q has dtype .*floating"),
    ({"temperature": torch.tensor(1)}, r"temperature has dtype .*floating"),
]

WRONG_VALUE = [
    ({"query": torch.ones(D)}, r"query has shape \[3\]; wanted \[B, D\]"),
    ({"query": torch.ones(B, 0)}, r"query has embeddings of size 0"),
    ({"positive": torch.ones(B, D + 1)}, r"positive has shape \[4, 4\]; wanted \[4, 3\]"),
    ({"positive": torch.ones(B + 1, D)}, r"positive has shape \[5, 3\]; wanted \[4, 3\]"),
    ({"negative": torch.ones(N, D + 1)}, r"negative has shape \[6, 4\]; wanted \[N, 3\]"),
    ({"negative": torch.ones(D)}, r"negative has shape \[3\]; wanted \[N, 3\]"),
    ({"negative": torch.ones(N, D, device="meta")}, r"negative is on meta but query is on cpu"),
    ({"positive_ids": ids(B)}, r"positive_ids is given without negative_ids; pass both"),
    ({"negative_ids": ids(N)}, r"negative_ids is given without positive_ids; pass both"),
    ({"positive_ids": ids(N), "negative_ids": ids(N)}, r"positive_ids has shape \[6\]; wanted"),
    ({"positive_log_q": torch.ones(N)}, r"positive_log_q has shape \[6\]; wanted \[4\]"),
    ({"negative_log_q": torch.ones(B)}, r"negative_log_q has shape \[4\]; wanted \[6\]"),
    ({"domain_ids": ids(B)}, r"domain_ids is given without domain_weights; pass the weight"),
    ({"domain_weights": torch.ones(3)}, r"domain_weights is given without domain_ids; pass"),
    (
        {"domain_ids": ids(B + 1), "domain_weights": torch.ones(9)},
        r"domain_ids has shape \[5\]; wanted \[4",
    ),
    (
        {"domain_ids": ids(B), "domain_weights": torch.ones(0)},
        r"domain_weights has shape \[0\]; wanted \[num_domains\]",
    ),
    (
        {"domain_ids": ids(B), "domain_weights": torch.ones(2, 2)},
        r"domain_weights has shape \[2, 2\]; wanted",
    ),
    ({"example_weights": torch.ones(N)}, r"example_weights has shape \[6\]; wanted \[4\]"),
    (
        {"example_weights": torch.tensor([1.0, -2.0, 1.0, 1.0])},
        r"weight of row 1 is -2, .*negative",
    ),
    (
        {"domain_ids": ids(B), "domain_weights": torch.tensor([1.0, 1.0, -3.0, 1.0])},
        r"weight of row 2 is -3, .*domain_weights",
    ),
    (
        {"example_weights": torch.ones(B, requires_grad=True)},
        r"example_weights requires a gradient, .*detach",
    ),
    (
        {"negative_log_q": torch.ones(N, requires_grad=True)},
        r"negative_log_q requires a gradient, .*detach",
    ),
    ({"temperature": 0.0}, r"temperature is 0\.0; wanted a positive, finite number"),
    ({"temperature": -1}, r"temperature is -1\.0; wanted a positive"),
    ({"temperature": float("nan")}, r"temperature is nan; wanted a positive"),
    ({"temperature": torch.ones(B + 1)}, r"temperature has shape \[5\]; wanted \[4\]"),
    ({"reduction": "average"}, r"reduction is 'average'; wanted one of \('mean', 'weighted_mean'"),
    ({"correction": "none"}, r"correction is 'none'; wanted one of \('standard', 'refined'\)"),
    ({"backend": "cuda2"}, r"backend is 'cuda2'; wanted one of \('auto'"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_TYPE, ids=lambda x: str(x)[:40])
def test_wrong_type_is_a_type_error_that_names_it(change: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        sampled_softmax_loss(**good(**change))


@pytest.mark.parametrize(("change", "message"), WRONG_VALUE, ids=lambda x: str(x)[:40])
def test_wrong_value_is_a_value_error_that_names_it(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampled_softmax_loss(**good(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negative_ids": ids(N)}, r"negative_log_q and negative_ids describe `negative`"),
        ({"negative": torch.ones(N, D), "ids": ids(B)}, r"ids is given without negative_ids"),
        (
            {"negative": torch.ones(N, D), "log_q": torch.ones(B)},
            r"log_q is given without negative_log_q",
        ),
        ({"ids": ids(N)}, r"ids has shape \[6\]; wanted \[4\]"),
        ({"log_q": torch.ones(N)}, r"log_q has shape \[6\]; wanted \[4\]"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_wrong_in_batch_arguments_are_named(change: dict, message: str) -> None:
    inputs = good()
    del inputs["negative"]
    with pytest.raises(ValueError, match=message):
        in_batch_softmax_loss(**inputs, **change)


def full(**changes: Any) -> dict[str, Any]:
    inputs = good()
    return {
        "query": inputs["query"],
        "table": inputs["negative"],
        "target": torch.tensor([0, 5, -100, 2]),
        **changes,
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"table": torch.ones(0, D)}, ValueError, r"table has no rows"),
        ({"table": torch.ones(N, D + 1)}, ValueError, r"table has shape \[6, 4\]; wanted \[V, 3\]"),
        ({"target": ids(N)}, ValueError, r"target has shape \[6\]; wanted \[4\]"),
        ({"target": torch.ones(B)}, TypeError, r"target has dtype .*integers"),
        ({"bias": torch.ones(B)}, ValueError, r"bias has shape \[4\]; wanted \[6\]"),
        ({"skip_threshold": -1e-3}, ValueError, r"skip_threshold is -0\.001; wanted a finite"),
        ({"skip_threshold": float("inf")}, ValueError, r"skip_threshold is inf; wanted a finite"),
        ({"skip_threshold": float("nan")}, ValueError, r"skip_threshold is nan; wanted a finite"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_wrong_arguments_of_the_full_softmax_are_named(
    change: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        full_softmax_loss(**full(**change))


@pytest.mark.parametrize("bad", [6, -1, 1 << 40])
def test_target_out_of_range_is_an_index_error(backend: str, bad: int) -> None:
    with pytest.raises(IndexError, match=rf"target holds {bad}, but table has 6 rows"):
        full_softmax_loss(**full(target=torch.tensor([0, bad, -100, 2])), backend=backend)


def indexed(**changes: Any) -> dict[str, Any]:
    inputs = good()
    return {
        "query": inputs["query"],
        "table": inputs["negative"],
        "positive_ids": torch.tensor([0, 5, 1, 2]),
        "negative_ids": torch.tensor([[0, 5], [3, 3], [1, 2], [4, 4]]),
        **changes,
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"table": torch.ones(0, D)}, ValueError, r"table has no rows"),
        ({"table": torch.ones(N, D + 1)}, ValueError, r"table has shape \[6, 4\]; wanted \[V, 3\]"),
        ({"table": torch.ones(N, D).double()}, TypeError, r"table has dtype .*float64 but query"),
        ({"positive_ids": ids(N)}, ValueError, r"positive_ids has shape \[6\]; wanted \[4\]"),
        ({"positive_ids": torch.ones(B)}, TypeError, r"positive_ids has dtype .*integers"),
        ({"negative_ids": torch.ones(B)}, TypeError, r"negative_ids has dtype .*integers"),
        (
            {"negative_ids": ids(N)[None]},
            ValueError,
            r"negative_ids has shape \[1, 6\]; wanted \[N\].* or \[4, 'K'\]",
        ),
        ({"negative_ids": torch.tensor(3)}, ValueError, r"negative_ids has shape \[\]; wanted"),
        ({"negative_ids": [1, 2]}, TypeError, r"negative_ids is a list"),
        (
            {"negative_log_q": torch.ones(2)},
            ValueError,
            r"negative_log_q has shape \[2\]; wanted \[4, 2\]",
        ),
        (
            {"negative_ids": ids(N), "negative_log_q": torch.ones(2)},
            ValueError,
            r"negative_log_q has shape \[2\]; wanted \[6\]",
        ),
        ({"correction": "best"}, ValueError, r"correction is 'best'"),
        ({"backend": "best"}, ValueError, r"backend is 'best'"),
    ],
    ids=lambda x: str(x)[:40],
)
@pytest.mark.parametrize("shared", [False, True])
def test_wrong_arguments_of_the_indexed_loss_are_named(
    change: dict, error: type[Exception], message: str, shared: bool
) -> None:
    inputs = indexed(**change)
    if shared and not {"negative_ids", "negative_log_q"} & change.keys():
        inputs["negative_ids"] = ids(N)
    with pytest.raises(error, match=message):
        indexed_sampled_softmax_loss(**inputs)


@pytest.mark.parametrize("bad", [6, -1, -100, 1 << 40])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["positive_ids", "negative_ids"])
def test_id_outside_the_table_is_an_index_error(
    backend: str, name: str, shared: bool, bad: int
) -> None:
    inputs = indexed(backend=backend)
    if shared:
        inputs["negative_ids"] = ids(N)
    if name == "negative_ids" and bad == -1:
        bad = -2  # -1 is no item, which is left out
    inputs[name].view(-1)[2] = bad
    message = rf"{name} holds {bad}, but table has 6 rows: ids must be in \[0, 6\)"
    with pytest.raises(IndexError, match=message):
        indexed_sampled_softmax_loss(**inputs)
    if not (shared and name == "negative_ids"):  # in a padded row nobody looks
        row = 2 if name == "positive_ids" else 1
        weights = (torch.arange(B) != row).float()
        assert indexed_sampled_softmax_loss(**inputs, example_weights=weights).isfinite()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["positive_ids", "negative_ids"])
def test_id_outside_the_table_is_nan_where_values_are_not_looked_at(
    monkeypatch: pytest.MonkeyPatch, name: str, shared: bool
) -> None:
    """As on CUDA: no read out of bounds, and a loss that cannot pass unnoticed."""
    monkeypatch.setattr(dwl_kernels.core.values, "checks_values", lambda device: False)
    for backend in ("eager", "chunked"):
        inputs = indexed(backend=backend, reduction="none")
        inputs["table"].requires_grad_()
        if shared:
            inputs["negative_ids"] = ids(N)
        inputs[name].view(-1)[2] = 1 << 40
        loss = indexed_sampled_softmax_loss(**inputs)
        rows = [2] if name == "positive_ids" else [0, 1, 2, 3] if shared else [1]
        assert loss.isnan().nonzero()[:, 0].tolist() == rows
        loss.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hardness": -float("inf")}, ValueError, r"hardness is -inf; wanted a finite number"),
        ({"similarity": float("nan")}, ValueError, r"similarity is nan"),
        ({"competition": float("inf")}, ValueError, r"competition is inf"),
        ({"slate_size": 0}, ValueError, r"slate_size is 0; wanted at least 1"),
        ({"slate_size": 2.0}, TypeError, r"slate_size is a float; wanted an int"),
        ({"negative": None, "in_batch": False}, ValueError, "no candidates: in_batch is False"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_wrong_choices_of_the_dual_scale_are_named(
    change: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        dual_scale_softmax_loss(**good(**change))


def test_backend_that_does_not_take_a_problem_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if dwl_kernels.backends.unavailable_reason("cpu", "cpu") is not None:
        pytest.skip("no CPU kernel")
    cpu = dwl_kernels.backends.cpu.solve
    monkeypatch.setattr(cpu, "unsupported_reason", lambda problem: "it does not take this")
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run: it does not take this"):
        sampled_softmax_loss(**good(), backend="cpu")
    assert sampled_softmax_loss(**good()).isfinite()


def test_environment_variable_chooses_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    reference = dwl_kernels.backends.reference.solve
    real = reference.solve
    monkeypatch.setattr(reference, "solve", lambda *a: chosen.append("eager") or real(*a))
    monkeypatch.setenv("DWL_KERNELS_BACKEND", "eager")
    sampled_softmax_loss(**good())
    assert chosen == ["eager"]
    monkeypatch.setenv("DWL_KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="backend is 'nonsense'"):
        sampled_softmax_loss(**good())


def test_missing_compiler_warns_once_and_chunked_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "no compiler found"
    monkeypatch.setattr(dwl_kernels.backends.cpu.solve, "does_not_build", lambda: reason)
    monkeypatch.setattr(dwl_kernels.backends, "_warned", set())
    with pytest.warns(UserWarning, match=reason):
        first = sampled_softmax_loss(**good())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = sampled_softmax_loss(**good())
    assert torch.equal(first, second)
    torch.testing.assert_close(first, sampled_softmax_loss(**good(), backend="eager"))
    with pytest.raises(RuntimeError, match=f"backend 'cpu' cannot run: {reason}"):
        sampled_softmax_loss(**good(), backend="cpu")


def test_meta_tensors_give_a_loss_of_the_right_shape() -> None:
    inputs = {k: v.to("meta").requires_grad_() for k, v in good().items()}
    loss = sampled_softmax_loss(**inputs, reduction="none")
    assert (loss.shape, loss.device.type) == ((B,), "meta")


def test_in_batch_takes_the_names_of_the_other_losses() -> None:
    query, positive = torch.randn(3, 4), torch.randn(3, 4)
    log_q, ids = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([1, 1, 2])
    short = dwl_kernels.in_batch_softmax_loss(query, positive, log_q=log_q, ids=ids)
    long = dwl_kernels.in_batch_softmax_loss(
        query, positive, positive_log_q=log_q, positive_ids=ids
    )
    assert torch.equal(short, long)
    with pytest.raises(ValueError, match="log_q and positive_log_q are the same argument"):
        dwl_kernels.in_batch_softmax_loss(query, positive, log_q=log_q, positive_log_q=log_q)
