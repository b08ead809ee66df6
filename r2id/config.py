"""Settings of every run: frozen, strict schemas; r2id.config_files reads and writes them.

A schema's field is the one owner of a setting's default and of its documentation; a TOML file under ``configs/`` holds
only what its run changes. Sizes are always (height, width).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _as_path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and value else value


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


PathField = Annotated[Path, BeforeValidator(_as_path)]
Size = Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], BeforeValidator(_as_tuple)]
Sizes = Annotated[tuple[Size, ...], BeforeValidator(_as_tuple)]
Pair = Annotated[tuple[float, float], BeforeValidator(_as_tuple)]
IntPair = Annotated[tuple[int, int], BeforeValidator(_as_tuple)]
Labels = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_as_tuple)]
Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Widths = Annotated[tuple[Annotated[float, Field(gt=0, lt=0.28)], ...], BeforeValidator(_as_tuple)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Fraction0 = Annotated[float, Field(ge=0, le=1)]
Solver = Literal["ddim", "dpmpp_2m", "euler", "heun"]


class Section(BaseModel):
    """A table of a TOML file: frozen; unknown keys and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class DataConfig(Section):
    shards: PathField
    """Folder written by ``r2id prepare``."""
    latents: PathField | None = None
    """Cache written by ``r2id encode`` (R2ID only); without one, latents are encoded on the fly, with the same result."""
    train_split: str = "train"
    test_split: str = "test"
    channels: Literal[1, 3] = 1
    """Colour channels that the model sees; every image is converted to them."""
    size: Size | None = None
    """Resize every image to this height and width; none keeps native sizes."""
    max_pixels: int = Field(default=65536, ge=1)
    """Images of more pixels are shrunk to this area, aspect ratio kept. Nothing is ever enlarged."""
    window: Size | None = None
    """Train on a random part of each image, at most this high and wide, drawn anew every epoch; none takes it whole."""
    flip: bool = False
    """Mirror half of the images from left to right, drawn anew every epoch. Not for digits and letters."""
    batch_pixels: int | None = Field(default=None, ge=1)
    """Pixels of a training step: a step of small images takes as many times ``train.batch`` of them as keep within it, a
    whole number, and never less than once. None takes ``train.batch`` of every size."""
    shuffle: Literal["samples", "shards"] = "samples"
    """An epoch's order: of all samples, or of shards and then of the samples within some shards at a time, for disks and
    stores that are slow to jump."""
    stream: str | None = None
    """Folder or address (http, s3, … as fsspec has them) of the same shards, streamed in the order of the tars instead of
    read one image at a time; ``shards`` then needs the manifest and the indexes only. See r2id.data.stream."""
    workers: int = Field(default=0, ge=0)
    """Loader processes of each rank; 0 decodes in the training process."""

    @model_validator(mode="after")
    def _parts_of_images(self) -> DataConfig:
        if self.window and self.size:
            raise ValueError("window and size exclude each other: windows are cut from images of their own sizes")
        for name in ("window", "flip", "stream"):
            if self.latents and getattr(self, name):
                raise ValueError(f"{name} does not go with latents, which are of whole images as they are")
        return self


