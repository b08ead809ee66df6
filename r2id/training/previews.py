"""Pictures that a training run shows of itself: reconstructions under their originals, or samples at three sizes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from r2id.config import R2idRun
from r2id.data.loader import eval_loader
from r2id.images import save_png, tile
from r2id.models.r2id import R2ID
from r2id.models.riae import RIAE
from r2id.sampling.conditions import choose_labels
from r2id.sampling.sampler import Sampler
from r2id.training.tasks import Stage

_PREVIEW_IMAGES = 10


def preview(stage: Stage, model: nn.Module, file: Path) -> Path:
    """What a model in training makes: RIAE's reconstructions under their originals, or R2ID's samples at three sizes."""
    device = next(model.parameters()).device
    if isinstance(model, RIAE):
        return _preview_reconstructions(stage, model, file, device)
    assert isinstance(model, R2ID) and stage.codec is not None
    return _preview_samples(stage, model, file)


def _preview_reconstructions(stage: Stage, model: RIAE, file: Path, device: torch.device) -> Path:
    data = stage.config.data
    # A small folder of images may have no test split; its pictures then show what training sees.
    split = data.test_split if data.test_split in stage.shards.manifest.splits else data.train_split
    batch = next(
        iter(
            eval_loader(
                stage.shards, data, split=split, batch=_PREVIEW_IMAGES, limit=_PREVIEW_IMAGES
            )
        )
    )
    images = batch["image"].to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=stage.config.train.autocast):
        decoded = model.decode(model.encode(images), (images.shape[2], images.shape[3]))
    return save_png(tile(torch.cat([images, decoded]), len(images)), file)


def _preview_samples(stage: Stage, model: R2ID, file: Path) -> Path:
    config = stage.config
    assert isinstance(config, R2idRun) and stage.codec is not None
    sampler = Sampler(
        model,
        stage.codec,
        config.diffusion,
        config.sample,
        stage.facts["base_side"],
        tuple(stage.facts["areas"]),
        tuple(stage.facts["ratios"]),
        config.train.autocast,
        tuple(stage.facts.get("attributes", ())),
    )
    labels = choose_labels(config.sample.labels, _PREVIEW_IMAGES, sampler.num_classes)
    height, width = stage.codec.image
    rows = [
        sampler.sample(labels, torch.arange(len(labels)), size)
        for size in ((height, width), (height * 3 // 2, width), (height * 2, width * 2))
    ]
    tiled = [tile(row, len(labels)) for row in rows]
    widest = max(row.shape[2] for row in tiled)
    return save_png(
        torch.cat([F.pad(row, (0, widest - row.shape[2]), value=-1.0) for row in tiled], dim=1),
        file,
    )
