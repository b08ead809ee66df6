#!/usr/bin/env bash
# A whole pipeline: flow.sh CONFIG [section.key=value …]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
run python -m r2id.cli run "$@"
