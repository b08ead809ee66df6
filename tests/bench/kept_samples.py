"""Samples that are kept while they are drawn, and their figures: for the benchmarks of sampling."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from r2id.evaluation.classifier import Classifier
from r2id.evaluation.reference import BATCH, Figures, ImageFeatures, compare_features
from r2id.evaluation.reference import extract_features as extract
from r2id.files import write_atomic
from r2id.images import to_float, to_uint8
from r2id.progress import Progress

_CHUNK = 64
"""Samples at once, after which they are kept."""


def sampling_arguments(description: str | None, count: int) -> argparse.ArgumentParser:
    """Make the parser of a benchmark that draws ``count`` samples of one run and judges them."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=Path, help="default: the run's")
    parser.add_argument("--judge", type=Path, help="default: OUT/classifier.safetensors")
    parser.add_argument("--count", type=int, default=count)
    return parser


def draw_kept(file: Path, count: int, draw: Callable[[slice], Tensor]) -> tuple[Tensor, float]:
    """Draw ``count`` samples, or those that the file lacks of them.

    ``draw(rows)`` returns images [B, C, H, W] in [−1, 1]. → uint8 images [count, C, H, W], and CPU
    seconds of each sample drawn.
    """
    images, seconds = _read(file)
    if len(images) >= count:
        return images[:count], seconds / len(images)
    title = file.stem
    with Progress(title, count, start=len(images), unit="images") as progress:
        while len(images) < count:
            rows = slice(len(images), min(count, len(images) + _CHUNK))
            began = time.process_time()
            drawn = draw(rows)
            seconds += time.process_time() - began
            images = torch.cat([images.view(-1, *drawn.shape[1:]), to_uint8(drawn)])
            write_atomic(file, save({"images": images}, {"seconds": str(seconds)}))
            progress.advance(len(drawn))
    return images, seconds / count


def _read(file: Path) -> tuple[Tensor, float]:
    """Read samples, and the CPU seconds that all of them took; none without a file."""
    if not file.is_file():
        return torch.empty(0, dtype=torch.uint8), 0.0
    with safe_open(file, "pt") as opened:
        return opened.get_tensor("images"), float(opened.metadata()["seconds"])


def score(judge: Classifier, images: Tensor, labels: Tensor, real: ImageFeatures) -> Figures:
    """Compare uint8 samples with real images, and with the classes [N] that they were drawn for."""
    features = extract(judge, (to_float(part) for part in images.split(BATCH)))
    right = judge.classify(images) == labels
    return {
        "samples": len(images),
        "accuracy": float(right.double().mean()),
        **compare_features(features, real),
    }
