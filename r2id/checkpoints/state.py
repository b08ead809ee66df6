"""Training state, in the form that all engines and checkpoints share.

It consists of float32 tensors under the model's own parameter names, whole or in the slices that
each rank holds.
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
    """A tensor, or consecutive elements of it."""

    values: Tensor
    """The elements: in the tensor's own shape when they are all of it, or else flat."""
    shape: Shape
    """Shape of the whole tensor."""
    start: int = 0
    """Index of the first of these elements in the flattened tensor."""

    @property
    def whole(self) -> bool:
        """Whether these are all elements of the tensor."""
        return self.values.numel() == math.prod(self.shape)


Slices = dict[str, Slice]


@dataclass(frozen=True)
class EngineState:
    """One rank's share of everything that training needs to resume.

    The shares of all ranks make up the whole state, without overlap. Its kinds of tensors are
    ``model`` (the weights and the model's buffers), ``ema`` and ``ema-SIGMA`` (averages of the
    weights, and the same buffers), ``discriminator`` (the weights of a loss's own network, if it
    trains one, under the names discriminator.NAME) and ``optimizer`` (Adam's moments of both, under
    the names exp_avg.NAME and exp_avg_sq.NAME).
    """

    parts: dict[str, Slices]
    """Kind → name → the elements that this rank holds."""
    step: int
    """Optimizer steps done."""


class Source(Protocol):
    """A whole state, such as a checkpoint, from which each rank reads what it holds."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    def kinds(self) -> list[str]:
        """Return the kinds of tensors that it holds."""

    def shapes(self, kind: str) -> dict[str, Shape]:
        """Return the shapes of a kind's tensors, by name. Raises InputError when there are none."""

    def read(self, kind: str, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """Read ``count`` elements (None: all the rest) of a flattened tensor from ``start`` on."""


@dataclass(frozen=True)
class Piece:
    """Where a rank holds a parameter, or consecutive elements of it.

    The ``count`` elements of parameter ``name`` from ``start`` on are those from ``offset`` on in
    the rank's tensor number ``master``; both are flattened.
    """

    name: str
    start: int
    count: int
    master: int
    offset: int

    def of(self, masters: Sequence[Tensor]) -> Tensor:
        """Return these elements, flat, of tensors with this layout; a view, not a copy."""
        return masters[self.master].view(-1)[self.offset : self.offset + self.count]


def whole_layout(shapes: Mapping[str, Shape]) -> list[Piece]:
    """Return the layout of a rank that holds every parameter as a tensor of its own."""
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
    """Cut tensors with this layout into slices, by parameter name; views, not copies."""
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
    """Read the elements of tensors with this layout from a source: the reverse of ``cut``."""
    for piece in layout:
        piece.of(masters).copy_(source.read(kind, prefix + piece.name, piece.start, piece.count))


def check_fits(
    source: Source,
    kinds: Mapping[str, Sequence[str]],
    shapes: Mapping[str, Shape],
    model: nn.Module,
) -> None:
    """Raise InputError when a state belongs to another model.

    Compares the names and shapes of parameters, and the names of buffers. ``kinds`` maps each kind
    to the prefixes under which it holds every parameter.
    """
    check_shapes(source, kinds, shapes)
    unknown = set(source.shapes("model")) - set(model.state_dict())
    if unknown:
        raise InputError(f"has {min(unknown)}, the model has not; it is of another model")
    missing = set(buffers(model)) - set(source.shapes("model"))
    if missing:
        raise InputError(f"has no {min(missing)}; it is of another model")


def check_shapes(
    source: Source, kinds: Mapping[str, Sequence[str]], shapes: Mapping[str, Shape]
) -> None:
    """Raise InputError unless a state holds parameters of these names and shapes.

    ``kinds`` maps each kind to the prefixes under which it holds every one of them.
    """
    for kind, prefixes in kinds.items():
        stored = source.shapes(kind)
        for name, shape in (
            (prefix + name, shape) for prefix in prefixes for name, shape in shapes.items()
        ):
            if name not in stored:
                raise InputError(f"has no {name}; it is of another model")
            if stored[name] != shape:
                raise InputError(
                    f"{name} has shape {stored[name]}, the model's is {shape}; it is of another "
                    "model"
                )


def buffers(model: nn.Module) -> Tensors:
    """Return the model's persistent buffers, by name. They are no weights, so never averaged."""
    parameters = {name for name, _ in model.named_parameters()}
    return {
        name: value.detach() for name, value in model.state_dict().items() if name not in parameters
    }


def whole(tensors: Tensors) -> Slices:
    """Make slices of tensors that this rank holds as a whole."""
    return {name: Slice(tensor, tuple(tensor.shape)) for name, tensor in tensors.items()}
