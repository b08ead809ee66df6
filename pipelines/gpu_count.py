"""Count the GPUs that this process may use."""

from __future__ import annotations

import os
import shutil
import subprocess


def gpu_count() -> int:
    """Count the GPUs in CUDA_VISIBLE_DEVICES, or else those that the driver lists.

    torch could tell too, but importing it takes seconds.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(
        ["nvidia-smi", "--list-gpus"], capture_output=True, encoding="utf-8", check=False
    )
    # Below a GPU, indented, are the instances that it is divided into; one process uses one.
    gpus = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return len(gpus) if listed.returncode == 0 else 0


if __name__ == "__main__":
    print(gpu_count())
