"""The shapes that are measured, their inputs, and what no implementation can do without.

Letters: ``B`` rows (queries), ``N`` candidates that all rows share, ``K`` candidates of each row's
own, ``D`` dimensions, ``V`` rows of the table that candidates per row are drawn from.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

# "shared": candidates [N, D] of all rows. "in-batch": the positives of the other rows, N = B.
# "full": the whole table [N, D], the target among them. "per-example": K ids per row.
Kind = Literal["shared", "in-batch", "full", "per-example"]

# What is switched on, each on top of the one before.
Level = Literal["plain", "log-Q", "hits", "domain weights"]
LEVELS: tuple[Level, ...] = get_args(Level)

NUM_ITEMS = 100_000  # ids are drawn from a Zipf-like catalogue, so hits and duplicates occur
NUM_DOMAINS = 20
# Embeddings are N(0, 1), so logits have a standard deviation of 2 to 4 at 64 to 256 dimensions. A
# power of two: peers without a temperature take it in the query, and lose no digits.
TEMPERATURE = 4.0
SPREADS = (0.1, 1.0, 3.0, 10.0, 30.0, 100.0)  # other standard deviations of the logits
RISE = 1e4  # of the logits from the first candidate to the last, where they rise

# Matrices of B N float32 that are alive at once; a CPU measured 3.2 and 2.0. Only used to leave a
# version out before it exhausts the machine.
MATRICES = {"eager": 4, "torch.compile": 3}


@dataclass(frozen=True)
class Shape:
    name: str
    kind: Kind
    rows: int  # B
    candidates: int  # N, or K
    dim: int  # D
    table: int = 0  # V, for "per-example"
    dtype: torch.dtype = torch.float32
    twin: bool = False  # a scaled-down twin of the shape of this name, for a CPU
    spread: float | None = None  # standard deviation of the logits; None: sqrt(D) / TEMPERATURE
    rising: bool = False  # every tile of candidates outscores all before it, in every row
    plain: bool = False  # compared with nothing switched on, which peers compute as well

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        candidates = {
            "in-batch": "in-batch",
            "per-example": f"K = {self.candidates} of {self.table:,}",
        }.get(self.kind, f"N = {self.candidates:,}")
        sizes = f"B = {self.rows:,}, {candidates}, D = {self.dim}"
        logits = "" if self.spread is None else f", logits ± {self.spread:g}"
        logits += ", rising logits" if self.rising else ""
        return f"{self.name}{' (twin)' if self.twin else ''}: {sizes}, {dtype}{logits}"

    @property
    def temperature(self) -> float:
        """Products of N(0, 1) embeddings have the standard deviation sqrt(D)."""
        return TEMPERATURE if self.spread is None else math.sqrt(self.dim) / self.spread

    @property
    def levels(self) -> tuple[Level, ...]:
        """What can be switched on: a full softmax samples nothing, and ids always remove hits."""
        if self.kind == "full":
            return ("plain", "domain weights")
        if self.kind == "per-example":
            return ("plain", "log-Q", "domain weights")
        return LEVELS

    @property
    def compared_at(self) -> Level:
        """What is on when versions are compared: all of it, or what the peers compute as well."""
        return "plain" if self.plain or self.kind == "full" else "domain weights"

    @property
    def operations(self) -> float:
        """6 B N D: ``q c^T``, ``dz c`` and ``dz^T q``, a multiplication and an addition each."""
        return 6.0 * self.rows * self.candidates * self.dim

    @property
    def distinct(self) -> float:
        """Table rows that get a gradient: V (1 - (1 - 1/V)^(B K)) of B K uniform draws."""
        return -self.table * math.expm1(self.rows * self.candidates * math.log1p(-1 / self.table))

    @property
    def gathered_bytes(self) -> float:
        """(B K D + 2 B D + distinct D) numbers: each candidate read once, the query read, its
        gradient written, and the gradient of each distinct table row written once."""
        numbers = self.rows * self.candidates + 2 * self.rows + self.distinct
        return numbers * self.dim * self.dtype.itemsize

    @property
    def gradient_bytes(self) -> int:
        """The gradients of query, positive and candidates, or of query and table."""
        embeddings = {
            "shared": 2 * self.rows + self.candidates,
            "in-batch": 2 * self.rows,
            "full": self.rows + self.candidates,
            "per-example": self.rows + self.table,
        }[self.kind]
        return embeddings * self.dim * self.dtype.itemsize

    @property
    def logits_bytes(self) -> int:
        """The matrix [B, N] or [B, K] of float32 logits that eager PyTorch makes, and copies."""
        return self.rows * self.candidates * 4

    def needed_bytes(self, version: str) -> float:
        """What a version that keeps the logits needs above inputs and gradients, computed: a few
        [B, N] of float32; per example the gathered [B, K, D] and its gradient. 0 for others."""
        if version not in MATRICES:
            return 0
        if self.kind == "per-example":
            return 2 * self.rows * self.candidates * self.dim * self.dtype.itemsize
        return MATRICES[version] * self.logits_bytes

    def shrunk(self, rows: int, candidates: int, table: int, dim: int = 1 << 30) -> Shape:
        """The same at no more than these sizes."""
        rows, candidates = min(self.rows, rows), min(self.candidates, candidates)
        if self.kind == "in-batch":
            rows = candidates = min(rows, candidates)
        smaller = replace(
            self,
            rows=rows,
            candidates=candidates,
            table=min(self.table, table),
            dim=min(self.dim, dim),
        )
        return self if smaller == self else replace(smaller, twin=True)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Shape:
        known = {f.name: values[f.name] for f in fields(cls)}
        return cls(**{**known, "dtype": getattr(torch, values["dtype"])})


_BF16 = torch.bfloat16
GPU = (
    Shape("small", "in-batch", 512, 512, 64, dtype=_BF16),
    Shape("two-tower", "in-batch", 8192, 8192, 128, dtype=_BF16),
    Shape("sequence", "shared", 65_536, 8192, 128, dtype=_BF16),
    Shape("wide", "shared", 16_384, 16_384, 256, dtype=_BF16),
    Shape("catalogue", "full", 16_384, 262_144, 128, dtype=_BF16),
    Shape("per-example", "per-example", 65_536, 128, 64, table=1 << 20, dtype=_BF16),
    # On GPUs alone. Sizes that neither tiles nor multiprocessors divide.
    Shape("odd", "in-batch", 10_000, 10_000, 128, dtype=_BF16),
    # N(0, 1) with a temperature of 1: candidates outscore their positive by 60 and more.
    Shape("unscaled", "in-batch", 8192, 8192, 128, dtype=_BF16, spread=math.sqrt(128), plain=True),
)
CPU = (
    Shape("cpu", "shared", 4096, 8192, 64),
    Shape("cpu", "shared", 4096, 8192, 64, dtype=_BF16),
    Shape("cpu", "shared", 4096, 8192, 128),
    Shape("cpu", "shared", 4096, 8192, 128, dtype=_BF16),
    Shape("small", "in-batch", 512, 512, 64),
    Shape("two-tower", "in-batch", 4096, 4096, 128, twin=True),
    Shape("sequence", "shared", 16_384, 2048, 128, twin=True),
    Shape("wide", "shared", 4096, 4096, 256, twin=True),
    Shape("wide", "shared", 4096, 4096, 256, dtype=_BF16, twin=True),
    Shape("catalogue", "full", 4096, 65_536, 64, twin=True),
    Shape("per-example", "per-example", 16_384, 128, 64, table=1 << 18, twin=True),
    Shape("per-example", "per-example", 16_384, 128, 64, table=1 << 18, dtype=_BF16, twin=True),
)
# For the tests: one of each kind, in odd sizes, so that swapped dimensions do not fit.
TINY = (
    Shape("shared", "shared", 37, 53, 8),
    Shape("in-batch", "in-batch", 37, 37, 8),
    Shape("full", "full", 37, 53, 8),
    Shape("per-example", "per-example", 37, 11, 8, table=53),
)
DEMO = Shape("demo", "shared", 2048, 4096, 64)
DEMO_MEMORY = Shape("demo", "shared", 8192, 8192, 64)


def scales(shape: Shape) -> list[Shape]:
    """The shape with logits of every size, and with those that are worst for a running maximum."""
    spreads = [replace(shape, spread=spread) for spread in SPREADS]
    return [*spreads, replace(shape, rising=True)]


Side = Literal["candidates", "rows"]
SIDES: tuple[Side, ...] = get_args(Side)


def growth(side: Side, device: str) -> list[Shape]:
    """Shapes along which one side grows by fours and the other stays."""
    sizes: tuple[int, ...] = (1024, 4096, 16_384, 65_536)
    fixed, dim, dtype = 1024, 64, torch.float32
    if device == "cuda":
        sizes = (4096, 16_384, 65_536, 262_144, 1_048_576)
        fixed, dim, dtype = 16_384, 128, _BF16
    pairs = [(fixed, n) if side == "candidates" else (n, fixed) for n in sizes]
    return [Shape("growth", "shared", b, n, dim, dtype=dtype) for b, n in pairs]


@dataclass(frozen=True)
class Inputs:
    """One batch. The arguments that the kind or the level leaves out are None."""

    kind: Kind
    query: Tensor  # [B, D]
    positive: Tensor | None  # [B, D], "shared" and "in-batch"
    negative: Tensor | None  # [N, D], "shared"
    table: Tensor | None  # [N, D] "full", [V, D] "per-example"
    positive_log_q: Tensor | None  # [B]
    negative_log_q: Tensor | None  # [N] or [B, K]
    positive_ids: Tensor | None  # [B]; the target where there is a table
    negative_ids: Tensor | None  # [N] or [B, K]
    domain_ids: Tensor | None  # [B]
    domain_weights: Tensor | None  # [NUM_DOMAINS]
    temperature: float
    example_weights: Tensor | None = None  # [B], only of padded batches

    def leaves(self) -> dict[str, Tensor]:
        """The embeddings, whose gradients every step computes."""
        named = {name: getattr(self, name) for name in ("query", "positive", "negative", "table")}
        return {name: leaf for name, leaf in named.items() if leaf is not None}

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers as leaves of their own in another dtype."""
        own: dict[str, Any] = {
            name: leaf.detach().to(dtype).requires_grad_() for name, leaf in self.leaves().items()
        }
        return replace(self, **own)

    def half_padded(self) -> Inputs:
        """The same with every second row padded, as sequences of uneven length are."""
        weights = torch.ones(len(self.query), device=self.query.device)
        weights[::2] = 0
        return replace(self, example_weights=weights)


