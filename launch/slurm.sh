#!/usr/bin/env bash
#SBATCH --job-name=r2id
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# Run r2id under Slurm. Submit from the root of the checkout, which all nodes must see. A job has
# one task per node, which starts one process per GPU. Two minutes before its time limit, or when it
# is preempted, the job saves, ends with exit code 75 and is requeued.
#   sbatch --nodes 8 --gpus-per-node 8 --cpus-per-task 64 launch/slurm.sh \
#       train CONFIG [section.key=value …]
#   sbatch --nodes 1 --gpus-per-node 8 --cpus-per-task 64 launch/slurm.sh \
#       encode --riae RUN --shards DIR --out DIR
#
# To train both models, submit three jobs, each of which starts when the one before has succeeded:
# RIAE, its latents (if R2ID's config has data.latents) and R2ID. An RIAE that is finetuned has one
# more, after another --. OPTIONS are sbatch's, for all:
#   OPTIONS="--nodes 8 --gpus-per-node 8" \
#       launch/slurm.sh [--dry-run] stages RIAE.toml [key=value …] -- R2ID.toml [key=value …]
set -euo pipefail

# Slurm runs a copy of this script from another folder, so the checkout is where it was submitted.
here="${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
if [ ! -e "$here/launch/setup.sh" ]; then
    echo "error: $here: not the root of the checkout; submit from there" >&2
    exit 2
fi
cd "$here"
source launch/setup.sh

submit() {
    echo "+ sbatch --parsable ${OPTIONS:-} $*" >&2
    if [ -n "$dry_run" ]; then
        echo JOB
        return
    fi
    # shellcheck disable=SC2086  # OPTIONS are several words
    sbatch --parsable ${OPTIONS:-} "$@" | cut -d ';' -f 1
}

# Print the encode command of an R2ID run, one argument a line; nothing if it has no latent cache.
encode_arguments() {
    python - "$@" <<'PYTHON'
import sys
from pathlib import Path
from r2id.config import R2idRun, load_config
from r2id.errors import InputError

try:
    config = load_config(Path(sys.argv[1]), sys.argv[2:])
except InputError as error:
    sys.exit(f"error: {error}")
if not isinstance(config, R2idRun):
    sys.exit(f"error: {sys.argv[1]}: stage {config.stage!r}, must be 'r2id'")
if config.data.latents is not None:
    data = config.data
    words = ["encode", "--riae", config.codec, "--shards", data.shards, "--out", data.latents]
    print(*words, sep="\n")
PYTHON
}

submit_stages() {
    local words=("$@") stage=() last=0 job="" index word encode arguments
    for index in "${!words[@]}"; do
        [ "${words[index]}" != -- ] || last=$index
    done
    local r2id=("${words[@]:last + 1}")
    [ "$last" -ge 1 ] && [ ${#r2id[@]} -ge 1 ] && [[ " $* " != *" -- -- "* ]] ||
        wrong "stages: slurm.sh stages RIAE.toml [key=value …] -- R2ID.toml [key=value …]"
    arguments="$(encode_arguments "${r2id[@]}")" || exit 2
    for word in "${words[@]:0:last}" --; do
        if [ "$word" != -- ]; then
            stage+=("$word")
            continue
        fi
        job="$(submit ${job:+--dependency "afterok:$job"} launch/slurm.sh train "${stage[@]}")"
        stage=()
    done
    if [ -n "$arguments" ]; then
        mapfile -t encode <<< "$arguments"
        job="$(submit --dependency "afterok:$job" launch/slurm.sh "${encode[@]}")"
    fi
    submit --dependency "afterok:$job" launch/slurm.sh train "${r2id[@]}"
}

[ $# -ge 1 ] || wrong "which r2id command? sbatch launch/slurm.sh train CONFIG"
if [ "$1" = stages ]; then
    submit_stages "${@:2}"
    exit
fi
[ -n "${SLURM_JOB_ID:-}" ] || [ -n "$dry_run" ] ||
    wrong "no Slurm job here: sbatch launch/slurm.sh $*"

# Jobs may share a node, so each has a port of its own, derived from its number.
export NNODES="${SLURM_JOB_NUM_NODES:-1}" MASTER_PORT="$((20000 + ${SLURM_JOB_ID:-0} % 10000))"
nodes=FIRST_NODE
[ -n "$dry_run" ] || nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
export MASTER_ADDR="${nodes%%$'\n'*}"
# --kill-on-bad-exit=0: when a task ends with 75, the others may still be saving.
# --wait: a task that still runs two minutes after the first has ended is stuck, and is killed.
# shellcheck disable=SC2016  # $SLURM_NODEID is the task's, not this shell's
command=(srun --ntasks-per-node 1 --cpus-per-task "${SLURM_CPUS_ON_NODE:-1}"
         --kill-on-bad-exit=0 --wait=120 bash -c
         'NODE_RANK="$SLURM_NODEID" exec bash launch/multinode.sh "$@"' node "$@")
echo "+ NNODES=$NNODES MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT ${command[*]}" >&2
[ -z "$dry_run" ] || exit 0

# At SIGTERM srun would kill its tasks. scancel sends the signal to the tasks only, which then save.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM
"${command[@]}" &
step=$!
while kill -0 "$step" 2>/dev/null; do
    wait "$step" || true  # a signal ends it early
done
code=0
wait "$step" || code=$?
# A job that the user cancelled is no longer RUNNING and must not be requeued.
if [ "$code" -eq 75 ] &&
    [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
    run scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
