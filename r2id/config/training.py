"""Settings of a training run of either stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from r2id.config.diffusion import DiffusionConfig, SampleConfig
from r2id.config.losses import LossConfig
from r2id.config.models import R2idConfig, RiaeConfig
from r2id.config.section import Pair, PathField, Section, Seed, Size, Widths


class DataConfig(Section):
    """Which images are trained on, and how they are read."""

    shards: PathField
    """Folder written by ``r2id prepare``."""
    latents: PathField | None = None
    """Cache written by ``r2id encode`` (R2ID only). Without one, latents are encoded during
    training, with the same result."""
    train_split: str = "train"
    """Name of the split that is trained on."""
    test_split: str = "test"
    """Name of the split that is measured and shown in previews."""
    channels: Literal[1, 3] = 1
    """Colour channels of the model; every image is converted to them."""
    size: Size | None = None
    """Resize every image to this height and width. Without it, images keep their sizes."""
    max_pixels: int = Field(default=65536, ge=1)
    """Shrink images of more pixels to this area, with their aspect ratio. Smaller images keep their
    size."""
    window: Size | None = None
    """Train on a random part of each image, at most this high and wide, drawn anew every epoch.
    Without it, images are taken whole."""
    flip: bool = False
    """Mirror images from left to right with a probability of one half, drawn anew every epoch. Not
    for digits and letters. A cache of latents has mirrored ones when its RIAE was trained so."""
    batch_pixels: int | None = Field(default=None, ge=1)
    """Largest number of pixels in a training step. Small images then have larger batches: a whole
    multiple of ``train.batch``, as large as fits. Without it, every size has ``train.batch``
    images."""
    shuffle: Literal["samples", "shards"] = "samples"
    """What an epoch shuffles: all samples; or the shards, and the samples of a few shards at a
    time, for storage that is slow to seek."""
    stream: str | None = None
    """Folder or address (any that fsspec knows, such as http or s3) of the same shards. They are
    then streamed, tar after tar, instead of read image by image, and ``shards`` needs only the
    manifest and the indexes. See r2id.data.stream."""
    workers: int = Field(default=0, ge=0)
    """Loader processes of each training process; 0 loads images in the training process."""

    @model_validator(mode="after")
    def _parts_of_images(self) -> DataConfig:
        if self.window and self.size:
            raise ValueError(
                "window and size exclude each other: windows are cut from images of their own sizes"
            )
        for name in ("window", "stream"):
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
    """Learning rate at the last step, to which it falls on a cosine."""
    warmup: int = Field(default=100, ge=0)
    """Steps in which the learning rate rises from 0 to its peak."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's weight decay, of matrices only, not of norms, biases and embeddings."""
    betas: Pair = (0.9, 0.99)
    """Decays of AdamW's averages of the gradient and of its square."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; a larger one is scaled down to it."""

    @model_validator(mode="after")
    def _falls(self) -> OptimConfig:
        if self.lr_end > self.lr:
            raise ValueError(
                f"lr_end = {self.lr_end}: must be at most lr = {self.lr}, from which it falls; set "
                "both"
            )
        return self