class RiaeConfig(Section):
    latent_channels: int = Field(default=64, ge=1)
    cell: float = Field(default=4.0, ge=1)
    """Side of one latent cell in pixels: an H×W image has round(H/cell) × round(W/cell) latents, at least one."""
    width: int = Field(default=256, ge=8)
    """Width of the latent side."""
    pixel_width: int = Field(default=256, ge=8)
    """Width of the pixel side: the keys of the encoder and the queries of the decoder."""
    heads: int = Field(default=8, ge=1)
    encoder_blocks: int = Field(default=1, ge=1)
    """Blocks in which the latents query the image's pixels."""
    decoder_blocks: int = Field(default=1, ge=1)
    """Blocks in which output pixels query the latents."""
    latent_blocks: int = Field(default=0, ge=0)
    """Self-attention blocks on the latent grid, at the end of the encoder and again at the start of the decoder."""
    latent_attention: Literal["global", "local"] = "global"
    """In those blocks, where ``attention`` is local: between all latents, which takes most of the time of an image of more
    than some thousand latents, or between those of a tile and its halo."""
    ffn_ratio: float = Field(default=4.0, gt=0)
    fourier: IntPair = (-3, 7)
    """First and last power p of the Fourier features sin, cos(π·2^p·coordinate), for ``cloud`` attention."""
    attention: Literal["cloud", "local"] = "cloud"
    """Between latents and pixels. cloud is dense: all of them, and in training random clouds of them. local: those of a
    square tile of latent cells see what lies within the tile and a halo, whatever the sizes, so that time and memory grow
    linearly with the pixels; places are then given in cells, the same in an image of any size."""
    tile: int = Field(default=4, ge=1)
    """Side of a tile in latent cells, for ``local`` attention."""
    halo: float = Field(default=2.0, ge=0)
    """How far around its tile a query sees, in latent cells, for ``local`` attention."""
    cell_fourier: IntPair = (-3, 2)
    """First and last power p of the features sin, cos(π·2^p·place in cells), for ``local`` attention."""
    locality: bool = True
    """Each head learns how far it looks, in latent cells: a Gaussian window on top of the learned attention."""
    bounded: bool = False
    """Latents through tanh, so that they lie in (−1, 1)."""
    latent_noise: float = Field(default=0.0, ge=0)
    """Standard deviation of Gaussian noise added to the latents in training, so that near latents decode alike."""
    encode_cloud: Fraction = 1 / 16
    """Share of an image's pixels that the encoder sees in a training step: one random cloud for all queries. With ``local``
    attention it sees them all."""
    decode_cloud: Fraction = 1.0
    """Share of the latents that the decoder sees in a training step: one random cloud for all queries. With ``local``
    attention a tile sees all that are near."""
    decode_pixels: int = Field(default=256, ge=1)
    """Random output pixels that a training step decodes of each image: its cost does not depend on the image's size. With
    ``local`` attention they come as whole tiles, at least one."""
    encode_scales: Pair | None = None
    """Smallest and largest factor between an image's height, and likewise its width, and those at which the encoder sees it
    in training, drawn anew each step; none is 1."""
    decode_scales: Pair | None = None
    """The same for the size at which the decoder is trained to render it."""
    cell_size: bool = False
    """Tell encoder and decoder how large pixels are, in latent cells, beside where they are: a pixel is then what an area
    looks like from afar, not the colour of a point (cell decoding of LIIF, Chen et al. 2021). For training at scales."""
    jitter: float = Field(default=1.0, ge=0)
    """Strength of the coordinate jitter in training; 1 is a Gaussian of half a pixel, as published."""
    loss: Literal["l1", "mse", "charbonnier"] = "mse"
    texture: float = Field(default=0.0, ge=0)
    """Weight of a second term: the same error of the differences between each point and one a pixel away, in a direction
    drawn anew, which is the derivative of the image function. Doubles what the decoder costs."""

    @model_validator(mode="after")
    def _scales_are_a_range(self) -> RiaeConfig:
        for name in ("encode_scales", "decode_scales"):
            scales = getattr(self, name)
            if scales and not 0 < scales[0] <= scales[1]:
                raise ValueError(f"{name} = {list(scales)}: must be positive, the smaller first")
        return self


class R2idConfig(Section):
    width: int = Field(default=256, ge=8)
    heads: int = Field(default=8, ge=1)
    encoder_blocks: int = Field(default=8, ge=0)
    """Self-attention blocks, run once per step whatever the number of conditions."""
    decoder_blocks: int = Field(default=8, ge=1)
    """Self-attention and cross-attention blocks, run once per condition."""
    attention: Annotated[tuple[Literal["full", "cloud", "axial", "linear", "local"], ...], BeforeValidator(_as_tuple),
                         Field(min_length=1)] = ("full",)
    """Self-attention of the blocks in turn, encoder first, and over again: to all tokens, within random groups (in training;
    else to all), along rows and columns, linear, or within tiles of the grid and a halo."""
    cloud_tokens: int = Field(default=256, ge=1)
    """Tokens of a random group of 'cloud', about."""
    tile: int = Field(default=8, ge=1)
    """Side of the tiles of 'local', in tokens."""
    halo: int = Field(default=4, ge=0)
    """What tokens of 'local' see around their tile, in tokens."""
    ffn_ratio: float = Field(default=4.0, gt=0)
    condition: Literal["class", "attributes", "embedding", "none"] = "class"
    """What samples are drawn under: their class, the attributes of the set (CelebA's 40), the embedding of a text that came
    with the image, or nothing."""
    condition_tokens: int = Field(default=2, ge=1)
    """Tokens made of the condition, attended to by every decoder block; embeddings of T tokens make T."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    fourier: IntPair = (-3, 7)
    """First and last power p of the coordinates' Fourier features."""
    time_fourier: IntPair = (-3, 6)
    """First and last power p of the Fourier features of ᾱ."""
    jitter: float = Field(default=1.0, ge=0)
    """Strength of the coordinate jitter in training; 1 is a Gaussian of half a latent cell, as published."""


