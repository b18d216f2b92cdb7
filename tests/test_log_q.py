"""Log-Q as it must be given: the log of a probability, of both sides or of none."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dwl_kernels import (
    CountMinSketch,
    DualScaleSampledSoftmax,
    DynamicWeightedSampledSoftmax,
    LogUniformSampler,
    StreamingFrequency,
    UniformSampler,
    UnigramSampler,
    dual_scale_softmax_loss,
    in_batch_softmax_loss,
    indexed_sampled_softmax_loss,
    sampled_softmax_loss,
)

B, N, V, D = 4, 5, 9, 3


def embeddings(rows: int) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(rows))


QUERY, POSITIVE, NEGATIVE, TABLE = embeddings(B), embeddings(B) + 1, embeddings(N), embeddings(V)
IDS, NEGATIVE_IDS = torch.arange(B), torch.arange(N) + 3
ROWS = torch.stack([NEGATIVE_IDS.roll(k) for k in range(B)])
DOMAINS = {"domain_ids": torch.tensor([0, 1, 1, 0])}
OF_NEGATIVES = {"negative_domain_ids": torch.tensor([0, 1, 0, 1, 1])}
STRENGTHS = {"hardness": 1.0, "similarity": 1.0}
OPTIONS = {"weights": [0.25, 4.0], "calibration": 1.0}


def module(kind: Any = DynamicWeightedSampledSoftmax, **options: Any) -> Any:
    return kind(**{"temperature": 1.0, "backend": "eager"} | options)


# Every public call that takes log-Q of positives and negatives, by those names.
BOTH = {
    "sampled": lambda **rest: sampled_softmax_loss(QUERY, POSITIVE, NEGATIVE, **rest),
    "refined": lambda **rest: sampled_softmax_loss(
        QUERY, POSITIVE, NEGATIVE, correction="refined", **rest
    ),
    "indexed": lambda **rest: indexed_sampled_softmax_loss(QUERY, TABLE, IDS, NEGATIVE_IDS, **rest),
    "by row": lambda **rest: indexed_sampled_softmax_loss(QUERY, TABLE, IDS, ROWS, **rest),
    "dual scale": lambda **rest: dual_scale_softmax_loss(
        QUERY, POSITIVE, NEGATIVE, **STRENGTHS, **rest
    ),
    "dual scale, mixed": lambda **rest: dual_scale_softmax_loss(
        QUERY, POSITIVE, NEGATIVE, in_batch=True, **STRENGTHS, **rest
    ),
    "mixed": lambda positive_log_q, **rest: in_batch_softmax_loss(
        QUERY, POSITIVE, log_q=positive_log_q, negative=NEGATIVE, **rest
    ),
    "module": lambda **rest: module()(QUERY, POSITIVE, NEGATIVE, **rest),
    "module, mixed": lambda **rest: module(in_batch=True)(QUERY, POSITIVE, NEGATIVE, **rest),
    "module of the dual scale": lambda **rest: module(DualScaleSampledSoftmax)(
        QUERY, POSITIVE, NEGATIVE, **rest
    ),
    "module of a table": lambda **rest: module()(
        QUERY, table=TABLE, positive_ids=IDS, negative_ids=NEGATIVE_IDS, **rest
    ),
    "module, by row": lambda **rest: module()(
        QUERY, table=TABLE, positive_ids=IDS, negative_ids=ROWS, **rest
    ),
    "calibrated": lambda **rest: module(**OPTIONS)(
        QUERY, POSITIVE, NEGATIVE, **DOMAINS, **OF_NEGATIVES, **rest
    ),
    "calibrated, mixed": lambda **rest: module(in_batch=True, **OPTIONS)(
        QUERY, POSITIVE, NEGATIVE, **DOMAINS, **OF_NEGATIVES, **rest
    ),
    "calibrated, by row": lambda **rest: module(item_domains=[0, 1] * 4 + [0], **OPTIONS)(
        QUERY, table=TABLE, positive_ids=IDS, negative_ids=ROWS, **rest
    ),
}
# Those of positives alone: the batch.
POSITIVES = {
    "in-batch": lambda positive_log_q, **rest: in_batch_softmax_loss(
        QUERY, POSITIVE, log_q=positive_log_q, **rest
    ),
    "dual scale, in-batch": lambda **rest: dual_scale_softmax_loss(
        QUERY, POSITIVE, **STRENGTHS, **rest
    ),
    "module, in-batch": lambda **rest: module()(QUERY, POSITIVE, **rest),
    "calibrated, in-batch": lambda **rest: module(**OPTIONS)(QUERY, POSITIVE, **DOMAINS, **rest),
}
ALL = BOTH | POSITIVES


def valid(kind: str) -> dict[str, Tensor]:
    """Log-Q of both sides as the call takes it."""
    log_q = {"positive_log_q": torch.tensor([-1.0, -2.0, -3.0, -0.5])}
    if kind in BOTH:
        shape = (B, N) if "by row" in kind else (N,)
        log_q["negative_log_q"] = -torch.arange(1.0, 1 + math.prod(shape)).view(shape)
    return log_q


WRONG = {
    "probabilities": lambda log_q: log_q.exp(),
    "of uniform draws from a billion": lambda log_q: torch.full_like(log_q, 1e-9),
    "probabilities, some of them 0": lambda log_q: torch.where(log_q < -1, 1e-7, 0.0),
    "counts": lambda log_q: (100 * log_q.exp()).ceil(),
    "logs of counts": lambda log_q: (100 * log_q.exp()).ceil().log(),
    "the other sign": lambda log_q: -log_q,
    "logs of expected counts": lambda log_q: log_q + math.log(20),
    "one above 0": lambda log_q: torch.where(log_q == log_q.max(), 0.01, log_q),
    "NaN elsewhere": lambda log_q: torch.where(log_q == log_q.max(), torch.nan, -log_q),
    "-inf elsewhere": lambda log_q: torch.where(log_q == log_q.max(), 3.0, -torch.inf),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", ALL)
def test_what_is_no_log_of_a_probability_is_refused_with_the_mend(kind: str, wrong: str) -> None:
    for name in valid(kind):
        given = valid(kind)
        given[name] = WRONG[wrong](given[name])
        prefix = "log_q" if kind in ("in-batch", "mixed") and name[0] == "p" else name
        message = (
            rf"^{prefix} holds .* at most 0: pass the log of the probability .*not a probability, "
            r"a count or minus the log; from the log of an expected count subtract the log of the "
            r"number of draws"
        )
        with pytest.raises(ValueError, match=message):
            ALL[kind](**given)


@pytest.mark.parametrize("kind", ALL)
def test_log_probabilities_are_taken_with_infinities_and_what_rounding_leaves(kind: str) -> None:
    for name, value in valid(kind).items():
        for odd in (0.0, 1e-7, -torch.inf, torch.inf, torch.nan, -1e30):
            changed = value.clone()
            changed.view(-1)[1] = odd
            ALL[kind](**valid(kind) | {name: changed})
        certain = torch.zeros_like(value)  # an item that every draw gives
        ALL[kind](**valid(kind) | {name: certain})


@pytest.mark.parametrize("kind", ALL)
def test_log_q_of_padded_rows_is_not_looked_at(kind: str) -> None:
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0])
    wanted = ALL[kind](**valid(kind), example_weights=weights)
    for odd in (7.0, torch.nan):
        given = valid(kind)
        for value in given.values():
            if len(value) == B:  # what the rows do not share
                value[2] = odd
        torch.testing.assert_close(ALL[kind](**given, example_weights=weights), wanted)


@pytest.mark.parametrize("kind", BOTH)
def test_log_q_of_one_side_alone_is_refused(kind: str) -> None:
    for name in ("positive_log_q", "negative_log_q"):
        given = {"positive_log_q": None, "negative_log_q": None} | {name: valid(kind)[name]}
        with pytest.raises(ValueError, match=r"log_q is given without .*log_q; pass both"):
            BOTH[kind](**given)


@pytest.mark.parametrize("kind", ["calibrated", "calibrated, mixed", "calibrated, by row"])
def test_calibration_may_lift_log_q_above_zero(kind: str) -> None:
    near_zero = {name: torch.full_like(v, -0.01) for name, v in valid(kind).items()}
    got = BOTH[kind](**near_zero)  # -log 0.25 lies above it by far
    far_below = {name: value - 5 for name, value in near_zero.items()}
    torch.testing.assert_close(got, BOTH[kind](**far_below))  # a constant cancels


def test_values_are_not_looked_at_where_that_would_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwl_kernels.core.checks.checks_values", lambda device: False)
    given = {name: -value for name, value in valid("sampled").items()}
    assert BOTH["sampled"](**given).isfinite()


def test_compiled_call_does_not_look_at_values() -> None:
    compiled = torch.compile(BOTH["sampled"], fullgraph=True, backend="aot_eager")
    given = {name: -value for name, value in valid("sampled").items()}
    assert compiled(**given, backend="eager").isfinite()


def test_bias_of_the_full_softmax_is_no_log_q() -> None:
    from dwl_kernels import full_softmax_loss

    assert full_softmax_loss(QUERY, TABLE, IDS, bias=torch.full((V,), 3.0)).isfinite()


@pytest.mark.parametrize(
    "estimate",
    [
        UniformSampler(1),
        LogUniformSampler(1),
        UnigramSampler([5]),
        UnigramSampler([10**15, 1, 0]),
        CountMinSketch(16),
        *(StreamingFrequency(16, learning_rate=rate) for rate in (0.01, 0.3)),
        *(StreamingFrequency(16, initial_gap=gap) for gap in (1, 1.7)),
        StreamingFrequency(16, batch_size=3),
    ],
    ids=lambda x: f"{type(x).__name__}({x.extra_repr()})",
)
def test_no_estimate_of_ours_is_above_zero(estimate: Any) -> None:
    """One item in every draw and every batch: where rounding would show."""
    estimate = copy.deepcopy(estimate)
    ids = torch.zeros(3, dtype=torch.int64)
    for _ in range(200):
        if hasattr(estimate, "update"):
            estimate.update(ids)
        assert estimate.log_q(ids).max() <= 0
