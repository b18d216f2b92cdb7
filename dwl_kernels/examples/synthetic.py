"""A catalogue made from a seed, so that examples and benchmarks run without any data set.

Domains have Zipf-distributed sizes. Users start with what everybody takes and come to their own
taste over domains, so that popularity hides the sparse domains of what they take in the end, as in
MovieLens. Some items are followed by successors from their own cluster: the order can be learned. A
sparse domain has as much structure per item as a dense one, and fewer examples to learn it from.

How strongly, was chosen by what a score bonus for sparse domains brings on the validation items of
two seeds, next to MovieLens 1M; test items had no say.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dwl_kernels.examples.data import Interactions

FOLLOW, STAY = 0.2, 0.15  # probability of a successor, of an item of the same domain; else a jump
SUCCESSORS, CLUSTER = 4, 12  # successors of an item, items of a cluster
TASTE = 0.5  # concentration of the Dirichlet distribution of tastes: few domains per user
FLAT = 0.7  # power of the domains' shares that gives those of the tastes
CROWD = 1.0  # how far the first jump follows the crowd; the last does not
PROPOSALS = 8


def synthetic(
    seed: int = 0,
    users: int = 5000,
    items: int = 2000,
    domains: int = 12,
    zipf: float = 1.2,
    length: int = 50,
) -> Interactions:
    """Make interactions with Zipf-sized domains, domain tastes and sequential structure.

    Args:
        seed: the same seed gives the same interactions.
        users: number of users, each with `length // 3` to `length` items.
        items: number of items to choose from; one in ten also belongs to a second domain.
        domains: number of domains.
        zipf: exponent of the domain sizes, 0 makes all domains alike.
        length: longest sequence.

    Returns:
        The interactions; no user takes an item twice.

    Raises:
        ValueError: there are too few items for the domains or for the sequences.
    """
    if domains < 1 or items < 2 * length or items < 4 * domains:
        raise ValueError(
            f"{items} items are too few for {domains} domains and sequences of {length}; "
            f"take at least {max(2 * length, 4 * domains)}"
        )
    rng = np.random.default_rng(seed)
    share = np.arange(1, domains + 1) ** -zipf
    share /= share.sum()
    home = _homes(share, items)  # [V], sorted
    successors = _successors(rng, home)  # [V, SUCCESSORS]
    draw_item = _draw_by_popularity(rng, home)
    liked = share**FLAT / (share**FLAT).sum()
    taste = rng.dirichlet(TASTE * liked, users)  # [U, domains]

    def jump(step: int = 0) -> np.ndarray:  # [U]
        crowd = CROWD * (1 - step / length)
        mixed = (1 - crowd) * taste + crowd * share
        domain = (rng.random((users, 1)) > mixed.cumsum(1)).sum(1)
        return draw_item(np.minimum(domain, domains - 1))

    everyone = np.arange(users)
    seen = np.zeros((users, items), bool)
    sequences = np.empty((users, length), np.int64)
    current = jump()
    for step in range(length):
        sequences[:, step] = current
        seen[everyone, current] = True
        following = current  # seen, hence replaced by the first proposal that is new to the user
        for proposal in range(PROPOSALS):
            rank = np.minimum(rng.geometric(0.5, users), SUCCESSORS) - 1
            kind = rng.random(users)
            candidate = np.where(kind < FOLLOW, successors[current, rank], draw_item(home[current]))
            jumps = (kind >= FOLLOW + STAY) | (proposal >= PROPOSALS // 2)
            candidate = np.where(jumps, jump(step), candidate)
            following = np.where(seen[everyone, following], candidate, following)
        exhausted = seen[everyone, following]
        following[exhausted] = seen[exhausted].argmin(1)
        current = following

    lengths = rng.integers(length // 3, length + 1, users)
    taken = sequences[np.arange(length) < lengths[:, None]]
    known, numbered = np.unique(taken, return_inverse=True)
    second = np.where(rng.random(items) < 0.1, rng.choice(domains, items, p=share), -1)
    second[second == home] = -1
    offsets = np.concatenate([[0], lengths.cumsum()])
    item_domains = np.stack([home, second], axis=1)[known]
    names = [f"domain {number}" for number in range(1, domains + 1)]
    return Interactions("synthetic", numbered, offsets, item_domains, names, [""] * len(known))


def _homes(share: np.ndarray, items: int) -> np.ndarray:  # [V] sorted domains
    """Spread the items by the root of the shares: a sparse item has fewer interactions."""
    spread = share**0.5 / (share**0.5).sum()
    counts = np.maximum(2, np.floor(spread * items).astype(np.int64))
    counts[0] += items - counts.sum()
    return np.repeat(np.arange(len(share)), counts)


def _successors(rng: np.random.Generator, home: np.ndarray) -> np.ndarray:  # [V, SUCCESSORS]
    """Choose successors of each item from its cluster, a run of items within one domain."""
    place = np.arange(len(home)) - np.searchsorted(home, home)  # within the domain
    cluster = home * len(home) + place // CLUSTER  # sorted
    first = np.searchsorted(cluster, cluster)
    size = np.searchsorted(cluster, cluster, side="right") - first
    return first[:, None] + rng.integers(0, size[:, None], (len(home), SUCCESSORS))


def _draw_by_popularity(
    rng: np.random.Generator, home: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that draws an item of each given domain by Zipf-like popularity."""
    popularity = rng.pareto(1.5, len(home)) + 0.2
    total = np.bincount(home, popularity)
    # The items of domain d cover the interval (d, d + 1], so one search draws from any domain.
    upper = popularity.cumsum() - (total.cumsum() - total)[home]
    upper = home + upper / total[home]
    upper[np.flatnonzero(np.diff(home, append=home[-1] + 1))] = np.unique(home) + 1.0

    def draw(domain: np.ndarray) -> np.ndarray:
        return np.searchsorted(upper, domain + rng.random(domain.shape), side="right")

    return draw
