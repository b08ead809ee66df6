"""How this process's memory allocator treats memory that is freed."""

from __future__ import annotations

import ctypes
import os
import sys

_KEPT = 1 << 30
# Numbers of the parameters in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Have glibc reuse up to a gigabyte of freed memory, instead of returning it to the system.

    A network on a CPU frees and allocates megabytes in every operation. By default glibc returns
    them each time, and the system clears every page anew: a fifth of the time of sampling. Does
    nothing where the user has set glibc's own variables (MALLOC_TRIM_THRESHOLD_ and others), and
    with other allocators.
    """
    chosen = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
    if sys.platform != "linux" or any(name in os.environ for name in chosen):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # missing in musl
        mallopt(_MMAP_THRESHOLD, _KEPT)
        mallopt(_TRIM_THRESHOLD, _KEPT)
