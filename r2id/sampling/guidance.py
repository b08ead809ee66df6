"""Classifier-free guidance: the conditions that the model is asked for, and their combination.

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


def guide(predictions: Tensor, guidance: float) -> Tensor:
    """Guide without a classifier (Ho & Salimans 2022): empty + guidance·(conditional − empty).

    Predictions [1 or 2, B, …], in the order of conditions_for → [B, …].
    """
    if len(predictions) == 1:
        return predictions[0]
    return torch.lerp(predictions[0], predictions[1], guidance)
