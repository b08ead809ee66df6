"""A checkpoint and a shard set → metrics.json, figures and report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import r2id
from r2id.config import DataConfig
from r2id.data.files import write_atomic
from r2id.data.shards import ShardSet
from r2id.errors import InputError
from r2id.evaluation import figures
from r2id.evaluation.classifier import obtain_judge
from r2id.evaluation.images import load_images, to_floats
from r2id.evaluation.r2id import compare_real, draw_samples, encode_tests, score_samples, scrape_times
from r2id.evaluation.report import render
from r2id.evaluation.riae import draw_riae, measure_riae, scaled
from r2id.models.coords import Size
from r2id.sampling import Sampler
from r2id.training import checkpoint as checkpoints
from r2id.training.codec import Codec

FORMAT_VERSION = 1
_GRID_COUNT = 100  # samples shown per size
_LADDER_ROWS = 5

Metrics = dict[str, Any]
Pictures = dict[str, bytes]


def evaluate(checkpoint: Path, shards: Path, out: Path, *, sizes: Sequence[Size] = (), count: int = 1000, seed: int = 0,
             device: torch.device | str = "cpu") -> Metrics:
    """Measure an RIAE or R2ID checkpoint on the test split of a shard set; an R2ID's RIAE is measured with it.

    Scores ``count`` samples of each of ``sizes`` (default: the size of the training images), with seeds from ``seed`` on.
    Writes ``metrics.json``, ``figures/*.png``, ``report.html`` and, to be used again, ``classifier.safetensors`` into the
    folder ``out``, replacing an older evaluation, and returns what metrics.json holds.
    Raises InputError when checkpoint, shards or ``out`` are not what they should be, before anything is written.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; must be a folder, new or of an earlier evaluation")
    meta = checkpoints.load_meta(checkpoint)
    opened = ShardSet.open(shards)
    sampler = Sampler.load(checkpoint, device) if meta.stage == "r2id" else None
    codec = sampler.codec if sampler else Codec.load(checkpoint, device)
    data = _data(codec.path, shards)
    opened.split(data.test_split)
    if sampler and sampler.num_classes != opened.num_classes:
        raise InputError(f"{shards}: has {opened.num_classes} classes, and {checkpoint} was trained with "
                         f"{sampler.num_classes}")

    metrics: Metrics = {"format_version": FORMAT_VERSION, "riae": measure_riae(codec, opened, data)}
    pictures = _riae_pictures(codec, opened, data)
    if sampler:
        data, wanted = _data(checkpoint, shards), list(dict.fromkeys(sizes)) or [codec.image]
        metrics |= _score(sampler, opened, data, out / "classifier.safetensors", wanted, count, seed)
        pictures |= _show_samples(sampler, opened, data, wanted, seed)
        pictures["t_scrape"] = figures.time_curves(metrics["r2id"]["t_scrape"])
    metrics["provenance"] = _provenance(checkpoint, codec, sampler, opened, seed)
    metrics["headlines"] = _headlines(metrics)
    _write(out, metrics, pictures)
    return metrics


def _data(path: Path, shards: Path) -> DataConfig:
    """How the checkpoint's images are read, from other shards maybe."""
    recorded = DataConfig.model_validate(checkpoints.load_meta(path).config["data"])
    return recorded.model_copy(update={"shards": shards, "latents": None})


def _riae_pictures(codec: Codec, shards: ShardSet, data: DataConfig) -> Pictures:
    drawn = draw_riae(codec, shards, data)
    return {"reconstructions": figures.table([drawn.originals, *drawn.rendered.values()],
                                             ["original", *drawn.rendered]),
            "latents": figures.latents(drawn.latents[:4])}


def _score(sampler: Sampler, shards: ShardSet, data: DataConfig, kept: Path, sizes: Sequence[Size], count: int,
           seed: int) -> Metrics:
    """Everything that is measured of R2ID. Without classes there is no classifier, and only the loss is measured."""
    found: Metrics = {"t_scrape": scrape_times(sampler, encode_tests(sampler, shards, data), seed=seed), "sizes": {}}
    if sampler.num_classes < 2:
        return {"r2id": found}
    judge = obtain_judge(shards, data, kept, sampler.codec.device)
    real, found["real"] = compare_real(judge, shards, data, count)
    for size in sizes:
        found["sizes"][f"{size[0]}x{size[1]}"] = score_samples(sampler, judge, real, size, count, seed)
    return {"r2id": found, "classifier": {
        "test_accuracy": judge.test_accuracy, "size": list(judge.size), "train_images": judge.train_images,
        "test_images": judge.test_images}}


def _show_samples(sampler: Sampler, shards: ShardSet, data: DataConfig, sizes: Sequence[Size], seed: int) -> Pictures:
    """A grid per size, one seed at many sizes, and real images to compare with."""
    drawn = draw_samples(sampler, sizes, _GRID_COUNT, seed)
    own = sampler.codec.image
    others = [scaled(own, scale) for scale in ((0.5, 0.5), (1, 1), (2, 2), (4, 4), (1.5, 1), (1, 1.5))]
    ladder = sorted({*sizes, *others}, key=lambda size: (size[0] * own[1] != size[1] * own[0], size[0] * size[1], size))
    rungs = draw_samples(sampler, ladder, _LADDER_ROWS, seed)
    columns = min(10, sampler.num_classes) if sampler.num_classes > 1 else 10
    real, _ = load_images(shards, data.model_copy(update={"size": own}), data.test_split, _GRID_COUNT)
    return {"ladder": figures.table([[rungs[size][row] for size in ladder] for row in range(_LADDER_ROWS)],
                                    [f"seed {seed + row}" for row in range(_LADDER_ROWS)],
                                    [f"{height}×{width}" for height, width in ladder]),
            **{f"samples_{size[0]}x{size[1]}": figures.grid(images, columns) for size, images in drawn.items()},
            "real": figures.grid(to_floats(real), columns)}


def _provenance(path: Path, codec: Codec, sampler: Sampler | None, shards: ShardSet, seed: int) -> Metrics:
    """Where every figure comes from."""
    splits = shards.manifest.splits
    facts = {"data": {"dataset": shards.manifest.dataset, "digest": shards.digest, "class_names": shards.class_names,
                      **{f"{name}_images": split.samples for name, split in splits.items()}},
             "riae": _origin(codec.path, shards)}
    if sampler:
        chosen = sampler.defaults
        facts |= {"r2id": _origin(path, shards),
                  "sampling": {"first_seed": seed, "steps": chosen.steps, "guidance": chosen.guidance,
                               "solver": chosen.solver}}
    return facts | {"software": {"r2id": r2id.__version__, "torch": torch.__version__, "device": codec.device.type}}


def _origin(path: Path, shards: ShardSet) -> Metrics:
    meta = checkpoints.load_meta(path)
    return {"checkpoint": str(checkpoints.resolve(path)), "identity": checkpoints.identity(path), "steps": meta.step,
            "images_seen": meta.samples, "seed": meta.seed, "trained_on_this_data": meta.model["digest"] == shards.digest}


def _headlines(metrics: Mapping[str, Any]) -> list[str]:
    """The figures that a person asks for first."""
    lines = []
    if "classifier" in metrics:
        judge = metrics["classifier"]
        for name, row in metrics["r2id"]["sizes"].items():
            distance = "" if row["frechet"] is None else f", Fréchet distance {row['frechet']:.3g}"
            lines.append(f"samples at {name}: class accuracy {row['accuracy']:.3f}{distance} ({row['samples']} samples)")
        lines.append(f"the classifier on real test images: {judge['test_accuracy']:.4f} ({judge['test_images']} images)")
    native = metrics["riae"]["native"]
    height, width = native["size"]
    return [*lines, f"RIAE at {height}x{width}: test MSE {native['mse']:.4f}, PSNR {native['psnr']:.2f} dB "
                    f"({native['images']} images)"]


def _write(out: Path, metrics: Metrics, pictures: Pictures) -> None:
    """Each file whole or absent, the report last; pictures of an older evaluation go."""
    for name, data in pictures.items():
        write_atomic(out / "figures" / f"{name}.png", data)
    for file in (out / "figures").glob("*.png"):
        if file.stem not in pictures:
            file.unlink()
    write_atomic(out / "metrics.json", (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode())
    write_atomic(out / "report.html", render(metrics, pictures).encode())
