"""What all engines share: saving and loading state under the model's own names, averages, AdamW.

An engine trains a *loss module*: ``module(**batch)`` returns (scalar loss, dict of detached
figures), and ``module.model`` holds the trained weights. Each of these must have a gradient in
every step, be it 0: engines treat missing ones differently. Masters, moments and averages are
always float32; bfloat16 is used in the forward pass only. Each rank saves and loads its own share,
so that any engine, with any number of ranks, can go on from any other's checkpoint, and no rank
needs the memory for the whole state.

A loss may have a network of its own that learns beside the model, ``module.discriminator``. It is
trained by the same optimizer, in groups of its own, and saved as another kind of tensors: nothing
that loads a model meets it, and a run with other weights to begin with (``init_from``) begins with
a new one.

A loss may freeze parts of the model: it lists their parameters in ``module.frozen`` and
gives them gradients of 0. They stay in the optimizer, so that checkpoints of all runs look alike.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
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
    check_shapes,
    cut,
    fill,
    whole,
)
from r2id.config import OptimConfig, TrainConfig
from r2id.errors import InputError, NonFiniteError
from r2id.training.ema import Ema, decays

DISCRIMINATOR = "discriminator"
"""Kind of tensors in checkpoints, and, with a dot, the prefix of their names."""

_DISCRIMINATOR_BETAS = (0.0, 0.99)
"""Adam's decays for a discriminator: no momentum, because what it learns against moves (as
StyleGAN's; Karras et al. 2019, arXiv:1812.04948)."""


class Engine(ABC):
    """The interface between the training loop and an engine.

    In a job of several processes every process calls every method. An engine updates float32
    *masters*: the weights themselves, or flat shares of them. Moments and averages have the layout
    of the masters, so that one list of pieces tells where a parameter's elements are in all three.
    """

    device: torch.device
    model: nn.Module
    optimizer: torch.optim.Optimizer
    shapes: dict[str, Shape]
    """Shapes of the trained parameters, by name; a discriminator's are in it too."""
    discriminator_start: int = 0
    """Step at which a discriminator begins to learn."""
    masters: list[Tensor]
    layout: list[Piece]
    """Which elements of the parameters this rank's masters hold."""
    ema: Ema
    """Averages of the masters. A callback updates them (r2id.training.callbacks.averages)."""
    steps: int = 0
    """Optimizer steps done."""

    @abstractmethod
    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensors]:
        """Run the forward pass of a micro-batch that is on the device → (loss, figures)."""

    @abstractmethod
    def backward(self, loss: Tensor, accumulation: int) -> None:
        """Add the gradients of loss / accumulation to those of the step."""

    def step(self, lr: float, step: int) -> Tensor:
        """Clip the gradients and update the weights, in optimizer step ``step`` (from 0).

        Call it after the step's last micro-batch. Returns the gradient norm before clipping, a
        scalar on the device. Gradients that are not finite never reach the weights: every rank
        raises NonFiniteError, and the engine can make more steps afterwards. On a GPU in one
        process, the error comes with ``confirm``, or with the next call, before that call changes
        anything.
        """
        self.steps = step + 1
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Adam corrects its averages by their number of steps. Engines count steps that are skipped,
        # or have no gradients, in different ways, and a resumed one cannot know.
        for start, counts in self._step_counts:
            torch._foreach_zero_(counts)
            torch._foreach_add_(counts, float(max(0, step - start)))
        return self._update(step)

    @cached_property
    def _step_counts(self) -> list[tuple[int, list[Tensor]]]:
        """Adam's counts of steps, with the step in which training of their weights begins."""
        found = []
        for kind, start in (("model", 0), (DISCRIMINATOR, self.discriminator_start)):
            numbers = {piece.master for piece in self._pieces(kind)}
            counts = [self.optimizer.state[self.masters[number]]["step"] for number in numbers]
            if counts:
                found.append((start, counts))
        return found

    def confirm(self) -> None:  # noqa: B027  (most engines know at once)
        """Raise NonFiniteError, once, if the last step's gradient was not finite.

        Call it before the state is read.
        """

    def state(self) -> EngineState:
        """Return this rank's share of the state.

        Its tensors are not copies: the next step changes them.
        """
        parts: dict[str, Slices] = {}
        for kind, prefix, values in self._tracked():
            own = self._own(self._pieces(kind))
            if own:
                parts.setdefault(kind, {}).update(cut(values, own, self.shapes, prefix))
        if dist.is_main():
            for kind in ("model", *self.ema.averages):
                parts.setdefault(kind, {}).update(whole(buffers(self.model)))
        return EngineState(parts, self.steps)

    def check(self, source: Source) -> None:
        """Raise InputError when a state belongs to another model or has other averages."""
        moments = {"optimizer": tuple(f"{moment}." for moment in MOMENTS)}
        self._check_model(source, moments | dict.fromkeys(("model", *self.ema.averages), ("",)))
        others = self._shapes(DISCRIMINATOR)
        if others and DISCRIMINATOR not in source.kinds():
            raise InputError(
                "has no discriminator, and loss.discriminator asks for one: it is of a run without "
                "it; begin another run from its weights with init_from"
            )
        if others:
            check_shapes(source, moments | {DISCRIMINATOR: ("",)}, others)

    @torch.no_grad()
    def load(self, source: Source) -> None:
        """Load a state that has passed ``check``; each rank reads what it holds."""
        for kind, prefix, values in self._tracked():
            fill(values, self._pieces(kind), source, kind, prefix)
        for kind in ("model", DISCRIMINATOR):
            self._set_weights(source, kind, list(self._shapes(kind)))
        self._set_buffers(source, "model")
        self.steps = source.step

    def check_averages(self, source: Source) -> None:
        """Raise InputError when averaged weights belong to another model."""
        self._check_model(source, {"ema": ("",)})

    @torch.no_grad()
    def load_averages(self, source: Source) -> None:
        """Load the averaged weights of another run, which must fit, as the model's.

        Its own averages begin with the same weights. Moments and steps stay as they are at step 0,
        and a discriminator stays new.
        """
        for values in (self.masters, *self.ema.averages.values()):
            fill(values, self._pieces("model"), source, "ema")
        self._set_weights(source, "ema", list(self._shapes("model")))
        self._set_buffers(source, "ema")

    @torch.no_grad()
    def ema_state(self, kind: str = "ema") -> Tensors | None:
        """Gather one of the averages, by default what sampling uses, with the model's buffers.

        Returns whole tensors on the CPU of rank 0, and None on other ranks, which must call it too.
        """
        pieces = {piece.name: piece for piece in self.layout}
        averages: Tensors = {}
        for name, shape in self._shapes("model").items():
            # One parameter at a time, so that no rank's device holds the whole model once more.
            full = torch.zeros(math.prod(shape), device=self.device)
            if name in pieces:
                piece = pieces[name]
                full[piece.start : piece.start + piece.count] = piece.of(self.ema.averages[kind])
            full = full if self._replicated() else dist.all_reduce_sum(full)
            if dist.is_main():
                averages[name] = full.view(shape).cpu()
        return {**averages, **buffers(self.model)} if dist.is_main() else None

    def _track_masters(self, module: nn.Module, train: TrainConfig) -> None:
        """Make the moments and averages of the masters; constructors call it at their end."""
        fill_moments(self.optimizer, self.masters)
        self.discriminator_start = getattr(discriminator_of(module), "start", 0)
        self.ema = Ema(self.masters, decays(train))

    def _tracked(self) -> list[tuple[str, str, list[Tensor]]]:
        """List what is saved → (kind, prefix of names, tensors with the layout of the masters)."""
        state = self.optimizer.state
        moments = [
            ("optimizer", f"{moment}.", [state[master][moment] for master in self.masters])
            for moment in MOMENTS
        ]
        averages = [(kind, "", values) for kind, values in self.ema.averages.items()]
        weights = [(kind, "", self.masters) for kind in ("model", DISCRIMINATOR)]
        return [*weights, *moments, *averages]

    def _check_model(self, source: Source, kinds: dict[str, tuple[str, ...]]) -> None:
        check_fits(source, kinds, self._shapes("model"), self.model)

    def _shapes(self, kind: str) -> dict[str, Shape]:
        """Return the parameters that a kind of tensors in checkpoints holds, and their shapes."""
        return {name: shape for name, shape in self.shapes.items() if _belongs(name, kind)}

    def _pieces(self, kind: str) -> list[Piece]:
        """List this rank's pieces of these parameters."""
        return [piece for piece in self.layout if _belongs(piece.name, kind)]

    def _own(self, pieces: list[Piece]) -> list[Piece]:
        """Return those of the pieces that this rank saves: every element is saved by one rank."""
        return pieces[dist.rank() :: dist.world_size()] if self._replicated() else pieces

    def _set_buffers(self, source: Source, kind: str) -> None:
        shapes = source.shapes(kind)
        values = {name: source.read(kind, name).view(shapes[name]) for name in buffers(self.model)}
        self.model.load_state_dict(values, strict=False)  # not strict: there are no parameters

    @abstractmethod
    def _update(self, step: int) -> Tensor:
        """Clip the gradients, update the masters and drop the gradients; see ``step``."""

    @abstractmethod
    def _replicated(self) -> bool:
        """Tell whether every rank holds all masters, rather than a share of them."""

    @abstractmethod
    def _set_weights(self, source: Source, kind: str, names: list[str]) -> None:
        """Set weights of the forward pass, where they are not the masters themselves."""


