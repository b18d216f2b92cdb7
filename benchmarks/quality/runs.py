"""All runs of a data set and setting: those that are kept already, and those still to train.

`__main__` calls `complete`. A finished run is kept twice: as its model in a folder that is not
committed, so that another dial or metric needs no training, and as metrics in one JSON file per
data set and setting, which is; tables and pictures are made from that file alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.progress import Progress, in_processes
from benchmarks.record import record, replacing
from dwl_kernels.examples.data import Interactions, load
from dwl_kernels.examples.synthetic import synthetic

from . import factors
from .metrics import SPARSEST, Group, LeaveOneOut, make_groups, ndcg, rank_targets, recall
from .objective import measure_domains
from .settings import METHODS, Config, Method, Setting
from .train import Trained, make_sequence_model, train

# Of the bonus, in nats; weighted training is taken back on the negative side.
STRENGTHS = (-2.0, -1.0, -0.5, -0.25, 0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
DOMAINS = ("domains", "beyond")  # settings with dials, and metrics of every domain
AIMED = ("Film-Noir", "Documentary")  # domains that have a dial of their own
TILT = "log weight"  # the dial that gives or takes what the default weights would
PARTS = ("validation", "test")
METRICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "NDCG@10": ndcg,
    "Recall@10": recall,
    "NDCG@5": functools.partial(ndcg, k=5),  # of the setting "cumulative" alone
}
Key = tuple[int, str]  # of a run: its seed and its method


@functools.cache
def load_data(name: str) -> Interactions:
    """The data set in a folder, or the synthetic one."""
    return synthetic() if name == "synthetic" else load(name)


@functools.cache
def split_of(name: str, setting: Setting) -> LeaveOneOut | factors.RandomSplit:
    if setting in ("domains", "beyond", "cumulative"):
        return LeaveOneOut(load_data(name))
    return factors.RandomSplit(load_data(name), shifted=setting == "dual-scale-shifted")


def one_thread() -> None:
    """Two processes of one thread train more than one of two."""
    torch.set_num_threads(1)


def finished(
    data: str, setting: Setting, config: Config, method: str, seed: int, models: Path
) -> dict[str, Any]:
    """The metrics of a run, from its model where that is kept, else by training it."""
    one, split = METHODS[setting][method], split_of(data, setting)
    trained, about = trained_once(one, split, config, seed, models)
    run: dict[str, Any] = {"method": method, "seed": seed, **about}
    if isinstance(split, factors.RandomSplit):
        for part in PARTS:
            found = factors.metrics(factors.rank_pairs(trained, split, part), split, part)
            run[part] = {"all": {name: [round(value, 5)] for name, value in found.items()}}
    elif setting in DOMAINS:
        first, *others = (dial_of(name, split, trained) for name in dials(split))
        run |= first | {"dials": dict(zip(dials(split)[1:], others, strict=True))}
    else:
        for part in PARTS:
            everyone = make_groups(split, part)[:1]
            run[part] = summary(rank_targets(trained, split, part)[None], everyone, METRICS)
    return run


def trained_once(
    method: Method,
    split: LeaveOneOut | factors.RandomSplit,
    config: Config,
    seed: int,
    models: Path,
) -> tuple[Any, dict[str, Any]]:
    """A model and how it came about, from an earlier command where it is kept."""
    shifted = isinstance(split, factors.RandomSplit) and split.shifted
    made = {"config": asdict(config), "method": asdict(method), "seed": seed, "shifted": shifted}
    digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
    path = models / f"{digest[:16]}.pt"
    if path.exists():
        kept = torch.load(path)
        model = make_model(method, split, config)
        model.load_state_dict(kept["model"])
        return model.eval(), json.loads(kept["about"])
    trained: Trained[Any]
    if isinstance(split, factors.RandomSplit):
        trained = factors.train_factors(method, split, config, seed)
    else:
        trained = train(method, split, config, seed, states=models)
    about = record(
        seconds=round(trained.seconds, 1),
        best_step=trained.best_step,
        checkpoints=[round(value, 5) for value in trained.validation],
    )
    del about["machine"]
    with replacing(path) as partial:
        torch.save({"model": trained.model.state_dict(), "about": json.dumps(about)}, partial)
    return trained.model, about


def make_model(
    method: Method, split: LeaveOneOut | factors.RandomSplit, config: Config
) -> nn.Module:
    if isinstance(split, factors.RandomSplit):
        return factors.make_model(method, split, config)
    return make_sequence_model(method, split, config)


def dials(split: LeaveOneOut) -> list[str]:
    """What the scores of may be raised; the first is the one that methods are compared with."""
    return [SPARSEST, TILT, *(name for name in AIMED if name in split.data.domain_names)]


def dial_of(dial: str, split: LeaveOneOut, model: Any) -> dict[str, Any]:
    """Of both parts the metrics at every strength; by domain NDCG@10 of test items, first dial."""
    domains, weights = torch.from_numpy(split.data.item_domains), measure_domains(split)
    if dial == TILT:
        bonus = weights.log_weight(domains)
        bonus = bonus / bonus.std()
    elif dial == SPARSEST:
        bonus = weights.sparsest(domains).float()
    else:
        bonus = (domains == split.data.domain_names.index(dial)).any(1).float()
    found = {}
    shown = ("all", SPARSEST, *(AIMED if dial == SPARSEST else (dial,)))
    for part in PARTS:
        groups = make_groups(split, part)
        ranks = rank_targets(model, split, part, *(one * bonus for one in STRENGTHS))
        found[part] = summary(ranks, [g for g in groups if g.name in shown], list(METRICS)[:2])
        if dial == SPARSEST and part == "test":
            rest = [group for group in groups if group.name not in shown]
            found[part] |= summary(ranks, rest, ["NDCG@10"])
    return found


def summary(
    ranks: np.ndarray,  # [strengths, E]
    groups: Sequence[Group],
    names: Iterable[str],
) -> dict[str, dict[str, list[float]]]:
    """The mean of every metric by group, a number for each strength of the dial."""
    return {
        group.name: {
            name: [round(float(one), 5) for one in METRICS[name](ranks[:, group.members]).mean(1)]
            for name in names
        }
        for group in groups
    }


def complete(
    data: str,
    setting: Setting,
    config: Config,
    methods: Sequence[str],
    seeds: int,
    jobs: int,
    out: Path,
    models: Path,
    say: Callable[[str], object],
) -> Path:
    """Train what is missing, the seeds outermost; the file holds every run as soon as it is done.

    Args:
        data: the folder of a data set, or "synthetic".
        setting, config, methods, seeds: what to run.
        jobs: how many trainings at once, each of one thread.
        out: the folder of the JSON files.
        models: the folder of the models, and of the states that deferred runs begin with.
        say: told of each finished run.

    Returns:
        The JSON file.

    Raises:
        ValueError: the file holds runs of another configuration.
    """
    split = split_of(data, setting)
    name = split.data.name
    path = out / (f"{name}.json" if setting == "domains" else f"{name}-{setting}.json")
    own = json.loads(json.dumps(head(split, setting, config)))
    document = read_as(own, path)
    order = {method: place for place, method in enumerate(METHODS[setting])}
    runs: dict[Key, Any] = {(run["seed"], run["method"]): run for run in document["runs"]}
    missing = {
        (seed, method): (data, setting, config, method, seed, models / name)
        for seed in range(seeds)
        for method in methods
        if (seed, method) not in runs
    }
    begun, done = time.monotonic(), 0
    with Progress() as progress:
        progress(f"{name}: {len(missing)} runs to train")
        for key, run in in_processes(finished, missing, min(jobs, len(missing)) or 1, one_thread):
            document = read_as(own, path)  # another command may have added runs
            runs = {(run["seed"], run["method"]): run for run in document["runs"]}
            runs[key], done = run, done + 1
            document["runs"] = [
                runs[one]
                for one in sorted(runs, key=lambda key: (key[0], order.get(key[1], len(order))))
            ]
            write(path, document)
            left = (time.monotonic() - begun) / done * (len(missing) - done)
            metric, values = next(iter(run["test"]["all"].items()))
            value = values[document["strengths"].index(0.0)]
            progress("")
            say(f"{name}, {key[1]}, seed {key[0]}: {metric} {value:.4f}, {run['seconds']:.0f} s")
            progress(f"{name}: {len(missing) - done} runs left, {left / 60:.0f} minutes")
    return path


def head(
    split: LeaveOneOut | factors.RandomSplit, setting: Setting, config: Config
) -> dict[str, Any]:
    """What all runs of a file share."""
    data = split.data
    users = {}
    if isinstance(split, LeaveOneOut):
        for part in PARTS:
            users[part] = {g.name: int(g.members.sum()) for g in make_groups(split, part)}
    return {
        "setting": setting,
        "data": {
            "name": data.name,
            "users": data.num_users,
            "items": data.num_items,
            "interactions": len(data.items),
        },
        "users": users,
        "strengths": STRENGTHS if setting in DOMAINS else (0.0,),
        "config": asdict(config),
        "runs": [],
    }


def read_as(own: dict[str, Any], path: Path) -> dict[str, Any]:
    """The file, whose head is `own`; that alone where there is none yet."""
    document = read(path) if path.exists() else own
    config = asdict(Config(0)) | document["config"]
    if (config, document["strengths"]) != (own["config"], own["strengths"]):
        raise ValueError(f"{path} holds runs of another configuration; name another --out")
    return document


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return document


def write(path: Path, document: dict[str, Any]) -> None:
    """A line for each run, so that a new one is one line more."""
    lines = [json.dumps(run, ensure_ascii=False, separators=(",", ":")) for run in document["runs"]]
    text = json.dumps({**document, "runs": []}, ensure_ascii=False, indent=1)
    text = text.removesuffix("[]\n}") + "[\n" + ",\n".join(lines) + "\n]\n}\n"
    with replacing(path) as partial:
        partial.write_text(text, "utf-8")
