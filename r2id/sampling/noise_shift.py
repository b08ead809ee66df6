"""A noise shift that was measured for a checkpoint and replaces the one it was trained with.

It is kept in ``RUN/noise-shift.json``, with the identity of its checkpoint. Sampling uses it until
the file is removed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r2id.checkpoints import Checkpoint
from r2id.checkpoints.trained import Trained
from r2id.errors import InputError, WorkError
from r2id.files import NOISE_SHIFT_FILE, write_json
from r2id.progress import say


def applied_file(checkpoint: Checkpoint) -> Path:
    """Return the path of the file that holds the noise shift applied to a checkpoint."""
    return checkpoint.run / NOISE_SHIFT_FILE


def apply(checkpoint: Checkpoint, measured: Mapping[str, Any]) -> Path:
    """Have samples of a checkpoint drawn with the shift exponent ``measured["k"]``.

    Returns the file that it writes. Raises WorkError when a schedule cannot have that exponent.
    """
    if not (math.isfinite(measured["k"]) and measured["k"] >= 0):
        raise WorkError(f"k = {measured['k']:.3f}: cannot be applied; must be at least 0")
    file = applied_file(checkpoint)
    write_json(file, measured)
    return file


def applied_exponent(trained: Trained) -> float | None:
    """Return the shift exponent that was applied to a checkpoint, and say so on stderr.

    None when there is none, or when it was measured for another checkpoint; and for an exported
    file, which has it among its own settings. Raises InputError when the file is damaged.
    """
    if not isinstance(trained, Checkpoint):
        return None
    file = applied_file(trained)
    try:
        stored = json.loads(file.read_bytes())
        exponent, identity = float(stored["k"]), str(stored["checkpoint"])
        if not (math.isfinite(exponent) and exponent >= 0):
            raise ValueError(f"k = {exponent}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{file}: damaged ({error}); remove it, or measure again with r2id noise-shift --apply"
        ) from None
    if identity != trained.identity:
        say(f"{file}: ignored: it was measured for another checkpoint")
        return None
    say(f"{file}: noise shift exponent {exponent:.3f} instead of the trained one")
    return exponent
