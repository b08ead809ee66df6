#!/usr/bin/env bash
# Check style and types, and run the tests: test.sh [--all] [options of pytest]
# Tests that are marked slow run only with --all. There is one test process per processor; -n 0 runs
# all tests in one. R2ID_DATA names a folder of real datasets; tests that need it are skipped
# without it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

tests=(-m "not slow")
if [ "${1:-}" = --all ]; then
    tests=(-m "")
    shift
fi
run python -m ruff check .
run python -m ruff format --check --quiet .
run python -m mypy
run python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder "${tests[@]}" "$@"
