"""All runs of a data set and setting: those that are kept already, and those still to train.

`__main__` calls `complete`. A finished run is kept twice: as its model and the rank of every target
in a folder that is not committed, and as metrics in one JSON file per data set and setting, which
is; tables and pictures are made from that file alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.progress import Progress, in_processes
from benchmarks.record import record, replacing
from dwl_kernels.examples.data import Interactions, load
from dwl_kernels.examples.synthetic import synthetic

from . import factors
from .metrics import LeaveOneOut, make_groups, ndcg, rank_targets, recall
from .settings import METHODS, Config, Method, Setting
from .train import Trained, by_hand, make_model, measure_domains, train

# Of the bonus of the default weights: the dial of a plain model costs 10% over all before 8, and
# weights in (1, 16) are taken back at -4.
STRENGTHS = (-4.0, -3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
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
    if setting in ("domains", "cumulative"):
        return LeaveOneOut(load_data(name))
    return factors.RandomSplit(load_data(name), shifted=setting == "dual-scale-shifted")


def one_thread() -> None:
    """Two processes of one thread train more than one of two."""
    torch.set_num_threads(1)


def finished(
    data: str, setting: Setting, config: Config, method: str, seed: int, ranks: Path
) -> dict[str, Any]:
    """The metrics of a run, from its ranks where they are kept, else by training it."""
    path = ranks / f"{method.replace(', ', '-').replace(' ', '-')}-{seed}.npz"
    one = METHODS[setting][method]
    made = {"config": asdict(config), "method": asdict(one)}
    split = split_of(data, setting)
    kept = dict(np.load(path)) if path.exists() else {}
    if not kept or with_defaults(json.loads(str(kept["made"]))) != made:
        trained, found = trained_ranks(one, split, setting, config, seed, ranks)
        about = record(
            method=method,
            seed=seed,
            seconds=round(trained.seconds, 1),
            best_step=trained.best_step,
            checkpoints=[round(value, 5) for value in trained.validation],
        )
        del about["machine"]
        kept = {"made": np.array(json.dumps(made)), "about": np.array(json.dumps(about)), **found}
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **kept)
    about = json.loads(str(kept["about"]))
    return about | {part: summary(kept[part], split, part, setting) for part in PARTS}


def with_defaults(made: dict[str, Any]) -> dict[str, Any]:
    """How a run was made, with the fields that came later."""
    return {
        "config": asdict(Config(0)) | made["config"],
        "method": asdict(Method()) | made.get("method", {}),
    }


def trained_ranks(
    method: Method,
    split: LeaveOneOut | factors.RandomSplit,
    setting: Setting,
    config: Config,
    seed: int,
    states: Path,
) -> tuple[Trained[Any], dict[str, np.ndarray]]:
    """Of both parts the rank of every target, at every strength of the dial where there is one."""
    if isinstance(split, factors.RandomSplit):
        factored = factors.train_factors(method, split, config, seed)
        found = {part: factors.rank_pairs(factored.model, split, part) for part in PARTS}
        trained: Trained[Any] = factored
    else:
        trained = train_once(method, split, config, seed, states)
        weights = measure_domains(split)
        weights = by_hand(weights) if method.bonus == "fixed" else weights
        bonus = weights.log_weight(torch.from_numpy(split.data.item_domains))
        bonuses = [strength * bonus for strength in strengths_of(setting)]
        found = {part: rank_targets(trained.model, split, part, *bonuses) for part in PARTS}
    return trained, {part: ranks.astype(np.int32) for part, ranks in found.items()}


def train_once(
    method: Method, split: LeaveOneOut, config: Config, seed: int, states: Path
) -> Trained[Any]:
    """Train, or take the model of a run that differs by what the dial adds alone."""
    made = asdict(config) | asdict(replace(method, bonus="dynamic")) | {"seed": seed}
    digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
    path = states / f"model-{digest[:16]}.pt"
    if path.exists():
        kept = torch.load(path)
        model = make_model(method, split, config)
        model.load_state_dict(kept.pop("model"))
        return Trained(model.eval(), **kept)
    trained = train(method, split, config, seed, states=states)
    with replacing(path) as partial:
        torch.save(vars(trained) | {"model": trained.model.state_dict()}, partial)
    return trained


def strengths_of(setting: Setting) -> tuple[float, ...]:
    return STRENGTHS if setting == "domains" else (0.0,)


def summary(
    ranks: np.ndarray,  # [strengths, E], or [P] of the dual scale
    split: LeaveOneOut | factors.RandomSplit,
    part: str,
    setting: Setting,
) -> dict[str, dict[str, list[float]]]:
    """The mean of every metric by group, a number for each strength of the dial."""
    if isinstance(split, factors.RandomSplit):
        found = factors.metrics(ranks, split, part)
        return {"all": {name: [round(value, 5)] for name, value in found.items()}}
    groups = make_groups(split, part) if setting == "domains" else make_groups(split, part)[:1]
    names = [name for name in METRICS if setting == "cumulative" or name != "NDCG@5"]
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
    ranks: Path,
    say: Callable[[str], object],
) -> Path:
    """Train what is missing, the seeds outermost; the file holds every run as soon as it is done.

    Args:
        data: the folder of a data set, or "synthetic".
        setting, config, methods, seeds: what to run.
        jobs: how many trainings at once, each of one thread.
        out: the folder of the JSON files.
        ranks: the folder of the ranks, and of the states that deferred runs begin with.
        say: told of each finished run.

    Returns:
        The JSON file.

    Raises:
        ValueError: the file holds runs of another configuration.
    """
    split = split_of(data, setting)
    name = split.data.name
    path = out / (f"{name}.json" if setting == "domains" else f"{name}-{setting}.json")
    document = read(path) if path.exists() else head(split, setting, config)
    if with_defaults(document)["config"] != asdict(config):
        raise ValueError(f"{path} holds runs of another configuration; name another --out")
    order = {method: place for place, method in enumerate(METHODS[setting])}
    runs: dict[Key, Any] = {(run["seed"], run["method"]): run for run in document["runs"]}
    missing = {
        (seed, method): (data, setting, config, method, seed, ranks / name / setting)
        for seed in range(seeds)
        for method in sorted(methods, key=lambda one: METHODS[setting][one].bonus != "dynamic")
        if (seed, method) not in runs
    }
    begun, done = time.monotonic(), 0
    with Progress() as progress:
        progress(f"{name}: {len(missing)} runs to train")
        for key, run in in_processes(finished, missing, min(jobs, len(missing)) or 1, one_thread):
            if path.exists():  # another command may have added runs
                document = read(path)
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
        "strengths": strengths_of(setting),
        "config": asdict(config),
        "runs": [],
    }


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
