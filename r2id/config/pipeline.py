"""Settings of a pipeline, and of its steps that train nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializationInfo, field_serializer, model_validator

from r2id.config.diffusion import SampleConfig, SamplerConfig
from r2id.config.section import (
    MOST_PIXELS,
    Guidances,
    PathField,
    Section,
    Seed,
    Size,
    Sizes,
    Strings,
    check_seeds,
)
from r2id.config.training import TrackingConfig


class PrepareConfig(Section):
    """Which dataset becomes shards, and how they are written."""

    dataset: str = Field(min_length=1)
    """Name of the dataset, one of data_prep.readers.DATASETS."""
    source: PathField | None = None
    """File or folder with the dataset. digits and mnist can do without: the first is shipped with a
    library, the second is downloaded."""
    out: PathField
    """Folder for the shards, which all runs on the dataset share."""
    workers: int = Field(default=1, ge=1)
    """Number of processes that write shards."""
    engine: Literal["processes", "dask", "ray"] = "processes"
    """Where shards are written: by processes of this machine, or on a Dask or Ray cluster that sees
    the same folders."""
    address: str | None = None
    """Address of the cluster: Dask's scheduler (``tcp://host:8786``) or Ray's head
    (``ray://host:10001``, or auto). Without one, a cluster of so many ``workers`` is started on
    this machine."""
    shard_mb: float = Field(default=256.0, gt=0)
    """Largest size of a shard in megabytes (10⁶ bytes)."""
    labels: PathField | None = None
    """Table of the classes of a folder's images: a CSV or Parquet file with the columns path
    (relative to the source) and label, and split if it decides that too."""
    label: str = "none"
    """What is the class of a CelebA image: none, identity, or the name of an attribute."""
    images: Literal["aligned", "wild"] = "aligned"
    """Which images of CelebA are taken: aligned faces, or those in the wild."""
    partial: bool = False
    """Take the part of CelebA that is there: without some images or rows of its tables, or without
    the partition. A tenth becomes the test split if there is none."""
    max_megapixels: float = Field(default=100.0, gt=0, le=MOST_PIXELS / 1e6)
    """Images of more megapixels (10⁶ pixels) are rejected before they are decoded."""
    max_rejects: float = Field(default=0.01, ge=0, le=1)
    """Largest share of unusable images, which are left out; ten are always allowed. More end the
    preparation."""

    @model_validator(mode="after")
    def _address_of_a_cluster(self) -> PrepareConfig:
        if self.address and self.engine == "processes":
            raise ValueError(f"address {self.address!r}: goes with engine 'dask' or 'ray'")
        return self


class StageConfig(Section):
    """A training stage of a pipeline."""

    config: PathField
    """The stage's TOML file, relative to this one."""
    set: Strings = ()
    """Overrides of that file, as ``section.key=value``."""


class EncodeConfig(Section):
    """How the latents of a dataset are computed and kept."""

    batch: int = Field(default=256, ge=1)
    """Number of images that are encoded at once."""
    workers: int | None = Field(default=None, ge=0)
    """Number of processes that load images; 0 loads them in the encoding process. Without it, as
    many as the RIAE's training had (``data.workers``)."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of the latents on disk."""


class EvaluateConfig(SamplerConfig):
    """What is measured. Samples are drawn as the R2ID run says, unless it is set here."""

    count: int = Field(default=1000, ge=1)
    """Number of samples per size that are drawn and scored."""
    sizes: Sizes = ()
    """Height x width of the samples in pixels. Without any, the size of the training images."""
    seed: Seed = 0
    """Seed of the first sample of each size."""
    split: str | None = None
    """Split of the shards that is compared with. Without one, ``data.test_split`` of the model's
    training."""
    invariance: bool = False
    """Also evaluate at fourteen other sizes and ratios, beside real images resized to them."""
    invariance_count: int = Field(default=500, ge=1)
    """Number of samples per size of ``invariance``."""
    guidance: Guidances = ()  # type: ignore[assignment]
    """Scale of classifier-free guidance: 1 is none, 0 ignores the condition. Without one, the run's
    own. Of several, each is scored at the size of the training images, and all else is measured
    with the one of the least Fréchet distance."""
    extractor: str | None = None
    """TorchScript file, or its address, that maps uint8 images [N, 3, H, W] to features [N, D],
    such as Inception-v3 for the FID. The program in it is run, so use one that you trust. Without
    one, features are those of a classifier that is trained on the real images first, or without
    classes of a network that is trained on them by itself. The classifier is trained with one, too,
    for class accuracy."""
    extractor_size: Size | None = None
    """Height x width of the images that such a file takes. Without it, that of the training
    images."""

    @model_validator(mode="after")
    def _seeds_are_seeds(self) -> EvaluateConfig:
        check_seeds(self.seed, max(self.count, self.invariance_count))
        return self


class PipelineRun(Section):
    """The whole pipeline: prepare, train riae, finetune, encode, train r2id, sample, evaluate.

    Its tables override the stages' own configs where they set something.
    """

    stage: Literal["pipeline"]
    name: str = Field(min_length=1)
    """Name of the pipeline's runs in Prefect and MLflow."""
    out: PathField
    """Folder of the runs, the latent cache, the samples and the report."""
    prepare: PrepareConfig
    riae: StageConfig
    finetune: StageConfig | None = None
    """A second run of RIAE that begins with the weights of the first, under a loss of its own; its
    RIAE is the one that all later stages use. Without it, that is the first one."""
    encode: EncodeConfig = EncodeConfig()
    r2id: StageConfig
    sample: SampleConfig = SampleConfig()
    """Pictures that are drawn at the end; the R2ID run's own [sample] decides what is not set."""
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()
    """What MLflow records of the pipeline; the stages' runs are children of its run."""

    def training_stages(self) -> dict[str, StageConfig]:
        """Return the stages that train, by the name of their table, in their order."""
        stages = {"riae": self.riae, "finetune": self.finetune, "r2id": self.r2id}
        return {name: stage for name, stage in stages.items() if stage}

    def stage_paths(self) -> dict[str, dict[str, Path]]:
        """Return the settings by which the stages find each other, by the name of their table."""
        riae, finetuned = self.out / "riae", self.out / "riae-finetuned"
        return {
            "riae": {"run": riae},
            "finetune": {"run": finetuned, "init_from": riae},
            "r2id": {
                "run": self.out / "r2id",
                # Latents are made by the first RIAE where there is no second.
                "codec": finetuned if self.finetune else riae,
                "data.latents": self.out / "latents",
            },
        }

    @field_serializer("encode", "sample", "evaluate", "tracking")
    def _only_changes(self, section: Section, info: SerializationInfo) -> dict[str, Any]:
        # A default that is written out would be set where it is read again, and win over a
        # stage's own value.
        return section.model_dump(
            mode=info.mode, exclude_unset=True, exclude_none=info.exclude_none
        )
