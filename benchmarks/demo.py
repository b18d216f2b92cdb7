"""What the package does, in the order in which it matters: `make demo`, about two minutes.

``python -m benchmarks.demo [--data path/to/ml-1m]``: log-Q on and off, the domains and what they
weigh, the dial for sparse domains, speed and memory. `results/demo-dial.png` is its picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.progress import Progress
from benchmarks.quality.__main__ import folder, positive
from benchmarks.quality.metrics import LeaveOneOut, ndcg, rank_targets
from benchmarks.quality.objective import measure_domains
from benchmarks.quality.settings import Config, Method
from benchmarks.quality.train import steps_per_epoch, train
from benchmarks.record import replacing
from benchmarks.speed import shapes
from benchmarks.speed.accuracy import check
from benchmarks.speed.baselines import kernels, losses
from benchmarks.speed.measure import Rounds, compare_versions, peak_memories
from dwl_kernels import DomainWeights
from dwl_kernels.dial import STRENGTHS, Dial, choose_bonus
from dwl_kernels.examples import two_tower
from dwl_kernels.examples.data import DataError, Interactions, load
from dwl_kernels.examples.synthetic import synthetic

STEPS, EPOCHS, MOST_EPOCHS = 1000, 5, 12  # of the two towers; of the sequence model
REAL_STEPS = 1200  # of the sequence model on a data set that is given
PRICES = (0.0, 0.03)  # what NDCG over all items may lose for sparse domains
SHOWN = 6  # domains of the table, half of them the sparsest


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--data", help="folder of a data set, or nothing: a synthetic one")
    parser.add_argument("--steps", type=positive, default=STEPS, help="of the two towers")
    parser.add_argument("--epochs", type=positive, help="of the sequence model")
    parser.add_argument("--out", type=folder, default=Path("results"), help="of the picture")
    options = parser.parse_args(arguments)
    try:
        data = synthetic() if options.data is None else load(options.data)
        print(
            f"{data.name}: {data.num_users:,} users, {data.num_items:,} items,\n"
            f"{len(data.items):,} interactions, {len(data.domain_names)} domains\n"
        )
        with Progress() as progress:
            log_q_on_and_off(data, options.steps, progress)
            split = LeaveOneOut(data)
            weights = show_domains(split)
            turn_the_dial(split, weights, options, progress)
            return speed_and_memory(progress)
    except DataError as error:
        print(f"error: {error}")
        return 1


def log_q_on_and_off(data: Interactions, steps: int, progress: Progress) -> None:
    print("1. log-Q: two towers, with the other items of a batch as\n   negatives", flush=True)
    *_, last = two_tower.split(data)
    for name, log_q in (("without log-Q", False), ("with log-Q", True)):
        progress(f"two towers {name}")
        scores = two_tower.train(data, log_q, steps)
        found = (scores.topk(50).indices == last[:, None]).any(1)
        progress("")
        print(f"   {name}: Recall@50 {float(found.float().mean()):.3f}", flush=True)
    print(
        "   Popular items are negatives too often and get too low\n"
        "   scores; log-Q takes that back, in the same pass.\n"
    )


def show_domains(split: LeaveOneOut) -> DomainWeights:
    print("2. domains: how sparse each is, what its examples weigh")
    weights = measure_domains(split)
    by_size = weights.interactions.argsort(descending=True).tolist()
    shown = by_size if len(by_size) <= SHOWN else [*by_size[:3], *by_size[-3:]]
    names = weights.names or [str(domain) for domain in range(weights.num_domains)]
    print(f"   {'domain':<22}{'interactions':>13}{'users':>8}{'weight':>8}")
    for domain in shown:
        print(
            f"   {names[domain][:21]:<22}{int(weights.interactions[domain]):>13,}"
            f"{int(weights.users[domain]):>8,}{float(weights.weights[domain]):>8.2f}"
        )
    print(f"   ({len(shown)} of {len(by_size)}; the sparser, the larger the weight)\n")
    return weights


def turn_the_dial(
    split: LeaveOneOut, weights: DomainWeights, options: argparse.Namespace, progress: Progress
) -> None:
    """Train one model, choose the strength of the bonus on validation items, show test items."""
    print("3. the dial: scores + a strength for the items of the")
    print("   sparsest quarter of the domains, when serving", flush=True)
    data = split.data
    epochs = options.epochs
    if epochs is None:
        per_epoch = max(len(split.users) // Config.batch_size, 1)
        epochs = EPOCHS if options.data is None else min(-(-REAL_STEPS // per_epoch), MOST_EPOCHS)
    steps = epochs * steps_per_epoch(split, Config.batch_size)
    config = Config(steps, max_length=min(int(data.lengths.max()), 50))
    run = train(Method(), split, config, 0, progress.of("the model"))
    progress("ranks of the items")
    domains = torch.from_numpy(data.item_domains)
    sparse = weights.sparsest(domains)

    def ranks(part: str, strengths: Sequence[float]) -> dict[float, Tensor]:
        found = rank_targets(run.model, split, part, *(one * sparse for one in strengths))
        return dict(zip(strengths, torch.from_numpy(found), strict=True))

    validation = ranks("validation", STRENGTHS)
    target = {part: torch.from_numpy(split.target(part)) for part in ("validation", "test")}
    dials = [choose_bonus(validation, sparse[target["validation"]], price=p) for p in PRICES]
    test = ranks("test", sorted({0.0, *(dial.strength for dial in dials)}))
    progress("")
    print(f"   NDCG@10 of the test items {ndcg(test[0.0].numpy()).mean():.3f}; sparse: the")
    print("   sparsest quarter of the domains; strengths chosen on\n   validation items")
    of_sparse = sparse[target["test"]]
    for dial in dials:
        held = choose_bonus(test, of_sparse, price=0.99)
        at = held.strengths.index(dial.strength)
        print(
            f"   price {dial.price:.0%}: strength {dial.strength:g}, "
            f"sparse {held.sparse[at]:+.1%}, all {held.overall[at]:+.1%}"
        )
    print(
        "   Sparse domains are raised without training again, and how\n   far is yours to choose."
    )
    draw(dials[-1], options.out / "demo-dial.png")


def draw(dial: Dial, path: Path) -> None:
    with replacing(path) as partial:
        dial.plot(partial, format="png")
    print(f"   picture: {path}\n")


def speed_and_memory(progress: Progress) -> int:
    """A smaller shape and no compilation by PyTorch, so that it ends within half a minute."""
    print("4. speed and memory: loss and gradients, all corrections on")
    shape, large = shapes.DEMO, shapes.DEMO_MEMORY
    progress("speed, then memory")
    found = losses(shape, "cpu")
    del found["torch.compile"]
    verdict = check(shape, found)
    if verdict.refused:
        print(f"   wrong results, so no times: {verdict.refused}")
        return 1
    found = {name: found[name] for name in verdict.passed}
    times = {t.version: t for t in compare_versions(shape, found, Rounds(6, least=5, most=7))}
    peaks = peak_memories(list(found), large)
    kernel = next(iter(kernels("cpu")), "chunked")
    own, eager = times[kernel], times["eager"]
    progress("")
    print(
        f"   PyTorch as usual {eager.median_ms:.0f} ms, this package {own.median_ms:.0f} ms:\n"
        f"   {eager.ratio / own.ratio:.1f} times as fast\n"
        f"   ({shape.rows:,} rows, {shape.candidates:,} candidates, {shape.dim} dimensions)"
    )
    before, after = peaks["eager"], peaks[kernel]
    if before is not None and after is not None:
        print(
            f"   {before / 1e6:.0f} MB of memory become {after / 1e6:.0f} MB: no matrix of\n"
            f"   logits ({large.rows:,} rows, {large.candidates:,} candidates)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
