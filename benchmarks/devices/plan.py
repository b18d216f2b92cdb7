"""Formulas: what a loss over several devices sends, holds, computes, and how long that takes.

Bytes and products are exact, memory is that of the largest tensors; `simulated` and the tests
compare all three with what is counted. Time follows from them and from `Hardware`, and is a
prediction. `tests/test_distributed_bytes.py`, `simulated` and ``benchmarks.devices`` call it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

HEADER, SUMS, ALIGNMENT = 40, 16, 16  # bytes: of the check of arguments, of a loss, of a tensor


@dataclass(frozen=True)
class Setting:
    """What every rank has. Ids are int64 and log-Q float32, sums are float32."""

    ranks: int
    rows: int  # of the batch, on every rank; in-batch, so many candidates
    dim: int
    element: int = 2  # bytes of a number of an embedding
    items: int = 0  # rows of the whole table
    negatives: int = 0  # ids that a rank draws for its rows
    different: float | None = None  # of those and of the positives; None: as uniform draws expect
    wide: int = 4  # bytes of a number of a sum

    @property
    def embedded(self) -> int:
        """Bytes of the embeddings of a rank's rows."""
        return self.rows * self.dim * self.element

    @property
    def others(self) -> int:
        return self.ranks - 1

    @property
    def shard(self) -> int:
        """Rows of the table on a rank."""
        return -(-self.items // self.ranks)

    @property
    def fetched(self) -> float:
        """Different rows of the table that the rows and the negatives of a rank need."""
        if self.different is not None:
            return self.different
        drawn = self.rows + self.negatives
        if self.items < 2:
            return min(self.items, drawn)
        return -self.items * math.expm1(drawn * math.log1p(-1 / self.items))


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


# ---------------------------------------------------------------- bytes, of each collective


class Sent(NamedTuple):
    """Bytes that a rank sends to others, a number for each collective."""

    forward: Sequence[float]
    backward: Sequence[float]

    def total(self) -> float:
        return sum(self.forward) + sum(self.backward)


def block(s: Setting) -> int:
    """The candidates of a rank with their ids and log-Q."""
    return aligned(s.embedded) + aligned(8 * s.rows) + aligned(4 * s.rows)


def sent_gathered(s: Setting) -> Sent:
    forward = [HEADER * s.others, block(s) * s.others, SUMS * s.others]
    return Sent(forward, [s.embedded * s.others])


def sent_round(s: Setting) -> Sent:
    """A ring: candidates go round twice, and their gradients once, the last step home."""
    gradient = s.rows * s.dim * s.wide
    forward = [HEADER * s.others, *[block(s)] * s.others, SUMS * s.others]
    home = [gradient] if s.others else []
    return Sent(forward, [*[block(s), gradient] * s.others, *home])


def sent_sharded(s: Setting) -> Sent:
    """Rows go to all shards; two float64 a row and shard come back, and go again to all."""
    pairs = 16 * s.rows
    rows = aligned(s.embedded) + aligned(8 * s.rows)
    forward = [HEADER, rows, pairs, SUMS]
    backward = [aligned(pairs), s.rows * s.dim * s.wide]
    return Sent([x * s.others for x in forward], [x * s.others for x in backward])


def sent_indexed(s: Setting) -> Sent:
    """Every rank wants as many rows of every other."""
    elsewhere = s.fetched * s.others / s.ranks
    return sent_fetching(s, elsewhere, elsewhere)


def sent_fetching(s: Setting, asked: float, wanted: float) -> Sent:
    """A rank asks the others for so many rows, and they want so many of it."""
    row = s.dim * s.element
    forward = [HEADER * s.others, aligned(8 * s.ranks) * s.others, 8 * asked, wanted * row]
    return Sent([*forward, SUMS * s.others], [asked * row])


# ---------------------------------------------------------------- memory and products


def held_gathered(s: Setting) -> float:
    """At the peak, in the backward: three times the candidates of all ranks."""
    numbers = s.rows * s.dim
    return s.ranks * (3 * s.element * numbers + 12 * s.rows) + (s.element + s.wide) * numbers


def held_round(s: Setting) -> float:
    """A few blocks, however many ranks, and their row losses, a float64 for each rank."""
    return (5 * s.element + 8 * s.wide) * s.rows * s.dim + (20 * s.ranks + 96) * s.rows


def held_sharded(s: Setting) -> float:
    """The rows of all ranks, and the gradient of the shard before and after it is summed."""
    rows = s.ranks * s.rows
    of_rows = (2 * s.element + s.wide) * rows * s.dim + 70 * rows + s.embedded
    gradient = (s.element + s.wide) * s.dim
    return of_rows + s.shard * max(gradient, s.element * s.dim + 12)  # 12: an id and a bias


def held_indexed(s: Setting) -> float:
    """The rows that were fetched, and a dense gradient of the shard."""
    fetched = s.fetched * (3 * s.element * s.dim + 8)
    return fetched + s.embedded + s.element * s.shard * s.dim


def products(count: int, rows: float, candidates: float, dim: int) -> float:
    """Operations of so many products: one for the logits, one for each of their gradients."""
    return 2.0 * count * rows * candidates * dim


@dataclass(frozen=True)
class Way:
    """A way to share candidates; everything is of one rank and one step, forward and backward."""

    name: str
    sent: Callable[[Setting], Sent]
    held: Callable[[Setting], float]  # bytes of its tensors at the peak, with the gradients
    operations: Callable[[Setting], float]
    table_on_every_rank: bool = False  # or its rows are spread
    overlaps: bool = False  # whether transfers go on while blocks are computed


WAYS = {
    "gathered": Way(
        "gathered candidates",
        sent_gathered,
        held_gathered,
        lambda s: products(3, s.rows, s.ranks * s.rows, s.dim),
        table_on_every_rank=True,
    ),
    "ring": Way(
        "ring",
        sent_round,
        held_round,
        lambda s: products(4, s.rows, s.ranks * s.rows, s.dim),  # the logits twice
        table_on_every_rank=True,
        overlaps=True,
    ),
    "sharded": Way(
        "sharded table",
        sent_sharded,
        held_sharded,
        lambda s: products(4, s.ranks * s.rows, s.shard, s.dim),
    ),
    "indexed": Way(
        "sampled ids",
        sent_indexed,
        held_indexed,
        lambda s: products(3, s.rows, s.negatives, s.dim),
    ),
}


# ---------------------------------------------------------------- time, a prediction


@dataclass(frozen=True)
class Hardware:
    """Assumptions of an H100 SXM in nodes of 8, from data sheets; none was measured here."""

    node: int = 8  # devices that NVLink joins
    inside: float = 450e9  # bytes/s that a device sends over NVLink
    between: float = 50e9  # bytes/s that a device sends to other nodes, 400 Gbit/s
    latency_inside: float = 10e-6  # s of a collective or a step of a ring
    latency_between: float = 25e-6
    operations: float = 300e12  # per second in bfloat16, 30% of the data sheet's 989e12
    reading: float = 3.35e12  # bytes/s of its memory
    memory: float = 80e9  # bytes


H100 = Hardware()


def table_bytes(way: Way, s: Setting) -> float:
    """Weights of the table on a rank, and where `held` has it not, their gradient."""
    weights = s.dim * s.element
    return 2 * s.items * weights if way.table_on_every_rank else s.shard * weights


def memory(way: Way, s: Setting) -> float:
    """Bytes of the loss and the table at the peak, without the states of an optimizer."""
    return way.held(s) + table_bytes(way, s)


def seconds(way: Way, s: Setting, hardware: Hardware = H100) -> float:
    """A step: the loss, and for a table on every rank the average of its gradient over ranks."""
    inside = s.ranks <= hardware.node
    link = hardware.inside if inside else hardware.between
    latency = hardware.latency_inside if inside else hardware.latency_between
    sent = way.sent(s) if s.ranks > 1 else Sent([], [])
    moves = len(sent.forward) + len(sent.backward)
    transfer = sent.total() / link + moves * latency
    compute = way.operations(s) / hardware.operations
    if way.table_on_every_rank:
        transfer_of_table = 2 * s.others / s.ranks * s.items * s.dim * s.element / link
    else:
        transfer_of_table = 0.0
        # Read for both passes and for the gradient, or only zeroed.
        passes = 3 * s.element + 2 * s.wide if way.sent is sent_sharded else s.element
        compute += s.shard * s.dim * passes / hardware.reading
    together = max(compute, transfer) if way.overlaps else compute + transfer
    return together + transfer_of_table


# What the picture and the README show.
TRAINING = Setting(ranks=64, rows=4096, dim=128, negatives=8192)
CONTRASTIVE = Setting(ranks=64, rows=4096, dim=1024)  # two towers and no table
RANKS = (2, 4, 8, 16, 32, 64)
CATALOGUES = tuple(round(10 ** (e / 4)) for e in range(20, 37))  # 10^5 to 10^9
PATIENCE = 0.020  # s of a step that the full softmax may take
ROWS = tuple(2**e for e in range(10, 20))  # of the contrastive batch, on every device


def winner(s: Setting, hardware: Hardware = H100) -> str | None:
    """The sharded table, where all items compete, if it is quick; else the fastest that fits.

    Gathered candidates where they take at most a fifth longer than the ring: they are simpler, and
    predictions no finer than that.
    """
    names = [*WAYS] if s.items else ["gathered", "ring"]
    fits = [name for name in names if memory(WAYS[name], s) <= hardware.memory]
    if "sharded" in fits and seconds(WAYS["sharded"], s, hardware) <= PATIENCE:
        return "sharded"
    rest = [name for name in fits if name != "sharded"]
    better = {name: 0.8 if name == "gathered" else 1.0 for name in rest}
    return min(rest, key=lambda name: better[name] * seconds(WAYS[name], s, hardware), default=None)
