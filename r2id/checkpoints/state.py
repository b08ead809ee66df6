"""Training state, in the one form that all engines and checkpoints share.

float32 tensors by the model's own parameter names, whole or in the slices that each rank holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from r2id.errors import InputError

Tensors = dict[str, Tensor]
Shape = tuple[int, ...]

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's moments, as torch names them."""


@dataclass(frozen=True)
class Slice:
    """A tensor, or a run of its flattened elements: those of ``values``, from ``start`` on."""

    values: Tensor
    """Of the tensor's own shape when it is whole, else flat."""
    shape: Shape
    """Shape of the whole tensor."""
    start: int = 0

    @property
    def whole(self) -> bool:
        """Whether it is the whole tensor."""
        return self.values.numel() == math.prod(self.shape)


Slices = dict[str, Slice]


@dataclass(frozen=True)
class EngineState:
    """One rank's share of all that training needs to resume.

    The shares of all ranks make up the whole state, without overlap. Kinds are ``model`` (weights
    and the model's buffers), ``ema`` and ``ema-SIGMA`` (averages of the weights, and the same
    buffers) and ``optimizer`` (names exp_avg.NAME and exp_avg_sq.NAME).
    """

    parts: dict[str, Slices]
    """Kind → name → elements."""
    step: int
    """Optimizer steps done."""


class Source(Protocol):
    """A whole state, such as a checkpoint, from which engines read what they hold."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    def shapes(self, kind: str) -> dict[str, Shape]:
        """Shapes of a kind's tensors, by name. Raises InputError when there are none."""

    def read(self, kind: str, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """Read ``count`` elements of a flattened tensor from ``start`` on (None: all the rest)."""


@dataclass(frozen=True)
class Piece:
    """Where a rank holds a parameter, or a part of one.

    ``count`` elements from ``offset`` on in the rank's flattened tensor number ``master`` are the
    parameter's elements from ``start`` on.
    """

    name: str
    start: int
    count: int
    master: int
    offset: int

    def of(self, masters: Sequence[Tensor]) -> Tensor:
        """The elements themselves, flat, in tensors that are laid out like this; no copy."""
        return masters[self.master].view(-1)[self.offset : self.offset + self.count]


def whole_layout(shapes: Mapping[str, Shape]) -> list[Piece]:
    """The layout of a rank that holds every parameter as a tensor of its own."""
    return [
        Piece(name, 0, math.prod(shape), number, 0)
        for number, (name, shape) in enumerate(shapes.items())
    ]


def cut(
    masters: Sequence[Tensor],
    layout: Sequence[Piece],
    shapes: Mapping[str, Shape],
    prefix: str = "",
) -> Slices:
    """Name the elements of tensors that are laid out like this; no copies."""
    slices = {}
    for piece in layout:
        values, shape = piece.of(masters).detach(), shapes[piece.name]
        whole = piece.count == math.prod(shape)
        slices[prefix + piece.name] = Slice(
            values.view(shape) if whole else values, shape, piece.start
        )
    return slices


def fill(
    masters: Sequence[Tensor], layout: Sequence[Piece], source: Source, kind: str, prefix: str = ""
) -> None:
    """Read a source's elements into tensors that are laid out like this: the reverse of ``cut``."""
    for piece in layout:
        piece.of(masters).copy_(source.read(kind, prefix + piece.name, piece.start, piece.count))


def check_fits(
    source: Source,
    kinds: Mapping[str, Sequence[str]],
    shapes: Mapping[str, Shape],
    model: nn.Module,
) -> None:
    """Raise InputError when a state is another model's.

    Names and shapes of parameters are compared, and names of buffers. ``kinds``: kind → prefixes
    under which it holds every parameter.
    """
    for kind, prefixes in kinds.items():
        found = source.shapes(kind)
        for name, shape in (
            (prefix + name, shape) for prefix in prefixes for name, shape in shapes.items()
        ):
            if name not in found:
                raise InputError(f"has no {name}; it is of another model")
            if found[name] != shape:
                raise InputError(
                    f"{name} has shape {found[name]}, the model's is {shape}; it is of another "
                    "model"
                )
    unknown = set(source.shapes("model")) - set(model.state_dict())
    if unknown:
        raise InputError(f"has {min(unknown)}, the model has not; it is of another model")
    missing = set(buffers(model)) - set(source.shapes("model"))
    if missing:
        raise InputError(f"has no {min(missing)}; it is of another model")


def buffers(model: nn.Module) -> Tensors:
    """The model's persistent buffers, by name. They are not weights, and so never averaged."""
    parameters = {name for name, _ in model.named_parameters()}
    return {
        name: value.detach() for name, value in model.state_dict().items() if name not in parameters
    }


def whole(tensors: Tensors) -> Slices:
    """Slices of tensors that this rank holds all of."""
    return {name: Slice(tensor, tuple(tensor.shape)) for name, tensor in tensors.items()}
