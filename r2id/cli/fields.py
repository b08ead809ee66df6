"""Options of a command that are generated from the fields of a config section.

The field owns the option's name, type, range, default and help. A command only says which sections
it takes::

    @app.command()
    @with_fields
    def sample(checkpoint: Checkpoint, settings: Annotated[Given, Fields(SampleConfig)]): ...
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args

import annotated_types
import typer

from r2id.config import Section
from r2id.config.arguments import Option, find_option

Given = dict[str, Any]
"""Field → value, of options that were given on the command line; defaults are not in it."""


@dataclass(frozen=True)
class Fields:
    """Marks a parameter of a command that stands for the options of a section's fields."""

    section: type[Section]
    only: tuple[str, ...] = ()
    """Names of the fields; empty for all of them."""
    without: tuple[str, ...] = ()
    """Names of fields that the command takes in another way."""
    unset: str = ""
    """The default that help names for these options; empty for each field's own."""

    def options(self) -> list[Option]:
        names = self.only or tuple(self.section.model_fields)
        return [find_option(self.section, name) for name in names if name not in self.without]


def with_fields(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter annotated with Fields by the options of its fields.

    The command receives Given in its place.
    """
    signature = inspect.signature(command, eval_str=True)
    markers = {
        name: marker
        for name, parameter in signature.parameters.items()
        for marker in get_args(parameter.annotation)
        if isinstance(marker, Fields)
    }

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        for name, marker in markers.items():
            options = [(option, values.pop(option.name)) for option in marker.options()]
            # What was not given is None, or empty for an option that may be repeated.
            values[name] = {
                option.name: option.read(value)
                for option, value in options
                if value is not None and value != [] and value != ()
            }
        command(**values)

    parameters = [
        replaced.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in signature.parameters.items()
        for replaced in (_parameters(markers[name]) if name in markers else [parameter])
    ]
    # Typer makes options from these, and not from the command's own.
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def _parameters(marker: Fields) -> Iterator[inspect.Parameter]:
    for option in marker.options():
        yield inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if option.field.is_required() else None,
            annotation=Annotated[_annotation(option), _typer_option(option, marker.unset)],
        )


def _annotation(option: Option) -> Any:
    """The type that typer reads: text for a value that Option.read makes something else of."""
    kind = str if option.structured or option.kind == int | str else option.kind
    if option.repeated:
        return list[kind] | None  # type: ignore[valid-type]
    return kind if option.field.is_required() else kind | None


def _typer_option(option: Option, unset: str) -> Any:
    bounds = _bounds(option)
    return typer.Option(
        option.flag,
        metavar=option.form,
        help=_help(option, unset),
        show_default=False,
        min=bounds.get("ge"),
        max=bounds.get("le"),
    )


def _bounds(option: Option) -> dict[str, Any]:
    """Inclusive limits of a number; pydantic checks all others when the section is made."""
    constraints = [*option.field.metadata]
    if option.repeated:
        item = get_args(option.field.annotation)[0]
        constraints += [
            inner for meta in get_args(item)[1:] for inner in getattr(meta, "metadata", ())
        ]
    if option.kind not in (int, float):
        return {}
    return {
        name: getattr(constraint, name)
        for constraint in constraints
        for name, kind in (("ge", annotated_types.Ge), ("le", annotated_types.Le))
        if isinstance(constraint, kind)
    }


def _help(option: Option, unset: str) -> str:
    """Write the option's help: the field's docstring and the default."""
    field = option.field
    if not field.description:
        raise TypeError(f"{option.name}: the field needs a docstring, which is the option's help")
    empty = field.default is None or field.default is False or field.default == ()
    default = unset or ("" if empty else str(field.default))
    sentences = [
        " ".join(field.description.split()).replace("``", ""),
        "May be repeated." if option.repeated else "",
        f"Default: {default}." if default and not field.is_required() else "",
    ]
    return " ".join(sentence for sentence in sentences if sentence)
