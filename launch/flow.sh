#!/usr/bin/env bash
# Run a whole pipeline: flow.sh [--dry-run] CONFIG [section.key=value …]
set -euo pipefail
[ $# -gt 0 ] || { echo "error: which CONFIG? flow.sh CONFIG" >&2; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
run_last python -m r2id.cli run "$@"
