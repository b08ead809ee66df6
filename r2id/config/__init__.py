"""Settings of every run: frozen, strict schemas, TOML files and ``section.key=value`` overrides.

The field of a schema owns a setting: its type, limits, default and documentation. TOML files under
``configs/`` hold only what their run changes. Options of the commands, and what a pipeline hands to
its stages, are generated from the fields (see r2id.config.arguments).
"""

from r2id.config.arguments import to_arguments
from r2id.config.diffusion import (
    DiffusionConfig,
    PictureConfig,
    SampleConfig,
    SamplerConfig,
    check_guidance,
    find_labels,
)
from r2id.config.files import Run, build, change, load_config, override, parse_config, to_toml
from r2id.config.losses import LossConfig
from r2id.config.models import LevelConfig, R2idConfig, RiaeConfig
from r2id.config.pipeline import (
    EncodeConfig,
    EvaluateConfig,
    PipelineRun,
    PrepareConfig,
    StageConfig,
)
from r2id.config.section import Section, Size
from r2id.config.stages import find_stages
from r2id.config.training import (
    DataConfig,
    EngineConfig,
    OptimConfig,
    R2idRun,
    RiaeRun,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "DataConfig",
    "DiffusionConfig",
    "EncodeConfig",
    "EngineConfig",
    "EvaluateConfig",
    "LevelConfig",
    "LossConfig",
    "OptimConfig",
    "PictureConfig",
    "PipelineRun",
    "PrepareConfig",
    "R2idConfig",
    "R2idRun",
    "RiaeConfig",
    "RiaeRun",
    "Run",
    "SampleConfig",
    "SamplerConfig",
    "Section",
    "Size",
    "StageConfig",
    "TrackingConfig",
    "TrainConfig",
    "build",
    "change",
    "check_guidance",
    "find_labels",
    "find_stages",
    "load_config",
    "override",
    "parse_config",
    "to_arguments",
    "to_toml",
]
