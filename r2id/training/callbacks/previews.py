"""Pictures of a run's progress, with captions: reconstructions beside originals, or samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from r2id import dist
from r2id.data.loader import eval_loader
from r2id.images import psnr, resize, save_png, tile
from r2id.models.coords import Size, scale_size
from r2id.models.r2id import R2ID
from r2id.models.riae import RIAE
from r2id.progress import say
from r2id.sampling.conditions import choose_labels, draw_conditions
from r2id.sampling.sampler import Sampler
from r2id.training.callbacks.base import Callback
from r2id.training.sheet import Row, enlargement, read_row, save_sheet
from r2id.training.state import TrainState
from r2id.training.tasks import R2idTask, RiaeTask

_IMAGES, _WIDTH = 10, 1600  # the most images in a row, and the most pixels of them
_FILM_ROWS = 24
_SIZES = {"native": 1.0, "half": 0.5, "double": 2.0}  # of reconstructions


class Previews(Callback):
    """Draw RUN/samples/step-STEP.png every ``train.preview_every`` steps and at the end.

    It shows an RIAE's reconstructions under their originals at native, half and double size, or an
    R2ID's samples at three sizes. The R2ID's seeds are those of all its previews, and
    RUN/samples/film.png has a row for each preview so far.

    An RIAE's losses are means over plain, magnified and resized images, and rise where that is
    harder. What training gained is seen in the PSNR of plain reconstructions: recorded before the
    first step and with each preview, and said at the start and at the end.
    """

    def pre_train(self, state: TrainState) -> None:
        if state.start or state.config.stage != "riae":
            return
        model = state.ema_model()
        if model is not None:
            assert isinstance(state.task, RiaeTask) and isinstance(model, RIAE)
            _tell_quality(state, _reconstruct(state.task, model, ("native",)))
        dist.barrier()

    def post_step(self, state: TrainState) -> None:
        # After a signal there may be little time left.
        if state.stopping or not state.due(state.config.train.preview_every):
            return
        model, guide = state.ema_model(), None
        if state.config.stage == "r2id" and state.config.sample.autoguidance:
            guide = state.ema_model("guide")
        if model is not None:
            _draw(state, model, guide)
        dist.barrier()  # the other ranks wait for rank 0 here, and not somewhere in the next step


def _draw(state: TrainState, model: nn.Module, guide: nn.Module | None) -> None:
    task, folder = state.task, state.folder / "samples"
    file = folder / f"step-{state.step:08d}.png"
    if isinstance(task, RiaeTask):
        assert isinstance(model, RIAE)
        title, pictures = f"RIAE at step {state.step}", _reconstruct(task, model, _SIZES)
        _tell_quality(state, pictures)
        sheet = save_sheet(title, _reconstructions(pictures), file)
        state.tracker.image(sheet, "reconstructions", state.step)
        return
    assert isinstance(task, R2idTask) and isinstance(model, R2ID)
    assert isinstance(guide, R2ID | None)
    rows = _samples(task, model, guide)
    title = f"R2ID at step {state.step}: each column is one seed"
    state.tracker.image(save_sheet(title, rows, file), "samples", state.step)
    save_png(rows[0].picture, folder / "film" / file.name)
    state.tracker.image(_film(folder, state.step, rows[0].scale), "film")


def _film(folder: Path, step: int, scale: int) -> Path:
    """Stack the rows of all previews up to a step, or some of many, and return the file."""
    # A process that was killed may have left rows of later steps.
    steps = sorted(int(file.stem.removeprefix("step-")) for file in (folder / "film").glob("*.png"))
    steps = _spread([past for past in steps if past <= step], _FILM_ROWS)
    rows = [
        Row(f"step {past}", read_row(folder / "film" / f"step-{past:08d}.png"), scale)
        for past in steps
    ]
    title = f"R2ID up to step {step}: each column is one seed, each row a preview"
    return save_sheet(title, rows, folder / "film.png")


def _spread(values: Sequence[int], count: int) -> list[int]:
    """Choose at most ``count`` of them, evenly spaced, the first and the last among them."""
    last = len(values) - 1
    if last < count:
        return list(values)
    return [values[round(place * last / (count - 1))] for place in range(count)]


def _columns(size: Size, scale: int) -> int:
    """Return how many images of a size fit in a row when they are drawn at twice that size."""
    return min(max(_WIDTH // (2 * size[1] * scale), 2), _IMAGES)


Pictures = dict[str, tuple[Tensor, Tensor]]
"""Name of a size → images [N, C, H, W], resized to it, and their reconstructions at it."""


def _reconstruct(task: RiaeTask, model: RIAE, names: Iterable[str]) -> Pictures:
    """Reconstruct some images of the test split, as many as fit in a row, at sizes of _SIZES."""
    data, device = task.config.data, next(model.parameters()).device
    # A small folder of images may have no test split. The pictures then show training images.
    tests = task.shards.manifest.splits.get(data.test_split)
    split = data.test_split if tests and tests.samples else data.train_split
    batches = eval_loader(task.shards, data, split=split, batch=_IMAGES, limit=_IMAGES)
    images = next(iter(batches))["image"]
    native = (images.shape[2], images.shape[3])
    images = images[: _columns(native, enlargement(native))].to(device)
    pictures = {}
    with torch.autocast(device.type, torch.bfloat16, enabled=task.config.train.autocast):
        latents = model.encode(images)
        for name in names:
            size = scale_size(native, (_SIZES[name], _SIZES[name]))
            decoded = model.decode(latents, size, native=native).float()
            pictures[name] = resize(images, size), decoded.clamp(-1, 1)  # as a codec's
    return pictures


def _reconstructions(pictures: Pictures) -> list[Row]:
    """Show images and their reconstructions at native, half and double size, two rows for each."""
    native = pictures["native"][0]
    scale = enlargement((native.shape[2], native.shape[3]))
    rows = []
    for name, (originals, decoded) in pictures.items():
        text = f"{name} size, {decoded.shape[2]}x{decoded.shape[3]}"
        original = "originals," if name == "native" else "originals resized to"
        # At double size the originals are enlargements, which say nothing of quality.
        quality = "" if name == "double" else f": PSNR {_psnr(originals, decoded):.2f} dB"
        rows += [
            Row(f"{original} {text}", tile(originals, len(originals)), scale),
            Row(f"reconstructions at {text}{quality}", tile(decoded, len(originals)), scale),
        ]
    return rows


def _tell_quality(state: TrainState, pictures: Pictures) -> None:
    """Record the PSNR of plain reconstructions, and say it at the start and at the end."""
    originals, decoded = pictures["native"]
    quality = _psnr(originals, decoded)
    state.tracker.metrics({"reconstruction/psnr": quality}, state.step)
    if state.step == 0 or state.finished:
        when = "at the end" if state.step else "before the first step"
        say(f"PSNR of {len(originals)} plain reconstructions {when}: {quality:.2f} dB")


def _psnr(originals: Tensor, decoded: Tensor) -> float:
    return float(psnr((originals - decoded).square().mean()))


def _samples(task: R2idTask, model: R2ID, guide: R2ID | None) -> list[Row]:
    """Draw the same samples at the codec's image size, at 1.5 times its height, and at twice it."""
    config = task.config
    sampler = Sampler.of(
        model, task.codec, task.facts, config.diffusion, config.sample, config.train.autocast, guide
    )
    height, width = task.codec.image
    scale = enlargement((height, width))
    count = _columns((height, width), scale)
    labels = choose_labels(
        config.sample.labels[:count], count, sampler.num_classes, sampler.class_names
    )
    sizes = ((height, width), (height * 3 // 2, width), (height * 2, width * 2))
    seeds = torch.arange(len(labels))
    told = draw_conditions(sampler, task.shards, config.data.test_split, count, config.seed)
    condition = labels if told is None else told[torch.arange(count) % len(told)]
    return [
        Row(
            f"samples, {size[0]}x{size[1]}, guidance {sampler.defaults.guidance:g}, "
            f"autoguidance {config.sample.autoguidance:g}",
            tile(sampler.sample(condition, seeds, size), len(labels)),
            scale,
        )
        for size in sizes
    ]
