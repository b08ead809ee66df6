"""The settings of a config, with their types, defaults and descriptions, from the schemas alone."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from r2id.config.files import Run, override, schemas
from r2id.config.section import Section
from r2id.errors import InputError


@dataclass(frozen=True)
class Setting:
    """One setting of a config."""

    name: str
    """Its key, as ``section.key``."""
    type: str
    default: str | None
    """As it is written in a config; None where there is none."""
    description: str
    value: str | None = None
    """What a given config sets it to; None where it keeps the default."""


def list_settings(stage: str, config: Run | None = None) -> list[dict[str, Any]]:
    """Return the settings of a stage's configs, with what a ``config`` sets them to.

    Raises InputError for an unknown stage.
    """
    known = schemas()
    if stage not in known:
        raise InputError(f"stage {stage!r}: must be one of {', '.join(known)}")
    values = config.model_dump() if config is not None else {}
    return [asdict(setting) for setting in _settings(known[stage], values, "")]


def _settings(schema: type[BaseModel], values: dict[str, Any], prefix: str) -> Iterator[Setting]:
    for name, field in schema.model_fields.items():
        inner = _section(field)
        if inner is not None:
            yield from _settings(inner, values.get(name) or {}, f"{prefix}{name}.")
        elif not (prefix == "" and name == "stage"):
            default = _default(field)
            given = _text(values[name]) if name in values else default
            yield Setting(
                prefix + name,
                _words(_annotation(field)),
                default,
                _first_sentence(field.description or ""),
                given if given != default else None,
            )


def _section(field: FieldInfo) -> type[Section] | None:
    """Return the schema of a table of settings; None for a plain setting."""
    optional = get_origin(field.annotation) in (Union, types.UnionType)
    for kind in get_args(field.annotation) if optional else (field.annotation,):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _annotation(field: FieldInfo) -> Any:
    """Return a field's type together with its limits, which pydantic takes out of it."""
    kind: Any = field.annotation
    return Annotated[kind, *field.metadata] if field.metadata else kind


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    if field.default_factory_takes_validated_data:
        return "follows from other settings"
    return _text(field.get_default(call_default_factory=True))


def _text(value: Any) -> str:
    """Write a value as a config does; what TOML cannot say is none."""
    return "none" if value is None else override("", value).removeprefix("=")


def _words(kind: Any, limits: str = "") -> str:
    """Write a type in words, with the values that it allows."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        found = [sign + _text(limit) for meta in inner[1:] for sign, limit in _limits(meta)]
        return _words(inner[0], limits or " and ".join(found))
    if origin is Literal:
        return " | ".join(map(_text, inner))
    if origin in (Union, types.UnionType):
        rest = [part for part in inner if part is not type(None)]
        return " | ".join(_words(part, limits) for part in rest)
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return f"list of {_words(inner[0])}"
        return f"[{', '.join(_words(part) for part in inner)}]"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "{" + ", ".join(kind.model_fields) + "}"
    named = {str: "text", Path: "path", bool: "true | false", int: "integer", float: "number"}
    return f"{named.get(kind, 'table')} {limits}".strip()


def _limits(meta: Any) -> Iterator[tuple[str, Any]]:
    """List the signs and numbers of what an annotation says of a number."""
    for part in (meta, *getattr(meta, "metadata", ())):
        for name, sign in (("ge", "≥ "), ("gt", "> "), ("le", "≤ "), ("lt", "< ")):
            if (limit := getattr(part, name, None)) is not None:
                yield sign, limit


def _first_sentence(text: str) -> str:
    plain = " ".join(text.split()).replace("``", "")
    return re.split(r"(?<=\.) (?=[A-Z])", plain, maxsplit=1)[0]
