"""A TorchScript file as a user may have one: small, and of known features."""

from pathlib import Path

import torch
from torch import Tensor, nn


class Quarters(nn.Module):
    """Means of the quarters of each colour, [N, 12], of uint8 images; without the flag, something else."""

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
