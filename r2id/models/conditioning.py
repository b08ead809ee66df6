"""Condition tokens, learned together with the diffusion model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClassCondition(nn.Module):
    """A class, or none, as a few tokens: labels [B] (−1 is none) → [B, tokens, width]."""

    def __init__(self, classes: int, tokens: int, width: int) -> None:
        super().__init__()
        self.classes, self.tokens = classes, tokens
        self.embedding = nn.Embedding(classes + 1, tokens * width)  # the last row is the empty condition

    def forward(self, labels: Tensor) -> Tensor:
        rows = torch.where(labels < 0, self.classes, labels)
        return self.embedding(rows).unflatten(-1, (self.tokens, -1))
