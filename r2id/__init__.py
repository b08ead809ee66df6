"""Resolution-invariant image generation: RIAE compresses images, R2ID diffuses in its latents."""

import importlib
import os
from typing import Any

# MLflow, Prefect and their dependencies report usage to their makers unless told not to. A user who
# has set any of these variables keeps that choice.
for _name, _value in {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}.items():
    os.environ.setdefault(_name, _value)

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load what is used of the package, on its first use: Pipeline."""
    if name == "Pipeline":
        return importlib.import_module("r2id.pipeline").Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
