"""Guidance: what the models are asked for, and how their predictions are combined.

Shape letters: B samples · K predictions · L latent channels · h, w latent grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r2id.config import SampleConfig
from r2id.models.conditioning import empty
from r2id.models.r2id import R2ID


class Guidance:
    """Guided predictions under the conditions of one batch [B, …], by a run's settings.

    Outside the guidance interval predictions are not guided: they are conditional, or unconditional
    when the scale is 0. ``guide`` is an early average of the model, which autoguidance needs.
    """

    def __init__(
        self, model: R2ID, guide: R2ID | None, settings: SampleConfig, condition: Tensor
    ) -> None:
        self._model, self._guide = model, guide
        self._inside = settings.guidance, settings.autoguidance
        self._outside = float(settings.guidance > 0), 0.0
        self._conditions = {
            scale: conditions_for(condition, scale) for scale, _ in (self._inside, self._outside)
        }
        # Not as levels of noise: schedules that are shifted have one level at several times. In
        # float32, as times are.
        self._first, self._last = torch.tensor(
            settings.guidance_interval, dtype=torch.float32
        ).tolist()

    def predict(self, x: Tensor, time: float, alpha_bar: float) -> Tensor:
        """Predict a grid [B, L, h, w] noised to the level of a time → float32 [B, L, h, w].

        Guidance without a classifier (Ho & Salimans 2022) and autoguidance (Karras et al. 2024b,
        arXiv 2406.02507): empty + guidance·(conditional − empty) + autoguidance·(conditional −
        early), where early is what the guide predicts under the same condition.
        """
        inside = self._first <= time <= self._last
        guidance, autoguidance = self._inside if inside else self._outside
        times = torch.full((1,), alpha_bar, dtype=torch.float32, device=x.device)
        conditions = self._conditions[guidance]
        predictions = self._model.predict(x, times, conditions)
        guided = combine(predictions, guidance)
        if not autoguidance:
            return guided
        assert self._guide is not None, "the sampler has checked that there is one"
        early = self._guide.predict(x, times, conditions[-1:])
        return torch.add(guided, predictions[-1] - early[0], alpha=autoguidance)


def conditions_for(condition: Tensor, guidance: float) -> Tensor:
    """Return the conditions that guidance needs, empty ones first: [B, …] → [1 or 2, B, …]."""
    if guidance == 0:
        return empty(condition).unsqueeze(0)
    return condition.unsqueeze(0) if guidance == 1 else torch.stack([empty(condition), condition])


def combine(predictions: Tensor, guidance: float) -> Tensor:
    """Combine predictions [K, B, L, h, w] in the order of conditions_for → [B, L, h, w]."""
    if len(predictions) == 1:
        return predictions[0]
    return torch.lerp(predictions[0], predictions[1], guidance)
