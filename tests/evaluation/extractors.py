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


class Pair(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.float().mean((2, 3)), images.float()


class Maps(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float()


class Whole(nn.Module):
    """Takes images of 14×14 alone, as networks of patches take multiples of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(14 * 14, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.float().mean(1).flatten(1))


def write(module: nn.Module, file: Path) -> Path:
    torch.jit.script(module).save(str(file))
    return file
