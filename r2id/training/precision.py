"""``train.precision = "auto"``: bfloat16 where this machine is fast at it, else float32.

It is decided when a run begins, and kept by its checkpoints, so that the run goes on in the same
numbers, and its samples are drawn in them, on any other machine too.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import torch

from r2id import dist
from r2id.config import R2idRun, RiaeRun
from r2id.progress import say

Run = TypeVar("Run", RiaeRun, R2idRun, RiaeRun | R2idRun)


def bfloat16_is_fast(device: torch.device) -> bool:
    """Tell whether bfloat16 autocast is faster on a device than float32.

    It is on GPUs that have bfloat16 (not those that emulate it), and on CPUs that multiply it, with
    AMX or AVX512-BF16: 1.4 to 1.9 times as fast for an R2ID, 0.8 to 1.3 times for an RIAE
    (tests/bench/train_step.py). Other CPUs convert it, which costs more than it gains.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def fastest_precision(device: torch.device) -> tuple[Literal["float32", "bfloat16"], str]:
    """Choose for a device → (precision, why)."""
    place = "GPU" if device.type == "cuda" else "CPU"
    if bfloat16_is_fast(device):
        return "bfloat16", f"which this {place} is fast at"
    return "float32", f"because this {place} is slow at bfloat16"


def resolve_precision(config: Run, device: torch.device, recorded: str | None = None) -> Run:
    """Return the config with a precision in place of ``auto``, the same on every rank, and say it.

    ``recorded``: the precision of the checkpoint that the run goes on from, if there is one. Every
    rank must call it, with rank 0's device deciding.
    """
    if config.train.precision != "auto":
        return config
    if recorded is None:
        chosen, why = dist.broadcast_object(fastest_precision(device))
    else:  # weights in bfloat16 are a layout of the engine, which this run does not ask for
        chosen, why = "float32" if recorded == "float32" else "bfloat16", "as the run began"
    if dist.is_main():
        say(f"train.precision auto: {chosen}, {why}")
    train = config.train.model_copy(update={"precision": chosen})
    return config.model_copy(update={"train": train})
