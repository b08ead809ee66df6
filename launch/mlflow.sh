#!/usr/bin/env bash
# Serve the MLflow runs of this folder, or of MLFLOW_TRACKING_URI, at http://127.0.0.1:5000, and say
# where the newest one is. If MLFLOW_TRACKING_URI is a server's address, only say that:
#   mlflow.sh [--dry-run] [options of `mlflow server`]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# Jobs are MLflow's work on traces of language models. Without them the server starts sooner.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION="${MLFLOW_SERVER_ENABLE_JOB_EXECUTION:-false}"
run python -m r2id.training.tracking.newest "$@"
case "${MLFLOW_TRACKING_URI:-}" in
    http://* | https://*) exit 0 ;;
esac
run_last python -m mlflow server --backend-store-uri "${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}" \
    --workers 1 --uvicorn-opts "--log-level warning" "$@"
