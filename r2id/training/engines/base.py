"""What every engine does: state in and out by the model's own names, averages, clipping and AdamW.

An engine trains a *loss module*: ``module(**batch)`` returns (scalar loss, dict of detached
figures), and ``module.model`` holds the trained weights. Masters, moments and averages are float32
everywhere; bfloat16 is autocast of the forward pass. Each rank saves and loads its own share, so
any engine at any number of ranks goes on from any other's checkpoint and none gathers the whole.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from r2id import dist
from r2id.checkpoints.state import (
    MOMENTS,
    EngineState,
    Piece,
    Shape,
    Slices,
    Source,
    Tensors,
    buffers,
    check_fits,
    cut,
    fill,
    whole,
)
from r2id.config import OptimConfig, TrainConfig
from r2id.errors import NonFiniteError
from r2id.training.ema import Ema, decays


class Engine(ABC):
    """What the training loop knows of an engine. In a job of many processes all call every method.

    An engine updates float32 *masters*: the weights themselves, or flat shares of them. Moments and
    averages are laid out as the masters are, so that one list of pieces tells where each
    parameter's elements are in all of them.
    """

    device: torch.device
    model: nn.Module
    optimizer: torch.optim.Optimizer
    shapes: dict[str, Shape]
    """Shapes of the trained parameters, by name."""
    masters: list[Tensor]
    layout: list[Piece]
    """Which elements of the parameters this rank's masters hold."""
    ema: Ema
    """Averages of the masters, which a callback moves (r2id.training.callbacks.averages)."""
    steps: int = 0
    """Optimizer steps done."""

    @abstractmethod
    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensors]:
        """Run one micro-batch that is on the device → (loss, figures)."""

    @abstractmethod
    def backward(self, loss: Tensor, accumulation: int) -> None:
        """Add a micro-batch's share, loss / accumulation, to the step's gradients."""

    def step(self, lr: float, step: int) -> Tensor:
        """Clip the gradients, then update the weights: optimizer step ``step`` (from 0).

        To be called after the step's last micro-batch. Returns the gradient norm before clipping, a
        scalar on the device. A norm that is not finite never reaches the weights: NonFiniteError on
        every rank, here or, on a GPU in one process, at the next call, before that does anything.
        The engine is good for more steps afterwards.
        """
        self.steps = step + 1
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return self._update(step)

    def state(self) -> EngineState:
        """Return this rank's share of the state: the very tensors that the next step changes."""
        parts: dict[str, Slices] = {}
        for kind, prefix, values in self._tracked():
            parts.setdefault(kind, {}).update(cut(values, self._own(), self.shapes, prefix))
        if dist.is_main():
            for kind in ("model", *self.ema.averages):
                parts[kind].update(whole(buffers(self.model)))
        return EngineState(parts, self.steps)

    def check(self, source: Source) -> None:
        """Raise InputError when a state is another model's, or has other averages."""
        kinds = {"optimizer": tuple(f"{moment}." for moment in MOMENTS), "model": ("",)}
        check_fits(source, kinds | dict.fromkeys(self.ema.averages, ("",)), self.shapes, self.model)

    @torch.no_grad()
    def load(self, source: Source) -> None:
        """Take over a state that fits; each rank reads what it holds."""
        for kind, prefix, values in self._tracked():
            fill(values, self.layout, source, kind, prefix)
        for master in self.masters:
            self.optimizer.state[master]["step"].fill_(source.step)
        self._set_weights(source, "model")
        self._set_buffers(source, "model")
        self.steps = source.step

    @torch.no_grad()
    def load_weights(self, source: Source, kind: str) -> None:
        """Begin with the weights of a kind (``model``, ``ema``) of another run, which must fit.

        Averages begin there too. Moments and steps stay those of a run that has not begun.
        """
        for values in (self.masters, *self.ema.averages.values()):
            fill(values, self.layout, source, kind)
        self._set_weights(source, kind)
        self._set_buffers(source, kind)

    @torch.no_grad()
    def ema_state(self) -> Tensors | None:
        """Gather the averaged weights that sampling uses, with the model's buffers.

        Whole, on rank 0's CPU; None on the other ranks, which must call it too.
        """
        pieces = {piece.name: piece for piece in self.layout}
        averages: Tensors = {}
        for name, shape in self.shapes.items():
            full = torch.zeros(math.prod(shape), device=self.device)
            if name in pieces:
                piece = pieces[name]
                full[piece.start : piece.start + piece.count] = piece.of(self.ema.averages["ema"])
            full = full if self._replicated() else dist.all_reduce_sum(full)
            if dist.is_main():
                averages[name] = full.view(shape).cpu()
        return {**averages, **buffers(self.model)} if dist.is_main() else None

    def _track_masters(self, train: TrainConfig) -> None:
        """Make the moments and averages of the masters: the last thing that a constructor does."""
        fill_moments(self.optimizer, self.masters)
        self.ema = Ema(self.masters, decays(train))

    def _tracked(self) -> list[tuple[str, str, list[Tensor]]]:
        """List all that is saved: (kind, prefix of the names, tensors laid out as the masters)."""
        state = self.optimizer.state
        moments = [
            ("optimizer", f"{moment}.", [state[master][moment] for master in self.masters])
            for moment in MOMENTS
        ]
        averages = [(kind, "", values) for kind, values in self.ema.averages.items()]
        return [("model", "", self.masters), *moments, *averages]

    def _own(self) -> list[Piece]:
        """Return the pieces that this rank saves: each parameter's elements are saved once."""
        return self.layout[dist.rank() :: dist.world_size()] if self._replicated() else self.layout

    def _set_buffers(self, source: Source, kind: str) -> None:
        shapes = source.shapes(kind)
        held = {name: source.read(kind, name).view(shapes[name]) for name in buffers(self.model)}
        self.model.load_state_dict(held, strict=False)

    @abstractmethod
    def _update(self, step: int) -> Tensor:
        """Clip the gradients, update the masters and forget the gradients; see ``step``."""

    @abstractmethod
    def _replicated(self) -> bool:
        """Tell whether every rank holds everything."""

    @abstractmethod
    def _set_weights(self, source: Source, kind: str) -> None:
        """Set the weights that the forward pass uses, where they are not the masters."""


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Make an AdamW (Loshchilov & Hutter 2019) that decays matrices alone.

    Norms, biases and embeddings are left as they are.
    """
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or id(parameter) in embeddings
            (others if plain else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=optim.lr, betas=optim.betas, fused=True
    )


def fill_moments(optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor]) -> None:
    """Give every tensor its Adam state before the first step.

    Torch makes it at that step only, and a state is to be loaded or saved before.
    """
    for tensor in tensors:
        optimizer.state[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
            "exp_avg": torch.zeros_like(tensor),
            "exp_avg_sq": torch.zeros_like(tensor),
        }


def trained_model(module: nn.Module) -> nn.Module:
    """Return the model that a loss module trains."""
    model = module.model
    if not isinstance(model, nn.Module):
        raise TypeError(f"{type(module).__name__}.model: must be a module")
    return model


def raise_unless_finite(norm: float, step: int) -> None:
    """Raise NonFiniteError for the gradient norm of a step that is infinite or not a number."""
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"step {step}: the gradient norm is {norm}; stopped before the update, the last "
            "checkpoint is good; a lower optim.lr or train.precision = 'float32' may help",
            step,
        )
