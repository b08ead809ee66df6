"""Evaluate a checkpoint on a shard set: write metrics.json, figures and report.html.

``evaluate`` measures what the checkpoint allows: reconstructions (r2id.evaluation.riae), loss and
samples (r2id.evaluation.r2id) and both at many sizes (r2id.evaluation.invariance).
r2id.evaluation.provenance records how each figure was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from r2id.checkpoints import Checkpoint
from r2id.config import change
from r2id.data.shards import ShardSet
from r2id.errors import InputError
from r2id.evaluation import figures
from r2id.evaluation.classifier import load_or_train_classifier
from r2id.evaluation.extractor import TorchScriptExtractor
from r2id.evaluation.images import load_images
from r2id.evaluation.invariance import measure_reconstructions, measure_samples
from r2id.evaluation.provenance import Subject, describe
from r2id.evaluation.r2id import (
    Samples,
    draw_samples,
    encode_test_images,
    measure_loss_by_grid,
    measure_loss_by_time,
    measure_real_baseline,
    score_samples,
)
from r2id.evaluation.report import render
from r2id.evaluation.riae import measure_riae, reconstruct_examples, scale_size
from r2id.files import write_atomic, write_json
from r2id.images import to_float
from r2id.models.codec import Codec
from r2id.models.coords import Size
from r2id.sampling.memory import check_samples
from r2id.sampling.sampler import Sampler

FORMAT_VERSION = 2  # 2: "t_scrape" and "grid_scrape" became "loss_by_time" and "loss_by_grid"
_GRID_COUNT = 100  # samples shown per size
_LADDER_ROWS = 5  # seeds in the figure of one seed at many sizes
_SHOWN_BY_SIZE = {
    "accuracy": "class accuracy",
    "frechet": "Fréchet distance",
    "patch_frechet": "Fréchet distance of windows",
}

Metrics = dict[str, Any]
Pictures = dict[str, bytes]


def evaluate(
    checkpoint: Path,
    shards: Path,
    out: Path,
    *,
    sizes: Sequence[Size] = (),
    count: int = 1000,
    seed: int = 0,
    invariance: int = 0,
    extractor: str | Path | None = None,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> Metrics:
    """Measure an RIAE or R2ID checkpoint on the test split of a shard set.

    With an R2ID checkpoint its RIAE is measured too. Writes ``metrics.json``, ``figures/*.png``,
    ``report.html`` and, for reuse, ``classifier.safetensors`` into the folder ``out``, replacing an
    older evaluation. Returns the content of metrics.json.

    Args:
        sizes: sizes (height, width) of the scored samples; default: the training images' size.
        count: samples scored at each size, with seeds from ``seed`` on.
        invariance: samples at each of the sizes of r2id.evaluation.invariance, where
            reconstructions are measured too; 0 leaves this part out.
        extractor: path or URL of a TorchScript file, in whose features images are compared;
            None uses the classifier.
        settings: fields of SampleConfig that replace the run's own; None keeps a field.

    Raises InputError, before anything is written, when checkpoint, shards, extractor or ``out`` are
    unusable, and WorkError when an extractor cannot be downloaded.
    """
    if out.exists() and not out.is_dir():
        raise InputError(
            f"--out {out}: is a file; must be a folder, new or of an earlier evaluation"
        )
    subject = _open(checkpoint, shards, extractor, device, seed)
    settings = {name: value for name, value in settings.items() if value is not None}
    if settings:
        subject = _with_sampling(subject, settings)
    if subject.sampler:
        for size in sizes:
            check_samples(subject.sampler, size, None, _GRID_COUNT)
    subject = _with_classifier(subject, out / "classifier.safetensors")
    metrics: Metrics = {"format_version": FORMAT_VERSION}
    pictures: Pictures = {}
    if subject.codec.riae:  # an R2ID of pixels has no autoencoder to measure
        metrics["riae"] = measure_riae(
            subject.codec, subject.shards, subject.riae_data, subject.extractor
        )
        pictures = _riae_pictures(subject)
    samples = Samples(subject.sampler, count, seed) if subject.sampler else None
    if samples:
        wanted = list(dict.fromkeys(sizes)) or [subject.codec.image]
        metrics |= _score(subject, samples, wanted)
        pictures |= _show_samples(subject, samples, wanted, metrics["r2id"])
    if invariance:
        metrics["invariance"] = _invariance(subject, samples and samples.first(invariance))
        pictures |= _show_invariance(metrics["invariance"])
    metrics["provenance"] = describe(subject, metrics)
    metrics["headlines"] = _headlines(metrics)
    _write(out, metrics, pictures)
    return metrics


def _open(
    source: Checkpoint | Path,
    shards: Path,
    extractor: str | Path | None,
    device: torch.device | str,
    seed: int,
) -> Subject:
    """Open everything. Input errors are raised here, before anything is computed or written."""
    checkpoint = Checkpoint.open(source)
    opened = ShardSet.open(shards)
    sampler = Sampler.load(checkpoint, device) if checkpoint.meta.stage == "r2id" else None
    codec = sampler.codec if sampler else Codec.load(checkpoint, device)
    subject = Subject(checkpoint, codec, sampler, opened, seed)
    opened.split(subject.riae_data.test_split)
    # A model that is not conditioned on classes (but on embeddings) is sampled unconditionally.
    conditioned = sampler.model.condition_shape if sampler else ()
    if sampler and not conditioned and sampler.num_classes != opened.num_classes:
        raise InputError(
            f"{shards}: has {opened.num_classes} classes, and {checkpoint.path} was trained with "
            f"{sampler.num_classes}"
        )
    if extractor is None:
        return subject
    return replace(
        subject, extractor=TorchScriptExtractor.load(extractor, codec.image, codec.device)
    )


def _with_sampling(subject: Subject, settings: Mapping[str, Any]) -> Subject:
    if subject.sampler is None:
        raise InputError(
            f"{', '.join(settings)}: for samples only, but {subject.checkpoint.path} is an RIAE, "
            "which draws none"
        )
    return replace(
        subject,
        sampler=replace(subject.sampler, defaults=change(subject.sampler.defaults, settings)),
    )


def _with_classifier(subject: Subject, kept: Path) -> Subject:
    """Add the classifier, unless the checkpoint is an RIAE or has no classes to score."""
    if subject.sampler is None or subject.sampler.num_classes < 2:
        return subject
    classifier = load_or_train_classifier(subject.shards, subject.data, kept, subject.codec.device)
    return replace(subject, classifier=classifier, extractor=subject.extractor or classifier)


def _riae_pictures(subject: Subject) -> Pictures:
    examples = reconstruct_examples(subject.codec, subject.shards, subject.riae_data)
    return {
        "reconstructions": figures.table(
            [examples.originals, *examples.rendered.values()], ["original", *examples.rendered]
        ),
        "latents": figures.latents(examples.latents[:4]),
    }


def _score(subject: Subject, samples: Samples, sizes: Sequence[Size]) -> Metrics:
    """Measure an R2ID: its loss and, with a feature extractor, its samples."""
    sampler = samples.sampler
    shards, data, classifier, extractor = (
        subject.shards,
        subject.data,
        subject.classifier,
        subject.extractor,
    )
    found: Metrics = {
        "loss_by_time": measure_loss_by_time(
            sampler, encode_test_images(sampler, shards, data), seed=subject.seed
        ),
        "loss_by_grid": measure_loss_by_grid(sampler, shards, data, seed=subject.seed),
        "sizes": {},
    }
    if extractor is None:
        return {"r2id": found}
    real, found["real"] = measure_real_baseline(
        extractor, shards, data, sampler.codec.image, len(samples)
    )
    for size in sizes:
        found["sizes"][f"{size[0]}x{size[1]}"] = score_samples(
            samples, classifier, extractor, real, size
        )
    return (
        {"r2id": found}
        if classifier is None
        else {
            "r2id": found,
            "classifier": {
                "test_accuracy": classifier.test_accuracy,
                "size": list(classifier.size),
                "train_images": classifier.train_images,
                "test_images": classifier.test_images,
            },
        }
    )


def _invariance(subject: Subject, samples: Samples | None) -> Metrics:
    """Measure samples and reconstructions at many sizes; see r2id.evaluation.invariance."""
    found: Metrics = {}
    if subject.codec.riae:
        found["riae"] = measure_reconstructions(
            subject.codec, subject.shards, subject.riae_data, subject.extractor
        )
    if samples and subject.extractor:
        found["r2id"] = measure_samples(
            samples, subject.classifier, subject.extractor, subject.shards, subject.data
        )
    return found


def _show_samples(
    subject: Subject, samples: Samples, sizes: Sequence[Size], found: Metrics
) -> Pictures:
    """Draw the figures of an R2ID.

    They are a grid of samples per size, one seed at many sizes ("ladder"), the samples with the
    lowest scores, real images for comparison, and the loss curves.
    """
    drawn = draw_samples(samples.first(_GRID_COUNT), sizes)
    sampler, own = samples.sampler, samples.sampler.codec.image
    others = [
        scale_size(own, scale) for scale in ((0.5, 0.5), (1, 1), (2, 2), (4, 4), (1.5, 1), (1, 1.5))
    ]
    # Sizes of the native aspect ratio come first, each group by increasing area.
    ladder = sorted(
        {*sizes, *others},
        key=lambda size: (size[0] * own[1] != size[1] * own[0], size[0] * size[1], size),
    )
    rungs = draw_samples(samples.first(_LADDER_ROWS), ladder)
    columns = min(10, sampler.num_classes) if sampler.num_classes > 1 else 10
    data = subject.data.model_copy(update={"size": own})
    real, _ = load_images(subject.shards, data, data.test_split, _GRID_COUNT)
    return {
        "ladder": figures.table(
            [[rungs[size][row] for size in ladder] for row in range(_LADDER_ROWS)],
            [f"seed {subject.seed + row}" for row in range(_LADDER_ROWS)],
            [f"{height}×{width}" for height, width in ladder],
        ),
        **{
            f"samples_{size[0]}x{size[1]}": figures.grid(images, columns)
            for size, images in drawn.items()
        },
        "real": figures.grid(to_float(real), columns),
        **{
            f"failures_{name}": _show_failures(sampler, row, subject.shards.class_names)
            for name, row in found["sizes"].items()
            if row["lowest"]
        },
        "loss_by_time": figures.loss_by_time(found["loss_by_time"]),
        "loss_by_grid": figures.loss_by_grid(found["loss_by_grid"]),
    }


def _show_failures(sampler: Sampler, row: Metrics, names: Sequence[str]) -> bytes:
    lowest = row["lowest"]
    labels, seeds = (torch.tensor([one[name] for one in lowest]) for name in ("label", "seed"))
    images = sampler.sample(labels, seeds, tuple(row["size"]))
    return figures.captioned(
        list(images),
        [
            f"{names[one['label']]}: {one['score']:.2g}\nas {names[one['predicted']]}"
            for one in lowest
        ],
    )


def _show_invariance(found: Metrics) -> Pictures:
    if "r2id" not in found:
        return {}
    rows = found["r2id"]["sizes"]
    return {
        f"invariance_{name}": figures.size_curves(
            list(rows),
            {
                "samples": [row[name] for row in rows.values()],
                "real images stretched": [row["stretched"][name] for row in rows.values()],
            },
            words,
        )
        for name, words in _SHOWN_BY_SIZE.items()
        if all(row[name] is not None for row in rows.values())
    }


def _headlines(metrics: Mapping[str, Any]) -> list[str]:
    """Return the main results as lines of text."""
    lines = []
    if "r2id" in metrics:
        for name, row in metrics["r2id"]["sizes"].items():
            accuracy = "" if row["accuracy"] is None else f" class accuracy {row['accuracy']:.3f},"
            distance = "" if row["frechet"] is None else f" Fréchet distance {row['frechet']:.3g},"
            lines.append(
                f"samples at {name}:{accuracy}{distance}".rstrip(",")
                + f" ({row['samples']} samples)"
            )
    if "classifier" in metrics:
        classifier = metrics["classifier"]
        lines.append(
            f"the classifier on real test images: {classifier['test_accuracy']:.4f} "
            f"({classifier['test_images']} images)"
        )
    if "invariance" in metrics:
        lines += _invariance_headlines(metrics["invariance"])
    if "riae" not in metrics:
        return lines
    native = metrics["riae"]["native"]
    height, width = native["size"]
    return [
        *lines,
        f"RIAE at {height}x{width}: test MSE {native['mse']:.4f}, PSNR {native['psnr']:.2f} dB "
        f"({native['images']} images)",
    ]


def _invariance_headlines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the worst result of all sizes, for each kind of result."""
    rows, riae = (found[name]["sizes"] if name in found else {} for name in ("r2id", "riae"))
    ratios = {
        name: row["accuracy"] / row["stretched"]["accuracy"]
        for name, row in rows.items()
        if row["accuracy"] is not None and row["stretched"]["accuracy"]
    }
    if ratios:
        worst = min(ratios, key=lambda name: ratios[name])
        yield (
            "lowest accuracy relative to real images stretched to the size: "
            f"{ratios[worst]:.3f} at {worst}"
        )
    for kind, pairs in (
        ("samples", {name: row["consistency"]["psnr"] for name, row in rows.items()}),
        ("reconstructions", {name: row["consistency"] for name, row in riae.items()}),
    ):
        if pairs:
            worst = min(pairs, key=lambda name: pairs[name])
            yield (
                f"lowest consistency of {kind} with twice the size: "
                f"{pairs[worst]:.2f} dB at {worst}"
            )
    if riae:
        relative = found["riae"]["half_to_double"]["relative"]
        yield (
            f"RIAE encoded at half and decoded at double size: {relative:.2f} times the native "
            "squared error"
        )


def _write(out: Path, metrics: Metrics, pictures: Pictures) -> None:
    """Write each file atomically, the report last, and remove figures of an older evaluation."""
    for name, data in pictures.items():
        write_atomic(out / "figures" / f"{name}.png", data)
    for file in (out / "figures").glob("*.png"):
        if file.stem not in pictures:
            file.unlink()
    write_json(out / "metrics.json", metrics, allow_nan=False)
    write_atomic(out / "report.html", render(metrics, pictures).encode())
