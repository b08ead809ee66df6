"""The whole pipeline."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from r2id.config.diffusion import SampleConfig
from r2id.config.section import PathField, Section, Sizes, Strings
from r2id.config.training import TrackingConfig


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
