#!/usr/bin/env bash
# Run an r2id command on many hosts. All hosts must see the same folders under the same names.
#
# With torchrun, start this on every host:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 multinode.sh [--dry-run] train CONFIG [key=value …]
# NODE_RANK counts the hosts from 0, MASTER_ADDR is the address of the first. Optional: MASTER_PORT
# (29500) and NPROC, the processes of this host (one per GPU).
#
# With DeepSpeed's launcher, start this on one host; it reaches the others over ssh with pdsh:
#   multinode.sh [--dry-run] --hostfile FILE train CONFIG [key=value …]
# FILE has one line per host: "HOST slots=NUMBER_OF_GPUS". Optional: MASTER_PORT (29500).
#
# With torchrun, exit codes are those of the command, and SIGTERM saves. With DeepSpeed's launcher
# both are DeepSpeed's: launch/README.md says how they differ. Under Slurm, use slurm.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

hostfile=""
if [ "${1:-}" = --hostfile ]; then
    [ $# -ge 2 ] || wrong "--hostfile: names a file with a line \"HOST slots=GPUS\" for each host"
    hostfile="$2"
    shift 2
fi
[ $# -ge 1 ] || wrong "which r2id command? multinode.sh [--hostfile FILE] train CONFIG"
choose_processes
if [ -n "$hostfile" ]; then
    [ -r "$hostfile" ] || wrong "--hostfile $hostfile: no such file"
    run_last python -m deepspeed.launcher.runner --hostfile "$hostfile" \
        --master_port "${MASTER_PORT:-29500}" --no_local_rank --module r2id.cli "$@"
fi
for name in NNODES NODE_RANK MASTER_ADDR; do
    [ -n "${!name:-}" ] ||
        wrong "$name is not set: NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 multinode.sh train …"
done
run_last python -m r2id.torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" \
    --nproc-per-node "$processes" -m r2id.cli "$@"
