"""The generators that peers.py compares: what each is, how it is kept, loaded and sampled.

CONTENDERS lists them; to add one, write a class and a line.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import autoencoder_training
import timed
import torch
from autoencoder_training import Job
from codes import Code, count
from peer_models import DiTPeer, Peer, UNetPeer
from peer_training import (
    CODE_SHARE,
    GUIDE_STEPS,
    LARGER,
    TRAINED,
    Attempt,
    Contender,
    latents_file,
    prepared,
    write_run,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from r2id import dist
from r2id.config import OptimConfig, R2idRun, TrainConfig
from r2id.images import to_float
from r2id.models.codec import Codec
from r2id.models.coords import Size
from r2id.sampling.sampler import Sampler
from r2id.training.engines.local import LocalEngine
from r2id.training.precision import resolve_precision
from r2id.training.tasks import make_task


class _Foreign(Contender):
    """A network of peer_models, with R2ID's optimizer, averages and number formats."""

    batch_length = 64

    @abstractmethod
    def make(self) -> Peer: ...

    @abstractmethod
    def data(self, batch: dict[str, Tensor]) -> Tensor:
        """What is diffused, scaled."""

    def begin(self) -> Attempt:
        torch.manual_seed(self.setup.seed)
        train = TrainConfig(
            steps=1, batch=self.batch_length, precision="bfloat16", ema=self.setup.r2id.train.ema
        )
        engine = LocalEngine(self.make(), OptimConfig(), train, torch.device("cpu"))

        def inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
            return {"latent": self.data(batch), "condition": batch["label"]}

        return Attempt(engine, inputs, 0.02, self.batch_length)

    @property
    def file(self) -> Path:
        return self.setup.out / f"{self.name}.safetensors"

    def keep(self, attempt: Attempt, steps: int) -> None:
        save_file(attempt.engine.model.state_dict(), self.file)

    @cached_property
    def trained(self) -> Peer:
        peer = self.make()
        peer.model.load_state_dict(load_file(self.file))
        return peer.eval()


class UNet(_Foreign):
    """UNet2DModel in pixels."""

    rates = (4e-4, 1e-3, 2e-3)
    batch_length = 32

    def make(self) -> Peer:
        setup = self.setup
        return UNetPeer(setup.images.train.shape[1], setup.classes, setup.size, setup.seed)

    def data(self, batch: dict[str, Tensor]) -> Tensor:
        return to_float(batch["image"])

    def draw(self, labels: Tensor, seeds: Tensor, size: Size, guidance: float, way: str) -> Tensor:
        channels = self.setup.images.train.shape[1]
        return self.trained.draw(labels, seeds, channels, size, guidance).clamp(-1, 1)


