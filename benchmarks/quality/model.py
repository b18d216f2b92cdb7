"""A small causal transformer over item sequences, after SASRec (1808.09781) and PinnerFormer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        x = x + F.dropout(attended, self.dropout, self.training)
        return x + F.dropout(self.feed_forward(x), self.dropout, self.training)


class SequenceModel(nn.Module):
    """Map every step of a sequence to a query for the item that follows.

    Sequences are padded at the end, where causal attention keeps the padding out of all real
    steps: no mask is needed. Queries are scored against the same table that embeds the input.

    Args:
        num_items: size of the catalogue, V.
        max_length: longest sequence.
        dim: embedding size D.
        blocks: number of transformer blocks.
        heads: attention heads per block.
        dropout: of the input and of both branches of a block.
    """

    def __init__(
        self,
        num_items: int,
        max_length: int,
        dim: int = 64,
        blocks: int = 2,
        heads: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.items = nn.Embedding(num_items, dim)
        self.positions = nn.Parameter(torch.empty(max_length, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(dim, heads, dropout) for _ in range(blocks)))
        self.norm = nn.LayerNorm(dim)
        # Small vectors, scaled up at the input as in SASRec. NDCG@10 on the validation items of the
        # synthetic catalogue after two of three epochs: 0.20; not scaled 0.06, not small 0.16,
        # neither 0.07.
        nn.init.normal_(self.items.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, items: Tensor) -> Tensor:  # [B, L] -> queries [B, L, D]
        x = self.items(items) + self.positions[: items.shape[1]]
        x = x * x.shape[-1] ** 0.5
        return self.norm(self.blocks(self.dropout(x)))
