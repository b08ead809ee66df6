"""A noise shift that was measured of a checkpoint and replaces the one it was trained with.

``RUN/noise-shift.json`` holds it, beside the ``checkpoints`` of a run. It names its checkpoint by
identity, and holds until the file is removed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r2id.checkpoints import Checkpoint
from r2id.errors import InputError, WorkError
from r2id.files import write_json
from r2id.progress import say

NAME = "noise-shift.json"


def applied_file(checkpoint: Checkpoint) -> Path:
    """Where the shift of a checkpoint lies once it is applied."""
    return checkpoint.run / NAME


def apply(checkpoint: Checkpoint, found: Mapping[str, Any]) -> Path:
    """Let samples of a checkpoint be drawn with the exponent ``found["k"]``; the file written.

    Raises WorkError when a schedule cannot have that exponent.
    """
    if not (math.isfinite(found["k"]) and found["k"] >= 0):
        raise WorkError(f"k = {found['k']:.3f}: cannot be applied; must be at least 0")
    file = applied_file(checkpoint)
    write_json(file, found)
    return file


def applied_exponent(checkpoint: Checkpoint) -> float | None:
    """The exponent that was applied to a checkpoint, and a line on stderr that says so.

    None where there is none, or where it was measured of another checkpoint. Raises InputError when
    the file is damaged.
    """
    file = applied_file(checkpoint)
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
    if identity != checkpoint.identity:
        say(f"{file}: is of another checkpoint, and left aside")
        return None
    say(f"{file}: noise shift exponent {exponent:.3f} instead of the trained one")
    return exponent
