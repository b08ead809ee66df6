"""A checkpoint and a shard set → metrics.json, figures and report.html."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from r2id.checkpoints import checkpoint as checkpoints
from r2id.config import change
from r2id.data.shards import ShardSet
from r2id.errors import InputError
from r2id.evaluation import figures
from r2id.evaluation.classifier import obtain_judge
from r2id.evaluation.extractor import FileExtractor
from r2id.evaluation.images import load_images
from r2id.evaluation.invariance import measure_reconstructions, measure_samples
from r2id.evaluation.provenance import Subject, describe
from r2id.evaluation.r2id import (
    Samples,
    compare_real,
    draw_samples,
    encode_tests,
    score_samples,
    scrape_grids,
    scrape_times,
)
from r2id.evaluation.report import render
from r2id.evaluation.riae import draw_riae, measure_riae, scaled
from r2id.files import write_atomic
from r2id.images import to_float
from r2id.models.codec import Codec
from r2id.models.coords import Size
from r2id.sampling.memory import check_samples
from r2id.sampling.sampler import Sampler

FORMAT_VERSION = 1
_GRID_COUNT = 100  # samples shown per size
_LADDER_ROWS = 5
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
    """Measure an RIAE or R2ID checkpoint on the test split of a shard set; an R2ID's RIAE is measured with it.

    Scores ``count`` samples of each of ``sizes`` (default: the size of the training images), with seeds from ``seed`` on;
    with ``invariance``, so many at each of r2id.evaluation.invariance.invariance_sizes too, and reconstructions at them.
    ``settings`` are those of SampleConfig that samples are drawn with instead of the run's own; None changes nothing.
    ``extractor`` is a TorchScript file, or its address, in whose features images are compared; none compares in those of
    the classifier.
    Writes ``metrics.json``, ``figures/*.png``, ``report.html`` and, to be used again, ``classifier.safetensors`` into the
    folder ``out``, replacing an older evaluation, and returns what metrics.json holds.
    Raises InputError when checkpoint, shards, extractor or ``out`` are not what they should be, before anything is written,
    and WorkError when an extractor cannot be downloaded.
    """
    if out.exists() and not out.is_dir():
        raise InputError(
            f"--out {out}: is a file; must be a folder, new or of an earlier evaluation"
        )
    subject = _open(checkpoint, shards, extractor, device, seed)
    settings = {name: value for name, value in settings.items() if value is not None}
    if settings:
        subject = _drawn_with(subject, settings)
    if subject.sampler:
        for size in sizes:
            check_samples(subject.sampler, size, None, _GRID_COUNT)
    subject = _with_judge(subject, out / "classifier.safetensors")
    metrics: Metrics = {"format_version": FORMAT_VERSION}
    pictures: Pictures = {}
    if subject.codec.riae:  # pixels are no more than what is diffused
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
    checkpoint: Path,
    shards: Path,
    extractor: str | Path | None,
    device: torch.device | str,
    seed: int,
) -> Subject:
    """All that can be wrong is found here."""
    meta = checkpoints.load_meta(checkpoint)
    opened = ShardSet.open(shards)
    sampler = Sampler.load(checkpoint, device) if meta.stage == "r2id" else None
    codec = sampler.codec if sampler else Codec.load(checkpoint, device)
    subject = Subject(checkpoint, codec, sampler, opened, seed)
    opened.split(subject.riae_data.test_split)
    told = (
        sampler.model.condition_shape if sampler else ()
    )  # of what is no class, and samples are told none of
    if sampler and not told and sampler.num_classes != opened.num_classes:
        raise InputError(
            f"{shards}: has {opened.num_classes} classes, and {checkpoint} was trained with "
            f"{sampler.num_classes}"
        )
    if extractor is None:
        return subject
    return replace(subject, extractor=FileExtractor.load(extractor, codec.image, codec.device))


def _drawn_with(subject: Subject, settings: Mapping[str, Any]) -> Subject:
    if subject.sampler is None:
        raise InputError(
            f"{', '.join(settings)}: of samples, and {subject.checkpoint} is of an RIAE, which draws none"
        )
    return replace(
        subject,
        sampler=replace(subject.sampler, defaults=change(subject.sampler.defaults, settings)),
    )


def _with_judge(subject: Subject, kept: Path) -> Subject:
    """Without classes there is no classifier to judge by; an RIAE alone takes none."""
    if subject.sampler is None or subject.sampler.num_classes < 2:
        return subject
    judge = obtain_judge(subject.shards, subject.data, kept, subject.codec.device)
    return replace(subject, judge=judge, extractor=subject.extractor or judge)


def _riae_pictures(subject: Subject) -> Pictures:
    drawn = draw_riae(subject.codec, subject.shards, subject.riae_data)
    return {
        "reconstructions": figures.table(
            [drawn.originals, *drawn.rendered.values()], ["original", *drawn.rendered]
        ),
        "latents": figures.latents(drawn.latents[:4]),
    }


def _score(subject: Subject, samples: Samples, sizes: Sequence[Size]) -> Metrics:
    """Everything that is measured of R2ID. Without an extractor only the loss is measured."""
    sampler = samples.sampler
    shards, data, judge, extractor = subject.shards, subject.data, subject.judge, subject.extractor
    found: Metrics = {
        "t_scrape": scrape_times(sampler, encode_tests(sampler, shards, data), seed=subject.seed),
        "grid_scrape": scrape_grids(sampler, shards, data, seed=subject.seed),
        "sizes": {},
    }
    if extractor is None:
        return {"r2id": found}
    real, found["real"] = compare_real(extractor, shards, data, sampler.codec.image, len(samples))
    for size in sizes:
        found["sizes"][f"{size[0]}x{size[1]}"] = score_samples(
            samples, judge, extractor, real, size
        )
    return (
        {"r2id": found}
        if judge is None
        else {
            "r2id": found,
            "classifier": {
                "test_accuracy": judge.test_accuracy,
                "size": list(judge.size),
                "train_images": judge.train_images,
                "test_images": judge.test_images,
            },
        }
    )


def _invariance(subject: Subject, samples: Samples | None) -> Metrics:
    """See r2id.evaluation.invariance."""
    found: Metrics = {}
    if subject.codec.riae:
        found["riae"] = measure_reconstructions(
            subject.codec, subject.shards, subject.riae_data, subject.extractor
        )
    if samples and subject.extractor:
        found["r2id"] = measure_samples(
            samples, subject.judge, subject.extractor, subject.shards, subject.data
        )
    return found


def _show_samples(
    subject: Subject, samples: Samples, sizes: Sequence[Size], found: Metrics
) -> Pictures:
    """A grid per size, one seed at many sizes, the samples of the lowest scores, real images to compare with, and what the
    loss is."""
    drawn = draw_samples(samples.first(_GRID_COUNT), sizes)
    sampler, own = samples.sampler, samples.sampler.codec.image
    others = [
        scaled(own, scale) for scale in ((0.5, 0.5), (1, 1), (2, 2), (4, 4), (1.5, 1), (1, 1.5))
    ]
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
        "t_scrape": figures.time_curves(found["t_scrape"]),
        "grid_scrape": figures.grid_curves(found["grid_scrape"]),
    }


def _show_failures(sampler: Sampler, row: Metrics, names: Sequence[str]) -> bytes:
    lowest = row["lowest"]
    labels, seeds = (torch.tensor([one[name] for one in lowest]) for name in ("label", "seed"))
    images = sampler.sample(labels, seeds, tuple(row["size"]))
    return figures.captioned(
        list(images),
        [f"{names[one['label']]}: {one['score']:.2g}\nas {names[one['judged']]}" for one in lowest],
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
    """The figures that a person asks for first."""
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
        judge = metrics["classifier"]
        lines.append(
            f"the classifier on real test images: {judge['test_accuracy']:.4f} ({judge['test_images']} images)"
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
    """The worst of all sizes."""
    rows, riae = (found[name]["sizes"] if name in found else {} for name in ("r2id", "riae"))
    ratios = {
        name: row["accuracy"] / row["stretched"]["accuracy"]
        for name, row in rows.items()
        if row["accuracy"] is not None and row["stretched"]["accuracy"]
    }
    if ratios:
        worst = min(ratios, key=lambda name: ratios[name])
        yield f"least accuracy over that of real images stretched to the size: {ratios[worst]:.3f} at {worst}"
    for kind, pairs in (
        ("samples", {name: row["consistency"]["psnr"] for name, row in rows.items()}),
        ("reconstructions", {name: row["consistency"] for name, row in riae.items()}),
    ):
        if pairs:
            worst = min(pairs, key=lambda name: pairs[name])
            yield f"least consistency of {kind} with twice the size: {pairs[worst]:.2f} dB at {worst}"
    if riae:
        relative = found["riae"]["half_to_double"]["relative"]
        yield f"RIAE, encoded at half and decoded at double: {relative:.2f} times the native squared error"


def _write(out: Path, metrics: Metrics, pictures: Pictures) -> None:
    """Each file whole or absent, the report last; pictures of an older evaluation go."""
    for name, data in pictures.items():
        write_atomic(out / "figures" / f"{name}.png", data)
    for file in (out / "figures").glob("*.png"):
        if file.stem not in pictures:
            file.unlink()
    write_atomic(
        out / "metrics.json", (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode()
    )
    write_atomic(out / "report.html", render(metrics, pictures).encode())
