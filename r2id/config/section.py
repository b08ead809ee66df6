"""The base of all config tables, and the types of their values. Sizes are (height, width)."""

from __future__ import annotations

from numbers import Integral
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MOST_PIXELS = 400_000_000
"""Of any image that is decoded; as many take 1.2 GB."""


def as_path(value: Any) -> Any:
    """Convert a string of a TOML file to a path; strict validation refuses strings."""
    return Path(value) if isinstance(value, str) and value else value


def as_tuple(value: Any) -> Any:
    """Convert lists of a TOML file, and lists in them, to tuples; strict validation refuses lists.

    Tuples keep a frozen section unchangeable.
    """
    return tuple(as_tuple(item) for item in value) if isinstance(value, list) else value


def as_several(value: Any) -> Any:
    """Convert a single number to a tuple of one, and lists as as_tuple does."""
    return (value,) if isinstance(value, int | float) else as_tuple(value)


def as_label(value: Any) -> int | str:
    """Return the name or number of a class; raise ValueError for what is none.

    A text stays a text, also one of digits: only the model's names tell whether it is one of them.
    """
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError("must be the name of a class, or its number from 0 on")


def as_int(value: Any) -> Any:
    """Convert a whole number of another type, such as NumPy's; strict validation refuses them."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def check_scales(scales: tuple[float, float]) -> tuple[float, float]:
    """Raise ValueError unless 0 < smallest ≤ largest."""
    if not 0 < scales[0] <= scales[1]:
        raise ValueError("must be positive, the smaller first")
    return scales


def check_seeds(first: int, count: int) -> None:
    """Raise ValueError when the last of ``count`` seeds is beyond the largest one."""
    largest = 2**63 - count
    if first > largest:
        raise ValueError(f"seed = {first}: must be at most {largest} for {count} samples")


PathField = Annotated[Path, BeforeValidator(as_path)]
Size = Annotated[
    tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], BeforeValidator(as_tuple)
]
Sizes = Annotated[tuple[Size, ...], BeforeValidator(as_tuple)]
Pair = Annotated[tuple[float, float], BeforeValidator(as_tuple)]
Scales = Annotated[Pair, AfterValidator(check_scales)]
"""Smallest and largest factor that a side of an image is multiplied by."""
IntPair = Annotated[tuple[int, int], BeforeValidator(as_tuple)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""Seeds are int64 in tensors."""
Guidance = Annotated[float, Field(ge=0, le=100)]
"""Scales beyond these say nothing: at 100 the condition alone decides already."""
Label = Annotated[int | str, BeforeValidator(as_label)]
"""A class: its number, or its name."""
Labels = Annotated[tuple[Label, ...], BeforeValidator(as_tuple)]
Guidances = Annotated[tuple[Guidance, ...], BeforeValidator(as_several)]
"""A single number need not be in brackets."""
Strings = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
# Widths σ_rel of power-function averages: their exponent, which is 0 for equal weights, would be
# negative from 0.2887 on (Karras et al. 2024).
Widths = Annotated[tuple[Annotated[float, Field(gt=0, lt=0.28)], ...], BeforeValidator(as_tuple)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Fraction0 = Annotated[float, Field(ge=0, le=1)]
Solver = Literal["ddim", "dpmpp_2m", "euler", "heun"]


class Section(BaseModel):
    """A table of a TOML file: frozen; unknown keys and wrong types are errors.

    The docstring of a field is its description, which commands show as help.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def changes(self, mode: Literal["python", "json"] = "python") -> dict[str, Any]:
        """Return the values that were set, by name, without those that are left to defaults."""
        return self.model_dump(mode=mode, exclude_unset=True)
