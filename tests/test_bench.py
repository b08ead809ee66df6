"""The benchmarks still start: measurements are repeated rarely, and renames would break them."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"
# Imports each script under a name of its own, so that it runs nothing.
IMPORT = "import runpy, sys; [runpy.run_path(name, run_name='bench') for name in sys.argv[1:]]"


@pytest.mark.slow
def test_every_benchmark_imports() -> None:
    scripts = sorted(map(str, BENCH.glob("*.py")))
    assert scripts
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, *scripts],
        capture_output=True,
        text=True,
        check=False,
        cwd=BENCH,
    )
    assert done.returncode == 0, done.stderr
