"""How a process's threads wait for each other between two pieces of work.

By default those of GNU's OpenMP, which torch computes with, spin for milliseconds. That is fast on
an idle machine. Where other processes want the same cores, each spins while the one that it waits
for is not running, and training becomes many times slower.
"""

from __future__ import annotations

import os

VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables by which a user may have chosen already, of GNU's, Intel's and LLVM's OpenMP."""

_SPINS = "1000"
"""A thousand turns are a few microseconds: longer than most gaps between two kernels of a step on
an idle machine, and too short to hold up others on a busy one."""


def limit_spinning() -> None:
    """Have the threads of this process, and of those that it starts, spin briefly and then sleep.

    It must be called before torch is loaded, whose OpenMP reads the environment then. What the user
    has set stays.
    """
    if not any(os.environ.get(name) for name in VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def waiting() -> str:
    """Say by which variable it is decided how long threads spin, for people."""
    for name in VARIABLES:
        if os.environ.get(name):
            return f"{name}={os.environ[name]}"
    return "OpenMP's default wait"
