"""A user without a home folder or an account, as in containers that run as a bare user id."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# The libraries ask the system for the account of the user id; here it knows none.
PROGRAM = """
import pwd, sys

def none(_):
    raise KeyError("getpwuid(): uid not found")

pwd.getpwuid = none
sys.argv = ["r2id", "--help"]
from r2id.cli import main
try:
    main()
except SystemExit as ended:
    assert ended.code == 0, ended.code
import getpass
from r2id.training.tracking import Tracker
from r2id.config import TrackingConfig
tracker = Tracker.start(TrackingConfig(), run_name="x", stage="riae")
tracker.finish()
print("user", getpass.getuser(), "run", tracker.run_id)
"""
UNKNOWN = ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "MLFLOW_TRACKING_URI")


def test_a_bare_user_id_works(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in UNKNOWN}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**environment, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    home = tmp_path / f"r2id-user-{os.getuid()}"
    assert f"no home folder: settings of libraries go to {home}" in done.stderr
    assert f"user user-{os.getuid()} run " in done.stdout and "run None" not in done.stdout
    assert "tracking:" not in done.stderr
