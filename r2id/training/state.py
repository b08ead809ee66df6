"""The state of a training run, which the loop changes and its callbacks read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from r2id.checkpoints.files import Meta
from r2id.config import R2idRun, RiaeRun
from r2id.models.coords import Size
from r2id.training.engines import Engine
from r2id.training.tasks import Batch, Task
from r2id.training.tracking import NullTracker


class MicroBatchResult(NamedTuple):
    """What one forward pass of this process came to."""

    figures: dict[str, Tensor]
    """Named scalars on the device, the loss among them."""
    images: int
    size: Size


@dataclass
class TrainState:
    """Where a training run is, in this process."""

    task: Task
    engine: Engine
    profile: bool = False
    """Whether to trace ten steps."""
    start: int = 0
    """The step that this process began at: 0, or that of the checkpoint it went on from."""
    step: int = 0
    """Optimizer steps done, those that were left out included."""
    samples: int = 0
    """Training samples seen, by all processes."""
    skipped: int = 0
    """Steps left out by this process because their loss or gradient was not finite."""
    updated: bool = False
    """Whether the last step changed the weights; not when it was left out."""
    stopping: bool = False
    """Whether the run ends after this step, with everything saved: on all ranks or on none."""

    micro_batches: list[Batch] = field(default_factory=list)
    """This process's share of the step in progress, or else of the last one."""
    results: list[MicroBatchResult] = field(default_factory=list)
    """What each of these micro-batches came to; empty when the step was left out."""
    lr: float = 0.0
    """Learning rate of the last step."""
    grad_norm: Tensor | float = 0.0
    """Gradient norm of the last step before clipping, on the device; NaN when it was left out."""
    figures: dict[str, float] = field(default_factory=dict)
    """Mean losses and rates, as they were logged last."""
    checkpoint: Path | None = None
    """The last checkpoint that this process has helped to write."""
    tracker: NullTracker = field(default_factory=NullTracker)
    """Takes figures, pictures and facts; does nothing on all ranks but the first."""

    @property
    def config(self) -> RiaeRun | R2idRun:
        return self.task.config

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.config.run

    @property
    def finished(self) -> bool:
        return self.step >= self.config.train.steps

    def due(self, every: int) -> bool:
        """Tell whether this step is a multiple of ``every``, or the last one."""
        return self.step % every == 0 or self.finished

    @property
    def log_due(self) -> bool:
        """Whether this step's figures are read, shown and recorded."""
        return self.due(self.config.train.log_every) or self.stopping

    def meta(self) -> Meta:
        """Describe the run as a checkpoint of this step does."""
        return Meta(
            stage=self.config.stage,
            step=self.step,
            samples=self.samples,
            seed=self.config.seed,
            config=self.config.model_dump(mode="json"),
            model=self.task.facts,
        )

    def ema_model(self) -> nn.Module | None:
        """Build the model with the averaged weights, as sampling uses it, on the device.

        None on all ranks but the first; all must call it, for the weights are gathered.
        """
        weights = self.engine.ema_state()
        if weights is None:
            return None
        model = self.task.build_model()
        model.load_state_dict(weights)
        return model.to(self.engine.device).eval().requires_grad_(False)