def make_optimizer(module: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Make AdamW (Loshchilov & Hutter 2019) for a loss module, with weight decay for matrices only.

    Parameters of norms, biases and embeddings do not decay, nor do frozen ones or a discriminator.
    That has a group of its own, so that DeepSpeed's flat masters hold parameters of one network
    only.
    """
    model, discriminator = trained_model(module), discriminator_of(module)
    kept = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    kept |= {id(parameter) for parameter in getattr(module, "frozen", [])}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or id(parameter) in kept
            (others if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
        {
            "params": list(discriminator.parameters()) if discriminator else [],
            "weight_decay": 0.0,
            "betas": _DISCRIMINATOR_BETAS,
        },
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=optim.lr, betas=optim.betas, fused=True
    )


def fill_moments(optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor]) -> None:
    """Give every tensor its Adam state before the first step.

    Torch makes it in the first step, which is too late for loading and saving a state before that.
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


def discriminator_of(module: nn.Module) -> nn.Module | None:
    """Return the network that a loss module trains beside the model, if it has one."""
    return getattr(module, DISCRIMINATOR, None)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters that a loss module trains, by name; a discriminator's come last."""
    parameters = dict(trained_model(module).named_parameters())
    discriminator = discriminator_of(module)
    if discriminator is not None:
        parameters |= discriminator.named_parameters(DISCRIMINATOR)
    return {name: value for name, value in parameters.items() if value.requires_grad}


def _belongs(name: str, kind: str) -> bool:
    """Tell whether a kind of tensors in checkpoints holds a parameter."""
    return kind == "optimizer" or name.startswith(f"{DISCRIMINATOR}.") == (kind == DISCRIMINATOR)


def raise_unless_finite(norm: float, step: int) -> None:
    """Raise NonFiniteError when the gradient norm of a step is infinite or not a number."""
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"step {step}: the gradient norm is {norm}; stopped before the update; a lower "
            "optim.lr or train.precision = 'float32' may help",
            step,
        )
