"""How well pictures are edited: classes kept, seams, and upscaling beside bicubic resizing.

    python tests/bench/editing.py RUN --shards data/digits --out FOLDER [--count 200]

Test images have a square of a quarter of their area masked, at a place of its own in each, and are
inpainted under their own class, and without one; and they are continued to twice their width. The
accuracy is that of the evaluation's classifier, beside those of the real images, of their
reconstructions and of images with a grey square. An outpainted picture is judged squeezed to the
image's own shape, beside the real image on black that is squeezed likewise.

A seam is the mean absolute difference of neighbouring pixels across the mask's border, beside that
of the real images at the same place, and that within known areas. Images are shrunk to a half and
to two thirds and upscaled again: PSNR, and the share of images where it is no lower than that of
bicubic resizing. FOLDER gets editing.json and editing.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r2id import rng
from r2id.config import change
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.evaluation.classifier import Classifier, load_or_train_classifier
from r2id.files import write_json
from r2id.images import psnr, resize, save_png, tile, to_float, to_uint8
from r2id.sampling import Sampler, editing

SHOWN, SIDE = 8, 64


def squares(count: int, height: int, width: int) -> Tensor:
    """Masks with a square of a quarter of the area each, at places of their own."""
    masks = torch.zeros(count, 1, height, width, dtype=torch.bool)
    places = rng.uniform(rng.fold(0, torch.arange(count)), 2)
    for mask, (down, across) in zip(masks, places.tolist(), strict=True):
        top, left = round(down * (height - height // 2)), round(across * (width - width // 2))
        mask[:, top : top + height // 2, left : left + width // 2] = True
    return masks


def seam(images: Tensor, masks: Tensor) -> dict[str, float]:
    """Mean absolute differences of neighbouring pixels: across the border, and in known areas."""
    across, known = [], []
    for axis in (2, 3):
        steps = images.diff(dim=axis).abs().mean(1)
        near, far = (
            masks.narrow(axis, 1, masks.shape[axis] - 1),
            masks.narrow(axis, 0, masks.shape[axis] - 1),
        )
        across.append(steps[(near != far)[:, 0]])
        known.append(steps[~(near | far)[:, 0]])
    return {"across": float(torch.cat(across).mean()), "known": float(torch.cat(known).mean())}


def measure(sampler: Sampler, classifier: Classifier, images: Tensor, labels: Tensor) -> Any:
    """Edit all images; return figures and pictures."""
    count, _, height, width = images.shape
    masks, seeds = squares(count, height, width), torch.arange(count)
    none = torch.full_like(labels, -1)

    def kept(edited: Tensor) -> float:
        return float((classifier.classify(edited) == labels).float().mean())

    codec, size = sampler.codec, (height, width)
    grey = images.masked_fill(masks, 0.0)
    inpainted = editing.inpaint(sampler, images, masks, labels, seeds)
    unlabelled = editing.inpaint(sampler, images, masks, none, seeds, guidance=1.0)
    wide, at = (height, 2 * width), (0, width // 2)
    outpainted = editing.outpaint(sampler, images, wide, at, labels, seeds)
    black = F.pad(images, (at[1], width - at[1]), value=-1.0)
    figures: dict[str, Any] = {
        "count": count,
        "accuracy": {
            "real": kept(images),
            "reconstructed": kept(codec.decode(codec.encode(images), size, native=size)),
            "a quarter grey": kept(grey),
            "inpainted": kept(inpainted),
            "inpainted without a class": kept(unlabelled),
            "on black, squeezed": kept(resize(black, size).clamp(-1, 1)),
            "outpainted, squeezed": kept(resize(outpainted, size).clamp(-1, 1)),
        },
        "seam": {"real": seam(images, masks), "inpainted": seam(inpainted, masks)},
        "known pixels unchanged": bool((inpainted == images)[~masks.expand_as(images)].all()),
    }
    for name, share in (("half", 1 / 2), ("two thirds", 2 / 3)):
        small = (max(1, int(height * share)), max(1, int(width * share)))
        given = to_float(to_uint8(resize(images, small)))
        errors = {
            kind: psnr((result - images).square().mean((1, 2, 3)))
            for kind, result in (
                ("bicubic", resize(given, size).clamp(-1, 1)),
                ("upscaled", editing.upscale(codec, given, size)),
            )
        }
        figures[f"upscaled from a {name}"] = {
            **{kind: float(error.mean()) for kind, error in errors.items()},
            "no lower": float((errors["upscaled"] >= errors["bicubic"] - 1e-4).float().mean()),
        }
    return figures, [images, grey, inpainted, outpainted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
    sampler, shards = Sampler.load(options.run), ShardSet.open(options.shards)
    data = change(sampler.codec.data, {"shards": options.shards})
    file = options.out / "classifier.safetensors"
    classifier = load_or_train_classifier(shards, data, file, torch.device("cpu"))
    loader = eval_loader(
        shards, data, split=data.test_split, batch=options.count, limit=options.count
    )
    batch = next(iter(loader))
    figures, pictures = measure(sampler, classifier, batch["image"], batch["label"])
    write_json(options.out / "editing.json", figures)
    times = max(1, SIDE // batch["image"].shape[2])
    parts = [
        part[:SHOWN].repeat_interleave(times, 2).repeat_interleave(times, 3) for part in pictures
    ]
    wide = tile(parts[3], SHOWN // 2)
    rows = tile(torch.cat(parts[:3]), SHOWN)
    save_png(
        torch.cat([rows, F.pad(wide, (0, rows.shape[2] - wide.shape[2]), value=-1.0)], 1),
        options.out / "editing.png",
    )
    print(figures)


if __name__ == "__main__":
    main()
