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
    """The result of one forward pass of this process."""

    figures: dict[str, Tensor]
    """Named tensors on the device, the loss among them; see Meter.add."""
    images: int
    """Number of images in the micro-batch."""
    size: Size
    """Height and width of these images."""


@dataclass
class TrainState:
    """Where a training run is, in this process."""

    task: Task
    engine: Engine
    profile: bool = False
    """Whether to trace ten steps."""
    start: int = 0
    """The step at which this process began: 0, or the step of the checkpoint that it resumed."""
    step: int = 0
    """Optimizer steps done, skipped ones included."""
    samples: int = 0
    """Training samples seen, by all processes."""
    skipped: int = 0
    """Steps that this process has skipped because their gradient was not finite."""
    updated: bool = False
    """Whether the last step updated the weights; false when it was skipped."""
    stopping: bool = False
    """Whether the run ends after this step, with everything saved. The same on all ranks."""

    micro_batches: list[Batch] = field(default_factory=list)
    """This process's micro-batches of the step in progress, or of the last one between steps."""
    results: list[MicroBatchResult] = field(default_factory=list)
    """The results of these micro-batches, in their order; empty when the step was skipped."""
    lr: float = 0.0
    """Learning rate of the last step."""
    grad_norm: Tensor | float = 0.0
    """Gradient norm of the last step before clipping, on the device; NaN when it was skipped."""
    figures: dict[str, float] = field(default_factory=dict)
    """The mean losses and rates that were logged last."""
    checkpoint: Path | None = None
    """The last checkpoint that this process has taken part in writing."""
    tracker: NullTracker = field(default_factory=NullTracker)
    """Records figures, pictures and facts; does nothing except on rank 0."""

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
        """Whether figures are read, shown and recorded after this step.

        Not after every step, because reading makes the host wait for a GPU.
        """
        return self.due(self.config.train.log_every) or self.stopping

    def meta(self) -> Meta:
        """Return the metadata of a checkpoint of this step."""
        return Meta(
            stage=self.config.stage,
            step=self.step,
            samples=self.samples,
            seed=self.config.seed,
            config=self.config.model_dump(mode="json"),
            model=self.task.facts,
        )

    def ema_model(self, kind: str = "ema") -> nn.Module | None:
        """Build the model with one of the averages, by default what sampling uses, on the device.

        Every rank must call it, because the weights are gathered; all but rank 0 get None.
        """
        weights = self.engine.ema_state(kind)
        if weights is None:
            return None
        model = self.task.build_model()
        model.load_state_dict(weights)
        return model.to(self.engine.device).eval().requires_grad_(False)
