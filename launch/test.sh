#!/usr/bin/env bash
# Style, types and tests: test.sh [options of pytest]
# R2ID_DATA names a folder of real datasets; tests that need one are skipped without it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
run ruff check .
run mypy
run pytest "$@"
