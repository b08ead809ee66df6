"""How well cells join, when latents are disturbed: RIAEs of one data set beside each other.

    python tests/bench/borders.py RUN [RUN ...] --shards SHARDS --out FILE.png

Test images are coded, and their normalised latents mixed with noise as if a diffusion model erred:
a share n² of the variance becomes noise, n from 0 (the codes as they are) to 1 (noise alone).
Measured of what is decoded are PSNR and, in brackets, the mean step between neighbouring pixels
across borders of cells, relative to that between pixels inside of cells; the same of the images
themselves is what it should be. The picture shows images, and a row for each run and n.
"""

import argparse
from pathlib import Path

import torch

from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.evaluation.metrics import mse
from r2id.images import psnr, save_png, tile
from r2id.models.codec import Codec

IMAGES, SHOWN = 500, 12
NOISE = (0.0, 0.1, 0.3, 0.6, 1.0)


def border_step(images, cell):
    """Steps across borders of cells of images [B, C, H, W], relative to those inside: the mean."""
    across = inside = 0.0
    for axis in (2, 3):
        steps = images.diff(dim=axis).abs().movedim(axis, 0)
        at_border = torch.arange(1, len(steps) + 1) % cell == 0
        across, inside = across + steps[at_border].mean(), inside + steps[~at_border].mean()
    return float(across / inside)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    codecs = [Codec.load(run) for run in options.runs]
    data = codecs[0].data.model_copy(update={"shards": options.shards})
    loader = eval_loader(
        ShardSet.open(options.shards), data, data.test_split, batch=50, limit=IMAGES
    )
    images = torch.cat([batch["image"] for batch in loader])
    size = images.shape[2], images.shape[3]
    rows = [images[:SHOWN]]
    print(f"| RIAE | {' | '.join(f'n = {n:g}' for n in NOISE)} |\n|---{'|---' * len(NOISE)}|")
    for run, codec in zip(options.runs, codecs, strict=True):
        assert codec.riae is not None
        cell, figures = codec.riae.cell, []
        latents = codec.normalise(codec.encode(images))
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        for n in NOISE:
            mixed = codec.denormalise((1 - n**2) ** 0.5 * latents + n * noise)
            decoded = codec.decode(mixed, size, native=size)
            rows.append(decoded[:SHOWN])
            figures.append(
                f"{psnr(mse(decoded, images)).mean():.2f} ({border_step(decoded, cell):.2f})"
            )
        print(f"| {run} | {' | '.join(figures)} |", flush=True)
        print(f"| images, with borders at the same places | ({border_step(images, cell):.2f}) |")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_png(tile(torch.cat(rows), SHOWN), options.out)


if __name__ == "__main__":
    main()
