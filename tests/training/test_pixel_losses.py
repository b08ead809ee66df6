"""Pixel losses, at errors whose losses are known."""

from typing import get_args

import pytest
import torch

from r2id.config.losses import PixelLoss
from r2id.training.losses.pixel import PIXEL_LOSSES, reconstruction_loss


def test_every_pixel_loss_of_the_config_is_there():
    assert set(PIXEL_LOSSES) == set(get_args(PixelLoss))


def test_losses_at_known_errors():
    decoded, truth = torch.tensor([0.0, 3.0]), torch.tensor([1.0, 1.0])
    assert reconstruction_loss(decoded, truth, "l1") == 1.5
    assert reconstruction_loss(decoded, truth, "mse") == 2.5
    assert reconstruction_loss(decoded, truth, "charbonnier") == pytest.approx(1.5, abs=1e-5)
