"""What is compared: the methods of every setting, and how long each data set is trained on.

`train` and `factors` read a method, `runs` goes through them, `report` names them in tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Setting = Literal["domains", "cumulative", "dual-scale"]
Loss = Literal[
    "plain",  # sampled softmax with log-Q; all examples weigh alike
    "dynamic",  # examples weigh by the measured sparsity of their domains
    "fixed",  # the sparsest quarter of the domains weighs `high`, the others 1
    "cvar",  # the conditional value at risk: the mean of the `tail` largest losses of a batch
    "refined",  # plain, with the positive out of the denominator
    "cross-entropy",  # every item is a candidate
    "binary",  # SASRec's own: one negative that the user does not know, binary cross-entropy
    "bpr",  # GRU4Rec's own: ranked above the targets of the other sequences at the same step
]
Schedule = Literal["start", "ramped", "deferred"]
Backbone = Literal["transformer", "gru"]
DEFERRED = 0.6  # of the steps are over when deferred weights begin


@dataclass(frozen=True)
class Method:
    """One way to train; a field that its loss has no use for is left alone."""

    loss: Loss = "plain"
    high: float = 4.0  # weights are measured in (1, high)
    schedule: Schedule = "start"
    calibration: float = 0.0
    tail: float = 1.0
    backbone: Backbone = "transformer"


@dataclass(frozen=True)
class Config:
    """Everything else that shapes a training; the same for all methods of a data set."""

    steps: int
    max_length: int = 50
    batch_size: int = 64  # sequences
    learning_rate: float = 5e-3
    dim: int = 64
    blocks: int = 2
    heads: int = 1
    dropout: float = 0.1
    negatives: int = 1024  # shared by the rows of a batch
    sampling_power: float = 0.75  # negatives are drawn by popularity to this power
    temperature: float = 1.0


SCHEDULES: dict[str, Schedule] = {
    "from the start": "start",
    "deferred": "deferred",
    "ramped": "ramped",
}
# Chosen by NDCG@10 of the plain loss on validation items, ml-1m by what a processor can do.
CONFIGS = {
    "ml-1m": Config(steps=2400),
    "ml-latest-small": Config(steps=600),
    "lastfm": Config(steps=600),
    "amazon-beauty": Config(steps=3000),
    "synthetic": Config(steps=500),
}
STEPS = 3000  # on any other data set


def _domains() -> dict[str, Method]:
    """In the order in which they are run."""
    plain = {"plain": Method()}
    weighted = {
        f"{when}{'' if high == 4 else f' to {high:g}'}{', calibrated' * calibrated}": Method(
            "dynamic", high, schedule, float(calibrated)
        )
        for high in (4.0, 16.0)
        for calibrated in (False, True)
        for when, schedule in SCHEDULES.items()
    }
    return plain | weighted | {"CVaR": Method("cvar", tail=0.7), "fixed": Method("fixed")}


METHODS: dict[Setting, dict[str, Method]] = {
    "domains": _domains(),
    "cumulative": {
        "SASRec, binary": Method("binary"),
        "SASRec, cumulative": Method("cross-entropy"),
        "GRU4Rec, BPR": Method("bpr", backbone="gru"),
        "GRU4Rec, cumulative": Method("cross-entropy", backbone="gru"),
    },
}