class TrainConfig(Section):
    """Length, batch, number formats, averages and checkpoints of a training run."""

    steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""
    batch: int = Field(default=64, ge=1)
    """Samples per optimizer step over all processes. Gradients are accumulated as often as it
    takes."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Largest number of samples in a forward pass of one process. Without it, a process takes its
    whole share of the batch at once."""
    precision: Literal["auto", "float32", "bfloat16", "bfloat16_weights"] = "auto"
    """Number formats. bfloat16 is autocast: weights, norms and gradients stay float32. auto is
    bfloat16 where the machine that the run begins on is fast at it (GPUs that have it, CPUs with
    AMX or AVX512-BF16), else float32; the run keeps it from then on. A GPU multiplies float32
    matrices in TF32. bfloat16_weights needs less memory: the weights of the forward pass and their
    gradients are bfloat16, and float32 weights are sharded over the processes (zero_stage 2 or
    3)."""
    deterministic: bool = False
    """Have a GPU give the same bits every time, as a CPU does: a run that was stopped and goes on
    then equals one that was not. Slower. Not every perceptual network can."""
    activation_checkpointing: Literal["none", "all"] | Annotated[int, Field(ge=2)] = "none"
    """Blocks whose activations are not kept but computed again in the backward pass, which saves
    memory: none, all, or every n-th."""
    compile: Literal["auto", "cuda_graphs"] | bool = "auto"
    """true: compile each block with torch.compile, which takes half a minute. cuda_graphs: record
    each step of R2ID as one CUDA graph, so that the GPU does not wait for its host, in one process
    and without activation checkpointing. auto: both on a GPU, where possible (zero_stage 3 is not
    compiled, and compiling needs a C compiler and Python's headers); nothing on a CPU, where
    compiling takes long, gains nothing and needs a C++ compiler. false: neither."""
    skip_nonfinite: int = Field(default=0, ge=0)
    """How many steps may be skipped because their loss or gradient is not finite, counted anew when
    a run goes on; one more ends the run."""
    stall_seconds: float = Field(default=1800.0, ge=0, le=1e9)
    """A process that makes no step for this many seconds prints the stacks of its threads and ends;
    0 waits for ever."""
    ema: float = Field(default=0.9995, ge=0, lt=1)
    """Decay of the weights' moving average; it begins lower, as min(ema, (1 + step) / (10 +
    step))."""
    ema_profiles: Widths = ()
    """Widths σ_rel of power-function averages (Karras et al. 2024), such as [0.05, 0.1], which are
    kept instead of the average of ``ema``. The width is the share of the training over which an
    average looks back. Sampling uses the first; ``r2id checkpoint export --ema`` makes one of any
    other width from two of them."""
    ema_snapshot_every: int | None = Field(default=None, ge=1)
    """Steps between copies of the ``ema_profiles`` averages, which export needs, in RUN/ema.
    Without it, a 32nd of the run."""
    guide_after: float | None = Field(default=None, gt=0, lt=1)
    """Share of an R2ID's run after which a copy of its average is kept as it is, for
    ``sample.autoguidance`` to move away from. It takes as much memory as the average."""
    log_every: int = Field(default=50, ge=1)
    """Steps between records of loss and speed."""
    save_every: int = Field(default=1000, ge=1)
    """Steps between checkpoints."""
    preview_every: int = Field(default=1000, ge=1)
    """Steps between pictures: reconstructions (RIAE) or samples (R2ID)."""
    keep: int = Field(default=2, ge=1)
    """Number of newest checkpoints that are kept."""
    milestone_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints that are kept for good, beside the newest ones."""

    @property
    def autocast(self) -> bool:
        """Whether the forward pass runs under bfloat16 autocast.

        Where ``auto`` is not decided yet, as in plans, it counts as a GPU's: bfloat16.
        """
        return self.precision != "float32"

    @model_validator(mode="after")
    def _profiles_differ(self) -> TrainConfig:
        if len(set(self.ema_profiles)) < len(self.ema_profiles):
            raise ValueError(
                f"ema_profiles = {list(self.ema_profiles)}: must differ from each other"
            )
        if self.ema_snapshot_every and not self.ema_profiles:
            raise ValueError(
                f"ema_snapshot_every = {self.ema_snapshot_every}: needs ema_profiles, and none are "
                "set"
            )
        return self


class EngineConfig(Section):
    """How a run is distributed over processes."""

    kind: Literal["auto", "local", "deepspeed"] = "auto"
    """What trains: local is plain PyTorch in one process, deepspeed is DeepSpeed in any number of
    them. auto takes local for one process and deepspeed for more."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards over the processes: 0 nothing, 1 the optimizer's state, 2 the gradients
    too, 3 the weights too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What is kept in the CPU's memory instead of the GPU's: nothing, the optimizer's state (needs
    zero_stage 1 to 3), or the weights too (needs 3)."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Settings of DeepSpeed's own, for experts; they replace those that r2id computes."""

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
    """Whether MLflow records the run, in the store that MLFLOW_TRACKING_URI names, or in SQLite in
    the working directory."""
    experiment: str = "r2id"
    """Name of MLflow's experiment."""
    name: str | None = None
    """Name of MLflow's run. Without it, the run directory and the folder that it is in, such as
    ``digits/r2id``."""


