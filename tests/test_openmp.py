"""How threads wait for each other is decided before torch is loaded, unless the user has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from r2id.openmp import VARIABLES, limit_spinning, waiting
from tests.conftest import CONFIGS

CHILDREN = """
import os, sys
from contextlib import suppress
from r2id import cli
sys.argv = ["r2id", "--help"]
with suppress(SystemExit):
    cli.main()
assert "torch" not in sys.modules
from torch.utils.data import DataLoader, Dataset
from pipelines.subprocesses import run_command
class Spins(Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, _index):
        return os.environ["GOMP_SPINCOUNT"]
program = "import os; print(os.environ['GOMP_SPINCOUNT'])"
stage = run_command([sys.executable, "-c", program])[1].strip()
print("found:", stage, *DataLoader(Spins(), batch_size=None, num_workers=1))
"""


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python where the user has set no variable but these."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [sys.executable, *words],
        env={**environment, "PYTHONPATH": str(CONFIGS.parent), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def doctor(**variables: str) -> str:
    """Everything that the command and torch's OpenMP print: it lists what it has read."""
    done = run("-m", "r2id.cli", "doctor", OMP_DISPLAY_ENV="VERBOSE", **variables)
    assert done.returncode == 0, done.stderr
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch has another OpenMP here")
    return done.stdout + done.stderr


def test_torch_has_read_it() -> None:
    said = doctor()
    assert "GOMP_SPINCOUNT = '1000'" in said and "; GOMP_SPINCOUNT=1000\n" in said


def test_what_the_user_has_set_wins() -> None:
    said = doctor(OMP_WAIT_POLICY="PASSIVE")
    assert "GOMP_SPINCOUNT = '0'" in said and "; OMP_WAIT_POLICY=PASSIVE\n" in said


@pytest.mark.parametrize("name", VARIABLES)
def test_each_way_to_choose_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in VARIABLES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "1")
    limit_spinning()
    assert [other for other in VARIABLES if other in os.environ] == [name]
    assert waiting() == f"{name}=1"


def test_stages_and_loaders_inherit_it(tmp_path: Path) -> None:
    (tmp_path / "children.py").write_text(CHILDREN)
    done = run(str(tmp_path / "children.py"))
    assert "found: 1000 1000\n" in done.stdout, done.stderr


def test_importing_the_library_decides_nothing() -> None:
    done = run("-c", "import os, r2id, r2id.config; print(os.environ.get('GOMP_SPINCOUNT'))")
    assert done.stdout == "None\n", done.stderr