class DiT(_Foreign):
    """DiT on the latents of the plain convolutional autoencoder."""

    rates = (4e-4, 1e-3, 2e-3)

    @property
    def weights(self) -> Path:
        return self.setup.out / "convolutional.safetensors"

    @property
    def job(self) -> Job:
        setup, images = self.setup, self.setup.images
        seconds = CODE_SHARE * setup.seconds
        return Job(setup.riae, setup.size, seconds, images.batch, images.some)

    def prepare(self) -> dict[str, Any]:
        def build() -> dict[str, Any]:
            file = self.setup.out / "convolutional-training.pt"
            code, weights, figures = autoencoder_training.train(self.job, "plain", _none, file)
            save_file(weights, self.weights)
            file.unlink(missing_ok=True)
            return figures | {"parameters": code.parameters}

        return prepared(self.setup, self.name, build, lambda: self.code.encode)

    @cached_property
    def code(self) -> Code:
        return autoencoder_training.load(self.job, "plain", load_file(self.weights))

    @cached_property
    def latents(self) -> dict[str, Tensor]:
        return load_file(latents_file(self.setup, self.name))

    @cached_property
    def scale(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel."""
        mean, std = (self.latents[name].view(1, -1, 1, 1) for name in ("mean", "std"))
        return mean, std

    def make(self) -> Peer:
        channels, *grid = self.latents["latents"].shape[1:]
        return DiTPeer(channels, self.setup.classes, (grid[0], grid[1]), self.setup.seed)

    def data(self, batch: dict[str, Tensor]) -> Tensor:
        mean, std = self.scale
        return (self.latents["latents"][batch["number"]] - mean) / std

    def draw(self, labels: Tensor, seeds: Tensor, size: Size, guidance: float, way: str) -> Tensor:
        mean, std = self.scale
        grid = self.setup.riae.riae.grid_for(size)
        drawn = self.trained.draw(labels, seeds, mean.shape[1], grid, guidance)
        return self.code.decode(drawn * std + mean, size)


class R2idPixels(Contender):
    """R2ID in pixels."""

    rates = (5e-4, 1e-3, 2e-3)

    @property
    def config(self) -> R2idRun:
        run = self.setup.out / self.name
        return self.setup.pixels.model_copy(update={"run": run})

    def begin(self) -> Attempt:
        world = dist.init()
        config = resolve_precision(self.config, world.device)
        task = make_task(config, world, config.train.batch)
        engine = LocalEngine(task.module, config.optim, config.train, torch.device("cpu"))

        def inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
            return task.inputs(self.raw(batch) | {"draw": torch.arange(len(batch["label"]))})

        end = config.optim.lr_end / config.optim.lr
        return Attempt(engine, inputs, end, config.train.batch, task)

    def raw(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What R2ID's loaders would have read."""
        return {"image": batch["image"], "label": batch["label"]}

    def keep(self, attempt: Attempt, steps: int) -> None:
        assert attempt.task is not None
        write_run(attempt.task, attempt.engine, steps)

    @cached_property
    def sampler(self) -> Sampler:
        return Sampler.load(self.setup.out / self.name)

    def draw(self, labels: Tensor, seeds: Tensor, size: Size, guidance: float, way: str) -> Tensor:
        grid = self.sampler.codec.grid_for(size) if way == LARGER else None
        return self.sampler.sample(labels, seeds, size, grid=grid, guidance=guidance)


class R2idLatents(R2idPixels):
    """R2ID on RIAE's latents, with the project's configs for small photos."""

    ways = (TRAINED, LARGER)

    @property
    def config(self) -> R2idRun:
        run, codec = self.setup.out / self.name, self.setup.out / "riae"
        # Latents are in memory here.
        data = self.setup.r2id.data.model_copy(update={"latents": None})
        # The seconds end before the config's steps, and how many there will be is not known.
        train = self.setup.r2id.train
        train = train.model_copy(update={"guide_after": GUIDE_STEPS / train.steps})
        changes = {"run": run, "codec": codec, "data": data, "train": train}
        return self.setup.r2id.model_copy(update=changes)

    @property
    def rates(self) -> tuple[float, ...]:  # type: ignore[override]
        return (self.setup.r2id.optim.lr,)

    def prepare(self) -> dict[str, Any]:
        return prepared(
            self.setup,
            self.name,
            self._train_riae,
            lambda: Codec.load(self.setup.out / "riae").encode,
        )

    def _train_riae(self) -> dict[str, Any]:
        setup, config = self.setup, self.setup.riae
        config = config.model_copy(update={"run": setup.out / "riae"})
        config = resolve_precision(config, torch.device("cpu"))
        file = setup.out / "riae-training.pt"
        began = time.process_time()
        task = make_task(config, dist.init(), config.train.batch)
        if not file.is_file():
            task.start()
        engine = LocalEngine(task.module, config.optim, config.train, torch.device("cpu"))

        def load(step: int) -> dict[str, Tensor]:
            images, index = setup.images.batch(step, config.train.batch)
            return {"image": images, "index": index}

        found = timed.run(
            engine,
            load,
            config.optim.lr,
            CODE_SHARE * setup.seconds,
            end=config.optim.lr_end / config.optim.lr,
            before=time.process_time() - began,
            seed=config.seed,
            file=file,
        )
        write_run(task, engine, int(found["steps"]))
        file.unlink(missing_ok=True)
        return found | {"parameters": count(engine.model)}

    @cached_property
    def latents(self) -> Tensor:
        return load_file(latents_file(self.setup, self.name))["latents"]

    def raw(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latent": self.latents[batch["number"]], "label": batch["label"]}


def _none(code: Code) -> float:
    return 0.0


CONTENDERS: dict[str, type[Contender]] = {
    "unet": UNet,
    "dit": DiT,
    "r2id": R2idLatents,
    "r2id-pixels": R2idPixels,
}
NAMES = {
    "unet": "UNet in pixels",
    "dit": "DiT on convolutional latents",
    "r2id": "R2ID on RIAE",
    "r2id-pixels": "R2ID in pixels",
}
