#!/usr/bin/env bash
# Install the project and its dependencies into .venv, if that is not done yet: setup.sh [--dry-run]
# A .venv that is there is used, and what it has and fits stays.
# The other scripts source this one. PYTHON names the interpreter (3.11 or later) to start from.
# With --dry-run as its first argument, a script prints what it would run and runs nothing.
set -euo pipefail

dry_run=""
if [ "${1:-}" = --dry-run ]; then
    dry_run=yes
    shift
fi

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"

# MLflow and Prefect send usage statistics unless told not to. A value that is already set is kept.
export DO_NOT_TRACK="${DO_NOT_TRACK:-true}"
export MLFLOW_DISABLE_TELEMETRY="${MLFLOW_DISABLE_TELEMETRY:-true}"
export PREFECT_SERVER_ANALYTICS_ENABLED="${PREFECT_SERVER_ANALYTICS_ENABLED:-false}"

run() {
    echo "+ $*" >&2
    [ -n "$dry_run" ] || "$@"
}

# Run the last command of a script in place of the script, so that signals reach the command itself.
run_last() {
    echo "+ $*" >&2
    [ -z "$dry_run" ] || exit 0
    exec "$@"
}

wrong() {
    echo "error: $*" >&2
    exit 2
}

# Set `processes`: NPROC, else one per GPU, else one. With the arguments of a training, only as many
# GPUs count as share its batch evenly. Several processes divide the cores among them: by default,
# PyTorch would start a thread per core in each.
choose_processes() {
    local gpus cores
    gpus="$("$python" "$root/pipelines/gpu_count.py")"
    processes="${NPROC:-$((gpus > 1 ? gpus : 1))}"
    if [ $# -gt 0 ] && [ "$processes" -gt 1 ] && [ -z "${NPROC:-}" ] && is_installed; then
        processes="$("$python" -m pipelines.processes "$@")"
    fi
    [ "$gpus" -gt 0 ] || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
    if [ "$processes" -gt 1 ]; then
        cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"
    fi
}

find_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    wrong "setup: no Python 3.11 or later among: ${candidates[*]}; set PYTHON to one"
}

has_nvidia() {
    [ -e /dev/nvidiactl ] || [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null
}

install_project() {
    local interpreter
    if ! "$python" -c "" 2>/dev/null; then
        interpreter="$(find_python)"
        run "$interpreter" -m venv --clear "$root/.venv"
    elif ! "$python" -m pip --version >/dev/null 2>&1; then  # as in one that uv has made
        run "$python" -m ensurepip
    fi
    # Without a GPU, prefer a torch that the machine offers through pip's find-links (usually a CPU
    # build) to the much larger one of the package index. Its dependencies come with the project's.
    if ! has_nvidia &&
        "$python" -m pip install --quiet --dry-run --no-deps --no-index torch >/dev/null 2>&1; then
        run "$python" -m pip install -qq --no-deps --no-index torch
    fi
    run "$python" -m pip install -qq --editable "${root}[dev]"
}

# The stamp tells whether the installation is complete and up to date. It depends on the folder's
# path too, because an editable install that was moved would still import from its old place. The
# scripts start every program by python -m: those in a moved .venv/bin start the interpreter there.
wanted="$(cat "$root/pyproject.toml" <(echo "$root") | cksum)"
stamp="$root/.venv/complete"
is_installed() {
    [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]
}

# Scripts that start at once, on one host or on several that share the folder, install in turn: the
# first does it, and the others find it done. Making a folder is atomic on shared file systems too.
lock="$root/.venv.lock"
lock_installation() {
    local waited=0
    until mkdir "$lock" 2>/dev/null; do
        [ -w "$root" ] || wrong "setup: $root cannot be written"
        if [ $((waited++ % 60)) -eq 0 ]; then
            echo "setup: waiting for $(cat "$lock/owner" 2>/dev/null || echo another), which installs" \
                "into $root/.venv; if it does not run any more: rm -r $lock" >&2
        fi
        sleep 1
    done
    trap 'rm -rf "$lock"' EXIT
    echo "process $$ on $(uname -n)" > "$lock/owner"
}

if ! is_installed && [ -n "$dry_run" ]; then
    install_project
    [ -x "$python" ] || python="$(find_python)"
elif ! is_installed; then
    (
        lock_installation  # until this subshell ends
        is_installed && exit
        echo "setup: installing into $root/.venv; this takes some minutes, once" >&2
        install_project
        echo "$wanted" > "$stamp"
    )
fi
export PATH="$root/.venv/bin:$PATH"
