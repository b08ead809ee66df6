"""Facts that are recorded of a run beside its figures: its parameters and its code's commit."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Turn nested dictionaries into one flat one: ``section.key`` → the value as text."""
    flat: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def git_tags() -> dict[str, str]:
    """Return the commit of the checkout that this file belongs to; {} for an installed package."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *arguments],
            capture_output=True,
            encoding="utf-8",
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        # An installed copy may lie in another project's checkout, so ask whether git knows this
        # file.
        git("ls-files", "--error-unmatch", here.name)
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {
            "mlflow.source.git.commit": git("rev-parse", "HEAD"),
            "git.dirty": str(dirty).lower(),
        }
    except (OSError, subprocess.SubprocessError):
        return {}
