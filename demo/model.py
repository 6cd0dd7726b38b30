"""A small GPT, sharded by FSDP2."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

__all__ = ["GPT", "GPTConfig"]


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """Sizes of the model. The vocabulary is the 256 bytes and an end-of-file token."""

    vocabulary: int = 257
    context: int = 64
    width: int = 160
    heads: int = 5
    layers: int = 3
    dropout: float = 0.05


class GPT(nn.Module):
    """Maps tokens [batch, time] to logits [batch, time, vocabulary]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head.weight = self.tokens.weight  # tied: one tensor, two names
        nn.init.normal_(self.tokens.weight, std=0.05)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def shard(self) -> GPT:
        """Shard every block's parameters, then the rest, over all ranks."""
        for block in self.blocks:
            fully_shard(block)
        return fully_shard(self)


class Block(nn.Module):
    """Attention, then a two-layer perceptron, both with residual connections."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, nn.Dropout(config.dropout)
        self.before_attention = nn.RMSNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.before_mlp = nn.RMSNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)
        for last in (self.out, self.down):
            nn.init.zeros_(last.weight)  # initially, every block is the identity

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attend(self.before_attention(x)))
        return x + self.dropout(self.down(F.gelu(self.up(self.before_mlp(x)))))

    def attend(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # batch, time, 3, heads, width
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))
