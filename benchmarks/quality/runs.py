"""All runs of a data set and setting: those that are kept already, and those still to train.

`__main__` calls `complete`. A finished run is kept twice: as ranks of every target in `RANKS`, which
is not committed, and as metrics in one JSON file per data set and setting, which is; tables and
pictures are made from that file alone.
"""

from __future__ import annotations

import functools
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

from .metrics import LeaveOneOut, make_groups, ndcg, rank_targets, recall
from .settings import METHODS, Config, Setting
from .train import measure_domains, train

# Of the bonus of the default weights: the dial of a plain model costs 10% over all before 8, and
# weights in (1, 16) are taken back at -4.
STRENGTHS = (-4.0, -3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
PARTS = ("validation", "test")
METRICS: dict[Setting, dict[str, Callable[[np.ndarray], np.ndarray]]] = {
    "domains": {"NDCG@10": ndcg, "Recall@10": recall},
    "cumulative": {
        "NDCG@10": ndcg,
        "Recall@10": recall,
        "NDCG@5": functools.partial(ndcg, k=5),
    },
}
Key = tuple[str, int]  # of a run: its method and its seed


@functools.cache
def load_data(name: str) -> Interactions:
    """The data set in a folder, or the synthetic one."""
    return synthetic() if name == "synthetic" else load(name)


@functools.cache
def split_of(name: str) -> LeaveOneOut:
    return LeaveOneOut(load_data(name))


def one_thread() -> None:
    """Two processes of one thread train more than one of two."""
    torch.set_num_threads(1)


def finished(
    data: str, setting: Setting, config: Config, method: str, seed: int, ranks: Path
) -> dict[str, Any]:
    """The metrics of a run, from its ranks where they are kept, else by training it."""
    one = METHODS[setting][method]
    path = ranks / f"{method.replace(', ', '-').replace(' ', '-')}-{seed}.npz"
    made = json.dumps({"config": asdict(config), "method": asdict(one)})
    split = split_of(data)
    kept = dict(np.load(path)) if path.exists() else {}
    if str(kept.get("made")) != made:
        domains = torch.from_numpy(split.data.item_domains)
        bonus = measure_domains(split).log_weight(domains)
        strengths = STRENGTHS if setting == "domains" else (0.0,)
        trained = train(one, split, config, seed, states=ranks)
        about = record(
            method=method,
            seed=seed,
            seconds=round(trained.seconds, 1),
            best_step=trained.best_step,
            checkpoints=[round(value, 5) for value in trained.validation],
        )
        about = {name: about[name] for name in about if name != "machine"}
        kept = {"made": np.array(made), "about": np.array(json.dumps(about))}
        bonuses = [strength * bonus for strength in strengths]
        for part in PARTS:
            kept[part] = rank_targets(trained.model, split, part, *bonuses).astype(np.int32)
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **kept)
    return {
        **json.loads(str(kept["about"])),
        **{part: summary(kept[part], split, part, setting) for part in PARTS},
    }


def summary(
    ranks: np.ndarray,  # [strengths, E]
    split: LeaveOneOut,
    part: str,
    setting: Setting,
) -> dict[str, dict[str, list[float]]]:
    """The mean of every metric by group, a number for each strength of the dial."""
    groups = make_groups(split, part) if setting == "domains" else make_groups(split, part)[:1]
    return {
        group.name: {
            name: [round(float(one), 5) for one in metric(ranks[:, group.members]).mean(1)]
            for name, metric in METRICS[setting].items()
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
    split = split_of(data)
    name = split.data.name
    path = out / (f"{name}.json" if setting == "domains" else f"{name}-{setting}.json")
    document = read(path) if path.exists() else head(split, setting, config)
    if document["config"] != json.loads(json.dumps(asdict(config))):
        raise ValueError(f"{path} holds runs of another configuration; name another --out")
    runs: dict[Key, dict[str, Any]] = {(run["method"], run["seed"]): run for run in document["runs"]}
    missing: dict[Key, tuple[Any, ...]] = {
        (method, seed): (data, setting, config, method, seed, ranks / name / setting)
        for seed in range(seeds)
        for method in methods
        if (method, seed) not in runs
    }
    begun, done = time.monotonic(), 0
    with Progress() as progress:
        progress(f"{name}: {len(missing)} runs to train")
        for key, run in in_processes(finished, missing, min(jobs, len(missing)) or 1, one_thread):
            runs[key], done = run, done + 1
            order = {name: place for place, name in enumerate(METHODS[setting])}
            document["runs"] = [
                runs[one] for one in sorted(runs, key=lambda k: (k[1], order.get(k[0], 99)))
            ]
            write(path, document)
            left = (time.monotonic() - begun) / done * (len(missing) - done)
            progress("")
            at_rest = run["test"]["all"]["NDCG@10"][len(run["test"]["all"]["NDCG@10"]) // 2 - 2]
            say(f"{name}, {key[0]}, seed {key[1]}: NDCG@10 {at_rest:.4f}, {run['seconds']:.0f} s")
            progress(f"{name}: {len(missing) - done} runs left, {left / 60:.0f} minutes")
    return path


def head(split: LeaveOneOut, setting: Setting, config: Config) -> dict[str, Any]:
    data = split.data
    groups = {part: make_groups(split, part) for part in PARTS}
    return {
        "setting": setting,
        "data": {
            "name": data.name,
            "users": data.num_users,
            "items": data.num_items,
            "interactions": len(data.items),
        },
        "users": {
            part: {group.name: int(group.members.sum()) for group in found}
            for part, found in groups.items()
        },
        "strengths": list(STRENGTHS if setting == "domains" else (0.0,)),
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
