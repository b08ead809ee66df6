"""The two training tasks: an RIAE on images, and an R2ID on an RIAE's latents.

A task holds what differs between them: the model, its loss, the batches, and the facts that a
checkpoint records.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from r2id import dist
from r2id.checkpoints import Checkpoint
from r2id.config import R2idRun, RiaeConfig, RiaeRun, find_labels
from r2id.data.latents import LatentCache, latent_loader
from r2id.data.loader import eval_loader, image_loader, image_sizes, split_buckets
from r2id.data.shards import ShardSet
from r2id.data.stats import crop_loss
from r2id.data.stream import stream_loader
from r2id.dist import World
from r2id.errors import InputError
from r2id.files import sha256_file
from r2id.images import to_float
from r2id.models.codec import Codec
from r2id.models.coords import Size
from r2id.models.r2id import R2ID
from r2id.models.riae import RIAE
from r2id.progress import say
from r2id.training import pca
from r2id.training.chosen_codec import choose_codec
from r2id.training.conditions import condition_facts, conditions_of
from r2id.training.latent_statistics import latent_statistics
from r2id.training.losses.perceptual import load_perceptual
from r2id.training.losses.r2id import R2idLoss
from r2id.training.losses.riae import RiaeLoss, riae_loss
from r2id.training.workload import Cost, Dimensions, Workload, check_depth, image_cost

# Bounds of what the mean and deviation of latents are measured from.
_STATISTICS_IMAGES, _STATISTICS_PIXELS = 2048, 1 << 24
_SIZES = 1024  # sizes of images that are kept to estimate how many pixels a number of them has

_TOLD = 0.02  # share of the images' area from which on it is said that training cuts it off

Batch = dict[str, Any]


class Task(ABC):
    """A model to train and the data to train it on."""

    config: RiaeRun | R2idRun
    module: RiaeLoss | R2idLoss
    """The loss module: ``module(**inputs, step=…)`` → (loss, figures), with its ``model``."""
    facts: dict[str, Any]
    """What is needed, beside the config, to build the model and use it. Checkpoints record it."""

    shapes: int | None
    """How many different latent grids the model's blocks meet; None where sizes are random."""

    def __init__(
        self, config: RiaeRun | R2idRun, shards: ShardSet, world: World, micro_batch: int
    ) -> None:
        self.shards = shards
        self._loading: dict[str, Any] = {
            "split": config.data.train_split,
            "batch": config.train.batch,
            "micro_batch": micro_batch,
            "seed": config.seed,
            "total_steps": config.train.steps,
            "rank": world.rank,
            "world_size": world.world_size,
        }

    def loader(self, start: int) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches, step by step from step ``start``, on the CPU."""
        load = stream_loader if self.config.data.stream else image_loader
        return load(self.shards, self.config.data, start_step=start, **self._loading)

    @abstractmethod
    def inputs(self, batch: Batch) -> Batch:
        """Turn a loaded batch, moved to the device, into keyword arguments of the module."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Build another model of the same architecture, for weights other than the trained ones."""

    def start(self) -> None:  # noqa: B027
        """Prepare the initial weights of a new run from its data, the same in all processes."""

    @abstractmethod
    def image_size(self, batch: Batch) -> Size:
        """Return the height and width of the images in a batch, or of those behind its latents."""

    def cost(self, size: Size) -> Cost:
        """Count what training on one image of this size takes."""
        dimensions = Dimensions(
            size,
            1,
            self.facts.get("classes", 0),
            self._codec_config(),
            tuple(self.facts.get("embedding", ())),
        )
        return image_cost(Workload(self.config, dimensions))

    def _codec_config(self) -> RiaeConfig | None:
        return None


