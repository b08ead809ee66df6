"""What a dataset's reader provides: a list of what there is, made without decoding anything, and the records of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from r2id.data.records import Record
from r2id.data.shards import Reject

TEST_SHARE = 0.1
"""Share of each class that becomes the test split where the source has none of its own."""


@dataclass(frozen=True)
class Item:
    """One source image. ``place`` is what its reader finds it by; ``size`` is an upper bound of its stored bytes."""

    key: str
    split: str
    label: int | None
    place: str
    size: int


class Reader(Protocol):
    """A dataset as it lies on disk. Items are in an order that depends on the source alone."""

    class_names: list[str]
    """Empty when there are no classes."""

    @property
    def digest(self) -> str:
        """Identity of the source's content."""
        ...

    def items(self) -> list[Item]:
        """All images. Raises InputError when the source is missing, empty or of another kind."""
        ...

    def records(self, items: Sequence[Item], rejects: list[Reject]) -> Iterator[Record]:
        """These items' records, each completely decoded; what cannot be goes to ``rejects`` with the reason."""
        ...


def stratified_test(labels: Iterable[int | None], share: float) -> np.ndarray:
    """Which samples are for testing: bool [N], the same share of every class, the same ones every time."""
    known = np.array([-1 if label is None else label for label in labels], dtype=np.int64)
    chosen = np.zeros(len(known), dtype=bool)
    generator = np.random.Generator(np.random.PCG64(0))
    for label in np.unique(known):
        members = np.flatnonzero(known == label)
        order = np.argsort(generator.random(len(members)), kind="stable")
        chosen[members[order[:round(share * len(members))]]] = True
    return chosen
