"""What differs between the two stages: model, loss, batches and the facts that a checkpoint records."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from r2id.config import R2idRun, RiaeRun
from r2id.data.latents import LatentCache, latent_loader
from r2id.data.loader import eval_loader, image_loader, image_sizes
from r2id.data.shards import ShardSet
from r2id.data.stream import stream_loader
from r2id.dist import World
from r2id.errors import InputError
from r2id.images import to_float
from r2id.models.codec import Codec
from r2id.models.coords import Size
from r2id.models.r2id import R2ID
from r2id.models.riae import RIAE
from r2id.training.conditions import conditions_of, known_conditions
from r2id.training.losses.r2id import R2idLoss
from r2id.training.losses.riae import RiaeLoss
from r2id.training.planner import Cost, Facts, Work, image_cost
from r2id.training.statistics import latent_statistics

_STATISTICS_IMAGES = 2048  # images from which the latents' mean and deviation are measured

Batch = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One stage, ready to train."""

    config: RiaeRun | R2idRun
    shards: ShardSet
    module: RiaeLoss | R2idLoss
    """``module(**batch, step=…)`` → (loss, figures); holds the model as ``module.model``."""
    facts: dict[str, Any]
    """What it takes to build the model and use it, beside its config."""
    loader: Callable[[int], Iterator[list[Batch]]]
    """First step → for every step from there this rank's micro-batches, still on the CPU."""
    to_inputs: Callable[[Batch], Batch]
    """A loaded batch, on the device → keyword arguments of the module."""
    codec: Codec | None = None

    def build_model(self) -> nn.Module:
        """A fresh model of this stage, for weights that are not the ones in training."""
        if isinstance(self.config, RiaeRun):
            return RIAE(self.config.riae, self.facts["channels"])
        return R2ID.of(self.config.r2id, self.facts)

    def image_size(self, batch: Batch) -> Size:
        """Height and width of a batch's images; of the images that its latents stand for."""
        if "image" in batch:
            return batch["image"].shape[2], batch["image"].shape[3]
        assert self.codec is not None
        height, width = (round(side * self.codec.downsample) for side in batch["latent"].shape[2:])
        return height, width

    def cost(self, size: Size) -> Cost:
        """What training on one image of this size takes."""
        codec = None if self.codec is None else self.codec.riae
        return image_cost(
            Work(
                self.config,
                Facts(
                    size,
                    1,
                    self.facts.get("classes", 0),
                    codec,
                    tuple(self.facts.get("embedding", ())),
                ),
            )
        )

    def statistics(self, model: nn.Module, device: torch.device) -> dict[str, Tensor] | None:
        """RIAE: mean and standard deviation of its latents; R2ID has none."""
        if not isinstance(model, RIAE):
            return None
        bfloat16 = self.config.train.autocast
        batches = eval_loader(
            self.shards,
            self.config.data,
            split=self.config.data.train_split,
            batch=128,
            limit=_STATISTICS_IMAGES,
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            return latent_statistics(model.encode, (batch["image"].to(device) for batch in batches))


def make_stage(config: RiaeRun | R2idRun, world: World, micro_batch: int) -> Stage:
    """Open the data and build model and loss. InputError when the data or the codec do not fit the config."""
    told = isinstance(config, R2idRun) and config.r2id.condition == "embedding"
    shards = ShardSet.open(config.data.shards, config.data.stream, embeddings=told)
    torch.manual_seed(config.seed)
    if isinstance(config, RiaeRun):
        return _riae_stage(config, shards, world, micro_batch)
    return _r2id_stage(config, shards, world, micro_batch)


def _loader_arguments(config: RiaeRun | R2idRun, world: World, micro_batch: int) -> dict[str, Any]:
    return {
        "split": config.data.train_split,
        "batch": config.train.batch,
        "micro_batch": micro_batch,
        "seed": config.seed,
        "total_steps": config.train.steps,
        "rank": world.rank,
        "world_size": world.world_size,
    }


def _image_batches(
    config: RiaeRun | R2idRun, shards: ShardSet, world: World, micro_batch: int
) -> Callable[[int], Iterator[list[Batch]]]:
    load = stream_loader if config.data.stream else image_loader
    arguments = _loader_arguments(config, world, micro_batch)
    return lambda start: load(shards, config.data, start_step=start, **arguments)


def _riae_stage(config: RiaeRun, shards: ShardSet, world: World, micro_batch: int) -> Stage:
    sizes = image_sizes(shards, config.data, config.data.train_split)
    facts = {
        "channels": config.data.channels,
        "digest": shards.digest,
        "image": [int(side) for side in sizes[len(sizes) // 2]],
    }
    return Stage(
        config,
        shards,
        RiaeLoss(RIAE(config.riae, config.data.channels), config.seed),
        facts,
        _image_batches(config, shards, world, micro_batch),
        lambda batch: {"image": to_float(batch["image"]), "index": batch["index"]},
    )


def _r2id_stage(config: R2idRun, shards: ShardSet, world: World, micro_batch: int) -> Stage:
    sizes = image_sizes(shards, config.data, config.data.train_split)
    height, width = (int(side) for side in sizes[len(sizes) // 2])
    median = height, width
    codec = (
        Codec.of_pixels(config.run, config.data, median, world.device)
        if config.codec is None
        else Codec.load(config.codec, world.device)
    )
    if codec.channels != config.data.channels:
        raise InputError(
            f"data.channels = {config.data.channels}: {codec.path} was trained with {codec.channels}"
        )
    grids = [codec.grid_for(size) for size in sizes]
    areas, ratios = sorted(h * w for h, w in grids), sorted(h / w for h, w in grids)
    base_side = areas[len(areas) // 2] ** 0.5
    facts = {
        "latent_channels": codec.latent_channels,
        **known_conditions(config, shards),
        "digest": shards.digest,
        "codec": os.path.relpath(codec.path, config.run) if config.codec else None,
        "codec_hash": codec.hash,
        "base_side": base_side,
        "areas": [areas[0], areas[-1]],
        "ratios": [ratios[0], ratios[-1]],
        **({} if config.codec else {"image": list(median)}),
    }

    load = _image_batches(config, shards, world, micro_batch)
    if config.data.latents is not None:
        cache = LatentCache.open(config.data.latents, codec.hash, shards.digest)
        arguments = _loader_arguments(config, world, micro_batch)

        def load(start: int) -> Iterator[list[Batch]]:
            return latent_loader(cache, shards, config.data, start_step=start, **arguments)

    def to_inputs(batch: Batch) -> Batch:
        raw = batch["latent"] if "latent" in batch else codec.encode(to_float(batch["image"]))
        return {
            "latent": codec.normalise(raw),
            "condition": conditions_of(config, batch),
            "index": batch["index"],
        }

    loss = R2idLoss(R2ID.of(config.r2id, facts), config.diffusion, base_side, config.seed)
    return Stage(config, shards, loss, facts, load, to_inputs, codec)
