"""The shapes that are measured, their inputs, and the operations that a shape cannot do without."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

# What is switched on, each on top of the one before.
Level = Literal["plain", "log-Q", "hits", "domain weights"]
LEVELS: tuple[Level, ...] = get_args(Level)

NUM_ITEMS = 100_000  # ids are drawn from a Zipf-like catalogue, so hits and duplicates occur
NUM_DOMAINS = 20
TEMPERATURE = 0.05


@dataclass(frozen=True)
class Shape:
    """`rows` queries against `candidates` that all rows share."""

    name: str
    rows: int
    candidates: int
    dim: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: B = {self.rows}, N = {self.candidates}, D = {self.dim}, {dtype}"

    @property
    def operations(self) -> float:
        """6 B N D: the three products of forward and backward, a multiplication and an addition."""
        return 6.0 * self.rows * self.candidates * self.dim

    @property
    def gradient_bytes(self) -> int:
        """The gradients of query, positive and candidates."""
        return (2 * self.rows + self.candidates) * self.dim * self.dtype.itemsize

    @property
    def logits_bytes(self) -> int:
        """The matrix of logits that eager PyTorch makes, more than once."""
        return self.rows * self.candidates * self.dtype.itemsize


CPU = (Shape("cpu", 4096, 8192, 64), Shape("cpu", 4096, 8192, 128))
DEMO = Shape("demo", 2048, 4096, 64)
MEMORY = Shape("memory", 16_384, 16_384, 64)
DEMO_MEMORY = Shape("memory", 8192, 8192, 64)


@dataclass(frozen=True)
class Inputs:
    """One batch. The arguments that a level leaves out are None."""

    query: Tensor  # [B, D]
    positive: Tensor  # [B, D]
    negative: Tensor  # [N, D]
    positive_log_q: Tensor | None  # [B]
    negative_log_q: Tensor | None  # [N]
    positive_ids: Tensor | None  # [B]
    negative_ids: Tensor | None  # [N]
    domain_ids: Tensor | None  # [B]
    domain_weights: Tensor | None  # [NUM_DOMAINS]


def random_inputs(shape: Shape, level: Level, seed: int = 0) -> Inputs:
    """Unit vectors, items drawn log-uniformly, as samplers and logs do."""
    generator = torch.Generator().manual_seed(seed)

    def embeddings(count: int) -> Tensor:
        vectors = torch.randn(count, shape.dim, generator=generator)
        return F.normalize(vectors, dim=1).to(shape.dtype).requires_grad_()

    def items(count: int) -> Tensor:
        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        return (uniform * math.log(NUM_ITEMS)).exp().long().clamp(max=NUM_ITEMS - 1)

    def log_q(ids: Tensor) -> Tensor:
        return (torch.log1p(1.0 / ids) / math.log(NUM_ITEMS)).log().float()

    reached = LEVELS.index(level)
    positive_ids, negative_ids = items(shape.rows), items(shape.candidates)
    domain_ids = torch.randint(NUM_DOMAINS, (shape.rows,), generator=generator)
    domain_weights = 0.5 + torch.rand(NUM_DOMAINS, generator=generator)
    return Inputs(
        embeddings(shape.rows),
        embeddings(shape.rows),
        embeddings(shape.candidates),
        log_q(positive_ids) if reached >= 1 else None,
        log_q(negative_ids) if reached >= 1 else None,
        positive_ids if reached >= 2 else None,
        negative_ids if reached >= 2 else None,
        domain_ids if reached >= 3 else None,
        domain_weights if reached >= 3 else None,
    )