class RiaeTask(Task):
    """An RIAE that reconstructs images."""

    config: RiaeRun

    def __init__(self, config: RiaeRun, shards: ShardSet, world: World, micro_batch: int) -> None:
        super().__init__(config, shards, world, micro_batch)
        self.config = config
        sizes = image_sizes(shards, config.data, config.data.train_split)
        whole = config.data.model_copy(update={"window": None})
        whole_sizes = image_sizes(shards, whole, config.data.train_split)
        self.images = len(whole_sizes)
        resized = config.loss.magnify or config.loss.equivariance
        self.shapes = None if resized else len(set(map(config.riae.grid_for, set(sizes))))
        self.sizes = whole_sizes[:: math.ceil(len(whole_sizes) / _SIZES)]
        """Sizes of some whole training images, evenly spaced by area."""
        self.facts = {
            "channels": config.data.channels,
            "digest": shards.digest,
            "image": list(_median(sizes)),
        }
        self.module = riae_loss(RIAE(config.riae, config.data.channels), config.loss, config.seed)
        network = load_perceptual(config.loss)
        if network is not None:
            self.facts["perceptual_hash"] = sha256_file(network.file)

    def inputs(self, batch: Batch) -> Batch:
        return {"image": to_float(batch["image"]), "index": batch["draw"]}

    def build_model(self) -> RIAE:
        return RIAE(self.config.riae, self.config.data.channels)

    def image_size(self, batch: Batch) -> Size:
        return batch["image"].shape[2], batch["image"].shape[3]

    def start(self) -> None:
        """Set the linear map to the PCA of training images, which rank 0 computes."""
        config, riae = self.config, self.config.riae
        if dist.is_main():
            self._tell_what_is_cut_off()
        if not config.starts_from_pca:
            return
        weights = None
        if dist.is_main():
            count = min(pca.image_limit(self.sizes), self.images)
            cells = sum(math.prod(riae.grid_for(size)) for size in self.sizes)
            say(f"PCA of {count:,} training images, to start from")
            batches = self._training_images(count, pca.image_batch(self.sizes))
            weights = pca.fit_pca(
                (batch["image"] for batch in batches),
                riae.cell,
                riae.latent_channels,
                cells * count // len(self.sizes),
                riae.lapped,
            )
        assert isinstance(self.module.model, RIAE)
        pca.start_from_pca(self.module.model, dist.broadcast_object(weights))

    def _tell_what_is_cut_off(self) -> None:
        data = self.config.data
        if data.size or data.window:  # chosen by the user
            return
        samples = self.shards.split(data.train_split)
        buckets = split_buckets(samples, data)
        lost = float(crop_loss(samples, buckets).mean())
        if lost >= _TOLD:
            say(
                f"buckets: {len(buckets.sizes)}; {lost:.0%} of the images' area is cut off to fit "
                f"them: r2id data stats {data.shards} --max-pixels {data.max_pixels} shows them. "
                "More images of each size have buckets of their own; of a data.window that is no "
                "larger than most images, training sees every part in turn"
            )

    def latent_statistics(self, model: RIAE, device: torch.device) -> dict[str, Tensor]:
        """Measure the mean and standard deviation of a model's latents, per channel.

        R2ID normalises latents with them.
        """
        limit = pca.images_within(_STATISTICS_PIXELS, self.sizes, _STATISTICS_IMAGES)
        batches = self._training_images(limit, 128)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.train.autocast):
            return latent_statistics(model.encode, (batch["image"].to(device) for batch in batches))

    def _training_images(self, limit: int, batch: int) -> Iterator[Batch]:
        """Yield whole training images, evenly spaced over the set, in batches of one size."""
        data = self.config.data
        return eval_loader(self.shards, data, split=data.train_split, batch=batch, limit=limit)


