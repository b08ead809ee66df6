"""Guidance: what the model is asked for, and how its predictions are combined.

Shape letters: B samples · K predictions · L latent channels · h, w latent grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r2id.config import SampleConfig
from r2id.diffusion import schedule
from r2id.models.conditioning import empty
from r2id.models.r2id import R2ID


class Guidance:
    """Guided predictions under the conditions of one batch [B, …], by a run's settings.

    Outside the guidance interval predictions are not guided: they are conditional, or unconditional
    when the scale is 0. ``kind`` and ``shift`` are those of the noise schedule on the batch's grid.
    """

    def __init__(
        self, settings: SampleConfig, condition: Tensor, kind: schedule.Kind, shift: float
    ) -> None:
        self._inside = settings.guidance, settings.attention_guidance
        self._outside = float(settings.guidance > 0), 0.0
        self._conditions = {
            scale: conditions_for(condition, scale) for scale, _ in (self._inside, self._outside)
        }
        # The logSNR falls with time.
        interval = schedule.log_snr(torch.tensor(settings.guidance_interval), kind, shift)
        self._latest, self._earliest = interval.tolist()

    def predict(self, model: R2ID, x: Tensor, log_snr: float, alpha_bar: float) -> Tensor:
        """Predict a grid [B, L, h, w] noised to a level → float32 [B, L, h, w]."""
        inside = self._earliest <= log_snr <= self._latest
        scale, of_attention = self._inside if inside else self._outside
        times = torch.full((1,), alpha_bar, device=x.device)
        conditions = self._conditions[scale]
        predictions = model.predict(x, times, conditions, unmixed=of_attention > 0)
        return guide(predictions, scale, of_attention)


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
