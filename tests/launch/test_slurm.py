"""launch/slurm.sh on a machine without Slurm: srun, scontrol, scancel, squeue and sbatch are small
programs that do what the script relies on and write down how they were called. The job inside, on
two nodes of one process each, is real.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from r2id.checkpoints import Checkpoint
from tests.conftest import CONFIGS
from tests.launch.conftest import BASE, Job, bash, executable, training

NOTE = 'echo "$(basename "$0") $*" >> "$SLURM_NOTES"\n'
PROGRAMS = {
    # One task per node, each in a session of its own, as Slurm's daemons start them; the highest
    # exit code.
    "srun": NOTE
    + """
while [ "$1" != bash ]; do shift; done
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
    SLURM_NODEID=$node setsid "$@" & tasks="$tasks $!"
done
echo $tasks > "$SLURM_NOTES.tasks"
code=0
for task in $tasks; do wait $task || { got=$?; [ $got -gt $code ] && code=$got; }; done
exit $code
""",
    "scancel": NOTE + 'kill -TERM $(cat "$SLURM_NOTES.tasks")\n',
    # More names than a pipe holds, so that who takes the first alone breaks it.
    "scontrol": NOTE + '[ "$1 $2" != "show hostnames" ] || yes localhost | head -n 20000\n',
    "squeue": NOTE + 'echo "$SLURM_STATE"\n',
    "sbatch": NOTE + 'echo "$(wc -l < "$SLURM_NOTES");cluster"\n',
}


@pytest.fixture
def slurm(checkout: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes; its notes are at SLURM_NOTES."""
    for name, text in PROGRAMS.items():
        executable(tmp_path / "slurm" / name, "#!/bin/bash\n" + text)
    return {
        **BASE,
        "PATH": f"{tmp_path / 'slurm'}:{os.environ['PATH']}",
        "SLURM_NOTES": str(tmp_path / "notes"),
        "SLURM_STATE": "RUNNING",
        "PYTHONPATH": str(checkout),
    }


def in_job(slurm: dict[str, str], checkout: Path) -> dict[str, str]:
    return {
        **slurm,
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_ON_NODE": "3",
        "SLURM_SUBMIT_DIR": str(checkout),
    }


def notes(slurm: dict[str, str]) -> list[str]:
    file = Path(slurm["SLURM_NOTES"])
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.slow
def test_a_job_that_is_asked_to_stop_saves_and_is_requeued(
    checkout: Path, slurm: dict[str, str], digits: Path, tmp_path: Path
) -> None:
    environment = in_job(slurm, checkout)
    spooled = tmp_path / "spool" / "slurm_script"  # Slurm runs a copy
    spooled.parent.mkdir()
    shutil.copy(checkout / "launch" / "slurm.sh", spooled)
    arguments = training(tmp_path / "run", digits, "train.steps=100000", "train.save_every=5")
    job = Job(["bash", str(spooled), "train", *arguments], checkout, **environment)
    job.wait_for(tmp_path / "run" / "checkpoints" / "latest")
    assert job.end(signal.SIGTERM) == 75, job.log.read_text()[-4000:]
    saved = Checkpoint.open(tmp_path / "run").step
    assert f"step {saved} of 100000 saved" in job.log.read_text()
    assert "scancel --signal=TERM 4242" in notes(slurm)
    assert notes(slurm)[-1] == "scontrol requeue 4242"
    called = next(note for note in notes(slurm) if note.startswith("srun "))
    assert called.startswith(
        "srun --ntasks-per-node 1 --cpus-per-task 3 --kill-on-bad-exit=0 --wait=120 bash"
    )
    job = Job(
        ["bash", str(spooled), "train", *arguments, f"train.steps={saved + 2}"],
        checkout,
        **environment,
    )
    assert job.end() == 0, job.log.read_text()[-4000:]
    assert Checkpoint.open(tmp_path / "run").step == saved + 2
    assert notes(slurm).count("scontrol requeue 4242") == 1


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        (75, "RUNNING", True),
        (75, "COMPLETING", False),
        (1, "RUNNING", False),
        (2, "RUNNING", False),
    ],
)
def test_only_what_was_saved_and_not_cancelled_is_requeued(
    code: int, state: str, requeued: bool, checkout: Path, slurm: dict[str, str], tmp_path: Path
) -> None:
    executable(tmp_path / "slurm" / "srun", f"#!/bin/sh\nexit {code}\n")
    done = subprocess.run(
        ["bash", "launch/slurm.sh", "train", "a.toml"],
        cwd=checkout,
        check=False,
        env={**os.environ, **in_job(slurm, checkout), "SLURM_STATE": state},
    )
    assert done.returncode == code
    assert ("scontrol requeue 4242" in notes(slurm)) == requeued


