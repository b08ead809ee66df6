#!/usr/bin/env bash
# Serve the MLflow runs of this folder, or of MLFLOW_TRACKING_URI, at http://127.0.0.1:5000:
#   mlflow.sh [--dry-run] [options of `mlflow server`]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
run mlflow server --backend-store-uri "${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}" "$@"