class DiffusionConfig(Section):
    objective: Literal["epsilon", "x0", "v", "flow"] = "v"
    """What the network predicts: noise, data, v (Salimans & Ho 2022) or the flow's velocity (Lipman et al. 2023)."""
    schedule: Literal["cosine", "linear_beta", "flow"] = "cosine"
    time_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """How training draws t: evenly, or bunched in the middle (Esser et al. 2024)."""
    weighting: Literal["uniform", "min_snr", "soft_min_snr"] = "uniform"
    """min_snr is min-SNR-γ with γ = 5 (Hang et al. 2023), soft_min_snr its smooth form (Crowson et al. 2024)."""
    condition_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of training samples whose condition is dropped, for guidance."""
    shift_exponent: float = Field(default=1.0, ge=0)
    """k of logSNR_n(t) = logSNR(t) − 2·k·log(n/n_base), n = √(h·w) of the diffused grid (Hoogeboom et al. 2023)."""

    @model_validator(mode="after")
    def _flow_goes_with_flow(self) -> DiffusionConfig:
        if (self.objective == "flow") != (self.schedule == "flow"):
            raise ValueError(f"objective {self.objective!r} does not go with schedule {self.schedule!r}: "
                             "'flow' needs 'flow', the others need 'cosine' or 'linear_beta'")
        return self


class SampleConfig(Section):
    sizes: Sizes = ()
    """Image sizes (height, width) of the grids; empty is the size of the training images."""
    count: int = Field(default=40, ge=1)
    """Images per size."""
    labels: Labels = ()
    """Class indices, repeated to fill count; empty takes all classes in turn."""
    steps: int = Field(default=30, ge=1)
    guidance: float = Field(default=2.0, ge=0)
    """Classifier-free guidance scale: 1 is none, 0 ignores the condition."""
    guidance_interval: Annotated[tuple[Fraction0, Fraction0], BeforeValidator(_as_tuple)] = (0.0, 1.0)
    """Times from and to which guidance applies, 0 is data and 1 noise (Kynkäänniemi et al. 2024); the rest of the way is
    conditional."""
    solver: Solver = "ddim"
    eta: float = Field(default=0.0, ge=0, le=1)
    """Share of fresh noise in ddim's steps: 0 is deterministic, 1 ancestral."""
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _solver_options(self) -> SampleConfig:
        low, high = self.guidance_interval
        if low >= high:
            raise ValueError(f"guidance_interval = {[low, high]}: must rise")
        if self.eta and self.solver != "ddim":
            raise ValueError(f"eta = {self.eta}: goes with solver 'ddim', not {self.solver!r}")
        return self


class OptimConfig(Section):
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
    steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""
    batch: int = Field(default=64, ge=1)
    """Samples per optimizer step over all processes; accumulation is computed from it."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Samples per forward pass of one process, fewer where its share of the batch is; none takes its whole share at once."""
    precision: Literal["float32", "bfloat16", "bfloat16_weights"] = "float32"
    """bfloat16 is autocast: weights, norms and gradients stay float32. bfloat16_weights needs less memory: the weights of
    the forward pass and their gradients are bfloat16, beside float32 ones that the processes share out (zero_stage 2, 3)."""
    activation_checkpointing: Literal["none", "all"] | Annotated[int, Field(ge=2)] = "none"
    """Blocks whose activations are computed again in the backward pass instead of kept: all, or every so-manieth."""
    compile: bool = False
    """torch.compile each block: one compilation for each shape that blocks meet. Needs a C++ compiler on a CPU."""
    skip_nonfinite: int = Field(default=0, ge=0)
    """Steps of a run that may be left out because their loss or gradient is not finite; one more ends it."""
    stall_seconds: float | None = Field(default=1800.0, gt=0)
    """A process that makes no step for so long ends, with the stacks of its threads; none waits for ever."""
    ema: float = Field(default=0.9995, ge=0, lt=1)
    """Decay of the weights' moving average; warmed up as min(ema, (1 + step) / (10 + step))."""
    ema_profiles: Widths = ()
    """Widths σ_rel of power-function averages (Karras et al. 2024) kept instead of that one, such as [0.05, 0.1]: the
    average looks back that share of the training. Sampling uses the first; ``r2id checkpoint export --ema`` makes any
    other width's from two of them."""
    ema_snapshot_every: int | None = Field(default=None, ge=1)
    """Steps between the copies of ``ema_profiles`` that this takes, kept in RUN/ema; none: a 32nd of the run."""
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
            raise ValueError(f"ema_profiles = {list(self.ema_profiles)}: must differ from one another")
        if self.ema_snapshot_every and not self.ema_profiles:
            raise ValueError("ema_snapshot_every: is of ema_profiles, and there are none")
        return self


