"""Condition tokens, learned together with the diffusion model.

A condition is a class, int64 [B] (−1 is none), or attributes [B, A], each −1, 1 or 0 for unknown:
none is all of them 0; or the embedding of a text, of D values [B, D] or of D for each of T tokens
[B, T, D]: none is all of them 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ClassCondition(nn.Module):
    """A class, or none, as a few tokens: labels [B] (−1 is none) → [B, tokens, width]."""

    def __init__(self, classes: int, tokens: int, width: int) -> None:
        super().__init__()
        self.classes, self.tokens = classes, tokens
        self.embedding = nn.Embedding(
            classes + 1, tokens * width
        )  # the last row is the empty condition

    def forward(self, labels: Tensor) -> Tensor:
        rows = torch.where(labels < 0, self.classes, labels)
        return self.embedding(rows).unflatten(-1, (self.tokens, -1))


class AttributeCondition(nn.Module):
    """Attributes as a few tokens: [B, A] → [B, tokens, width].

    The bias alone is the empty condition.
    """

    def __init__(self, attributes: int, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.linear = nn.Linear(attributes, tokens * width)

    def forward(self, attributes: Tensor) -> Tensor:
        return self.linear(attributes.to(self.linear.weight.dtype)).unflatten(-1, (self.tokens, -1))


class EmbeddingCondition(nn.Module):
    """An embedding as tokens: [B, D] → [B, tokens, width], or [B, T, D] → [B, T, width] by one
    linear layer for all T.

    What is added to each token, learned, is alone the empty condition.
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
    """No condition, in the shape of one."""
    return torch.full_like(condition, -1) if condition.dim() == 1 else torch.zeros_like(condition)


def drop(condition: Tensor, dropped: Tensor) -> Tensor:
    """Conditions, but none where ``dropped``, bool [B]."""
    return torch.where(dropped.view(-1, *[1] * (condition.dim() - 1)), empty(condition), condition)
