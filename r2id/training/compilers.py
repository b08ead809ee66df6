"""What torch.compile needs of the machine to build its code: a compiler and Python's headers."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

INSTALL = "apt install build-essential python3-dev"
"""How to get both on Debian and Ubuntu."""


def candidates(gpu: bool) -> Sequence[str]:
    """Return the names of the compilers that are tried in turn: of C for a GPU, of C++ for a CPU.

    They are Triton's and Inductor's.
    """
    if gpu:
        return [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    default = "clang++" if sys.platform == "darwin" else "g++"
    return [os.environ.get("CXX") or default]


def missing(gpu: bool) -> str | None:
    """Say what compiling for a GPU, or for a CPU, lacks here; None if it lacks nothing."""
    names = candidates(gpu)
    if not any(map(shutil.which, names)):
        return f"no {'C' if gpu else 'C++'} compiler ({', '.join(names)})"
    # Not the default scheme, which on Debian leads to /usr/local, where there are no headers.
    scheme = "nt" if os.name == "nt" else "posix_prefix"
    headers = Path(sysconfig.get_path("include", scheme))
    return None if (headers / "Python.h").is_file() else f"no Python.h in {headers}"
