"""A trained model as a folder to publish, which the Hugging Face Hub takes as it is.

    FOLDER/README.md            model card, see r2id.sampling.model_card
          /config.json          what the model is, for people and other programs
          /model.safetensors    the weights: the one file of r2id.checkpoints.pretrained
          /pictures/            samples, see r2id.sampling.thumbnails, and plots of the report

All weights are in one file, those of an R2ID's RIAE too: open_trained takes a folder with one such
file already, the two cannot be mixed up with those of another export, and ``model.safetensors`` is
where the hub looks for the number of parameters. It counts downloads by requests of
``config.json``.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import r2id
from r2id.checkpoints import Checkpoint
from r2id.checkpoints.export import export
from r2id.checkpoints.pretrained import FORMAT, Pretrained, read
from r2id.config import SamplerConfig
from r2id.errors import InputError
from r2id.files import atomic_folder, write_json
from r2id.models.codec import Codec
from r2id.models.coords import Size
from r2id.progress import say
from r2id.sampling.model_card import Card, render
from r2id.sampling.sampler import Sampler
from r2id.sampling.thumbnails import draw_thumbnails

WEIGHTS, CONFIG, CARD, PICTURES = "model.safetensors", "config.json", "README.md", "pictures"
_PLOTS = ("guidance", "loss_by_time")
"""Figures of a report that are published. Others show images of the data set, which may not be."""
_REPORT_VERSIONS = (2, 3, 4)
_SAMPLING = {*SamplerConfig.model_fields, "seed"}
"""Settings of the card's pictures."""
_FILES = (".pt", ".pth", ".ckpt", ".bin", ".onnx")
"""Endings of files that other programs keep weights in: nobody calls a folder so."""


def export_folder(
    source: Checkpoint | Path,
    out: Path,
    *,
    name: str | None = None,
    licence: str | None = None,
    report: Path | None = None,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    **weights: Any,
) -> dict[str, Any]:
    """Write the folder of a trained model, completely or not at all.

    ``name`` is how the card's examples call the model, by default as the folder is called;
    ``licence`` an identifier of the hub, such as "mit"; ``report`` the folder of an evaluation,
    by default the folder "report" beside the run, if it is one of this model. ``weights`` are
    options of r2id.checkpoints.export.export. Returns what that does, and the folder.

    Raises InputError when the model cannot be exported or draw, when there is something else at
    ``out``, and when a given report is of another model; WorkError when the disk is full.
    """
    _check(out, licence, overwrite)
    checkpoint = Checkpoint.open(source)
    with atomic_folder(out) as folder:
        done = export(checkpoint, folder / WEIGHTS, publish=True, **weights)
        model = _open(read(folder / WEIGHTS), device)
        found = _find_report(model, checkpoint, done["identity"], report)
        config = _config(model, done, licence)
        write_json(folder / CONFIG, config)
        sizes, plots = _picture(model, found, folder / PICTURES)
        card = Card(name or out.absolute().name, config, sizes, found and found[1], plots)
        (folder / CARD).write_text(render(card), encoding="utf-8")
    return {**done, "file": str(out / WEIGHTS), "folder": str(out), "report": found is not None}


@dataclass(frozen=True)
class _Model:
    """An exported model, opened."""

    file: Pretrained
    codec: Codec
    sampler: Sampler | None
    """None for an RIAE, which draws nothing."""


def _check(out: Path, licence: str | None, overwrite: bool) -> None:
    """Raise InputError for something at ``out`` that may not be replaced, or no licence's name."""
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise InputError(
            f"--license {licence!r}: must be an identifier of the hub in small letters, such as "
            "mit, apache-2.0 or cc-by-4.0"
        )
    if out.suffix in _FILES:
        raise InputError(f"--out {out}: must be a folder or a .safetensors file")
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"--out {out}: is a file; must be a folder or a .safetensors file")
    if not overwrite:
        raise InputError(f"--out {out}: exists already; choose another, or --overwrite")
    foreign = {path.name for path in out.iterdir()} - {WEIGHTS, CONFIG, CARD, PICTURES}
    if foreign:
        raise InputError(
            f"--out {out}: holds {min(foreign)}, which no export wrote and --overwrite would "
            "remove; choose another folder"
        )


