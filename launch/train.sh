#!/usr/bin/env bash
# Train one stage on the GPUs of this machine, with one process per GPU:
#   train.sh [--dry-run] CONFIG [section.key=value …]
# Only as many GPUs are used as share train.batch evenly. NPROC sets another number of processes.
# Exit codes are those of r2id train: 0 done, 1 failed, 2 wrong input, 75 stopped with everything
# saved.
set -euo pipefail
[ $# -gt 0 ] || { echo "error: which CONFIG? train.sh CONFIG" >&2; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

choose_processes "$@"
if [ "$processes" -eq 1 ]; then
    run_last python -m r2id.cli train "$@"
fi
run_last python -m r2id.torchrun --standalone --nproc-per-node "$processes" -m r2id.cli train "$@"
