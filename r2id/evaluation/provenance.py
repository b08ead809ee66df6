"""Where every figure comes from: how many images, of which seeds, in whose eyes, by which rules, against what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import r2id
from r2id.checkpoints import checkpoint as checkpoints
from r2id.config import DataConfig
from r2id.data.shards import ShardSet
from r2id.evaluation.classifier import Judge
from r2id.evaluation.extractor import Extractor
from r2id.evaluation.images import RESIZE_RULE
from r2id.evaluation.invariance import SIZE_RULE
from r2id.evaluation.reference import WINDOW_RULE
from r2id.models.codec import Codec
from r2id.sampling.sampler import Sampler

Facts = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What is evaluated, on what, and by what."""

    checkpoint: Path
    codec: Codec
    sampler: Sampler | None
    shards: ShardSet
    seed: int
    judge: Judge | None = None
    extractor: Extractor | None = None
    """In whose features images are compared: the one of a file, or the judge."""

    @property
    def riae_data(self) -> DataConfig:
        """How the RIAE's images are read."""
        return self._data(self.codec.path)

    @property
    def data(self) -> DataConfig:
        """How the R2ID's images are read."""
        return self._data(self.checkpoint)

    def _data(self, path: Path) -> DataConfig:
        """As the checkpoint's images were, from other shards maybe."""
        recorded = DataConfig.model_validate(checkpoints.load_meta(path).config["data"])
        return recorded.model_copy(update={"shards": self.shards.folder, "latents": None})


def describe(subject: Subject, metrics: Mapping[str, Any]) -> Facts:
    """Data, checkpoints, settings and rules, and for each figure of the metrics what it rests on."""
    shards, sampler = subject.shards, subject.sampler
    splits = shards.manifest.splits
    facts: Facts = {
        "data": {
            "dataset": shards.manifest.dataset,
            "digest": shards.digest,
            "class_names": shards.class_names,
            **{f"{name}_images": split.samples for name, split in splits.items()},
        },
        **({"riae": _origin(subject.codec.path, shards)} if subject.codec.riae else {}),
    }
    if sampler:
        chosen = sampler.defaults
        facts |= {
            "r2id": _origin(subject.checkpoint, shards),
            "sampling": {
                "first_seed": subject.seed,
                "steps": chosen.steps,
                "guidance": chosen.guidance,
                "guidance_interval": list(chosen.guidance_interval),
                "solver": chosen.solver,
                "shift_exponent": sampler.diffusion.shift_exponent,
            },
        }
    seen = {"judge of classes": subject.judge, "extractor": subject.extractor}
    facts |= {
        name: {"name": one.name, "hash": one.hash, "size": list(one.size)}
        for name, one in seen.items()
        if one
    }
    return facts | {
        "rules": {"resize": RESIZE_RULE, "windows": WINDOW_RULE, "invariance_sizes": SIZE_RULE},
        "software": {
            "r2id": r2id.__version__,
            "torch": torch.__version__,
            "device": subject.codec.device.type,
        },
        "figures": dict(_figures(subject, metrics)),
    }


def _origin(path: Path, shards: ShardSet) -> Facts:
    meta = checkpoints.load_meta(path)
    return {
        "checkpoint": str(checkpoints.resolve(path)),
        "identity": checkpoints.identity(path),
        "steps": meta.step,
        "images_seen": meta.samples,
        "seed": meta.seed,
        "trained_on_this_data": meta.model["digest"] == shards.digest,
    }


def _figures(subject: Subject, metrics: Mapping[str, Any]) -> Iterator[tuple[str, Facts]]:
    """Name of a figure → images, seeds, extractor, resize rule and reference."""
    split = subject.riae_data.test_split
    data = f"{split} split of {subject.shards.digest}"
    eyes = _eyes(subject.extractor)
    if "riae" in metrics:
        native, half = (metrics["riae"][name]["images"] for name in ("native", "half"))
        yield (
            "RIAE: MSE, PSNR, SSIM",
            _fact(f"{native} test images; {half} at other sizes", "", "", data),
        )
        if subject.extractor:
            yield "RIAE: Fréchet distance", _fact(f"{native} test images", "", eyes, data)
    if "r2id" in metrics:
        scrape = metrics["r2id"]["t_scrape"]
        yield (
            "loss against time and logSNR",
            _fact(f"{scrape['images']} test images", f"noise {subject.seed} on", "", data),
        )
        if "real" in metrics["r2id"]:
            yield from _of_samples(
                "samples",
                subject,
                metrics["r2id"]["sizes"],
                f"{metrics['r2id']['real']['test_images']} images of {data}",
            )
    if "invariance" in metrics:
        found = metrics["invariance"]
        if "riae" in found:
            images = found["riae"]["half_to_double"]["images"]
            yield (
                "invariance: reconstructions",
                _fact(f"{images} test images per size", "", eyes, data),
            )
        if "r2id" in found:
            reference = f"{found['r2id']['reference_images']} images (every other one) of {data}"
            yield from _of_samples(
                "invariance: samples", subject, found["r2id"]["sizes"], reference
            )
            row = next(iter(found["r2id"]["sizes"].values()))
            yield (
                "invariance: real images stretched",
                _fact(f"{row['stretched']['images']} per size", "", eyes, reference),
            )
            pairs = row["consistency"]["samples"]
            yield (
                "invariance: consistency of samples",
                _fact(
                    f"{pairs} per size",
                    _seeds(subject.seed, pairs),
                    _eyes(subject.judge),
                    "the same seeds at twice the size",
                ),
            )


def _of_samples(
    name: str, subject: Subject, rows: Mapping[str, Any], reference: str
) -> Iterator[tuple[str, Facts]]:
    count = next(iter(rows.values()))["samples"]
    images, seeds = f"{count} samples per size", _seeds(subject.seed, count)
    if subject.judge:
        yield (
            f"{name}: class accuracy, failures",
            _fact(images, seeds, _eyes(subject.judge), "the classes asked for"),
        )
    yield (
        f"{name}: Fréchet distances, precision, recall",
        _fact(images, seeds, _eyes(subject.extractor), reference),
    )


def _fact(images: str, seeds: str, extractor: str, reference: str) -> Facts:
    return {
        "images": images,
        "seeds": seeds,
        "extractor": extractor,
        "resize": RESIZE_RULE,
        "reference": reference,
    }


def _eyes(extractor: Extractor | None) -> str:
    return f"{extractor.name} {extractor.hash}" if extractor else ""


def _seeds(first: int, count: int) -> str:
    return f"{first} to {first + count - 1}"