def test_stages_wait_for_one_another(checkout: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    riae, r2id = (str(CONFIGS / "digits" / f"{name}.toml") for name in ("riae", "r2id"))
    command = f"bash launch/slurm.sh stages {riae} optim.lr=1e-4 -- {r2id} run=runs/x"
    done = bash(command, checkout, **slurm, OPTIONS="--nodes 2 --time 60")
    assert done.returncode == 0, done.stderr
    first = "sbatch --parsable --nodes 2 --time 60 "
    assert notes(slurm) == [
        f"{first}launch/slurm.sh train {riae} optim.lr=1e-4",
        f"{first}--dependency afterok:1 launch/slurm.sh encode "
        "--riae runs/digits/riae --shards data/digits "
        "--out runs/digits/latents",
        f"{first}--dependency afterok:2 launch/slurm.sh train {r2id} run=runs/x",
    ]
    assert done.stdout.split() == ["3"]
    pixels = tmp_path / "pixels.toml"
    pixels.write_text(Path(r2id).read_text().replace('latents = "runs/digits/latents"', ""))
    Path(slurm["SLURM_NOTES"]).unlink()
    bash(f"bash launch/slurm.sh stages {riae} -- {pixels}", checkout, **slurm)
    assert [note.split("launch/slurm.sh ")[1].split()[0] for note in notes(slurm)] == [
        "train",
        "train",
    ]


def test_a_finetuned_riae_has_a_job_of_its_own(checkout: Path, slurm: dict[str, str]) -> None:
    riae, sharp, r2id = (
        str(CONFIGS / "photos" / f"faces-{name}.toml") for name in ("riae", "sharp-riae", "r2id")
    )
    command = f"bash launch/slurm.sh stages {riae} seed=1 -- {sharp} seed=2 -- {r2id} seed=3"
    done = bash(command, checkout, **slurm)
    assert done.returncode == 0, done.stderr
    assert notes(slurm) == [
        f"sbatch --parsable launch/slurm.sh train {riae} seed=1",
        f"sbatch --parsable --dependency afterok:1 launch/slurm.sh train {sharp} seed=2",
        "sbatch --parsable --dependency afterok:2 launch/slurm.sh encode "
        "--riae runs/faces/riae-finetuned --shards data/faces --out runs/faces/latents",
        f"sbatch --parsable --dependency afterok:3 launch/slurm.sh train {r2id} seed=3",
    ]


def test_mistakes_submit_nothing(checkout: Path, slurm: dict[str, str]) -> None:
    riae = str(CONFIGS / "digits" / "riae.toml")
    for command, words in (
        (f"stages {riae}", "stages"),
        (f"stages -- {riae}", "stages"),
        (f"stages {riae} --", "stages"),
        (f"stages {riae} -- -- {riae}", "stages"),
        (f"stages {riae} -- {riae}", "'r2id'"),
        (f"stages {riae} -- none.toml", "none.toml"),
        ("train a.toml", "sbatch"),
    ):
        done = bash(f"bash launch/slurm.sh {command}", checkout, **slurm)
        assert done.returncode == 2 and words in done.stderr, done.stderr
    elsewhere = {**in_job(slurm, checkout), "SLURM_SUBMIT_DIR": "/"}
    done = bash("bash launch/slurm.sh train a.toml", checkout, **elsewhere)
    assert done.returncode == 2 and "not the root of the checkout" in done.stderr
    assert notes(slurm) == []


def test_a_dry_run_submits_nothing(checkout: Path, slurm: dict[str, str]) -> None:
    riae, r2id = (str(CONFIGS / "digits" / f"{name}.toml") for name in ("riae", "r2id"))
    done = bash(f"bash launch/slurm.sh --dry-run stages {riae} -- {r2id}", checkout, **slurm)
    assert done.returncode == 0 and done.stderr.count("+ sbatch --parsable") == 3
    done = bash("bash launch/slurm.sh --dry-run train a.toml", checkout, **slurm)
    assert (
        done.returncode == 0
        and "srun --ntasks-per-node 1" in done.stderr
        and "train a.toml" in done.stderr
    )
    assert notes(slurm) == []
