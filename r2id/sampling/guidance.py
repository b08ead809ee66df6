"""Guidance: what the model is asked for, and how its predictions are combined.

Shape letter: B samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r2id.models.conditioning import empty


def conditions_for(condition: Tensor, guidance: float) -> Tensor:
    """Return the conditions that guidance needs, empty ones first: [B, …] → [1 or 2, B, …]."""
    if guidance == 0:
        return empty(condition).unsqueeze(0)
    return condition.unsqueeze(0) if guidance == 1 else torch.stack([empty(condition), condition])


def guide(predictions: Tensor, guidance: float, attention_guidance: float = 0.0) -> Tensor:
    """Guide without a classifier (Ho & Salimans 2022): empty + guidance·(conditional − empty).

    Predictions [K, B, L, h, w], in the order of conditions_for → [B, L, h, w]. With attention
    guidance, one of an unmixed model is the last (see R2ID.predict), and its scale times the
    difference from it is added (Ahn et al. 2024, arXiv 2403.17377). Each channel's mean over the
    grid is left out of that, which would make pictures brighter.
    """
    asked = predictions[:-1] if attention_guidance else predictions
    guided = asked[0] if len(asked) == 1 else torch.lerp(asked[0], asked[1], guidance)
    if not attention_guidance:
        return guided
    away = asked[-1] - predictions[-1]
    return guided + attention_guidance * (away - away.mean((2, 3), keepdim=True))
