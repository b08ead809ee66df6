"""A signal before the first step of `r2id train`, at moments that a process chooses itself."""

import shutil
import signal
import subprocess
import sys

import pytest

from r2id.checkpoints import Checkpoint
from r2id.stop_signals import STOP_SIGNALS, left_at_a_signal, set_handler, stop_signals
from tests.conftest import CONFIGS, TINY_RIAE

STOPPED = "stopped: before the first step; run the same command again"

# Runs the command, and sends itself a signal as soon as it imports a module or opens a file.
SIGNALLED = """
import os, runpy, signal, sys
number, event, wanted, ignored = int(sys.argv[1]), *sys.argv[2:5]
sent = []
def send(happened, arguments):
    if happened == event and str(arguments[0]).endswith(wanted) and not sent:
        sent.append(1)
        os.kill(os.getpid(), number)
if ignored:
    signal.signal(number, signal.SIG_IGN)
sys.argv[1:] = sys.argv[5:]
sys.addaudithook(send)
try:
    runpy.run_module("r2id.cli", run_name="__main__")
finally:
    assert event == "end" or sent, f"no {event} of {wanted}"
    if event == "end":
        os.kill(os.getpid(), number)
"""


def train(
    number: signal.Signals, event: str, wanted: str, *settings: str, ignored: bool = False
) -> tuple[int, str]:
    """The exit code of a training that gets a signal at that event, and what it said."""
    program = [sys.executable, "-c", SIGNALLED, str(int(number)), event, wanted, "1" * ignored]
    command = ["train", str(CONFIGS / "digits" / "riae.toml"), *TINY_RIAE, *settings]
    done = subprocess.run(
        [*program, *command], stderr=subprocess.PIPE, text=True, check=False, timeout=120
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("number", "event", "wanted"),
    [
        (signal.SIGTERM, "import", "numpy.linalg"),
        (signal.SIGINT, "import", "torch.nn.functional"),
        (signal.SIGINT, "open", "manifest.json"),
        (signal.SIGHUP, "open", "shard-000000.tar"),  # for the principal components to start from
    ],
)
def test_a_signal_before_the_first_step_ends_with_75(number, event, wanted, digits, tmp_path):
    settings = (f"run={tmp_path / 'run'}", f"data.shards={digits}", "train.steps=1")
    code, said = train(number, event, wanted, *settings)
    assert code == 75 and said.splitlines()[-1] == STOPPED, said
    assert "Traceback" not in said and "Error" not in said
    assert not any((tmp_path / "run").rglob("*")), "nothing has been begun"


def test_a_signal_while_a_checkpoint_loads_leaves_it_to_go_on_from(digits, riae_run, tmp_path):
    run = shutil.copytree(riae_run, tmp_path / "run")
    settings = (f"run={run}", f"data.shards={digits}", "train.steps=61")
    code, said = train(signal.SIGTERM, "open", "checkpoint.json", *settings)
    assert code == 75 and said.splitlines()[-1] == STOPPED, said
    assert Checkpoint.open(run).identity == Checkpoint.open(riae_run).identity


def test_an_ignored_signal_stays_ignored(digits, tmp_path):
    """As SIGHUP under nohup, and SIGINT in the background of a script."""
    settings = (f"run={tmp_path / 'run'}", f"data.shards={digits}", "train.steps=1")
    code, said = train(signal.SIGINT, "open", "manifest.json", *settings, ignored=True)
    assert code == 0 and "stop" not in said, said


def test_a_signal_after_the_last_step_says_nothing_of_the_first(digits, tmp_path):
    settings = (f"run={tmp_path / 'run'}", f"data.shards={digits}", "train.steps=1")
    code, said = train(signal.SIGTERM, "end", "", *settings)
    assert code == -signal.SIGTERM and "stop" not in said, said
    assert Checkpoint.open(tmp_path / "run").step == 1


def handlers():
    return {number: signal.getsignal(number) for number in STOP_SIGNALS}


def test_the_handlers_from_before_come_back_when_training_ends(monkeypatch):
    """Not those of its start."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = handlers()
    with left_at_a_signal():
        assert all(handlers()[number] != before[number] for number in stop_signals())
        taken = set_handler(lambda *_: None)
        assert taken == {number: before[number] for number in stop_signals()}
    assert all(handlers()[number] != before[number] for number in stop_signals()), "not its own"
    for number, handler in taken.items():
        signal.signal(number, handler)
    with left_at_a_signal():
        pass
    assert handlers() == before


def test_one_of_several_processes_keeps_its_handlers(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = handlers()
    with left_at_a_signal():
        assert handlers() == before
