"""Where MLflow shows a run: the addresses of its pages, and how to start its server."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

RUN_ID_FILE = "mlflow-run-id"
"""File of a run directory: the id of the run in MLflow, and on a second line its experiment's."""
_DEFAULT_SERVER = "http://127.0.0.1:5000"
# MLflow opens its pages for language models unless the address says otherwise.
_MODEL_TRAINING = "?workflowType=machine_learning"


def run_page(
    experiment: str | None, run: str, tab: str = "model-metrics", server: str | None = None
) -> str:
    """Return the address of a run's page, by default of its charts.

    Without its experiment, it is that of a page that leads there. ``server`` is by default that of
    MLFLOW_TRACKING_URI, or the one that launch/mlflow.sh starts; "" makes an address for MLflow's
    own pages.
    """
    place = f"experiments/{experiment}/runs/{run}/{tab}" if experiment else f"runs/{run}"
    if server is None:
        server = f"{server_address() or _DEFAULT_SERVER}/"
    return f"{server}#/{place}{_MODEL_TRAINING}"


def read_run_ids(file: Path) -> tuple[str | None, str | None]:
    """Read a RUN_ID_FILE → (the run's id, its experiment's), None where it does not say."""
    try:
        lines = file.read_text(encoding="utf-8").split()
    except OSError:
        lines = []
    return lines[0] if lines else None, lines[1] if len(lines) > 1 else None


def server_address() -> str | None:
    """Return the address in MLFLOW_TRACKING_URI, without any password; None for another store."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not address.startswith(("http://", "https://")):
        return None
    return without_password(address).rstrip("/")


def without_password(text: str) -> str:
    """Leave users and passwords out of the addresses in a text."""
    return re.sub(r"://[^/\s]*@", "://", text)


def server_command() -> str | None:
    """Return the command that starts MLflow's server; None where one is running already."""
    if server_address():
        return None
    script = Path("launch") / "mlflow.sh"
    if script.exists():
        return f"bash {script}"
    store = os.environ.get("MLFLOW_TRACKING_URI")
    place = '"$MLFLOW_TRACKING_URI"' if store else "sqlite:///mlflow.db"
    found, program = shutil.which("mlflow"), "mlflow"
    if found is None or Path(found).parent != Path(sys.executable).parent:  # of another environment
        program = shlex.quote(sys.executable).replace(f"{Path.cwd()}/", "") + " -m mlflow"
    return f"{program} server --backend-store-uri {place}"


def how_to_open(experiment: str | None, run: str) -> str:
    """Return one line for people: what to start, if anything, and the address of a run's page."""
    command, page = server_command(), run_page(experiment, run)
    return f"to see this run, {command}, then {page}" if command else page
