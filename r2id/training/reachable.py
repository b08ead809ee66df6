"""Whether MLflow's store and Prefect's server can be reached, found out without importing either.

Both would take seconds, and MLflow would make the store.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import tomllib
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from r2id.mlflow_pages import without_password
from r2id.training.tracking.store import store_uri

_SECONDS = 3.0
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def find_store() -> tuple[str, str | None]:
    """Look at MLflow's store → (where it is, what is wrong with it or None)."""
    uri = store_uri()
    scheme = uri.partition(":")[0].partition("+")[0] if "://" in uri else "file"
    shown = without_password(uri)
    if scheme in ("http", "https"):
        return shown, _ask(f"{shown.rstrip('/')}/health")
    if scheme == "sqlite":
        return shown, _look_into(Path(uri.partition(":///")[2]))
    if scheme in _PORTS:
        return shown, _knock(uri, _PORTS[scheme])
    if scheme == "file":
        return shown, _try_to_write(Path(uri.removeprefix("file://")))
    return f"{shown} (not looked at)", None


def find_server() -> tuple[str | None, str | None]:
    """Ask Prefect's server → (its address or None for one of its own, what is wrong or None)."""
    address = os.environ.get("PREFECT_API_URL") or _of_files()
    if not address:
        return None, None
    shown = without_password(address)
    return shown, _ask(f"{shown.rstrip('/')}/health")


def _of_files() -> str | None:
    """Read the address that this folder's settings of Prefect name, or else its active profile."""
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    profiles = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml")
    active = os.environ.get("PREFECT_PROFILE") or _read(profiles, "active")
    return (
        _read(Path("prefect.toml"), "api", "url")
        or _read(Path("pyproject.toml"), "tool", "prefect", "api", "url")
        or _read(profiles, "profiles", active, "PREFECT_API_URL")
    )


def _read(file: Path, *keys: str | None) -> str | None:
    """Read a value from a TOML file; None if there is none."""
    try:
        value: Any = tomllib.loads(file.read_text(encoding="utf-8"))
        for key in keys:
            value = value[key]
        return str(value)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _ask(address: str) -> str | None:
    """Tell what is wrong with a server; None if it answers, be it that it wants a password."""
    try:
        with urllib.request.urlopen(address, timeout=_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        return None if error.code in (401, 403) else f"answers {error.code} at {address}"
    except urllib.error.URLError as error:
        return f"does not answer: {error.reason}"
    except (OSError, ValueError) as error:
        return f"does not answer: {error}"


def _look_into(file: Path) -> str | None:
    """Tell what is wrong with a store in SQLite, or the folder that it would be made in."""
    if not file.exists():
        return _try_to_write(file.parent)
    if not os.access(file, os.W_OK):
        return f"{file} cannot be written"
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as store:
            store.execute("SELECT version_num FROM alembic_version").fetchall()
    except sqlite3.OperationalError as error:
        return None if "locked" in str(error) else f"{file} is no store of MLflow: {error}"
    except sqlite3.DatabaseError as error:
        return f"{file} is damaged: {error}"
    return None


def existing_part(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists, in which it would be made."""
    whole = folder.absolute()
    return next(path for path in (whole, *whole.parents) if path.exists())


def _try_to_write(folder: Path) -> str | None:
    existing = existing_part(folder)
    if existing.is_dir() and os.access(existing, os.W_OK):
        return None
    return f"{existing} cannot be written"


def _knock(uri: str, port: int) -> str | None:
    """Tell what is wrong with the address of a database."""
    parts = urlsplit(uri)
    try:
        with socket.create_connection(
            (parts.hostname or "localhost", parts.port or port), _SECONDS
        ):
            return None
    except (OSError, ValueError) as error:
        return f"does not answer: {error}"
