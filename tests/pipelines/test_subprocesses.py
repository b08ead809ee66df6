"""Stages as processes: what they print, how they fail and stop; none outlives a killed pipeline."""

import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from pipelines import subprocesses
from pipelines.gpu_count import gpu_count
from pipelines.subprocesses import run_command, run_stage
from r2id.errors import InputError, Stopped
from tests.forked import FORKED
from tests.training import children
from tests.waiting import wait_until

SAVES_ON_SIGNAL = """
import os, signal, sys, time
def save(number, frame):
    os.write(2, b"stopped: saved at step 7\\n")  # print may be what the signal has interrupted
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
print("ready", file=sys.stderr, flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_output_and_messages_are_kept_apart(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import os, sys; print(os.environ['COLOUR']); "
        "print('half way', file=sys.stderr); sys.exit(3)"
    )
    assert run_command([sys.executable, "-c", code], {"COLOUR": "blue"}) == (
        3,
        "blue\n",
        "half way\n",
    )
    out, err = capsys.readouterr()
    assert (out, err) == ("", "half way\n")


def test_much_output_on_both_streams_blocks_nothing() -> None:
    code = "import sys; print('x' * 500_000); print('y' * 500_000, file=sys.stderr)"
    returned, output, tail = run_command([sys.executable, "-c", code])
    assert (returned, len(output), len(tail)) == (0, 500_001, 4096)


def test_letters_of_several_bytes_are_passed_on_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """Chunks of a stream end anywhere."""
    code = "import sys; sys.stderr.write('x' + '━' * 100_000)"
    tail = run_command([sys.executable, "-c", code])[2]
    assert (tail, capsys.readouterr().err) == ("━" * 4096, "x" + "━" * 100_000)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_users_mistake_is_an_input_error_naming_the_stage(processes: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^train: .*nowhere\.toml"):
        run_stage(["train", str(tmp_path / "nowhere.toml")], processes=processes)


@pytest.mark.parametrize(
    ("line", "message"), [("stopped: saved at step 7", "saved at step 7"), ("400/400", "train")]
)
def test_a_stage_that_was_stopped_says_why_or_is_named(line: str, message: str) -> None:
    code = f"import sys; print({line!r}, file=sys.stderr); sys.exit(75)"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match=f"^{message}$"):
        patch.setattr(subprocesses, "stage_command", lambda *_: [sys.executable, "-c", code])
        run_stage(["train"])


def run_and_tell(stage: str, number: int, said: Path, answers: Connection) -> None:
    """Run a stage, whose stderr goes on to the file ``said``, and send its exit code and its tail.

    And whether the handler of the signal ``number`` is afterwards the one of before.
    """
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    before = signal.getsignal(number)
    code, _, tail = run_command([sys.executable, "-c", stage])
    answers.send((code, tail, signal.getsignal(number) == before))


def signalled(stage: str, number: int, folder: Path) -> tuple[int, str, bool]:
    """What run_and_tell sends from a process that gets a signal once its stage is ready for it."""
    said, (ours, theirs) = folder / "said", FORKED.Pipe()
    with children.ended(children.start(run_and_tell, stage, number, said, theirs)) as process:
        wait_until(lambda: said.exists() and "ready" in said.read_text(), alive=process)
        os.kill(process.pid, number)
        process.join(60)
    assert process.exitcode == 0, said.read_text()
    return ours.recv()


def test_a_signal_to_a_stage_that_is_about_to_be_done_stops_what_would_come_next(
    tmp_path: Path,
) -> None:
    stage = SAVES_ON_SIGNAL.replace("sys.exit(75)", "sys.exit(0)")
    assert stage != SAVES_ON_SIGNAL
    code, tail, _ = signalled(stage, signal.SIGTERM, tmp_path)
    assert code == 75 and "stopped: saved at step 7" in tail


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_stage_which_saves(number: int, tmp_path: Path) -> None:
    code, tail, restored = signalled(SAVES_ON_SIGNAL, number, tmp_path)
    assert code == 75 and "stopped: saved at step 7" in tail and restored


def test_a_stage_ends_when_its_pipeline_is_killed(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    stage = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import sys; from pipelines.subprocesses import run_command; "
        f"run_command([sys.executable, '-c', {stage!r}])"
    )
    pipeline = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: note.exists() and note.read_text(), alive=pipeline)
    pid = int(note.read_text())
    assert alive(pid)
    pipeline.kill()
    pipeline.wait()
    wait_until(lambda: not alive(pid))


def test_gpus_are_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, count in {"": 0, "-1": 0, "0": 1, "0,3": 2}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpu_count() == count


LISTED = """\
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-a)
  MIG 3g.40gb     Device  0: (UUID: MIG-b)
  MIG 3g.40gb     Device  1: (UUID: MIG-c)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-d)
"""


def test_the_instances_of_a_gpu_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTED}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_count() == 2
