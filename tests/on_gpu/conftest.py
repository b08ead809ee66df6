"""The stand-in GPU for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from r2id.training import tasks
from r2id.training.callbacks import metering
from r2id.training.workload import Cost
from tests.stand_in import Counts, stand_in_gpu


@pytest.fixture(autouse=True)
def _no_large_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's peak is measured with matrices that would keep a CPU busy for ten seconds."""
    monkeypatch.setattr(metering, "matmul_peak", lambda *_: 1e12)


@pytest.fixture(autouse=True)
def _no_counting_of_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations are counted on tensors without contents, which no device has a part in."""
    monkeypatch.setattr(tasks, "image_cost", lambda _workload: Cost(1, 1))


@pytest.fixture
def counts() -> Iterator[Counts]:
    """Let there be a GPU in a test, and count what happens on it."""
    with stand_in_gpu() as found:
        yield found
