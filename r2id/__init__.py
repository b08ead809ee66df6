"""Resolution-invariant image generation: RIAE compresses images, R2ID diffuses in its latents."""

import os

# MLflow, Prefect and their dependencies report usage to their makers unless told not to. A user who
# has set any of these variables keeps that choice.
for _name, _value in {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}.items():
    os.environ.setdefault(_name, _value)

__version__ = "0.1.0"
