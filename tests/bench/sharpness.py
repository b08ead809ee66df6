"""What losses beside those of pixels do: RIAEs of one data set beside each other.

    python tests/bench/sharpness.py RUN [RUN ...] --shards SHARDS --judge SHARDS --out FOLDER

Reconstructs test images at their own size. Beside PSNR and SSIM it measures the Fréchet distance
between crops of 32×32 pixels of reconstructions and of the images, in the features of a classifier
that is trained on the small labelled photos of --judge; the floor is that of one half of the
images' crops to the other half. *Detail* is the energy of the differences between neighbouring
pixels, relative to the images'. *Dots* is how much finest detail, the squared difference from the
mean of the 3×3 pixels around, there is at the place within a cell that has most of it, relative to
the median of all places: a discriminator can make the decoder put dots at one place of every cell.
*Spectrum* is the distance of radial spectra; its floor is that of one half of the images to the
other, but of reconstructions to their own images it can be less.
FOLDER/sharpness.png shows the images and each reconstruction, whole and in a part at twice the
size.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from r2id.config import DataConfig
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.evaluation.classifier import load_or_train_classifier
from r2id.evaluation.metrics import frechet_distance, mse, spectral_distance, ssim
from r2id.images import psnr, save_png, tile
from r2id.models.codec import Codec
from r2id.spectra import radial_spectrum

IMAGES, SHOWN, CROP = 500, 6, 32


def crops(images):
    """All crops of CROP² pixels, side by side, of images [B, C, H, W]."""
    parts = images.unfold(2, CROP, CROP).unfold(3, CROP, CROP)
    return parts.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def detail(images):
    return sum(images.diff(dim=axis).square().mean() for axis in (2, 3))


def dots(images, cell):
    inner = images[:, :, 1:-1, 1:-1]
    finest = (inner - F.avg_pool2d(images, 3, stride=1)).square().mean((0, 1))
    places = torch.stack(
        [finest[y::cell, x::cell].mean() for y in range(cell) for x in range(cell)]
    )
    return places.max() / places.median()


def spectrum(images):
    return radial_spectrum(images.double()).mean(0)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    small = DataConfig(shards=options.judge, channels=3, size=(CROP, CROP), flip=True)
    judge = load_or_train_classifier(
        ShardSet.open(options.judge), small, options.out / "judge.safetensors", torch.device("cpu")
    )
    codecs = [Codec.load(run) for run in options.runs]
    shards, data = ShardSet.open(options.shards), codecs[0].data
    data = data.model_copy(update={"shards": options.shards})
    images = torch.cat(
        [
            batch["image"]
            for batch in eval_loader(shards, data, data.test_split, batch=50, limit=IMAGES)
        ]
    )
    size = images.shape[2], images.shape[3]
    features = judge.features(crops(images))
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    half = len(order) // 2
    floor = frechet_distance(features[order[:half]], features[order[half:]])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    halves = order.chunk(2)
    apart = spectral_distance(*(spectrum(images[half]) for half in halves))
    print("| RIAE | PSNR | SSIM | Fréchet of crops | detail | dots | spectrum |")
    print("|---|---|---|---|---|---|---|")
    cell = codecs[0].riae.cell
    print(
        f"| images, half to half | | | {floor:.3f} | 1 | {dots(images, cell):.1f} | {apart:.3f} |",
        flush=True,
    )
    rows = [images[:SHOWN]]
    for run, codec in zip(options.runs, codecs, strict=True):
        decoded = torch.cat([codec.decode(codec.encode(part), size) for part in images.split(50)])
        rows.append(decoded[:SHOWN])
        distance = frechet_distance(judge.features(crops(decoded)), features)
        print(
            f"| {run.name} | {psnr(mse(decoded, images)).mean():.2f} | "
            f"{ssim(decoded, images).mean():.4f} | {distance:.3f} | "
            f"{detail(decoded) / detail(images):.2f} | {dots(decoded, codec.riae.cell):.1f} | "
            f"{spectral_distance(spectrum(decoded), spectrum(images)):.3f} |",
            flush=True,
        )
    y, x = (side // 4 for side in size)
    parts = [row[:, :, y : y + size[0] // 2, x : x + size[1] // 2] for row in rows]
    large = [part.repeat_interleave(2, 2).repeat_interleave(2, 3) for part in parts]
    whole, twice = (tile(torch.cat(part), SHOWN) for part in (rows, large))
    width = max(whole.shape[2], twice.shape[2])
    picture = torch.full((3, whole.shape[1] + twice.shape[1], width), -1.0)
    picture[:, : whole.shape[1], : whole.shape[2]] = whole
    picture[:, whole.shape[1] :, : twice.shape[2]] = twice
    save_png(picture, options.out / "sharpness.png")


if __name__ == "__main__":
    main()
