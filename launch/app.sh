#!/usr/bin/env bash
# Show a trained R2ID's page in the browser, at http://127.0.0.1:7860: app.sh [--dry-run] RUN [options of `r2id app`]
set -euo pipefail
[ $# -gt 0 ] || { echo "error: which RUN? app.sh RUN" >&2; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if ! "$python" -c "import gradio" 2>/dev/null; then
    run "$python" -m pip install -qq --editable "${root}[app]"
fi
run_last python -m r2id.cli app "$@"
