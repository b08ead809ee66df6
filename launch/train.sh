#!/usr/bin/env bash
# One training stage, in one process or in one per GPU: train.sh CONFIG [section.key=value …]
# NPROC forces the number of processes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

gpus="$(python -m pipelines.processes)"
processes="${NPROC:-$((gpus > 1 ? gpus : 1))}"
if [ "$processes" -eq 1 ]; then
    run python -m r2id.cli train "$@"
    exit
fi
if [ "$gpus" -eq 0 ]; then
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
    cores="$(nproc)"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"
fi
run torchrun --standalone --nproc-per-node "$processes" -m r2id.cli train "$@"
