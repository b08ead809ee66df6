"""Error of a linear code with as many values as an RIAE's latents: PCA of the pixels of each
latent cell.

    python tests/bench/linear_code.py RIAE.toml [section.key=value ...]

The code is fitted to training images, which takes seconds, and measured on the test images,
cropped to whole cells: what an autoencoder of the same size should surpass.
"""

import argparse
from pathlib import Path

import torch
from einops import rearrange

from r2id.config import load_config
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.images import psnr

FITTED = 5000  # training images, evenly spaced


def to_cells(images, side):
    """Images [B, C, H, W] → the pixels of each cell [B, h·w, C·side²]."""
    height, width = (length // side * side for length in images.shape[2:])
    cropped = images[:, :, :height, :width]
    return rearrange(cropped, "b c (h i) (w j) -> b (h w) (c i j)", i=side, j=side)


def fit(cells, channels):
    """Mean [N] and the first principal components [N, L] of an iterator over cells [..., N]."""
    count, total, products = 0, 0, 0
    for part in cells:
        part = part.flatten(0, -2).double()
        count, total, products = count + len(part), total + part.sum(0), products + part.T @ part
    mean = total / count
    _, directions = torch.linalg.eigh(products / count - mean.outer(mean))
    return mean.float(), directions[:, -channels:].float()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    side, channels, data = int(config.riae.downsample), config.riae.latent_channels, config.data
    shards = ShardSet.open(data.shards)

    def cells(split, limit=None):
        for batch in eval_loader(shards, data, split, batch=100, limit=limit):
            yield to_cells(batch["image"], side)

    mean, basis = fit(cells(data.train_split, FITTED), channels)
    errors = []
    for truth in cells(data.test_split):
        decoded = ((truth - mean) @ basis @ basis.T + mean).clamp(-1, 1)
        errors.append((decoded - truth).square().flatten(1).mean(1))
    error = torch.cat(errors)
    print(
        f"{side}×{side} pixels → {channels} values: test MSE {error.mean():.4f} on [−1, 1], "
        f"mean PSNR {psnr(error).mean():.1f} dB, {len(error)} images"
    )


if __name__ == "__main__":
    main()
