"""The papers' claims beside what was reached, for the README, and every table behind them.

`benchmarks.readme` calls `section` and `tables`; both read the committed runs alone, so that a
later run only has to be added. What was not run says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .metrics import SPARSEST
from .report import (
    PRICES,
    Document,
    Mean,
    best_method,
    both,
    chosen,
    gains,
    markdown,
    mean,
    methods,
    metric_lines,
    p_value,
)
from .runs import AIMED, PARTS, TILT, read

DATA = ("ml-1m", "amazon-beauty", "lastfm", "ml-latest-small")
SHIFTED = ("", "-shifted")
CLAIMED = {"Recall@10": 0.524, "NDCG@10": 0.745}  # of Film-Noir
PAPERS = {
    "domains": ("domain weights", "2510.04375"),
    "cumulative": ("cumulative cross-entropy", "2301.00979"),
    "dual-scale": ("dual scale", "2602.07206"),
}
# In the picture: more lines cannot be told apart; the tables have all.
DRAWN = (
    "plain",
    "from the start",
    "deferred",
    "from the start to 16",
    "from the start, calibrated",
    "deferred to 16, calibrated",
    "ramped to 16, calibrated",
    "fixed",
)
SERVED = (0.0, 0.01, 0.03, 0.1)  # prices at which the dial is shown
CUMULATIVE = {"SASRec": ("SASRec, binary", 0.6990), "GRU4Rec": ("GRU4Rec, BPR", 1.2563)}
GRAPH = "LightGCN "  # before the names of its methods
DUAL = {  # the split, and the change that is claimed
    "": ("random split", 0.0622),
    "-shifted": ("test items even in popularity", 0.0931),
}
DEFAULT = "competition +1"  # of the dual scale
Documents = dict[str, Document]  # by the name of the file


def documents_in(folder: Path) -> Documents:
    return {path.stem: read(path) for path in sorted(folder.glob("*.json"))}


def section(documents: Documents, link: str, picture: str) -> str:
    """The block of the README; `link` and `picture` are addresses."""
    claims = {
        "domains": (
            "Film-Noir: Recall@10 +52.4%, NDCG@10 +74.5%, dense domains held",
            domain_claim(documents.get("ml-1m")),
        ),
        "cumulative": (
            "NDCG@5 over the models' own losses: SASRec +69.90%, GRU4Rec +125.63%",
            cumulative_claim(documents),
        ),
        "dual-scale": (
            "over the softmax loss +6.22% on average, +9.31% where popularity shifts",
            dual_claim(documents),
        ),
    }
    rows = [
        [f"[{PAPERS[name][0]}](https://arxiv.org/abs/{PAPERS[name][1]})", claim, found]
        for name, (claim, found) in claims.items()
    ]
    parts = [
        markdown(["paper", "its claim", f"[reached here]({link})"], rows).replace("---:", "---")
    ]
    parts.append(dial_table(documents))
    if "ml-1m" in documents:
        parts.append(f"![gain of sparse domains over the price]({picture})\n")
    return "\n".join(parts)


def tables(documents: Documents) -> str:
    """Every table, of every data set and setting that was run."""
    parts = [
        "# Quality: every table\n",
        "Written by `python -m benchmarks.readme` from the JSON files beside it, which "
        "`python -m benchmarks.quality` writes. Errors are standard errors over seeds. A gain is "
        "relative to the plain model without the dial, at a price, what NDCG@10 over all loses: "
        "the highest point of the curve of the test items that keeps it, a better strength than "
        "one can know beforehand, for all methods alike. p is that of Student's test of "
        "differences paired by seed, two-sided.\n",
        *(choice_table(documents, price) for price in (0.0, 0.03, 0.1)),
    ]
    for name in DATA:
        if name not in documents:
            parts.append(f"## {name}\n\nNot run yet.\n")
            continue
        document = documents[name]
        parts.append(f"## {name}: {seeds_of(document)}\n")
        parts.append(served_table(document))
        parts.append(gain_table(document, SPARSEST, SPARSEST))
        parts.append(markdown(*against_the_dial(document)))
        parts.append(gain_table(document, SPARSEST, TILT))
        for group in AIMED:
            if group in document["users"]["test"]:
                for dial in (SPARSEST, group):
                    parts.append(gain_table(document, group, dial))
                parts.append(gain_table(document, group, group, "Recall@10"))
    for name, document in documents.items():
        if document["setting"] == "domains":
            continue
        parts.append(f"## {name}: {seeds_of(document)}\n")
        if document["setting"] == "beyond":
            parts.append(gain_table(document, SPARSEST, SPARSEST))
            parts += [markdown(*against_the_dial(document, part)) for part in PARTS]
        else:
            parts.append(markdown(*metric_lines(document)))
    return "\n".join(parts)


def gain_table(document: Document, group: str, dial: str, metric: str = "NDCG@10") -> str:
    """The gain of a group at every price, a line per method, each with that dial."""
    users = document["users"]["test"][group]
    header = [f"{group} ({users} users), {metric}, dial on {dial}: gain in % at a price of"]
    found = {
        name: gains(document, name, group, metric=metric, dial=dial) for name in methods(document)
    }
    rows = [[name, *map(str, map(mean, values.T))] for name, values in found.items()]
    return markdown(header + [f"{price:.0%}" for price in PRICES], rows)


def seeds_of(document: Document) -> str:
    """How many seeds are complete, and how many were begun."""
    counts = {method: len(both(document, method)) for method in methods(document)}
    least, most = min(counts.values()), max(counts.values())
    return counted(most) if least == most else f"{least} to {counted(most)}"


def counted(seeds: int) -> str:
    return f"{seeds} seed{'s' if seeds > 1 else ''}"


# ---------------------------------------------------------------- the three claims


def verdict(found: Mean, claimed: float) -> str:
    return "reached" if found.value >= claimed else "not reached"


def domain_claim(document: Document | None) -> str:
    group = "Film-Noir"
    if document is None or group not in document["users"]["test"]:
        return "not run yet"
    cells = []
    for price in (0.03, 0.1):
        method = best_method(document, group, "NDCG@10", price, dial=group)
        on_curve, validated = {}, {}
        for metric in CLAIMED:
            options: dict[str, Any] = {"metric": metric, "dial": group}
            gained = gains(document, method, group, prices=[price], **options)[:, 0]
            on_curve[metric] = mean(gained)
            validated[metric] = chosen(document, method, price, group, **options)
        reached = all(on_curve[metric].value >= claimed for metric, claimed in CLAIMED.items())
        cells.append(
            f"at a price of {price:.0%} ({method}, {counted(on_curve['NDCG@10'].seeds)}) "
            f"{listed(on_curve)}: {'reached' if reached else 'not reached'}; with the strength "
            f"chosen on validation items {listed({m: c.gain for m, c in validated.items()})}, "
            f"all items {validated['NDCG@10'].overall}"
        )
    return "ml-1m, dial on the domain, in %: " + ". ".join([*cells[:1], *map(capital, cells[1:])])


def listed(found: dict[str, Mean]) -> str:
    return ", ".join(f"{metric} {value}" for metric, value in found.items())


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def relative(document: Document, method: str, base: str, metric: str) -> Mean:
    """The change against another method, paired by seed."""
    found = {(run["method"], run["seed"]): run["test"]["all"] for run in document["runs"]}
    seeds = [seed for name, seed in found if name == method and (base, seed) in found]
    return mean(
        [found[method, seed][metric][0] / found[base, seed][metric][0] - 1 for seed in seeds]
    )


def cumulative_claim(documents: Documents) -> str:
    cells = []
    for name in DATA[:2]:
        document = documents.get(f"{name}-cumulative")
        for model, (own, claimed) in CUMULATIVE.items():
            ours = f"{model}, cumulative"
            if document is None or not {own, ours} <= set(methods(document)):
                continue
            found = relative(document, ours, own, "NDCG@5")
            if found.seeds:
                said = f"{found}, {counted(found.seeds)}: {verdict(found, claimed)}"
                cells.append(f"{name}, {model} {said}")
    return "NDCG@5 in %: " + "; ".join(cells) if cells else "not run yet"


def best_validated(document: Document, names: list[str]) -> str:
    """The one with the best NDCG@20 on validation items, over the seeds that all of them have."""
    runs = [run for run in document["runs"] if run["method"] in names]
    seeds = set.intersection(*({r["seed"] for r in runs if r["method"] == n} for n in names))

    def validated(name: str) -> float:
        found = [run for run in runs if run["method"] == name and run["seed"] in seeds]
        return float(np.mean([run["validation"]["all"]["NDCG@20"][0] for run in found]))

    return max(names, key=validated)


def dual_claim(documents: Documents) -> str:
    """The best strength against the softmax loss at its best temperature, each by validation."""
    parts = []
    for shift, (split, claimed) in DUAL.items():
        found, by_default = [], []
        cells = []
        for name in DATA:
            document = documents.get(f"{name}-dual-scale{shift}")
            for kind in ("", GRAPH) if document else ():
                assert document is not None
                names = [n for n in methods(document) if n.startswith(GRAPH) == bool(kind)]
                plain = [n for n in names if n.removeprefix(kind).startswith("softmax")]
                if not plain or names == plain:
                    continue
                base = best_validated(document, plain)
                method = best_validated(document, [n for n in names if n not in plain])
                found.append(relative(document, method, base, "NDCG@20"))
                defaults = [n for n in names if n.startswith(kind + DEFAULT)]
                default = best_validated(document, defaults)
                by_default.append(relative(document, default, base, "NDCG@20"))
                where = f"{name}{', LightGCN' if kind else ''}"
                cells.append(f"{where} {found[-1]} ({method.removeprefix(kind)})")
        if found:
            every = average(found)
            seeds = counted(every.seeds)
            said = f"{split} {every} on average, {seeds}: {verdict(every, claimed)}"
            said += f"; {DEFAULT}, the default, {average(by_default)}"
            parts.append(f"{said}. By data set: {'; '.join(cells)}")
    said = ". ".join([*parts[:1], *map(capital, parts[1:])])
    return f"NDCG@20 in %: {said}" if parts else "not run yet"


def average(found: list[Mean]) -> Mean:
    """Over data sets and models, each of which counts alike; with the error over seeds."""
    count = len(found)
    error = sum(one.error**2 for one in found) ** 0.5 / count
    value = sum(one.value for one in found) / count
    return Mean(value, error, min(one.seeds for one in found))


# ---------------------------------------------------------------- the dial and the choice


def dial_table(documents: Documents) -> str:
    """The test items at the strength chosen on validation items, plain and with the weights that
    lift the sparsest quarter of these most at no price, if more than plain."""
    rows = []
    for name in DATA:
        if name not in documents:
            rows.append([name, "not run yet", *[""] * len(SERVED)])
            continue
        document = documents[name]
        validated = {m: chosen(document, m, 0.0).validated for m in methods(document)}
        best = max(validated, key=lambda method: np.nan_to_num(validated[method]))
        for method in dict.fromkeys(("plain", best)):
            seeds = counted(len(both(document, method)))
            rows.append([f"{name}, {seeds}: {method}", *served_cells(document, method)[1:]])
    header = ["sparsest ¼; all items, in %, dial chosen on validation items at"]
    return markdown([*header, *SERVED_HEADER], rows)


SERVED_HEADER = ["NDCG@10 of all, no dial", *(f"{price:.0%}" for price in SERVED)]


def served_cells(document: Document, method: str) -> list[str]:
    """The method, its NDCG@10 without the dial, and gains; – where no strength keeps the price."""
    still = document["strengths"].index(0.0)
    overall = [run["test"]["all"]["NDCG@10"][still] for run, _ in both(document, method)]
    every = [chosen(document, method, price) for price in SERVED]
    cells = ["–" if np.isnan(one.validated) else f"{one.gain}; {one.overall}" for one in every]
    return [method, f"{np.mean(overall):.4f}", *cells]


def served_table(document: Document) -> str:
    """Every method with the dial that validation items choose."""
    header = f"{SPARSEST}; all items, test, in %, dial chosen on validation items at"
    rows = [served_cells(document, method) for method in methods(document)]
    return markdown([header, *SERVED_HEADER], rows)


def against_the_dial(document: Document, part: str = "test") -> tuple[list[str], list[list[str]]]:
    """The gain less that of the plain model with the dial, paired by seed."""
    rows = []
    for method in methods(document)[1:]:
        own = gains(document, method, part=part)
        seeds = [pair[0]["seed"] for pair in both(document, method)]
        of_seed = [pair[0]["seed"] for pair in both(document, "plain")]
        plain = gains(document, "plain", part=part)[[of_seed.index(seed) for seed in seeds]]
        rows.append([method, *map(with_p_value, (own - plain).T)])
    header = [f"{SPARSEST} less that of plain with the dial, {part}, points (p) at a price of"]
    return [*header, *(f"{price:.0%}" for price in PRICES)], rows


def with_p_value(differences: np.ndarray) -> str:
    """A mean and its error, and the p of a paired test where there are several seeds."""
    p = p_value(differences)
    if np.isnan(p):
        return str(mean(differences))
    shown = "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.01 else f"{p:.2f}"
    return f"{mean(differences)} ({shown})"


def choice_table(documents: Documents, price: float) -> str:
    """On validation items, what weights add to the dial at a price; defaults follow from it."""
    names, column = [name for name in DATA if name in documents], 1 + PRICES.index(price)
    columns: dict[str, dict[str, Any]] = {
        name: {row[0]: row[column] for row in against_the_dial(documents[name], "validation")[1]}
        for name in names
    }
    every = list(dict.fromkeys(method for name in names for method in columns[name]))
    rows = [
        [method, *(columns[name].get(method, "not run yet") for name in names)] for method in every
    ]
    header = [f"validation items: points above plain with the dial (p), at {price:.0%}", *names]
    return markdown(header, rows)
