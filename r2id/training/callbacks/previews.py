"""Pictures of a run's progress: reconstructions under their originals, or samples."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2id import dist
from r2id.data.loader import eval_loader
from r2id.images import save_png, tile
from r2id.models.r2id import R2ID
from r2id.models.riae import RIAE
from r2id.sampling.conditions import choose_labels
from r2id.sampling.sampler import Sampler
from r2id.training.callbacks.base import Callback
from r2id.training.state import TrainState
from r2id.training.tasks import R2idTask, RiaeTask, Task

_IMAGES = 10  # in a row


class Previews(Callback):
    """Draw RUN/samples/step-STEP.png every ``train.preview_every`` steps and at the end."""

    def post_step(self, state: TrainState) -> None:
        # After a signal there may be little time left.
        if state.stopping or not state.due(state.config.train.preview_every):
            return
        model = state.ema_model()
        if model is not None:
            file = state.folder / "samples" / f"step-{state.step:08d}.png"
            state.tracker.image(preview(state.task, model, file), "samples", state.step)
        dist.barrier()  # the other ranks wait for rank 0 here, and not somewhere in the next step


def preview(task: Task, model: nn.Module, file: Path) -> Path:
    """Write a picture of an RIAE's reconstructions, or of an R2ID's samples at three sizes."""
    if isinstance(task, RiaeTask):
        assert isinstance(model, RIAE)
        return save_png(_reconstructions(task, model), file)
    assert isinstance(task, R2idTask) and isinstance(model, R2ID)
    return save_png(_samples(task, model), file)


def _reconstructions(task: RiaeTask, model: RIAE) -> Tensor:
    """Tile images in one row, and their reconstructions in a row under it."""
    data, device = task.config.data, next(model.parameters()).device
    # A small folder of images may have no test split. The pictures then show training images.
    split = data.test_split if data.test_split in task.shards.manifest.splits else data.train_split
    batches = eval_loader(task.shards, data, split=split, batch=_IMAGES, limit=_IMAGES)
    images = next(iter(batches))["image"].to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=task.config.train.autocast):
        decoded = model.decode(model.encode(images), (images.shape[2], images.shape[3]))
    return tile(torch.cat([images, decoded]), len(images))


def _samples(task: R2idTask, model: R2ID) -> Tensor:
    """Tile the same samples at the codec's image size, at 1.5 times its height, and at twice it."""
    config, facts = task.config, task.facts
    sampler = Sampler(
        model,
        task.codec,
        config.diffusion,
        config.sample,
        facts["base_side"],
        tuple(facts["areas"]),
        tuple(facts["ratios"]),
        config.train.autocast,
        tuple(facts.get("attributes", ())),
    )
    labels = choose_labels(config.sample.labels, _IMAGES, sampler.num_classes)
    height, width = task.codec.image
    sizes = ((height, width), (height * 3 // 2, width), (height * 2, width * 2))
    rows = [
        tile(sampler.sample(labels, torch.arange(len(labels)), size), len(labels)) for size in sizes
    ]
    # Rows differ in width: pad them with black (−1) on the right.
    widest = max(row.shape[2] for row in rows)
    return torch.cat([F.pad(row, (0, widest - row.shape[2]), value=-1.0) for row in rows], dim=1)
