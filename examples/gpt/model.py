"""A decoder-only transformer over bytes: pre-norm, rotary positions, causal attention, GELU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256  # every byte is a token


def rotary_table(context: int, width: int) -> Tensor:
    """Return (2, context, width / 2): cosine and sine of how far each position turns each pair."""
    frequency = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.outer(torch.arange(context), frequency)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + width/2]) of the last axis by their position's angle."""
    cos, sin = rotary[:, : x.shape[-2]].to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        batch, length, width = x.shape
        # (batch, length, 3 * width) -> three times (batch, heads, length, width / heads)
        split = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        query, key = rotate(query, rotary), rotate(key, rotary)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(attended.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.perceptron_norm = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary)
        return x + self.perceptron(self.perceptron_norm(x))


class GPT(nn.Module):
    """Predicts the next byte at every position.

    Args:
        layers: Number of blocks.
        width: Size of a token's vector; `heads` must divide it into even parts.
        heads: Attention heads per block.
        context: The longest sequence.
    """

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.register_buffer("rotary", rotary_table(context, width // heads), persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        """Draw weights as GPT-2 does: what adds to the residual stream shrinks with depth."""
        for name, param in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(param)
            elif param.dim() == 2:
                nn.init.normal_(param, std=0.02)
        for block in self.blocks:
            for last in (block.attention.out, block.perceptron[-1]):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * len(self.blocks)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits.

        Args:
            tokens: (batch, length <= context), int64.

        Returns:
            (batch, length, 256), in the dtype of the parameters.
        """
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.rotary)
        return self.head(self.norm(x))

    def param_groups(self) -> list[dict[str, Any]]:
        """Return two groups: matrices decay as the optimizer says; biases and norms never do."""
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def next_byte_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross entropy in nats, always in float32.

    Args:
        logits: (batch, length, 256).
        targets: (batch, length), int64: the byte after each position.
        reduction: "mean" or "sum" over all positions.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)