class R2idTask(Task):
    """An R2ID that denoises the latents of a trained codec, or pixels without a codec."""

    config: R2idRun

    def __init__(
        self,
        config: R2idRun,
        shards: ShardSet,
        world: World,
        micro_batch: int,
        newest: Checkpoint | None,
    ) -> None:
        super().__init__(config, shards, world, micro_batch)
        self.config = config
        sizes = image_sizes(shards, config.data, config.data.train_split)
        riae, image = choose_codec(config, newest), _median(sizes)
        self.codec = (
            Codec.of_pixels(config.data, image, world.device)
            if riae is None
            else replace(Codec.load(riae, world.device), image=image)
        )
        if self.codec.channels != config.data.channels:
            raise InputError(
                f"data.channels = {config.data.channels}: {self.codec.name} was trained with "
                f"{self.codec.channels}"
            )
        self.cache = (
            LatentCache.open(config.data.latents, self.codec.identity, shards.digest)
            if config.data.latents is not None
            else None
        )
        if self.cache is not None:
            self.cache.check(config.data)
        check_depth(config, self.codec.grid_for(image))
        self.facts = self._find_facts(sizes)
        names = self.facts.get("class_names", ())
        find_labels(config.sample.labels, len(names), names)  # of previews
        self.shapes = len(set(map(self.codec.grid_for, set(sizes))))
        if newest is not None and newest.meta.model.get("codec_hash") == self.codec.identity:
            self.facts["codec"] = newest.meta.model["codec"]  # where it came from at first
        model = R2ID.of(config.r2id, self.facts)
        self.module = R2idLoss(model, config.diffusion, self.facts["base_side"], config.seed)

    def _find_facts(self, sizes: Sequence[Size]) -> dict[str, Any]:
        """Return the facts of a run whose training images have these sizes.

        ``base_side`` is the side of a square latent grid of the median area; ``areas`` and
        ``ratios`` are the least and the greatest area and height / width of latent grids.
        """
        config, codec = self.config, self.codec
        # Once per size: a loop over millions of images would take seconds.
        grids = {size: codec.grid_for(size) for size in set(sizes)}
        area = {size: math.prod(grid) for size, grid in grids.items()}
        areas, ratios = sorted(map(area.__getitem__, sizes)), [h / w for h, w in grids.values()]
        return {
            "latent_channels": codec.latent_channels,
            **condition_facts(config, self.shards),
            "digest": self.shards.digest,
            # For people; checkpoints hold the RIAE itself.
            "codec": codec.source and os.path.relpath(codec.source.path, config.run),
            "codec_hash": codec.identity,
            # Noise schedules are shifted relative to a grid of this side.
            "base_side": areas[len(areas) // 2] ** 0.5,
            "areas": [areas[0], areas[-1]],
            "ratios": [min(ratios), max(ratios)],
            "image": list(codec.image),
        }

    def loader(self, start: int) -> Iterator[list[Batch]]:
        if self.cache is None:
            return super().loader(start)
        return latent_loader(
            self.cache, self.shards, self.config.data, start_step=start, **self._loading
        )

    def inputs(self, batch: Batch) -> Batch:
        raw = batch["latent"] if "latent" in batch else self.codec.encode(to_float(batch["image"]))
        return {
            "latent": self.codec.normalise(raw),
            "condition": conditions_of(self.config, batch),
            "index": batch["draw"],
        }

    def build_model(self) -> R2ID:
        return R2ID.of(self.config.r2id, self.facts)

    def image_size(self, batch: Batch) -> Size:
        if "image" in batch:
            return batch["image"].shape[2], batch["image"].shape[3]
        height, width = (round(side * self.codec.downsample) for side in batch["latent"].shape[2:])
        return height, width

    def _codec_config(self) -> RiaeConfig | None:
        return self.codec.riae


def make_task(
    config: RiaeRun | R2idRun, world: World, micro_batch: int, newest: Checkpoint | None = None
) -> Task:
    """Open the data and build the model and its loss, for a run with this newest checkpoint.

    Raises InputError when the data or the codec do not fit the config.
    """
    embedded = isinstance(config, R2idRun) and config.r2id.condition == "embedding"
    shards = ShardSet.open(config.data.shards, config.data.stream, embeddings=embedded)
    if world.rank == 0:
        _warn_of_test_split(shards, config.data.test_split)
    torch.manual_seed(config.seed)  # what is drawn from here on: the initial weights
    if isinstance(config, RiaeRun):
        return RiaeTask(config, shards, world, micro_batch)
    return R2idTask(config, shards, world, micro_batch, newest)


def _warn_of_test_split(shards: ShardSet, split: str) -> None:
    """Say now what a missing test split means, because an evaluation comes after the training."""
    try:
        shards.split(split)
    except InputError as error:
        say(
            f"data.test_split: {error}; an RIAE's previews show training images, and r2id evaluate "
            "needs --split"
        )


def _median(sizes: Sequence[Size]) -> Size:
    """Return the middle one of sizes that are in order."""
    height, width = (int(side) for side in sizes[len(sizes) // 2])
    return height, width
