"""Real jobs of two processes: they end as their ranks mean it, and a signal saves them."""

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from r2id.checkpoints import Checkpoint, reading
from tests.launch.conftest import BASE, Job, bash, executable, training
from tests.training import children
from tests.waiting import wait_until

RANK = """
import os, signal, sys, time
from pathlib import Path
folder, kind, code = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rank = int(os.environ["RANK"])
if kind == "hung up":
    os.kill(os.getppid(), signal.SIGHUP)
    time.sleep(0.5)
    sys.exit(code)
if kind == "asked":  # ends a while after SIGTERM, as a rank that saves
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    (folder / f"ready-{rank}").touch()
    while not asked:
        time.sleep(0.05)
    time.sleep(0.5 + rank)
    (folder / f"saved-{rank}").touch()
    sys.exit(code)
(folder / f"ready-{rank}").touch()
if rank == 1:  # the first to fail; the other one would stay
    os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
time.sleep(60 if code else 0)
"""


def start(folder: Path, kind: str, code: int, launch: Any = children.torchrun) -> Any:
    """Start two such ranks; what the job says goes to FOLDER/said."""
    (folder / "rank.py").write_text(RANK)
    options = ("--standalone", "--nproc-per-node", "2")
    program = (folder / "rank.py", folder, kind, code)
    return children.start(launch, folder / "said", *options, *program)


@pytest.mark.parametrize(
    ("code", "meant"), [(0, 0), (1, 1), (2, 2), (75, 75), (99, 1), (-signal.SIGKILL, 1)]
)
def test_the_exit_code_is_the_first_failed_ranks(code: int, meant: int, tmp_path: Path) -> None:
    with children.ended(start(tmp_path, "fails", code)) as job:
        job.join(60)
    said = (tmp_path / "said").read_text()
    assert job.exitcode == meant, said
    assert ("rank 1" in said and f"exit code {code}" in said) == (code != 0)


def test_a_signal_lets_every_rank_finish_saving(tmp_path: Path) -> None:
    with children.ended(start(tmp_path, "asked", 75)) as job:
        wait_until(
            lambda: len(list(tmp_path.glob("ready-*"))) == 2,
            alive=job,
            said=(tmp_path / "said").read_text,
        )
        os.kill(job.pid, signal.SIGTERM)
        job.join(60)
    assert job.exitcode == 75, (tmp_path / "said").read_text()
    assert len(list(tmp_path.glob("saved-*"))) == 2


def torchrun_under_nohup(*arguments: Any) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    children.torchrun(*arguments)


def test_under_nohup_a_closed_terminal_stops_nothing(tmp_path: Path) -> None:
    with children.ended(start(tmp_path, "hung up", 0, torchrun_under_nohup)) as job:
        job.join(60)
    assert job.exitcode == 0, (tmp_path / "said").read_text()


@pytest.mark.slow
def test_two_processes_stop_at_a_signal_and_go_on(
    checkout: Path, digits: Path, tmp_path: Path
) -> None:
    """First the whole job is sent SIGTERM, then rank 1 alone."""
    arguments = training(
        tmp_path / "run", digits, "train.steps=100000", "train.save_every=5", "train.keep=9999"
    )
    job = Job(["bash", "launch/train.sh", *arguments], checkout, NPROC="2")
    job.wait_for(tmp_path / "run" / "checkpoints" / "latest")
    assert job.end(signal.SIGTERM) == 75, job.log.read_text()[-4000:]
    saved = Checkpoint.open(tmp_path / "run").step
    assert f"step {saved} of 100000 saved" in job.log.read_text()
    assert job.log.read_text().count("waiting for 2 processes") == 1
    job = Job(["bash", "launch/train.sh", *arguments], checkout, NPROC="2")
    job.wait_for(tmp_path / "run" / "checkpoints" / f"step-{(saved // 5 + 2) * 5:08d}")
    rank_of(job, 1).send_signal(signal.SIGTERM)
    assert job.end() == 75, job.log.read_text()[-4000:]
    again = Checkpoint.open(tmp_path / "run").step
    assert again > saved and not reading.find_damages(tmp_path / "run")
    said = job.log.read_text()
    assert f"going on from step {saved}" in said and f"step {again} of 100000 saved" in said


def rank_of(job: Job, rank: int) -> psutil.Process:
    """One of a job's training processes."""
    return next(
        process
        for process in psutil.Process(job.process.pid).children(recursive=True)
        if process.environ().get("RANK") == str(rank)
    )


@pytest.mark.slow
def test_two_processes_of_wrong_input_end_with_2(checkout: Path) -> None:
    done = bash(
        "bash launch/train.sh nowhere.toml", checkout, **BASE, PYTHONPATH=str(checkout), NPROC="2"
    )
    assert done.returncode == 2, done.stderr
    assert "nowhere.toml" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_deepspeeds_launcher_on_one_host(checkout: Path, digits: Path, tmp_path: Path) -> None:
    """It first asks every host of the file over ssh whether it is there; here ssh runs what it is
    given.
    """
    executable(
        checkout / ".venv" / "bin" / "ssh",
        '#!/bin/sh\nwhile [ "$1" != localhost ]; do shift; done\nshift\nexec "$@"\n',
    )
    (checkout / "hosts").write_text("localhost slots=2\n")
    command = ["bash", "launch/multinode.sh", "--hostfile", "hosts", "train"]
    job = Job([*command, *training(tmp_path / "run", digits, "train.steps=3")], checkout)
    assert job.end() == 0, job.log.read_text()[-4000:]
    assert Checkpoint.open(tmp_path / "run").step == 3
    assert Job([*command, "nowhere.toml"], checkout).end() == 2
