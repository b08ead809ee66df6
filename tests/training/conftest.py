"""Two ranks for the tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.training.children import Ranks


@pytest.fixture(scope="package")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes of one job, which stay for all tests."""
    pair = Ranks(2, tmp_path_factory.mktemp("ranks") / "stdout")
    yield pair
    pair.close()
    if pair.output.exists():
        assert not pair.output.read_bytes(), "stdout is for results"
