"""Reading and writing of configs: TOML files and ``section.key=value`` overrides."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from r2id.config.pipeline import PipelineRun, StageConfig
from r2id.config.renamed import (
    is_removed,
    renew_config,
    renew_setting,
    tell_if_renamed,
    tell_left_out,
)
from r2id.config.section import Section
from r2id.config.training import R2idRun, RiaeRun
from r2id.errors import InputError

SectionT = TypeVar("SectionT", bound=Section)
Run = RiaeRun | R2idRun | PipelineRun
_KINDS: dict[str, type[Run]] = {
    kind: schema
    for schema in get_args(Run)
    for kind in get_args(schema.model_fields["stage"].annotation)
}
"""A file's ``stage`` → its schema; each schema declares its own stage."""
_TRAINED = ("riae", "finetune", "r2id")
"""Tables of a pipeline whose other keys are overrides of a stage's own file."""


def schemas() -> dict[str, type[Run]]:
    """Return the schemas of configs, by their ``stage``."""
    return dict(_KINDS)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Run:
    """Read a TOML file, apply ``section.key=value`` overrides and validate.

    Overrides of a pipeline's stages are written ``riae.KEY=VALUE``, ``finetune.KEY=VALUE`` and
    ``r2id.KEY=VALUE``, where KEY is a key of that stage's own file. Raises InputError, which names
    the file, the key, the value and what is allowed.
    """
    return parse_config(_read_table(path), overrides, where=str(path))


def read_stage(path: Path) -> Any:
    """Return the ``stage`` that a file names, without looking at anything else in it."""
    return _read_table(path).get("stage")


def _read_table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such config file") from None
    except (
        IsADirectoryError,
        UnicodeDecodeError,
        PermissionError,
        tomllib.TOMLDecodeError,
    ) as error:
        raise InputError(f"{path}: not a readable TOML file: {error}") from None


def parse_config(
    table: dict[str, Any], overrides: Sequence[str] = (), where: str = "config"
) -> Run:
    """Validate a table that was read from a file; see load_config."""
    kind = table.get("stage")
    if kind not in _KINDS:
        raise InputError(
            f"{where}: stage = {kind!r}: must be one of {', '.join(map(repr, _KINDS))}"
        )
    if kind != "pipeline":
        table = renew_config(table, where)
    for override in overrides:
        _apply(table, override, pipeline=kind == "pipeline")
    try:
        return _KINDS[kind].model_validate(table)
    except ValidationError as error:
        raise InputError(f"{where}: {_explain(error, _KINDS[kind])}") from None


def build(schema: type[SectionT], values: Mapping[str, Any]) -> SectionT:
    """Make a section of these values and the defaults.

    Raises InputError when a value is not allowed.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise InputError(_explain(error, schema)) from None


def change(section: SectionT, changes: Mapping[str, Any]) -> SectionT:
    """Copy a section with some values replaced; raises InputError when one is not allowed.

    A default that follows from other values follows from the new ones.
    """
    values = section.model_dump()
    for name, field in type(section).model_fields.items():
        if field.default_factory_takes_validated_data:
            default = field.get_default(call_default_factory=True, validated_data=values)
            if values[name] == default:
                del values[name]
    return build(type(section), {**values, **changes})


def override(key: str, value: Any) -> str:
    """Write an override ``section.key=value`` that parse_config reads as this value."""
    return f"{key}={_value(value)}"


def _apply(table: dict[str, Any], override: str, pipeline: bool) -> None:
    """Set an override in a table; those of a pipeline's stages are appended to its ``set``."""
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        raise InputError(f"override {override!r}: must look like section.key=value")
    head, _, rest = name.partition(".")
    if pipeline and head in _TRAINED and rest not in StageConfig.model_fields:
        stage = table.setdefault(head, {})
        stage["set"] = [*stage.get("set", []), f"{rest}={text}"]
        return
    value = _parse_value(text)
    if not pipeline:
        if is_removed(name, value, f"override {override!r}"):
            tell_left_out(f"override {override!r}", name)
            return
        old_name, old = name, value
        name, value = renew_setting(name, value)
        tell_if_renamed(f"override {override!r}", old_name, old, name, value)
    *parents, key = name.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise InputError(f"override {override!r}: {parent} is a value, not a section")
    table[key] = value


