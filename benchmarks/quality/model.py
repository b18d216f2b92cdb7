"""Small models that read item sequences: a transformer and a recurrent network.

`train` makes them; `benchmarks.training_step` times a step of the transformer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .settings import Config


def dropout(x: Tensor, part: float, training: bool) -> Tensor:
    """`F.dropout` in units of 1/256: bytes are drawn eight at once, ten times as fast on a CPU."""
    limit = round(256 * part)
    if not training or not limit:
        return x
    drawn = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    kept = drawn.view(torch.uint8)[: x.numel()].view(x.shape) >= limit
    return x * (kept * (256 / (256 - limit)))


class SequenceModel(nn.Module):
    """Map every step of a sequence to a query for the item that follows.

    Sequences are padded at the end, where neither causal attention nor a recurrent network lets
    the padding reach a real step: no mask is needed. Queries are scored against the same table that
    embeds the input.

    Args:
        num_items: size of the catalogue, V.
        config: longest sequence, embedding size, blocks, heads and dropout.
    """

    def __init__(self, num_items: int, config: Config) -> None:
        super().__init__()
        self.max_length, self.dropout = config.max_length, config.dropout
        self.items = nn.Embedding(num_items, config.dim)
        # Small vectors, scaled up at the input as in SASRec. NDCG@10 on the validation items of the
        # synthetic catalogue after two of three epochs: 0.20; not scaled 0.06, not small 0.16,
        # neither 0.07.
        nn.init.normal_(self.items.weight, std=0.02)


class Block(nn.Module):
    """Pre-norm causal self-attention and feed-forward."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, L, D]
        qkv = self.qkv(self.attention_norm(x))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, L, D / H]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = self.out(attended.transpose(1, 2).flatten(2))
        x = x + dropout(attended, self.dropout, self.training)
        return x + dropout(self.feed_forward(x), self.dropout, self.training)


class Transformer(SequenceModel):
    """After SASRec (1808.09781) and PinnerFormer."""

    def __init__(self, num_items: int, config: Config) -> None:
        super().__init__(num_items, config)
        dim = config.dim
        self.positions = nn.Parameter(torch.empty(config.max_length, dim))
        nn.init.normal_(self.positions, std=0.02)
        blocks = (Block(dim, config.heads, config.dropout) for _ in range(config.blocks))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim)

    def forward(self, items: Tensor) -> Tensor:  # [B, L] -> queries [B, L, D]
        x = self.items(items) + self.positions[: items.shape[1]]
        x = dropout(x * x.shape[-1] ** 0.5, self.dropout, self.training)
        return self.norm(self.blocks(x))


class Recurrent(SequenceModel):
    """After GRU4Rec (1511.06939): one layer of gated recurrent units."""

    def __init__(self, num_items: int, config: Config) -> None:
        super().__init__(num_items, config)
        self.gru = nn.GRU(config.dim, config.dim, batch_first=True)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, items: Tensor) -> Tensor:  # [B, L] -> queries [B, L, D]
        x = dropout(self.items(items) * self.items.embedding_dim**0.5, self.dropout, self.training)
        return self.out(self.gru(x)[0])
