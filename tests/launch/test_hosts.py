"""Two hosts for real: two network namespaces that a pair of virtual cables joins, each with one
process of the job.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from r2id.checkpoints import Checkpoint
from tests.launch.conftest import BASE, bash, training

# The first host is a new namespace, the second one is inside it: both vanish with the shell that
# made them.
NETWORK = """
set -euo pipefail
unshare --net sleep 600 & second=$!
trap 'kill $second' EXIT
until [ "$(readlink /proc/$second/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
ip link add r2id0 type veth peer name r2id1 netns $second
on_second() { nsenter --net=/proc/$second/ns/net "$@"; }
ip address add 10.77.0.1/24 dev r2id0
on_second ip address add 10.77.0.2/24 dev r2id1
for place in "" on_second; do $place ip link set lo up; done
ip link set r2id0 up
on_second ip link set r2id1 up
"""
HOST = (
    "env NODE_RANK={rank} GLOO_SOCKET_IFNAME=r2id{rank} "
    "bash launch/multinode.sh train {arguments} > {log} 2>&1"
)


def in_new_network(
    script: str, folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", "bash", "-c", NETWORK + script],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture
def network(tmp_path: Path) -> None:
    """Skips, with the reason, where the system does not let two hosts be made."""
    for program in ("unshare", "nsenter", "ip"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here (util-linux, iproute2)")
    made = in_new_network("ip link show r2id0", tmp_path)
    if made.returncode:
        pytest.skip(
            f"network namespaces cannot be made here: {made.stderr.strip().splitlines()[-1]}"
        )


@pytest.mark.slow
@pytest.mark.usefixtures("network")
def test_two_hosts_train_as_one(checkout: Path, digits: Path, tmp_path: Path) -> None:
    environment = {
        **BASE,
        "PYTHONPATH": str(checkout),
        "NNODES": "2",
        "MASTER_ADDR": "10.77.0.1",
        "NPROC": "1",
    }
    arguments = training(
        tmp_path / "run", digits, "train.steps=4", "train.save_every=4", "engine.zero_stage=2"
    )
    hosts = [
        HOST.format(rank=rank, arguments=" ".join(arguments), log=tmp_path / f"host-{rank}.log")
        for rank in (0, 1)
    ]
    done = in_new_network(
        f"on_second {hosts[1]} & other=$!\n{hosts[0]}\nwait $other\n"
        "ip -statistics -json link show r2id0\n",
        checkout,
        **environment,
    )
    said = "\n".join(log.read_text()[-3000:] for log in sorted(tmp_path.glob("host-*.log")))
    assert done.returncode == 0, done.stderr + said
    weights = sum(
        value.nbytes for value in Checkpoint.open(tmp_path / "run").tensors("model").values()
    )
    cable = json.loads(done.stdout)[0]["stats64"]
    assert min(cable["rx"]["bytes"], cable["tx"]["bytes"]) > 4 * weights / 2, (
        "half the gradients of each step, at least"
    )

    alone = training(
        tmp_path / "alone", digits, "train.steps=4", "train.save_every=4", "engine.zero_stage=2"
    )
    one = bash(
        f"bash launch/train.sh {' '.join(alone)}",
        checkout,
        **{**BASE, "PYTHONPATH": str(checkout), "NPROC": "2"},
    )
    assert one.returncode == 0, one.stderr
    for kind in ("model", "ema", "optimizer"):
        here, there = (Checkpoint.open(tmp_path / run).tensors(kind) for run in ("alone", "run"))
        assert here.keys() == there.keys()
        assert all(there[name].equal(value) for name, value in here.items()), kind
