"""Record how every figure of the report was made: its images, seeds, extractor and reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

import r2id
from r2id.checkpoints.trained import Trained, read_section
from r2id.config import DataConfig
from r2id.data.shards import ShardSet
from r2id.errors import InputError
from r2id.evaluation.classifier import Classifier
from r2id.evaluation.extractor import FeatureExtractor
from r2id.evaluation.images import RESIZE_RULE
from r2id.evaluation.invariance import SIZE_RULE
from r2id.evaluation.reference import WINDOW_RULE
from r2id.models.codec import Codec
from r2id.sampling.sampler import Sampler

Facts = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model under evaluation, the data it is evaluated on and the networks that score it."""

    trained: Trained
    codec: Codec
    sampler: Sampler | None
    shards: ShardSet
    seed: int
    split: str | None = None
    """Split that is compared with; None for the test split of the model's training."""
    grey: bool = False
    """Whether the model has one colour channel, and the shards have images in colour."""
    classifier: Classifier | None = None
    extractor: FeatureExtractor | None = None
    """The network in whose features images are compared: a TorchScript file or the classifier."""

    @property
    def riae_data(self) -> DataConfig:
        """Data settings that the RIAE was trained with, but with the evaluated shards."""
        return self._with_shards(self.codec.data)

    @property
    def data(self) -> DataConfig:
        """Data settings that the R2ID was trained with, but with the evaluated shards."""
        return self._with_shards(read_section(self.trained, "data", DataConfig))

    def _with_shards(self, recorded: DataConfig) -> DataConfig:
        # Images are prepared as in training, even if the shards are others.
        return evaluated_data(recorded, self.shards, self.split)


def evaluated_data(recorded: DataConfig, shards: ShardSet, split: str | None) -> DataConfig:
    """Return the data settings of a model's training, but with other shards and a test split.

    Raises InputError when the shards have no such split.
    """
    split = split or recorded.test_split
    try:
        shards.split(split)
    except InputError as error:
        raise InputError(f"{error}: --split names the one to compare with") from None
    return recorded.model_copy(
        update={"shards": shards.folder, "latents": None, "test_split": split}
    )


def describe(subject: Subject, metrics: Mapping[str, Any]) -> Facts:
    """Describe data, checkpoints, settings and rules, and how each figure was made."""
    shards, sampler, riae = subject.shards, subject.sampler, subject.codec.source
    splits = shards.manifest.splits
    facts: Facts = {
        "data": {
            "dataset": shards.manifest.dataset,
            "digest": shards.digest,
            "split": subject.data.test_split,
            "made_grey": subject.grey,
            "class_names": shards.class_names,
            **{f"{name}_images": split.samples for name, split in splits.items()},
        },
        **({"riae": _origin(riae, shards)} if riae else {}),
    }
    if sampler:
        chosen = sampler.defaults
        facts |= {
            "r2id": _origin(subject.trained, shards),
            "sampling": {
                "first_seed": subject.seed,
                "steps": chosen.steps,
                "guidance": chosen.guidance,
                "autoguidance": chosen.autoguidance,
                "guidance_interval": list(chosen.guidance_interval),
                "solver": chosen.solver,
                "eta": chosen.eta,
                "shift_exponent": sampler.diffusion.shift_exponent,
            },
        }
    networks = {"classifier": subject.classifier, "extractor": subject.extractor}
    facts |= {
        name: {"name": network.name, "hash": network.hash, "size": list(network.size)}
        for name, network in networks.items()
        if network
    }
    return facts | {
        "rules": {"resize": RESIZE_RULE, "windows": WINDOW_RULE, "invariance_sizes": SIZE_RULE},
        "software": {
            "r2id": r2id.__version__,
            "torch": torch.__version__,
            "device": subject.codec.device.type,
            "date": datetime.now(UTC).date().isoformat(),
        },
        "figures": dict(_figures(subject, metrics)),
    }


def _origin(trained: Trained, shards: ShardSet) -> Facts:
    """Describe a model and its training."""
    meta = trained.meta
    return {
        "checkpoint": str(trained.path),
        "identity": trained.identity,
        "steps": meta.step,
        "images_seen": meta.samples,
        "seed": meta.seed,
        "trained_on_this_data": meta.model["digest"] == shards.digest,
    }


def _figures(subject: Subject, metrics: Mapping[str, Any]) -> Iterator[tuple[str, Facts]]:
    """Yield (name of a figure, its images, seeds, extractor, resize rule and reference)."""
    split = subject.riae_data.test_split
    data = f"{split} split of {subject.shards.digest}"
    extractor = _extractor_id(subject.extractor)
    if "riae" in metrics:
        native, half = (metrics["riae"][name]["images"] for name in ("native", "half"))
        yield (
            "RIAE: MSE, PSNR, SSIM",
            _fact(f"{native} test images; {half} at other sizes", "", "", data),
        )
        if subject.extractor:
            yield "RIAE: Fréchet distance", _fact(f"{native} test images", "", extractor, data)
    if "r2id" in metrics:
        images = metrics["r2id"]["loss_by_time"]["images"]
        yield (
            "loss against time and logSNR",
            _fact(f"{images} test images", f"noise {subject.seed} on", "", data),
        )
        if "real" in metrics["r2id"]:
            yield from _of_samples(
                "samples",
                subject,
                metrics["r2id"]["sizes"],
                f"{metrics['r2id']['real']['test_images']} images of {data}",
            )
    if "invariance" in metrics:
        invariance = metrics["invariance"]
        if "riae" in invariance:
            images = invariance["riae"]["half_to_double"]["images"]
            yield (
                "invariance: reconstructions",
                _fact(f"{images} test images per size", "", extractor, data),
            )
        if "r2id" in invariance:
            measured = invariance["r2id"]
            reference = f"{measured['reference_images']} images (every other one) of {data}"
            yield from _of_samples("invariance: samples", subject, measured["sizes"], reference)
            row = next(iter(measured["sizes"].values()))
            yield (
                "invariance: real images stretched",
                _fact(f"{row['stretched']['images']} per size", "", extractor, reference),
            )
            pairs = row["consistency"]["samples"]
            yield (
                "invariance: consistency of samples",
                _fact(
                    f"{pairs} per size",
                    _seeds(subject.seed, pairs),
                    _extractor_id(subject.classifier),
                    "the same seeds at twice the size",
                ),
            )


def _of_samples(
    name: str, subject: Subject, rows: Mapping[str, Any], reference: str
) -> Iterator[tuple[str, Facts]]:
    count = next(iter(rows.values()))["samples"]
    images, seeds = f"{count} samples per size", _seeds(subject.seed, count)
    if subject.classifier:
        yield (
            f"{name}: class accuracy, failures",
            _fact(images, seeds, _extractor_id(subject.classifier), "the classes asked for"),
        )
    yield (
        f"{name}: Fréchet distances, precision, recall",
        _fact(images, seeds, _extractor_id(subject.extractor), reference),
    )


def _fact(images: str, seeds: str, extractor: str, reference: str) -> Facts:
    return {
        "images": images,
        "seeds": seeds,
        "extractor": extractor,
        "resize": RESIZE_RULE,
        "reference": reference,
    }


def _extractor_id(extractor: FeatureExtractor | None) -> str:
    return f"{extractor.name} {extractor.hash}" if extractor else ""


def _seeds(first: int, count: int) -> str:
    return f"{first} to {first + count - 1}"
