"""Command-line options of a section's fields: their names, and their values to text and back.

The options of a command are generated from a section (r2id.cli.fields), and so are the arguments
with which a pipeline starts that command. A new field of the section is therefore an option at
once, and pipelines pass it on.
"""

from __future__ import annotations

import re
import types
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from r2id.config.section import Section, Size, as_label
from r2id.errors import InputError


@dataclass(frozen=True)
class Option:
    """The option of one field.

    ``kind`` is the type of its value, or of one value where the option may be ``repeated``.
    """

    name: str
    kind: Any
    repeated: bool
    field: FieldInfo

    @property
    def flag(self) -> str:
        """The option's name, such as ``--max-rejects``; in the singular where it may be repeated.

        The field ``sizes`` has the option ``--size``.
        """
        singular = self.name.removesuffix("s") if self.repeated else self.name
        return "--" + singular.replace("_", "-")

    @property
    def structured(self) -> bool:
        """Whether a value has parts, such as a size or a range, and is written as one word."""
        return get_origin(self.kind) is tuple

    def read(self, value: Any) -> Any:
        """Convert what the command line holds to the field's value; structured values are text.

        Raises InputError when such a text is malformed.
        """
        if self.repeated:
            return tuple(map(self._read_one, value))
        return self._read_one(value)

    def _read_one(self, value: Any) -> Any:
        if value is not None and self.kind == int | str:
            try:
                return as_label(value)
            except ValueError as error:
                raise InputError(f"{self.flag} {value!r}: {error}") from None
        if not self.structured:
            return value
        if self.kind == _SIZE:
            return parse_size(value)
        kinds = get_args(self.kind)
        try:
            parts = [_bare(kind)(part) for kind, part in zip(kinds, value.split(","), strict=True)]
        except ValueError:
            raise InputError(
                f"{self.flag} {value!r}: must be {self.form}, such as 0.2,0.8"
            ) from None
        return tuple(parts)

    @property
    def form(self) -> str | None:
        """How a structured value is written, such as HxW; None for a plain one."""
        if not self.structured:
            return None
        return "HxW" if self.kind == _SIZE else "LOW,HIGH"

    def write(self, value: Any) -> list[str]:
        """Return the words that give the field this value; none if it is empty, None or False."""
        if self.kind is bool:
            return [self.flag] if value else []
        values = value if self.repeated else () if value is None else (value,)
        return [word for one in values for word in (self.flag, self._write_one(one))]

    def _write_one(self, value: Any) -> str:
        if not self.structured:
            return str(value)
        return ("x" if self.kind == _SIZE else ",").join(map(str, value))


def find_option(schema: type[Section], name: str) -> Option:
    """Return the option of a section's field.

    Raises TypeError when the field's type or default cannot be an option's.
    """
    field = schema.model_fields[name]
    kind = _without_none(_bare(field.annotation))
    if kind is bool and field.default is not False:
        raise TypeError(f"{name}: an option can only switch on what is off by default")
    repeated = get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis
    one = _without_none(_bare(get_args(kind)[0])) if repeated else kind
    return Option(name, one, repeated, field)


def to_arguments(section: Section) -> list[str]:
    """Write the fields that a section sets as command-line arguments, without those left out."""
    return [
        word
        for name, value in section.changes().items()
        for word in find_option(type(section), name).write(value)
    ]


def parse_size(text: str, name: str = "size", unit: str = "pixels") -> tuple[int, int]:
    """Read a size: '56x42' → (56, 42). Raises InputError for anything else, which it names."""
    match = re.fullmatch(r"([0-9]+)x([0-9]+)", text.strip().lower())
    if not match or not (int(match[1]) and int(match[2])):
        raise InputError(
            f"{name} {text!r}: must be HEIGHTxWIDTH in whole {unit}, at least 1x1, such as 56x42"
        )
    return int(match[1]), int(match[2])


def _bare(annotation: Any) -> Any:
    """Return a type without what Annotated adds to it."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _without_none(annotation: Any) -> Any:
    """Return the type that an optional field has beside None."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    if kinds == [int, str]:  # a class, by its number or its name
        return int | str
    if len(kinds) != 1:
        raise TypeError(f"{annotation}: no option can be made of a field of several types")
    return _without_none(_bare(kinds[0]))


_SIZE = _bare(Size)
