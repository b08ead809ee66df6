#!/usr/bin/env bash
# From nothing to samples and a report on scikit-learn's digits: demo.sh [section.key=value …]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
run python -m r2id.cli run configs/digits/pipeline.toml "$@"
