"""Freed memory stays with the process, unless the user has said what becomes of it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

MIB = 1 << 20
PROGRAM = """
import resource, sys
from r2id.host_memory import keep_freed_memory
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
if sys.argv[1] == "keep":
    keep_freed_memory()
before = resident()
block = bytearray(64 << 20)
del block
print(resident() - before)
"""


def kept(what: str, **variables: str) -> int:
    """Bytes that are still resident after 64 MiB were written and freed."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_and_the_user_decides() -> None:
    assert kept("keep") > 60 * MIB
    assert kept("leave") < 8 * MIB
    assert kept("keep", MALLOC_TRIM_THRESHOLD_="131072") < 8 * MIB, "the user's own holds"
