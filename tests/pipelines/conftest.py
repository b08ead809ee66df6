"""One Prefect server for the tests of this folder, with its files in a temporary folder."""

import os
import tempfile
from collections.abc import Iterator

# Before anything imports Prefect, which reads it then.
os.environ.setdefault("PREFECT_HOME", tempfile.mkdtemp(prefix="r2id-prefect-"))

import pytest


@pytest.fixture(scope="package")
def server() -> Iterator[None]:
    """Within the tests that use it flows can run; its address is in PREFECT_API_URL."""
    from pipelines.orchestration import prefect_ready

    with prefect_ready():
        yield