class EngineConfig(Section):
    kind: Literal["auto", "local", "deepspeed"] = "auto"
    """local is plain PyTorch in one process; auto takes it when there is one process and DeepSpeed when there are more."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: Literal["none", "optimizer", "all"] = "none"
    """What lies in the CPU's memory instead of the GPU's: the optimizer's state (stages 1 to 3), or the weights too (3)."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Merged over the computed DeepSpeed configuration, for experts."""

    @model_validator(mode="after")
    def _offload_what_is_sharded(self) -> EngineConfig:
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(f"offload {self.offload!r}: needs zero_stage {least} or more, not {self.zero_stage}")
        return self


class TrackingConfig(Section):
    enabled: bool = True
    """MLflow; its store is MLFLOW_TRACKING_URI or SQLite in the working directory."""
    experiment: str = "r2id"
    name: str | None = None
    """Name of the run; none takes the run directory's name."""


class _StageRun(Section):
    run: PathField
    """Run directory: resolved config, checkpoints, samples."""
    seed: int = Field(default=0, ge=0)
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    engine: EngineConfig = EngineConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _shared_masters(self) -> _StageRun:
        if self.train.precision == "bfloat16_weights" and (self.engine.kind == "local" or self.engine.zero_stage < 2):
            raise ValueError(f"train.precision 'bfloat16_weights': needs engine.zero_stage 2 or 3, not engine.kind "
                             f"{self.engine.kind!r} with zero_stage {self.engine.zero_stage}")
        return self


class RiaeRun(_StageRun):
    """One RIAE training run."""

    stage: Literal["riae"]
    riae: RiaeConfig = RiaeConfig()


class R2idRun(_StageRun):
    """One R2ID training run. Its latent channels, cell and statistics come from the RIAE checkpoint it names."""

    stage: Literal["r2id"]
    codec: PathField | None = None
    """RIAE checkpoint or run directory; none diffuses the pixels themselves."""
    r2id: R2idConfig = R2idConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sample: SampleConfig = SampleConfig()

    @model_validator(mode="after")
    def _latents_of_a_codec(self) -> R2idRun:
        if self.codec is None and self.data.latents is not None:
            raise ValueError(f"data.latents '{self.data.latents}': goes with a codec, and there is none")
        return self


class PrepareConfig(Section):
    dataset: Literal["digits", "mnist", "celeba", "imagenet", "folder", "webdataset"]
    source: PathField | None = None
    """Files of the dataset; none uses what the library ships (digits) or downloads it (mnist)."""
    out: PathField
    """Shards; shared by every run that uses the dataset."""
    workers: int = Field(default=1, ge=1)
    engine: Literal["processes", "dask", "ray"] = "processes"
    """Where shards are written: processes of this machine, or a Dask or Ray cluster that sees the same folders."""
    address: str | None = None
    """Of the cluster's scheduler (``tcp://host:8786``) or head (``ray://host:10001``, ``auto``); none starts ``workers``
    processes of its kind here."""
    shard_mb: float = Field(default=256.0, gt=0)
    """Largest shard in megabytes (10⁶ bytes)."""
    labels: PathField | None = None
    """Classes of a folder's images: CSV or Parquet with a column path (relative to the source), a column label and, where
    the table decides that too, a column split."""
    label: str = "none"
    """What the class of a CelebA image is: none, identity or one of the attributes."""
    images: Literal["aligned", "wild"] = "aligned"
    """Which of CelebA's images."""
    max_megapixels: float = Field(default=100.0, gt=0)
    """Images of more pixels (10⁶) are rejected before they are decoded."""
    max_rejects: float = Field(default=0.01, ge=0, le=1)
    """Share of the images that may be unusable; ten always may. More end the preparation."""

    @model_validator(mode="after")
    def _address_of_a_cluster(self) -> PrepareConfig:
        if self.address and self.engine == "processes":
            raise ValueError(f"address {self.address!r}: goes with engine 'dask' or 'ray'")
        return self


class StageConfig(Section):
    config: PathField
    """The stage's TOML file, relative to this one."""
    set: Strings = ()
    """Overrides of it, as ``section.key=value``."""


class EvaluateConfig(Section):
    count: int = Field(default=1000, ge=1)
    """Samples per size that are generated and scored."""
    sizes: Sizes = ()
    """Image sizes of scored samples; empty is the size of the training images."""


class PipelineRun(Section):
    """The whole pipeline: prepare, train riae, encode, train r2id, sample, evaluate."""

    stage: Literal["pipeline"]
    name: str = Field(min_length=1)
    out: PathField
    """Folder of the runs, the latent cache, the samples and the report."""
    prepare: PrepareConfig
    riae: StageConfig
    r2id: StageConfig
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()


Run = RiaeRun | R2idRun | PipelineRun
