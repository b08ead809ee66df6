"""Conditions of R2ID, and the tokens made of them, which are learned together with it.

A condition is one of these; each has an empty value, which stands for no condition:

* a class: int64 [B], empty is −1;
* attributes: [B, A], each 1, −1 or 0 for unknown, empty is all 0;
* the embedding of a text: [B, D], or [B, T, D] for T tokens, empty is all 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ClassCondition(nn.Module):
    """Makes a few tokens of a class: labels [B] (−1 is none) → [B, tokens, width]."""

    def __init__(self, classes: int, tokens: int, width: int) -> None:
        super().__init__()
        self.classes, self.tokens = classes, tokens
        # The last row is the empty condition.
        self.embedding = nn.Embedding(classes + 1, tokens * width)

    def forward(self, labels: Tensor) -> Tensor:
        rows = torch.where(labels < 0, self.classes, labels)
        return self.embedding(rows).unflatten(-1, (self.tokens, -1))


class AttributeCondition(nn.Module):
    """Makes a few tokens of attributes: [B, A] → [B, tokens, width].

    The empty condition, all 0, becomes the bias alone.
    """

    def __init__(self, attributes: int, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.linear = nn.Linear(attributes, tokens * width)

    def forward(self, attributes: Tensor) -> Tensor:
        return self.linear(attributes.to(self.linear.weight.dtype)).unflatten(-1, (self.tokens, -1))


class EmbeddingCondition(nn.Module):
    """Makes tokens of an embedding: [B, D] → [B, tokens, width], or [B, T, D] → [B, T, width].

    One linear layer serves all T tokens. Each token has a learned bias of its own, ``added``; the
    empty condition, all 0, becomes these alone.
    """

    def __init__(self, shape: Sequence[int], tokens: int, width: int) -> None:
        super().__init__()
        self.pooled = len(shape) == 1
        tokens = tokens if self.pooled else shape[0]
        self.linear = nn.Linear(shape[-1], tokens * width if self.pooled else width, bias=False)
        self.added = nn.Embedding(tokens, width)
        nn.init.zeros_(self.added.weight)

    def forward(self, embedding: Tensor) -> Tensor:
        projected = self.linear(embedding.to(self.linear.weight.dtype))
        return (
            projected.unflatten(-1, self.added.weight.shape) if self.pooled else projected
        ) + self.added.weight


def empty(condition: Tensor) -> Tensor:
    """Return the empty condition in the shape of a condition."""
    return torch.full_like(condition, -1) if condition.dim() == 1 else torch.zeros_like(condition)


def drop(condition: Tensor, dropped: Tensor) -> Tensor:
    """Replace conditions by the empty one where ``dropped`` bool [B] is true."""
    return torch.where(dropped.view(-1, *[1] * (condition.dim() - 1)), empty(condition), condition)
