"""The whole pipeline."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializationInfo, field_serializer, model_validator

from r2id.config.diffusion import SampleConfig, SamplerConfig
from r2id.config.section import PathField, Section, Sizes, Strings
from r2id.config.training import TrackingConfig


class PrepareConfig(Section):
    """Which dataset becomes shards, and how they are written."""

    dataset: str = Field(min_length=1)
    """Name of the dataset, one of data_prep.readers.DATASETS."""
    source: PathField | None = None
    """The dataset's files; none takes what the library ships (digits) or downloads it (mnist)."""
    out: PathField
    """Folder for the shards, which every run on the dataset shares."""
    workers: int = Field(default=1, ge=1)
    """Processes that write shards."""
    engine: Literal["processes", "dask", "ray"] = "processes"
    """Where shards are written: in processes of this machine, or on a Dask or Ray cluster that sees
    the same folders."""
    address: str | None = None
    """Of the cluster's scheduler (``tcp://host:8786``) or head (``ray://host:10001``, ``auto``);
    none starts ``workers`` processes of its kind here."""
    shard_mb: float = Field(default=256.0, gt=0)
    """Largest shard in megabytes (10⁶ bytes)."""
    labels: PathField | None = None
    """Classes of a folder's images: CSV or Parquet with a column path (relative to the source), a
    column label and, where the table decides that too, a column split."""
    label: str = "none"
    """What the class of a CelebA image is: none, identity or one of the attributes."""
    images: Literal["aligned", "wild"] = "aligned"
    """Which of CelebA's images."""
    max_megapixels: float = Field(default=100.0, gt=0)
    """Images of more pixels (10⁶) are rejected before they are decoded."""
    max_rejects: float = Field(default=0.01, ge=0, le=1)
    """Largest share of unusable images; ten are always let pass. More end the preparation."""

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
    """Overrides of it, as ``section.key=value``."""


class EncodeConfig(Section):
    """How the latents of a dataset are computed and kept."""

    batch: int = Field(default=256, ge=1)
    """Images encoded at once."""
    workers: int = Field(default=0, ge=0)
    """Loader processes; 0 decodes in the encoding process."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of the latents on disk."""


class EvaluateConfig(SamplerConfig):
    """What is measured; how samples are computed is the R2ID run's own unless it is set here."""

    count: int = Field(default=1000, ge=1)
    """Samples per size that are generated and scored."""
    sizes: Sizes = ()
    """Image height x width of scored samples; empty is the size of the training images."""
    seed: int = Field(default=0, ge=0)
    """Seed of the first sample."""
    invariance: bool = False
    """Measure at fourteen sizes and aspect ratios too, against real images stretched to them."""
    invariance_count: int = Field(default=500, ge=1)
    """Samples per size of ``invariance``."""
    extractor: str | None = None
    """TorchScript file or its address, uint8 images [N, 3, H, W] to features [N, D], such as
    Inception-v3 for the FID; its program is run, so use one that you trust. None takes the
    classifier trained here."""


class PipelineRun(Section):
    """The whole pipeline: prepare, train riae, encode, train r2id, sample, evaluate.

    What its tables set wins over the stages' own configs; what they leave out is the stages' own.
    """

    stage: Literal["pipeline"]
    name: str = Field(min_length=1)
    out: PathField
    """Folder of the runs, the latent cache, the samples and the report."""
    prepare: PrepareConfig
    riae: StageConfig
    encode: EncodeConfig = EncodeConfig()
    r2id: StageConfig
    sample: SampleConfig = SampleConfig()
    """Of the pictures drawn in the end; what is not set is in the R2ID run's own [sample]."""
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()
    """Of the pipeline's own MLflow run, whose children the stages' are."""

    @field_serializer("encode", "sample", "evaluate", "tracking")
    def _only_changes(self, section: Section, info: SerializationInfo) -> dict[str, Any]:
        # A default that is written out would be set where it is read again, and win over a
        # stage's own value.
        return section.model_dump(
            mode=info.mode, exclude_unset=True, exclude_none=info.exclude_none
        )
