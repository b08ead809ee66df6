#!/usr/bin/env bash
# Makes .venv with the project and everything it needs, once; when nothing has changed since, it returns at once.
# The other scripts source it; on its own it only sets up. PYTHON names the interpreter (3.11 or later) to build from.
# A script that is given --dry-run first prints what it would run, and runs nothing.
set -euo pipefail

dry_run=""
if [ "${1:-}" = --dry-run ]; then
    dry_run=yes
    shift
fi

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"

# MLflow and Prefect phone home unless they are told not to; whoever wants that sets these beforehand.
export DO_NOT_TRACK="${DO_NOT_TRACK:-true}"
export MLFLOW_DISABLE_TELEMETRY="${MLFLOW_DISABLE_TELEMETRY:-true}"
export PREFECT_SERVER_ANALYTICS_ENABLED="${PREFECT_SERVER_ANALYTICS_ENABLED:-false}"

run() {
    echo "+ $*" >&2
    [ -n "$dry_run" ] || "$@"
}

# The last command of a script: it takes the script's place, so that a signal to the script is one to the command.
run_last() {
    echo "+ $*" >&2
    [ -z "$dry_run" ] || exit 0
    exec "$@"
}

wrong() {
    echo "error: $*" >&2
    exit 2
}

# How many processes this machine gets, NPROC or one per GPU or one, and the cores of each where there are many.
choose_processes() {
    local gpus cores
    gpus="$("$python" "$root/pipelines/gpu_count.py")"
    processes="${NPROC:-$((gpus > 1 ? gpus : 1))}"
    [ "$gpus" -gt 0 ] || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
    if [ "$processes" -gt 1 ]; then
        cores="$(nproc)"
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"
    fi
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: no Python 3.11 or later among: ${PYTHON:-python3 python3.13 python3.12 python3.11};" \
        "set PYTHON to one" >&2
    exit 2
}

has_nvidia() {
    [ -e /dev/nvidiactl ] || [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null
}

install_project() {
    local interpreter
    interpreter="$(find_python)"
    run "$interpreter" -m venv --clear "$root/.venv"
    # A machine without a GPU may have been given a torch of its own (pip's find-links), usually a CPU build. It is
    # taken before any larger one from an index; what it needs comes with the project's dependencies.
    if ! has_nvidia && "$python" -m pip install --quiet --dry-run --no-deps --no-index torch >/dev/null 2>&1; then
        run "$python" -m pip install -qq --no-deps --no-index torch
    fi
    run "$python" -m pip install -qq --editable "${root}[dev]"
}

# The stamp also names the folder: an editable install that was moved would still import from its old place.
wanted="$(cat "$root/pyproject.toml" <(echo "$root") | cksum)"
stamp="$root/.venv/complete"
if [ ! -x "$python" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    [ -n "$dry_run" ] || echo "setup: installing into $root/.venv; this takes some minutes, once" >&2
    install_project
    if [ -n "$dry_run" ]; then
        python="$(find_python)"
    else
        echo "$wanted" > "$stamp"
    fi
fi
export PATH="$root/.venv/bin:$PATH"
