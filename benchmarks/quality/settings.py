"""What is compared: the methods of every setting, and how long each data set is trained on.

`train` and `factors` read a method, `runs` goes through them, `report` names them in tables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Setting = Literal["domains", "beyond", "cumulative", "dual-scale", "dual-scale-shifted"]
Loss = Literal[
    "plain",  # sampled softmax with log-Q; all examples weigh alike
    "dynamic",  # examples weigh by the measured sparsity of their domains
    "fixed",  # the sparsest quarter of the domains weighs `high`, the others 1
    "cvar",  # conditional value at risk, 2501.18117: the mean of a batch's `tail` largest losses
    "refined",  # plain, with the positive out of the denominator
    "cross-entropy",  # every item is a candidate
    "binary",  # SASRec's own: one negative that the user does not know, binary cross-entropy
    "bpr",  # GRU4Rec's own: ranked above the targets of the other sequences at the same step
]
Schedule = Literal["start", "ramped", "deferred"]
Backbone = Literal["transformer", "gru", "factors", "graph"]  # the last two of the dual scale
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
    weighed: Literal["domain", "item", "excess"] = "domain"  # what the weights are measured of
    thinned: bool = False  # rows are left out in proportion, in place of weights
    frozen: bool = False  # the item table, once deferred weights have begun
    late_rate: float = 1.0  # what the learning rate is then multiplied by
    candidates: float = 0.0  # power of an item's weight by which it is drawn as a candidate
    temperature: float | None = None  # in place of that of the configuration
    hardness: float = 0.0
    similarity: float = 0.0
    competition: float = 0.0


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
FACTORS = {  # of the dual scale; steps and temperature by NDCG@20 of the softmax loss
    "ml-1m": Config(steps=4000, batch_size=2048, learning_rate=1e-2, temperature=0.2),
    "lastfm": Config(steps=500, batch_size=2048, learning_rate=1e-2, temperature=0.2),
}
STEPS = 3000  # on any other data set


def _domains() -> dict[str, Method]:
    """In the order in which they are run."""
    weighted = {
        f"{when}{'' if high == 4 else f' to {high:g}'}{', calibrated' * calibrated}": Method(
            "dynamic", high, schedule, float(calibrated)
        )
        for high in (4.0, 16.0)
        for calibrated in (False, True)
        for when, schedule in SCHEDULES.items()
    }
    return (
        {"plain": Method()}
        | weighted
        | {"CVaR": Method("cvar", tail=0.7), "fixed": Method("fixed")}
    )


TEMPERATURES = (0.1, 0.15, 0.3)  # beside that of `FACTORS`
CLOSE = 0.15


def _dual_scale() -> dict[str, Method]:
    """The softmax loss at several temperatures, then the strengths at that of `FACTORS`.

    Where that is not the best temperature, `CLOSE` is: so the default has both.
    """
    methods = {}
    backbones: dict[str, Backbone] = {"": "factors", "LightGCN ": "graph"}
    for name, backbone in backbones.items():
        plain = Method(backbone=backbone)
        methods[f"{name}softmax"] = plain
        for tau in TEMPERATURES:
            methods[f"{name}softmax at {tau:g}"] = replace(plain, temperature=tau)
        for strength in (0.5, -0.5):
            methods[f"{name}hardness {strength:+g}"] = replace(plain, hardness=strength)
            methods[f"{name}similarity {strength:+g}"] = replace(plain, similarity=strength)
            methods[f"{name}competition {2 * strength:+g}"] = replace(
                plain, competition=2 * strength
            )
        at_close = replace(plain, competition=1.0, temperature=CLOSE)
        methods[f"{name}competition +1 at {CLOSE:g}"] = at_close
    return methods


def _beyond() -> dict[str, Method]:
    """What training may add to the dial; deferred runs begin with the state of the plain one."""
    late = Method("dynamic", schedule="deferred")
    return {
        "plain": Method(),
        "deferred": late,
        "deferred, table frozen": replace(late, frozen=True),
        "deferred, a quarter of the rate": replace(late, late_rate=0.25),
        "by item": Method("dynamic", weighed="item"),
        "by item, deferred": replace(late, weighed="item"),
        "by excess loss": Method("dynamic", weighed="excess"),
        "by excess loss, deferred": replace(late, weighed="excess"),
        "rows left out": Method("dynamic", thinned=True),
        "rows left out, deferred": replace(late, thinned=True),
        "sparse candidates": Method(candidates=1.0),
        "sparser candidates": Method(candidates=2.0),
        "sparse candidates, weighed": Method("dynamic", candidates=1.0),
    }


METHODS: dict[Setting, dict[str, Method]] = {
    "domains": _domains(),
    "beyond": _beyond(),
    "cumulative": {
        "SASRec, binary": Method("binary"),
        "SASRec, cumulative": Method("cross-entropy"),
        "GRU4Rec, BPR": Method("bpr", backbone="gru"),
        "GRU4Rec, cumulative": Method("cross-entropy", backbone="gru"),
    },
    "dual-scale": _dual_scale(),
    "dual-scale-shifted": _dual_scale(),
}


def config_of(setting: Setting, data: str) -> Config:
    """How a data set is trained on, by its name."""
    if setting in ("domains", "beyond", "cumulative"):
        return CONFIGS.get(data, Config(steps=STEPS))
    return FACTORS.get(data, Config(STEPS, batch_size=2048, learning_rate=1e-2, temperature=0.2))
