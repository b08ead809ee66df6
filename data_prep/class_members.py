"""The classes of a webdataset's samples, which their ``.cls`` members tell."""

from __future__ import annotations

import re

import pyarrow as pa

from r2id.errors import InputError

_LONGEST_NAME = 256  # bytes


class ClassMembers:
    """The classes of ``.cls`` members: numbers, or else names, which are numbered as they occur."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self._first: tuple[bool, str] | None = None
        """Whether the first class is a number, and a description of it."""

    def number(self, content: bytes, where: str) -> int:
        """Return the number of a class; InputError when it is none, or of another kind."""
        is_number = re.fullmatch(rb"\s*\d{1,9}\s*", content) is not None
        name = "" if is_number else _class_name(content)
        if not (is_number or name):
            raise InputError(
                f"{where}: {content[:20]!r}: must be a class number, 0 or more, or a name"
            )
        first = self._first = self._first or (is_number, f"{where}: {content[:20]!r}")
        if first[0] != is_number:
            raise InputError(
                f"{where}: {content[:20]!r}, but {first[1]}: classes must be all numbers or all "
                "names"
            )
        return int(content) if is_number else self.names.setdefault(name, len(self.names))

    def in_order(self, samples: pa.Table) -> tuple[pa.Table, list[str]]:
        """Number the classes in the order of their names; return the samples and the names."""
        names = sorted(self.names)
        if not names:
            return samples, []
        order = {name: number for number, name in enumerate(names)}
        numbers = pa.array([order[name] for name in self.names], pa.int32())
        column = samples.schema.get_field_index("label")
        labels = numbers.take(samples["label"].combine_chunks())
        return samples.set_column(column, samples.schema.field(column), labels), names


def _class_name(content: bytes) -> str:
    """Return a class's name, or "" for what is none: -1, 0.5, bytes, long text."""
    try:
        name = content.decode().strip()
    except UnicodeDecodeError:
        return ""
    usable = len(content) <= _LONGEST_NAME and name.isprintable() and any(map(str.isalpha, name))
    return name if usable else ""