def _open(file: Pretrained, device: torch.device | str) -> _Model:
    if file.meta.stage == "riae":
        return _Model(file, Codec.load(file, device), None)
    sampler = Sampler.load(file, device)
    return _Model(file, sampler.codec, sampler)


def _config(model: _Model, done: dict[str, Any], licence: str | None) -> dict[str, Any]:
    """Describe the model for config.json: its kind, its sizes and the settings of its training."""
    about, sampler, codec, inner = model.file.about, model.sampler, model.codec, model.file.inner
    networks = ({"r2id": sampler.model} if sampler else {}) | {"riae": codec.model}
    parameters = {
        name: sum(value.numel() for value in network.parameters())
        for name, network in networks.items()
    }
    condition = sampler.model.config.condition if sampler else None
    return {
        "format": FORMAT,
        "format_version": model.file.version,
        "library_name": "r2id",
        "r2id_version": r2id.__version__,
        "license": licence or "other",
        "license_name": None if licence else "unspecified",
        "stage": about.stage,
        "step": about.step,
        "samples_seen": about.samples,
        "average": about.average,
        "dtype": done["dtype"],
        "parameters": {name: count for name, count in parameters.items() if count},
        "image_size": list(codec.image),  # the median of the training images
        "latent_areas": list(sampler.areas) if sampler else None,
        "latent_ratios": list(sampler.ratios) if sampler else None,
        "downsample": codec.downsample,
        "channels": codec.channels,
        "classes": sampler.num_classes if sampler else 0,
        "class_names": list(sampler.class_names) if sampler else [],
        "attributes": list(sampler.attributes) if sampler else [],
        "condition": condition,
        "embedding_shape": list(sampler.model.condition_shape)
        if sampler and condition == "embedding"
        else None,
        "sampling": sampler.defaults.model_dump(mode="json", include=_SAMPLING)
        if sampler
        else None,
        "guide": about.guide,
        "config": about.config,
        "codec": inner
        and {
            "step": inner.about.step,
            "samples_seen": inner.about.samples,
            "config": inner.about.config,
        },
    }


def _find_report(
    model: _Model, checkpoint: Checkpoint, identity: str, given: Path | None
) -> tuple[Path, dict[str, Any]] | None:
    """Read the report of the model → (its folder, its metrics); None where there is none.

    Raises InputError when a given one is missing, damaged or of another model.
    """
    folder = given or checkpoint.run.parent / "report"
    file = folder / "metrics.json"
    if given is None and not file.is_file():
        return None
    try:
        metrics = json.loads(file.read_bytes())
        wrong = _difference(model, identity, metrics)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        wrong = "not the metrics of an evaluation of this version of r2id"
    if wrong and given:
        raise InputError(f"--report {file}: {wrong}")
    if wrong:
        say(f"{file}: its figures are left out: {wrong}")
    return None if wrong else (folder, metrics)


def _difference(model: _Model, identity: str, metrics: dict[str, Any]) -> str | None:
    """Tell why figures do not hold for an exported model; None if they do."""
    if metrics["format_version"] not in _REPORT_VERSIONS:
        return f"format_version {metrics['format_version']}; read are {_REPORT_VERSIONS}"
    measured = metrics["provenance"]
    if model.file.about.average != "default":
        return f"measured with another average of the weights than {model.file.about.average}"
    if measured[model.file.meta.stage]["identity"] != identity:
        return "measured with another model" + (", or guide," if model.file.about.guide else "")
    if model.sampler:
        used, now = measured["sampling"], model.sampler.diffusion
        if used["shift_exponent"] != now.shift_exponent:
            return f"measured with the noise shift exponent {used['shift_exponent']:g}"
    return None


def _picture(
    model: _Model, found: tuple[Path, dict[str, Any]] | None, pictures: Path
) -> tuple[list[Size], list[str]]:
    """Draw thumbnails and copy plots of the report → (sizes of those, names of these).

    An RIAE has none: what it shows are images of somebody's data set.
    """
    if not model.sampler:
        return [], []
    pictures.mkdir()
    sizes = draw_thumbnails(model.sampler, pictures)
    files = [found[0] / "figures" / f"{name}.png" for name in _PLOTS] if found else []
    present = [file for file in files if file.is_file()]
    for file in present:
        shutil.copyfile(file, pictures / file.name)
    return sizes, [file.stem for file in present]
