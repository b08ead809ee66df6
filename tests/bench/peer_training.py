"""What is the same for all generators that peers.py compares: how they are trained and kept.

All are trained by timed.run on the same batches.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timed
import torch
from codes import count
from image_sets import Images
from safetensors.torch import save_file
from torch import Tensor

from r2id.config import R2idRun, RiaeRun
from r2id.images import to_float
from r2id.models.coords import Size
from r2id.training.callbacks import Checkpoints
from r2id.training.engines.local import LocalEngine
from r2id.training.latent_statistics import latent_statistics
from r2id.training.resume import start_folder
from r2id.training.state import TrainState
from r2id.training.tasks import Task

CODE_SHARE = 0.2
"""Share of the seconds in which an autoencoder is trained."""
GUIDE_STEPS = 600
"""Steps of R2ID after which its guide is kept: three eighths of those that 480 seconds allow."""
LARGER, TRAINED = "larger grid", "trained grid"
"""Ways to draw another size: on a grid as much larger, or on the trained grid, decoded at it."""
_TRIAL_BATCHES = 4
_ENCODED = 250  # images at once


@dataclass(frozen=True)
class Setup:
    """What everybody is trained with."""

    images: Images
    classes: int
    seconds: float
    seed: int
    out: Path
    riae: RiaeRun
    r2id: R2idRun
    pixels: R2idRun

    @property
    def size(self) -> Size:
        return self.images.size


@dataclass(frozen=True)
class Attempt:
    """A network that is about to be trained."""

    engine: LocalEngine
    inputs: timed.Inputs
    end: float
    """Learning rate at the end, relative to its peak."""
    batch: int
    task: Task | None = None


class Contender(ABC):
    """One generator of the comparison."""

    rates: tuple[float, ...]
    """Learning rates that are tried; a single one is taken as it is."""
    ways: tuple[str, ...] = (LARGER,)
    """In which ways it draws other sizes."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.name, self.setup = name, setup

    def prepare(self) -> dict[str, Any]:
        """Train what comes before → figures; ``cpu_seconds`` of them are used up."""
        return {"cpu_seconds": 0.0}

    @abstractmethod
    def begin(self) -> Attempt:
        """Make a new network."""

    @abstractmethod
    def keep(self, attempt: Attempt, steps: int) -> None:
        """Write a trained network into the folder of the comparison."""

    @abstractmethod
    def draw(self, labels: Tensor, seeds: Tensor, size: Size, guidance: float, way: str) -> Tensor:
        """Draw images [B, C, *size] in [−1, 1] with the network that was kept."""

    def batch(self, step: int, length: int) -> dict[str, Tensor]:
        """Load a step's images, as they are in the set."""
        numbers = self.setup.images.numbers(step, length)
        images, labels = self.setup.images.train[numbers], self.setup.images.labels[numbers]
        return {"image": images, "label": labels, "number": numbers}

    def try_rate(self, rate: float, seconds: float) -> float:
        """Train for that long → mean loss on fixed batches and draws, the same for all rates."""
        attempt = self.begin()
        self.run(attempt, rate, seconds)
        losses = []
        for number in range(_TRIAL_BATCHES):
            step = (1 << 30) + number
            inputs = attempt.inputs(self.batch(step, 64))
            with torch.no_grad():
                losses.append(float(attempt.engine.forward({**inputs, "step": step})[0]))
        return sum(losses) / len(losses)

    def train(self, rate: float, seconds: float, before: float) -> dict[str, Any]:
        """Train and keep the network; ``before`` of the seconds are used up."""
        attempt, file = self.begin(), self.setup.out / f"{self.name}-training.pt"
        found = self.run(attempt, rate, seconds, before, file)
        self.keep(attempt, int(found["steps"]))
        file.unlink(missing_ok=True)
        speed = attempt.batch / found.pop("seconds_per_step")
        size = {"parameters": count(attempt.engine.model), "batch": attempt.batch}
        return found | size | {"images_per_second": speed}

    def run(
        self,
        attempt: Attempt,
        rate: float,
        seconds: float,
        before: float = 0.0,
        file: Path | None = None,
    ) -> dict[str, float]:
        return timed.run(
            attempt.engine,
            lambda step: self.batch(step, attempt.batch),
            rate,
            seconds,
            end=attempt.end,
            inputs=attempt.inputs,
            before=before,
            seed=self.setup.seed,
            file=file,
        )


def write_run(task: Task, engine: LocalEngine, steps: int) -> None:
    """Write a checkpoint as ``r2id train`` does."""
    # The state counts as stopped, which is when a checkpoint is written whatever the step.
    state = TrainState(task, engine, step=steps, stopping=True)
    start_folder(state)
    Checkpoints().post_step(state)


def latents_file(setup: Setup, name: str) -> Path:
    return setup.out / f"{name}-latents.safetensors"


def prepared(
    setup: Setup,
    name: str,
    build: Callable[[], dict[str, Any]],
    encoder: Callable[[], Callable[[Tensor], Tensor]],
) -> dict[str, Any]:
    """Train an autoencoder and encode all training images, each unless that has been done."""
    file, latents = setup.out / f"{name}-code.json", latents_file(setup, name)
    if not file.is_file():
        file.write_text(json.dumps(build()))
    figures = json.loads(file.read_text())
    if not latents.is_file():
        began, encode = time.process_time(), encoder()
        parts = [encode(to_float(part)) for part in setup.images.train.split(_ENCODED)]
        stats = latent_statistics(lambda part: part, parts)
        figures["encoding"] = time.process_time() - began
        file.write_text(json.dumps(figures))
        save_file({"latents": torch.cat(parts).contiguous(), **stats}, latents)
    return figures | {"cpu_seconds": figures["cpu_seconds"] + figures["encoding"]}
