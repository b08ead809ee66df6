"""Count the GPUs that this process may use: each gets one training process."""

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
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0


if __name__ == "__main__":
    print(gpu_count())
