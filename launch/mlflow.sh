#!/usr/bin/env bash
# MLflow's pages on what was recorded in this folder, or in MLFLOW_TRACKING_URI: mlflow.sh [options of `mlflow server`]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
run mlflow server --backend-store-uri "${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}" "$@"
