#!/usr/bin/env bash
# Train both models on scikit-learn's digits, from the images to samples and a report:
#   demo.sh [--dry-run] [section.key=value …]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
run_last python -m r2id.cli run configs/digits/pipeline.toml "$@"