def random_inputs(shape: Shape, level: Level, seed: int = 0, device: str = "cpu") -> Inputs:
    """N(0, 1); items drawn log-uniformly, as samplers and logs do, per example uniformly.

    Log-Q is that of log-uniform draws everywhere: the constant of uniform ones would cancel in the
    softmax, and hide that it was left out.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    per_row, full = shape.kind == "per-example", shape.kind == "full"
    items = shape.candidates if full else shape.table if per_row else NUM_ITEMS

    def embeddings(count: int) -> Tensor:
        vectors = torch.randn(count, shape.dim, generator=generator, device=device)
        return vectors.to(shape.dtype).requires_grad_()

    def drawn(count: int) -> Tensor:
        uniform = torch.rand(count, generator=generator, dtype=torch.float64, device=device)
        return (uniform * math.log(items)).exp().long().clamp(max=items - 1)

    def log_q(ids: Tensor) -> Tensor:
        return (torch.log1p(1.0 / ids.clamp(min=1)) / math.log(items)).log().float()

    reached = LEVELS.index(level)
    positive_ids, negative_ids = drawn(shape.rows), None
    if shape.kind == "shared":
        negative_ids = drawn(shape.candidates)
    elif per_row:
        size = (shape.rows, shape.candidates)
        negative_ids = torch.randint(items, size, generator=generator, device=device)
    domain_ids = torch.randint(NUM_DOMAINS, (shape.rows,), generator=generator, device=device)
    domain_weights = 0.5 + torch.rand(NUM_DOMAINS, generator=generator, device=device)
    query = embeddings(shape.rows)
    positive = negative = table = None
    if full or per_row:
        table = embeddings(items)
    else:
        positive = embeddings(shape.rows)
        negative = embeddings(shape.candidates) if shape.kind == "shared" else None
    if shape.rising:
        assert negative is not None
        with torch.no_grad():
            query[:, 0] = 1.0
            rise = torch.linspace(0, RISE * shape.temperature, shape.candidates)
            negative[:, 0] = rise.to(negative)
    ids_on, log_q_on = table is not None or reached >= 2, reached >= 1 and not full
    return Inputs(
        kind=shape.kind,
        query=query,
        positive=positive,
        negative=negative,
        table=table,
        positive_log_q=log_q(positive_ids) if log_q_on else None,
        negative_log_q=log_q(negative_ids) if log_q_on and negative_ids is not None else None,
        positive_ids=positive_ids if ids_on else None,
        negative_ids=negative_ids if ids_on else None,
        domain_ids=domain_ids if reached >= 3 else None,
        domain_weights=domain_weights if reached >= 3 else None,
        temperature=shape.temperature,
    )
