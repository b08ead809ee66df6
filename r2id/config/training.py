"""One training run of either stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from r2id.config.diffusion import DiffusionConfig, SampleConfig
from r2id.config.losses import LossConfig
from r2id.config.models import R2idConfig, RiaeConfig
from r2id.config.section import Pair, PathField, Section, Size, Widths


class DataConfig(Section):
    """Which images are trained on, and how they are read."""

    shards: PathField
    """Folder written by ``r2id prepare``."""
    latents: PathField | None = None
    """Cache written by ``r2id encode`` (R2ID only); without one, latents are encoded on the fly,
    with the same result."""
    train_split: str = "train"
    test_split: str = "test"
    channels: Literal[1, 3] = 1
    """Colour channels that the model sees; every image is converted to them."""
    size: Size | None = None
    """Resize every image to this height and width; none keeps native sizes."""
    max_pixels: int = Field(default=65536, ge=1)
    """Images of more pixels are shrunk to this area, aspect ratio kept. None are enlarged."""
    window: Size | None = None
    """Train on a random part of each image, at most this high and wide, drawn anew every epoch;
    none takes images whole."""
    flip: bool = False
    """Mirror half of the images from left to right, drawn anew every epoch. Not for digits and
    letters."""
    batch_pixels: int | None = Field(default=None, ge=1)
    """Largest number of pixels in a training step: the batch of small images is multiplied by the
    largest whole number that keeps within it, at least 1. None takes ``train.batch`` images of
    every size."""
    shuffle: Literal["samples", "shards"] = "samples"
    """What an epoch shuffles: all samples, or the shards and then the samples of a few shards at a
    time, for disks and stores that are slow to seek."""
    stream: str | None = None
    """Folder or address (http, s3, … as fsspec has them) of the same shards, which are then
    streamed, tar after tar, instead of read image by image; ``shards`` needs only the manifest and
    the indexes. See r2id.data.stream."""
    workers: int = Field(default=0, ge=0)
    """Loader processes of each rank; 0 decodes in the training process."""

    @model_validator(mode="after")
    def _parts_of_images(self) -> DataConfig:
        if self.window and self.size:
            raise ValueError(
                "window and size exclude each other: windows are cut from images of their own sizes"
            )
        for name in ("window", "flip", "stream"):
            if self.latents and getattr(self, name):
                raise ValueError(
                    f"{name} does not go with latents, which are of whole images as they are"
                )
        return self


class OptimConfig(Section):
    """AdamW and its learning rate."""

    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    lr_end: float = Field(default=1e-4, ge=0)
    """Learning rate at the last step, reached on a cosine."""
    warmup: int = Field(default=100, ge=0)
    """Steps from 0 to the peak."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Applied to matrices only, not to norms, biases and embeddings."""
    betas: Pair = (0.9, 0.99)
    clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""


