"""The launch scripts: sound shell, one owner of every setting, a set-up that is done once, and
what they would run.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.launch.conftest import BASE, ROOT, bash, executable
from tests.waiting import wait_until

SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_is_sound_shell_that_stops_at_the_first_error(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text()
    assert os.access(script, os.X_OK)


def test_shellcheck_has_nothing_to_say() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_a_second_set_up_does_nothing(checkout: Path) -> None:
    done = bash("source launch/setup.sh && command -v python", checkout)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.strip() == str(checkout / ".venv" / "bin" / "python")


def test_changed_requirements_are_installed_into_the_venv_that_is_there(checkout: Path) -> None:
    """Here its interpreter is a program that notes what it is asked to run."""
    executable(
        checkout / ".venv" / "bin" / "python", '#!/bin/sh\necho "$*" >> "$(dirname "$0")/called"\n'
    )
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    done = bash("bash launch/setup.sh", checkout, PYTHON="no-such-python")
    assert done.returncode == 0, done.stderr
    assert str(checkout / ".venv") in done.stderr and "-m venv" not in done.stderr
    called = (checkout / ".venv" / "bin" / "called").read_text()
    assert called.endswith(f"-m pip install -qq --editable {checkout}[dev]\n")
    again = bash("bash launch/setup.sh", checkout)
    assert (again.returncode, again.stderr) == (0, "")


NOTES = """#!/bin/sh
# Makes a .venv whose interpreter does nothing, and notes when it begins and ends.
[ "$1" != -c ] || exit 0
echo begins >> "{notes}"
sleep 1
mkdir -p "$4/bin"
cp "{idle}" "$4/bin/python"
echo ends >> "{notes}"
"""


@pytest.fixture
def noting(bare: Path, tmp_path: Path) -> tuple[Path, Path]:
    """An interpreter that takes a second to make a .venv, and the file of its notes."""
    notes, idle = tmp_path / "notes", executable(tmp_path / "idle", "#!/bin/sh\nexit 0\n")
    return executable(tmp_path / "noting", NOTES.format(notes=notes, idle=idle)), notes


def test_scripts_that_start_at_once_install_once(bare: Path, noting: tuple[Path, Path]) -> None:
    python, notes = noting
    environment = {**os.environ, "PYTHON": str(python)}
    scripts = [
        subprocess.Popen(
            ["bash", "launch/setup.sh"],
            cwd=bare,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = [script.communicate(timeout=60)[1] for script in scripts]
    assert [script.returncode for script in scripts] == [0, 0, 0], said
    assert notes.read_text().split() == ["begins", "ends"]
    assert sum("-m venv --clear" in one for one in said) == 1, said
    assert not (bare / ".venv.lock").exists()
    assert bash("bash launch/setup.sh", bare).stderr == ""


def test_an_installation_that_was_cut_off_is_named(bare: Path, noting: tuple[Path, Path]) -> None:
    python, notes = noting
    lock = bare / ".venv.lock"
    lock.mkdir()
    (lock / "owner").write_text("process 12 on host7\n")
    script = subprocess.Popen(
        ["bash", "launch/setup.sh"],
        cwd=bare,
        env={**os.environ, "PYTHON": str(python)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert script.stderr is not None
    line = script.stderr.readline()
    assert "waiting for process 12 on host7" in line and line.endswith(f"rm -r {lock}\n")
    assert not notes.exists()
    shutil.rmtree(lock)
    assert script.wait(60) == 0 and notes.exists()


def test_an_installation_that_is_interrupted_leaves_no_lock(
    bare: Path, noting: tuple[Path, Path]
) -> None:
    python, notes = noting
    script = subprocess.Popen(
        ["bash", "launch/setup.sh"],
        cwd=bare,
        env={**os.environ, "PYTHON": str(python)},
        start_new_session=True,
        # Tests that run in the background ignore it, and so would a shell that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(notes.exists, alive=script)
    os.killpg(script.pid, signal.SIGINT)  # as Ctrl-C does
    assert script.wait(60) != 0 and not (bare / ".venv.lock").exists()


def test_no_interpreter_to_start_from(bare: Path) -> None:
    done = bash("bash launch/setup.sh", bare, PYTHON="no-such-python")
    assert done.returncode == 2 and "no-such-python" in done.stderr


def test_the_interpreters_path_may_have_spaces(bare: Path) -> None:
    python = executable(bare / "a folder" / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    done = bash("bash launch/setup.sh --dry-run", bare, PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    assert f"+ {python} -m venv" in done.stderr


def test_a_dry_run_installs_and_runs_nothing(bare: Path) -> None:
    before = sorted(bare.rglob("*"))
    done = bash("bash launch/train.sh --dry-run nowhere.toml train.steps=3", bare, **BASE)
    assert done.returncode == 0, done.stderr
    assert "-m venv --clear" in done.stderr
    assert done.stderr.endswith("+ python -m r2id.cli train nowhere.toml train.steps=3\n")
    assert sorted(bare.rglob("*")) == before


def test_training_takes_the_processes_asked_for(checkout: Path) -> None:
    one = bash("bash launch/train.sh nowhere.toml", checkout, **BASE)
    assert one.returncode == 2
    assert "+ python -m r2id.cli train nowhere.toml" in one.stderr
    assert "nowhere.toml" in one.stderr.splitlines()[-1]
    two = bash("bash launch/train.sh --dry-run a.toml train.steps=3", checkout, **BASE, NPROC="2")
    assert two.stderr == (
        "+ python -m r2id.torchrun --standalone --nproc-per-node 2 -m r2id.cli train a.toml "
        "train.steps=3\n"
    )


def test_many_processes_share_the_cores(checkout: Path) -> None:
    executable(checkout / ".venv" / "bin" / "nproc", "#!/bin/sh\necho 12\n")
    told = bash(
        "source launch/setup.sh; choose_processes; "
        "echo $processes $DS_ACCELERATOR $OMP_NUM_THREADS",
        checkout,
        CUDA_VISIBLE_DEVICES="",
        NPROC="3",
        OMP_NUM_THREADS="",
    )
    assert told.stdout.split() == ["3", "cpu", "4"]
    executable(checkout / ".venv" / "bin" / "nproc", "#!/bin/sh\nexit 127\n")  # as on macOS
    executable(checkout / ".venv" / "bin" / "getconf", "#!/bin/sh\necho 6\n")
    told = bash(
        "source launch/setup.sh; choose_processes; echo $OMP_NUM_THREADS",
        checkout,
        NPROC="3",
        OMP_NUM_THREADS="",
    )
    assert told.stdout.split() == ["2"], told.stderr
    gpus = bash(
        "source launch/setup.sh; choose_processes; echo $processes",
        checkout,
        CUDA_VISIBLE_DEVICES="0,1,2,5",
    )
    assert gpus.stdout.split() == ["4"]
    shared = bash(
        f"bash launch/train.sh --dry-run {ROOT}/configs/mnist/reference-r2id.toml --profile",
        checkout,
        PYTHONPATH=str(ROOT),
        CUDA_VISIBLE_DEVICES="0,1,2,3",
    )
    assert "train.batch = 25 cannot be shared evenly by 4 GPUs: training on 1" in shared.stderr
    assert "+ python -m r2id.cli train" in shared.stderr


def test_one_of_many_hosts(checkout: Path) -> None:
    command = "bash launch/multinode.sh --dry-run train a.toml optim.lr=1e-4"
    done = bash(
        command, checkout, **BASE, NNODES="4", NODE_RANK="2", MASTER_ADDR="10.0.0.1", NPROC="8"
    )
    assert done.stderr == (
        "+ python -m r2id.torchrun --nnodes 4 --node-rank 2 "
        "--master-addr 10.0.0.1 --master-port 29500 "
        "--nproc-per-node 8 -m r2id.cli train a.toml optim.lr=1e-4\n"
    )
    for missing in ("NNODES", "NODE_RANK", "MASTER_ADDR"):
        place = {"NNODES": "4", "NODE_RANK": "2", "MASTER_ADDR": "10.0.0.1", missing: ""}
        done = bash(command, checkout, **BASE, **place)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {missing}"), done.stderr


def test_deepspeeds_launcher_with_a_hostfile(checkout: Path) -> None:
    (checkout / "hosts").write_text("first slots=8\nsecond slots=8\n")
    done = bash(
        "bash launch/multinode.sh --dry-run --hostfile hosts train a.toml",
        checkout,
        **BASE,
        MASTER_PORT="1234",
    )
    assert done.stderr == (
        "+ python -m deepspeed.launcher.runner --hostfile hosts --master_port 1234 "
        "--no_local_rank --module r2id.cli train a.toml\n"
    )
    done = bash("bash launch/multinode.sh --dry-run --hostfile none train a.toml", checkout, **BASE)
    assert done.returncode == 2 and "none" in done.stderr


@pytest.mark.parametrize("script", ["multinode.sh", "slurm.sh", "train.sh", "flow.sh", "app.sh"])
def test_a_script_without_a_command_says_what_it_takes(script: str, checkout: Path) -> None:
    done = bash(f"bash launch/{script}", checkout, **BASE)
    assert done.returncode == 2 and done.stderr.startswith("error: ")


@pytest.mark.parametrize("script", ["train.sh", "flow.sh", "app.sh"])
def test_nothing_is_installed_for_a_command_that_lacks_its_argument(
    script: str, bare: Path
) -> None:
    done = bash(f"bash launch/{script}", bare, **BASE)
    assert done.returncode == 2 and not (bare / ".venv").exists()


@pytest.mark.parametrize("script", ["app.sh", "train.sh", "flow.sh"])
def test_paths_are_those_of_the_folder_that_a_script_is_started_in(
    script: str, checkout: Path, tmp_path: Path
) -> None:
    executable(
        checkout / ".venv" / "bin" / "python", "#!/bin/sh\ncase $* in *r2id.cli*) pwd -P ;; esac\n"
    )
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    done = bash(f"bash {checkout}/launch/{script} RUN", folder, **BASE, NPROC="1")
    assert done.stdout.strip() == str(folder.resolve()), done.stderr


@pytest.mark.parametrize("command", ["flow.sh CONFIG", "demo.sh"])
def test_a_signal_to_the_script_reaches_the_pipeline(command: str, checkout: Path) -> None:
    """The pipeline is a program here that ends with 75 at SIGTERM, as one does that has saved."""
    executable(
        checkout / ".venv" / "bin" / "python",
        "#!/bin/bash\ntrap 'exit 75' TERM\necho ready\nsleep 10 &\nwait\n",
    )
    with subprocess.Popen(
        ["bash", *f"launch/{command}".split()], cwd=checkout, stdout=subprocess.PIPE
    ) as script:
        assert script.stdout is not None and script.stdout.readline() == b"ready\n"
        script.terminate()
        assert script.wait(30) == 75


class OneRun(BaseHTTPRequestHandler):
    """What MLflow's server answers when there is one run."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        run = {"run_id": "abc", "experiment_id": "7", "status": "FINISHED"}
        experiment = {"experiment_id": "7", "name": "r2id", "lifecycle_stage": "active"}
        answer = {"runs": [{"info": run, "data": {}}], "experiments": [experiment]}
        content = json.dumps({self.path.split("/")[-2]: answer[self.path.split("/")[-2]]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def mlflow_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), OneRun) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_mlflows_server_is_not_started_where_one_is_running(
    checkout: Path, mlflow_server: str
) -> None:
    variables = {**BASE, "PYTHONPATH": str(checkout)}
    done = bash("bash launch/mlflow.sh", checkout, **variables, MLFLOW_TRACKING_URI=mlflow_server)
    assert done.returncode == 0, done.stderr
    assert f"{mlflow_server}/#/experiments/7/runs/abc/" in done.stderr.splitlines()[-1]
    gone = bash(
        "bash launch/mlflow.sh", checkout, **variables, MLFLOW_TRACKING_URI="http://127.0.0.1:9"
    )
    assert gone.returncode == 1 and gone.stderr.splitlines()[-1].startswith("MLflow: ")
