#!/usr/bin/env bash
# Show what MLflow recorded in this folder, or in MLFLOW_TRACKING_URI, on http://127.0.0.1:5000:
#   mlflow.sh [--dry-run] [options of `mlflow server`]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
run mlflow server --backend-store-uri "${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}" "$@"