class _StageRun(Section):
    run: PathField
    """Run directory, for the resolved config, checkpoints and samples."""
    init_from: PathField | None = None
    """Checkpoint or run directory with whose weights this run begins, averaged as for sampling. Its
    model must have the same architecture; loss, data and optimizer are this run's own. Without it,
    weights are drawn at random."""
    seed: Seed = 0
    """Seed of all random numbers of the run."""
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
    start: Literal["pca", "random"] = "pca"
    """Where RIAE's linear map begins, if it has one: at a principal component analysis of the
    training images, or at random weights. Not used with ``init_from``."""
    riae: RiaeConfig = RiaeConfig()
    loss: LossConfig = LossConfig()

    @model_validator(mode="after")
    def _discriminator_is_whole(self) -> RiaeRun:
        where = f"loss.discriminator = {self.loss.discriminator}: does not go with"
        if self.loss.discriminator and self.engine.zero_stage == 3:
            raise ValueError(
                f"{where} engine.zero_stage 3, which scatters weights, because the decoder's loss "
                "reads the discriminator's whole; use 0, 1 or 2"
            )
        if self.loss.discriminator and self.train.precision == "bfloat16_weights":
            raise ValueError(
                f"{where} train.precision 'bfloat16_weights', because penalties of the "
                "discriminator are differentiated twice, in float32; use 'bfloat16' or 'float32'"
            )
        return self

    @model_validator(mode="after")
    def _frozen_encoder_is_trained(self) -> RiaeRun:
        if self.loss.freeze_encoder and self.init_from is None:
            raise ValueError(
                "loss.freeze_encoder = true: needs init_from, the run that has trained the encoder"
            )
        return self

    @model_validator(mode="after")
    def _has_no_guide(self) -> RiaeRun:
        if self.train.guide_after is not None:
            raise ValueError(
                f"train.guide_after = {self.train.guide_after}: is of stage 'r2id', whose samples "
                "can be guided"
            )
        return self

    @property
    def starts_from_pca(self) -> bool:
        """Whether a new run computes a principal component analysis of its training images."""
        return self.start == "pca" and self.riae.linear

    @model_validator(mode="after")
    def _loss_of_the_kind(self) -> RiaeRun:
        for name in self.loss.foreign_to(self.riae.kind):
            raise ValueError(
                f"loss.{name} = {getattr(self.loss, name)!r}: is no setting for riae.kind "
                f"'{self.riae.kind}'"
            )
        return self


class R2idRun(_StageRun):
    """One R2ID training run.

    Latent channels, downsampling and the statistics of the latents are those of its codec.
    """

    stage: Literal["r2id"]
    codec: PathField | None = None
    """Checkpoint or run directory of the RIAE whose latents are diffused. Without it, pixels
    are."""
    r2id: R2idConfig = R2idConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sample: SampleConfig = SampleConfig()
    """How previews are drawn, and all samples that say nothing else."""

    @model_validator(mode="after")
    def _autoguidance_has_a_guide(self) -> R2idRun:
        if self.sample.autoguidance and self.train.guide_after is None:
            raise ValueError(
                f"sample.autoguidance = {self.sample.autoguidance}: needs train.guide_after, such "
                "as 0.1, the share of the run after which its guide is kept"
            )
        return self

    @model_validator(mode="after")
    def _latents_of_a_codec(self) -> R2idRun:
        if self.codec is None and self.data.latents is not None:
            raise ValueError(
                f"data.latents '{self.data.latents}': goes with a codec, and there is none"
            )
        return self
