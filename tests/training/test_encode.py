"""A latent cache written by several processes is the one written by one."""

import os
import subprocess
import sys

from data_prep.prepare import prepare
from r2id.config import PrepareConfig
from r2id.training.encode import encode


def test_two_processes_write_the_same_cache(riae_run, tmp_path):
    prepare(PrepareConfig(dataset="digits", out=tmp_path / "digits", shard_mb=0.5))
    encode(riae_run, tmp_path / "digits", tmp_path / "one")
    for _ in range(2):  # the second finds all in place
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "r2id.cli",
            "encode",
            "--riae",
            str(riae_run),
            "--shards",
            str(tmp_path / "digits"),
            "--out",
            str(tmp_path / "two"),
            "--json",
        ]
        done = subprocess.run(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            text=True,
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count('"images": 1797') == 1, "the first process alone reports"
    assert '"reused": 1797' in done.stdout
    files = [
        {
            path.relative_to(tmp_path / name).as_posix(): path.read_bytes()
            for path in (tmp_path / name).rglob("*.*")
        }
        for name in ("one", "two")
    ]
    assert len(files[0]) > 8 and files[0] == files[1]
