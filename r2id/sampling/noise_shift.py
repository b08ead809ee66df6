"""The noise shift that was measured of a checkpoint and is to be used in the place of the trained one.

``RUN/noise-shift.json`` holds it, beside the ``checkpoints`` of a run. It is of one checkpoint, by its identity, and stands
for as long as the file does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r2id.checkpoints import checkpoint
from r2id.errors import InputError, WorkError
from r2id.files import write_json
from r2id.progress import say

NAME = "noise-shift.json"


def applied_file(path: Path) -> Path:
    """Where the shift of a checkpoint (or of a run's newest) lies once it is applied."""
    return checkpoint.resolve(path).parent.parent / NAME


def apply(path: Path, found: Mapping[str, Any]) -> Path:
    """Let samples of a checkpoint be drawn with the exponent ``found["k"]``; the file that says so.

    WorkError when that exponent is none that a schedule can have.
    """
    if not (math.isfinite(found["k"]) and found["k"] >= 0):
        raise WorkError(f"k = {found['k']:.3f}: cannot be applied; must be at least 0")
    file = applied_file(path)
    write_json(file, found)
    return file


def applied_exponent(path: Path) -> float | None:
    """The exponent applied to a checkpoint, None where there is none or it is another checkpoint's; told in one line.

    InputError when the file is damaged.
    """
    file = applied_file(path)
    try:
        found = json.loads(file.read_bytes())
        exponent, identity = float(found["k"]), str(found["checkpoint"])
        if not (math.isfinite(exponent) and exponent >= 0):
            raise ValueError(f"k = {exponent}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{file}: damaged ({error}); remove it, or measure again with r2id noise-shift --apply"
        ) from None
    if identity != checkpoint.identity(path):
        say(f"{file}: is of another checkpoint, and left aside")
        return None
    say(f"{file}: noise shift exponent {exponent:.3f} instead of the trained one")
    return exponent
