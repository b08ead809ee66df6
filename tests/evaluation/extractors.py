"""TorchScript files such as a user may have: small, and with known features."""

from pathlib import Path

import torch
from torch import Tensor, nn


class Quarters(nn.Module):
    """Means of each colour's quarters, [N, 12]; without the flag, something else.

    As Inception does, it returns features only when it is asked for them by ``return_features``.
    """

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        assert images.dtype == torch.uint8
        means = nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)
        return means if return_features else means[:, :1]


class Plain(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3))


class Odd(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean()


def write(module: nn.Module, file: Path) -> Path:
    torch.jit.script(module).save(str(file))
    return file
