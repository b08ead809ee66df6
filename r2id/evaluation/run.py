"""Evaluate a checkpoint on a shard set: write metrics.json, figures and report.html.

``evaluate`` measures what the checkpoint allows: reconstructions (r2id.evaluation.riae), loss and
samples (r2id.evaluation.r2id) and both at many sizes (r2id.evaluation.invariance).
r2id.evaluation.provenance records how each figure was made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2id.checkpoints.trained import Trained, open_trained
from r2id.config import DataConfig, change
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.errors import InputError
from r2id.evaluation import figures
from r2id.evaluation.classifier import load_or_train_classifier
from r2id.evaluation.extractor import TorchScriptExtractor
from r2id.evaluation.guidance import sweep_guidance
from r2id.evaluation.headlines import headlines
from r2id.evaluation.invariance import measure_reconstructions, measure_samples
from r2id.evaluation.neighbours import check_training_images, find_neighbours
from r2id.evaluation.pictures import (
    GRID_COUNT,
    Pictures,
    show_invariance,
    show_neighbours,
    show_riae,
    show_samples,
)
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
from r2id.evaluation.riae import measure_riae
from r2id.evaluation.self_supervised import load_or_train_extractor
from r2id.files import write_atomic, write_json
from r2id.models.codec import Codec
from r2id.models.coords import Size
from r2id.progress import counted, say
from r2id.sampling.conditions import draw_conditions
from r2id.sampling.memory import check_samples
from r2id.sampling.sampler import Sampler

# 2: "t_scrape" and "grid_scrape" became "loss_by_time" and "loss_by_grid".
# 3: windows of large images are no longer shrunk ("patch_frechet").
# 4: sets of unequal sizes are thinned at random, invariance compares as many real images as
# samples, and its rows have no "lowest".
FORMAT_VERSION = 4
_COMPARED = 1000  # samples, at most, whose nearest training images are found
_SEARCHED = 100  # images, at most, that are searched for colour
_COLOURED = 0.1  # least difference of colour channels in [−1, 1] that no compression makes of grey
Metrics = dict[str, Any]


def evaluate(
    checkpoint: Path,
    shards: Path,
    out: Path,
    *,
    sizes: Sequence[Size] = (),
    count: int = 1000,
    seed: int = 0,
    split: str | None = None,
    invariance: int = 0,
    guidance: float | Sequence[float] | None = None,
    extractor: str | Path | None = None,
    extractor_size: Size | None = None,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> Metrics:
    """Measure an RIAE or R2ID checkpoint on the test split, or another, of a shard set.

    With an R2ID checkpoint its RIAE is measured too. Writes ``metrics.json``, ``figures/*.png``,
    ``report.html`` and, for reuse, the networks that it trains (``classifier.safetensors``,
    ``extractor.safetensors``) into the folder ``out``, replacing an older evaluation. Files there
    that are of none stay.
    Returns the content of metrics.json.

    Args:
        sizes: sizes (height, width) of the scored samples; default: the training images' size.
        count: samples scored at each size, with seeds from ``seed`` on: of all classes in turn, or
            under the attributes or embeddings of test images.
        split: split of the shards that is compared with; None is data.test_split of the training.
        invariance: samples at each of the sizes of r2id.evaluation.invariance, where
            reconstructions are measured too; 0 leaves this part out.
        guidance: scale of classifier-free guidance; None is the run's own. Of several, each is
            scored at the training images' size, and the rest is measured with the one of the least
            Fréchet distance.
        extractor: path or URL of a TorchScript file, in whose features images are compared; None
            uses the classifier, or without classes an extractor that is trained on the images.
        extractor_size: height and width of the input of that file; default: the training images'.
        settings: fields of SampleConfig that replace the run's own; None keeps a field.

    Raises InputError, before anything is written, when checkpoint, shards, extractor or ``out`` are
    unusable, and WorkError when an extractor cannot be downloaded or makes features that are not
    finite.
    """
    if out.exists() and not out.is_dir():
        raise InputError(
            f"--out {out}: is a file; must be a folder, new or of an earlier evaluation"
        )
    subject = _open(checkpoint, shards, extractor, extractor_size, device, seed, split)
    compared = subject.riae_data.test_split
    if invariance and subject.sampler and len(subject.shards.split(compared)) < 2:
        raise InputError(
            f"{shards}: split {compared!r} has 1 image; --invariance compares halves of a split, "
            "which take at least 2"
        )
    scales = _scales(guidance, count)
    settings = {name: value for name, value in settings.items() if value is not None}
    if len(scales) == 1:
        settings["guidance"] = scales[0]
    if settings or scales:
        subject = _with_sampling(subject, settings, scales)
    if subject.sampler:
        for size in sizes:
            check_samples(subject.sampler, size, None, GRID_COUNT)
    given = _draw_conditions(subject, max(count, invariance))
    if len(scales) > 1 and subject.sampler and not subject.sampler.num_classes and given is None:
        raise InputError(
            f"guidance {', '.join(f'{scale:g}' for scale in scales)}: {shards} has nothing that "
            "samples could be conditioned on, and guidance changes nothing without"
        )
    subject = _with_networks(subject, out)
    metrics: Metrics = {"format_version": FORMAT_VERSION}
    pictures: Pictures = {}
    if subject.codec.riae:  # an R2ID of pixels has no autoencoder to measure
        metrics["riae"] = measure_riae(
            subject.codec, subject.shards, subject.riae_data, subject.extractor
        )
        pictures = show_riae(subject)
    samples = Samples(subject.sampler, count, seed, given) if subject.sampler else None
    if samples:
        wanted = list(dict.fromkeys(sizes)) or [subject.codec.image]
        samples, found, drawn = _score(subject, samples, wanted, scales)
        subject = replace(subject, sampler=samples.sampler)
        metrics |= found
        pictures |= drawn | show_samples(subject, samples, wanted, metrics["r2id"])
    if invariance:
        metrics["invariance"] = _invariance(subject, samples and samples.with_count(invariance))
        pictures |= show_invariance(metrics["invariance"])
    metrics["provenance"] = describe(subject, metrics)
    metrics["headlines"] = headlines(metrics)
    _write(out, metrics, pictures)
    return metrics


def _open(
    source: Trained | Path,
    shards: Path,
    extractor: str | Path | None,
    extractor_size: Size | None,
    device: torch.device | str,
    seed: int,
    split: str | None,
) -> Subject:
    """Open everything. Input errors are raised here, before anything is computed or written."""
    trained = open_trained(source)
    sampler = Sampler.load(trained, device) if trained.meta.stage == "r2id" else None
    kind = sampler.model.config.condition if sampler else "none"
    opened = ShardSet.open(shards, embeddings=kind == "embedding")
    codec = sampler.codec if sampler else Codec.load(trained, device)
    subject = Subject(trained, codec, sampler, opened, seed, split)
    subject = replace(subject, grey=_loses_colour(codec, opened, subject.riae_data))
    if sampler:
        check_training_images(opened, subject.data)
        _check_conditions(trained, sampler, opened)
    if sampler and sampler.num_classes not in (0, opened.num_classes):
        found = counted(opened.num_classes, "class", "classes")
        raise InputError(
            f"{shards}: has {found}, and {trained.path} was trained with {sampler.num_classes}"
        )
    if sampler and sampler.num_classes:
        _check_class_names(trained, opened)
    if extractor is None:
        if extractor_size:
            raise InputError("extractor_size: goes with an extractor, and there is none")
        return subject
    size = extractor_size or codec.image
    return replace(subject, extractor=TorchScriptExtractor.load(extractor, size, codec.device))


def _loses_colour(codec: Codec, shards: ShardSet, data: DataConfig) -> bool:
    """Return whether images in colour, of which some are looked at, are made grey for the model."""
    if codec.channels > 1:
        return False
    coloured = data.model_copy(update={"channels": 3})
    batches = eval_loader(shards, coloured, split=data.test_split, batch=10, limit=_SEARCHED)
    return any(float(batch["image"].diff(dim=1).abs().max()) > _COLOURED for batch in batches)


def _check_conditions(trained: Trained, sampler: Sampler, shards: ShardSet) -> None:
    """Raise InputError for attributes or embeddings other than the model's; say if there are none.

    What the model is not conditioned on does not matter.
    """
    kind, found = sampler.model.config.condition, shards.manifest
    wanted: dict[str, tuple[list[Any], list[Any]]] = {
        "attributes": (list(sampler.attributes), found.attribute_names),
        "embedding": (list(sampler.model.condition_shape or ()), found.embedding_shape),
    }
    own, theirs = wanted.get(kind, ([], []))
    if own and not theirs:
        say(f"{shards.folder}: has no {kind}: samples are drawn without a condition")
    elif own != theirs:
        raise InputError(
            f"{shards.folder}: has {kind} {theirs}, and {trained.path} was trained with {own}"
        )


def _check_class_names(trained: Trained, shards: ShardSet) -> None:
    """Raise InputError when a class of the shards has another name than the model's.

    Checkpoints of before classes were named have no names, and sets without names have numbers.
    """
    numbers = [str(number) for number in range(shards.num_classes)]
    if shards.class_names == numbers:
        return
    pairs = zip(trained.meta.model.get("class_names", ()), shards.class_names, strict=False)
    for number, (own, name) in enumerate(pairs):
        if own != name:
            raise InputError(
                f"{shards.folder}: class {number} is {name!r}, and {trained.path} was trained with "
                f"{own!r} as class {number}"
            )


def _scales(guidance: float | Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Return the different scales of guidance that were asked for."""
    if guidance is None:
        return ()
    if isinstance(guidance, int | float):
        return (guidance,)
    scales = tuple(dict.fromkeys(guidance))
    if len(scales) > 1 and count < 2:
        raise InputError(f"count {count}: scales of guidance are compared by at least 2 samples")
    return scales


def _with_sampling(
    subject: Subject, settings: Mapping[str, Any], scales: Sequence[float]
) -> Subject:
    if subject.sampler is None:
        names = dict.fromkeys([*settings, *(["guidance"] if scales else [])])
        raise InputError(
            f"{', '.join(names)}: for samples only, but {subject.trained.path} is an RIAE, "
            "which draws none"
        )
    for scale in scales or (None,):
        subject.sampler.check_guidance(scale, settings.get("autoguidance"))
    return replace(
        subject,
        sampler=replace(subject.sampler, defaults=change(subject.sampler.defaults, settings)),
    )


def _draw_conditions(subject: Subject, count: int) -> Tensor | None:
    if subject.sampler is None:
        return None
    split = subject.data.test_split
    return draw_conditions(subject.sampler, subject.shards, split, count, subject.seed)


def _with_networks(subject: Subject, out: Path) -> Subject:
    """Add the classifier and the extractor that samples need, trained unless they are in ``out``.

    A set without classes has no classifier, and an extractor that is trained without them.
    """
    if subject.sampler is None:
        return subject
    shards, data, device = subject.shards, subject.data, subject.codec.device
    if subject.sampler.num_classes > 1:
        file = out / "classifier.safetensors"
        classifier = load_or_train_classifier(shards, data, file, device)
        return replace(subject, classifier=classifier, extractor=subject.extractor or classifier)
    if subject.extractor:
        return subject
    file = out / "extractor.safetensors"
    return replace(subject, extractor=load_or_train_extractor(shards, data, file, device))


def _score(
    subject: Subject, samples: Samples, sizes: Sequence[Size], scales: Sequence[float]
) -> tuple[Samples, Metrics, Pictures]:
    """Measure an R2ID: its loss, its samples, and what is nearest to them in training.

    Of several ``scales`` of guidance, all but the sweep itself is measured with the best.
    """
    shards, data, extractor = subject.shards, subject.data, subject.extractor
    size = samples.sampler.codec.image
    assert extractor is not None
    found: Metrics = {
        "loss_by_time": measure_loss_by_time(
            samples.sampler, encode_test_images(samples.sampler, shards, data), seed=subject.seed
        ),
        "loss_by_grid": measure_loss_by_grid(samples.sampler, shards, data, seed=subject.seed),
        "condition": samples.condition,
        "sizes": {},
    }
    metrics: Metrics = {"r2id": found}
    pictures: Pictures = {}
    real, found["real"] = measure_real_baseline(extractor, shards, data, size, len(samples))
    if len(scales) > 1:
        samples, metrics["guidance"] = sweep_guidance(
            samples, scales, subject.classifier, extractor, real
        )
        pictures["guidance"] = figures.guidance(metrics["guidance"], found["real"])
    for height, width in sizes:
        found["sizes"][f"{height}x{width}"] = score_samples(
            samples, subject.classifier, extractor, real, (height, width)
        )
    few = samples.with_count(min(len(samples), _COMPARED))
    near, metrics["neighbours"] = find_neighbours(
        draw_samples(few, [size])[size], real.whole, extractor, shards, data
    )
    pictures["neighbours"] = show_neighbours(near)
    if subject.classifier:
        metrics["classifier"] = {
            "test_accuracy": subject.classifier.test_accuracy,
            "size": list(subject.classifier.size),
            "train_images": subject.classifier.train_images,
            "test_images": subject.classifier.test_images,
        }
    return samples, metrics, pictures


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


def _write(out: Path, metrics: Metrics, pictures: Pictures) -> None:
    """Write each file atomically, the report last, and remove figures of an older evaluation.

    Those are the ones that its metrics.json lists: other pictures are the user's.
    """
    metrics["figures"] = sorted(pictures)
    older = _older_figures(out / "metrics.json")
    for name, data in pictures.items():
        write_atomic(out / "figures" / f"{name}.png", data)
    for file in (out / "figures").glob("*.png"):
        if file.stem in older and file.stem not in pictures:
            file.unlink()
    write_json(out / "metrics.json", metrics, allow_nan=False)
    write_atomic(out / "report.html", render(metrics, pictures).encode())


def _older_figures(file: Path) -> list[str]:
    """Return the names of the figures that an older evaluation, of this metrics.json, has drawn."""
    try:
        return json.loads(file.read_bytes()).get("figures", [])
    except (OSError, ValueError, AttributeError):  # none, or damaged
        return []