class TrainConfig(Section):
    """Length, batch, number formats, averages and checkpoints of a training run."""

    steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""
    batch: int = Field(default=64, ge=1)
    """Samples per optimizer step over all processes; accumulation is computed from it."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Samples per forward pass of one process, or fewer where its share of the batch is smaller;
    none takes the whole share at once."""
    precision: Literal["float32", "bfloat16", "bfloat16_weights"] = "float32"
    """bfloat16 is autocast: weights, norms and gradients stay float32. bfloat16_weights needs less
    memory: the weights of the forward pass and their gradients are bfloat16, and float32 weights
    are sharded over the processes (zero_stage 2, 3)."""
    activation_checkpointing: Literal["none", "all"] | Annotated[int, Field(ge=2)] = "none"
    """Blocks whose activations are computed again in the backward pass instead of kept: none, all,
    or every n-th."""
    compile: bool = False
    """torch.compile each block, once for each shape that it meets. A CPU needs a C++ compiler."""
    skip_nonfinite: int = Field(default=0, ge=0)
    """Largest number of a run's steps that may be skipped because their loss or gradient is not
    finite; one more ends the run."""
    stall_seconds: float | None = Field(default=1800.0, gt=0)
    """A process that makes no step for this long ends, and prints the stacks of its threads; none
    waits for ever."""
    ema: float = Field(default=0.9995, ge=0, lt=1)
    """Decay of the weights' moving average; warmed up as min(ema, (1 + step) / (10 + step))."""
    ema_profiles: Widths = ()
    """Widths σ_rel of power-function averages (Karras et al. 2024) kept instead of that one, as in
    [0.05, 0.1]: an average looks back over that share of the training. Sampling uses the first;
    ``r2id checkpoint export --ema`` makes one of any other width from two of them."""
    ema_snapshot_every: int | None = Field(default=None, ge=1)
    """Steps between the copies of the ``ema_profiles`` averages that export needs, kept in RUN/ema;
    none is a 32nd of the run."""
    log_every: int = Field(default=50, ge=1)
    save_every: int = Field(default=1000, ge=1)
    preview_every: int = Field(default=1000, ge=1)
    """Steps between pictures: reconstructions (RIAE) or samples (R2ID)."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""
    milestone_every: int | None = Field(default=None, ge=1)
    """Checkpoints of these steps are saved and kept for good."""

    @property
    def autocast(self) -> bool:
        """Whether the forward pass runs under bfloat16 autocast."""
        return self.precision != "float32"

    @model_validator(mode="after")
    def _profiles_differ(self) -> TrainConfig:
        if len(set(self.ema_profiles)) < len(self.ema_profiles):
            raise ValueError(
                f"ema_profiles = {list(self.ema_profiles)}: must differ from one another"
            )
        if self.ema_snapshot_every and not self.ema_profiles:
            raise ValueError("ema_snapshot_every: is of ema_profiles, and there are none")
        return self


class EngineConfig(Section):
    """How a run is distributed over processes."""

    kind: Literal["auto", "local", "deepspeed"] = "auto"
    """local is plain PyTorch in one process; auto takes it for one process, and DeepSpeed for
    more."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: Literal["none", "optimizer", "all"] = "none"
    """What is kept in the CPU's memory instead of the GPU's: the optimizer's state (zero_stage 1 to
    3), or the weights too (3)."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Merged over the computed DeepSpeed configuration, for experts."""

    @model_validator(mode="after")
    def _offload_what_is_sharded(self) -> EngineConfig:
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(
                f"offload {self.offload!r}: needs zero_stage {least} or more, not {self.zero_stage}"
            )
        return self


class TrackingConfig(Section):
    """What MLflow records of a run."""

    enabled: bool = True
    """Whether it does; its store is MLFLOW_TRACKING_URI or SQLite in the working directory."""
    experiment: str = "r2id"
    name: str | None = None
    """Name of the run; none takes the run directory's name."""


class _StageRun(Section):
    run: PathField
    """Run directory: resolved config, checkpoints, samples."""
    init_from: PathField | None = None
    """Checkpoint or run directory whose averaged weights, those that sampling uses, this run begins
    with. Its model must have the same architecture; loss, data and optimizer are this run's own.
    None draws weights at random."""
    seed: int = Field(default=0, ge=0)
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    engine: EngineConfig = EngineConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _shared_masters(self) -> _StageRun:
        if self.train.precision == "bfloat16_weights" and (
            self.engine.kind == "local" or self.engine.zero_stage < 2
        ):
            raise ValueError(
                "train.precision 'bfloat16_weights': needs engine.zero_stage 2 or 3, not "
                f"engine.kind {self.engine.kind!r} with zero_stage {self.engine.zero_stage}"
            )
        return self


class RiaeRun(_StageRun):
    """One RIAE training run."""

    stage: Literal["riae"]
    riae: RiaeConfig = RiaeConfig()
    loss: LossConfig = LossConfig()


class R2idRun(_StageRun):
    """One R2ID training run.

    Latent channels, downsampling and statistics come from the RIAE checkpoint that it names.
    """

    stage: Literal["r2id"]
    codec: PathField | None = None
    """RIAE checkpoint or run directory; none diffuses the pixels themselves."""
    r2id: R2idConfig = R2idConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sample: SampleConfig = SampleConfig()

    @model_validator(mode="after")
    def _latents_of_a_codec(self) -> R2idRun:
        if self.codec is None and self.data.latents is not None:
            raise ValueError(
                f"data.latents '{self.data.latents}': goes with a codec, and there is none"
            )
        return self