def _parse_value(text: str) -> Any:
    """Read a TOML value; what is none is a string, so that paths need no quotes in a shell."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """Write pydantic's errors as one line: the key, its value, and what is allowed.

    Of several errors one is explained. Unknown keys come first, because a key that is missing may
    be one that is misspelt; then both are named.
    """
    order = {"extra_forbidden": 0, "missing": 2}
    # A default that another setting decides is an error, too, where that other one is wrong.
    own = [one for one in error.errors() if one["type"] != "default_factory_not_called"]
    errors = sorted(own, key=lambda found: order.get(found["type"], 1))
    first, missing = errors[0], [found for found in errors if found["type"] == "missing"]
    place = [str(part) for part in first["loc"]]
    name = ".".join(place)
    if first["type"] == "extra_forbidden":
        allowed = _fields_at(schema, place[:-1])
        near = difflib.get_close_matches(place[-1], allowed, n=1)
        meant = [f"{name}.{place[-1]}" for name in _sections_with(schema, place)] or near
        hint = f"; did you mean {' or '.join(map(repr, meant))}?" if meant else "."
        text = f"{name}: unknown key{hint} Allowed here: {', '.join(allowed)}"
        names = ", ".join(".".join(map(str, found["loc"])) for found in missing)
        return f"{text}; missing: {names}" if missing else text
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):
        return f"{'.'.join(place[:-1])}: has only {first['loc'][-1]} of the values that it takes"
    if first["type"] == "missing":
        names = ", ".join(".".join(map(str, found["loc"])) for found in missing)
        return f"{names}: missing, without a default"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "model_type":
        message = f"must be a table of {', '.join(_fields_at(schema, place))}"
    elif first["type"] == "tuple_type" and (fields := _fields_at(schema, place)):
        message = f"must be a list of tables in brackets, each of {', '.join(fields)}"
    elif first["type"] == "tuple_type":
        message = f"must be a list in brackets, such as {_example(first['input'], first['loc'])}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if isinstance(first["input"], dict):  # a section, whose message begins with its key
        return f"{name}.{message}{more}" if name else f"{message}{more}"
    return f"{name} = {first['input']!r}: {message}{more}"


def _example(value: Any, place: tuple[int | str, ...]) -> str:
    """Show how a list is written that was meant by one value, or by a size like 32x48."""
    if isinstance(place[-1], int):  # within another list
        return "[[32, 32], [64, 48]] for sizes"
    named = isinstance(value, str) and not value[:1].isdecimal()
    return _value([value]) if named else "[32, 32] for a size"


def _sections_with(schema: type[BaseModel], place: list[str]) -> list[str]:
    """Name the sections of a file that have the field that was written without its section."""
    if len(place) > 1:
        return []
    return [name for name in schema.model_fields if place[0] in _fields_at(schema, [name])]


def _fields_at(schema: type[BaseModel], place: list[str]) -> list[str]:
    """List the fields of the section at a place of a schema; none if that is no section."""
    for part in place:
        if part.isdigit():  # the number of a section in a list of them
            continue
        annotation = schema.model_fields[part].annotation
        if get_origin(annotation) is tuple:
            annotation = get_args(annotation)[0]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        schema = annotation
    return list(schema.model_fields)


def to_toml(config: BaseModel) -> str:
    """Write a whole config as TOML that load_config reads, without fields that are None."""
    return _table(config.model_dump(mode="json", exclude_none=True))


def _table(table: dict[str, Any], prefix: str = "") -> str:
    lines = [
        f"{_key(key)} = {_value(value)}"
        for key, value in table.items()
        if not isinstance(value, dict)
    ]
    for key, value in table.items():
        if isinstance(value, dict) and value:
            name = prefix + _key(key)
            lines += ["", f"[{name}]", _table(value, f"{name}.").strip("\n")]
    return "\n".join(lines) + "\n"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False)  # TOML has JSON's escapes
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_key(key)} = {_value(item)}' for key, item in value.items())}}}"
    return repr(value)
