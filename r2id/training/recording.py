"""Recording R2ID's loss and its gradients as CUDA graphs, which are started as a whole.

Starting a step's kernels one by one takes the host longer than a GPU needs to compute a small
model. A recorded step copies its inputs to where the graph reads them, and starts one graph.

What is drawn at random stays outside, but for dropout: a graph takes its seed from torch's
generator whenever it is started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from r2id import constants
from r2id.config import R2idConfig, TrainConfig
from r2id.errors import InputError
from r2id.training.losses.r2id import R2idLoss

MOST = 4
"""Number of shapes that are recorded. Their graphs share the memory of activations, since one runs
at a time, but each keeps gradients of its own. What is not recorded cannot use that memory: other
shapes, and the passes before a recording."""
_WARM_UP = 3  # passes before a recording, in which compilers and libraries choose their kernels

Tensors = tuple[Tensor, ...]
Replay = Callable[[], None]


def recorded_loss(
    module: nn.Module, parameters: Sequence[Tensor], train: TrainConfig, device: torch.device
) -> RecordedLoss | None:
    """Return the recorded form of a loss in these parameters, or None if it is not recorded.

    Recorded is R2ID's on a GPU, if ``train.compile`` is auto or cuda_graphs, unless activations are
    computed again (which reads the generator's state on the host) or attention draws groups at
    random. Raises InputError where cuda_graphs was asked for and cannot be.
    """
    if (
        device.type == "cuda"
        and isinstance(module, R2idLoss)
        and records(train, module.model.config)
    ):
        return RecordedLoss(module, parameters, train.autocast)
    if train.compile == "cuda_graphs":
        raise InputError(
            "train.compile = 'cuda_graphs': records an R2ID on a GPU, without "
            "activation_checkpointing and attention 'cloud'; use 'auto'"
        )
    return None


def records(train: TrainConfig, r2id: R2idConfig) -> bool:
    """Tell whether one process on a GPU records the steps of an R2ID."""
    return (
        train.compile in ("auto", "cuda_graphs")
        and train.activation_checkpointing == "none"
        and "cloud" not in r2id.attention
    )


@dataclass(frozen=True)
class _Recording:
    """A recorded pass: where it reads its inputs, and where it leaves loss, figures, gradients."""

    replay: Replay
    inputs: dict[str, Tensor]
    loss: Tensor
    names: Sequence[str]
    figures: Sequence[Tensor]
    gradients: Tensors
    kept: Sequence[Any]
    """Constants that the graph reads, which must live as long as it does."""


class RecordedLoss:
    """Computes an R2idLoss and its gradients, recorded once for each shape of its inputs."""

    def __init__(self, module: R2idLoss, parameters: Sequence[Tensor], autocast: bool) -> None:
        self.module, self.parameters, self.autocast = module, list(parameters), autocast
        self._recordings: dict[tuple[Any, ...], _Recording] = {}
        self._last: _Recording | None = None
        self._pool: Any = None

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the figures of a micro-batch, as the module's ``forward`` does."""
        drawn = self.module.draw(**batch)
        key = tuple((name, value.shape, value.dtype) for name, value in drawn.items())
        if key not in self._recordings and len(self._recordings) < MOST:
            self._recordings[key] = self._record(drawn)
        self._last = self._recordings.get(key)
        if self._last is None:
            return self._evaluate(drawn)
        for name, value in drawn.items():
            self._last.inputs[name].copy_(value, non_blocking=True)
        self._last.replay()
        # The next micro-batch overwrites them.
        loss, *figures = torch._foreach_add([self._last.loss, *self._last.figures], 0.0)
        return loss, dict(zip(self._last.names, figures, strict=True))

    def backward(self, loss: Tensor, accumulation: int) -> None:
        """Add the gradients of the last ``forward`` / accumulation to those of the step."""
        if self._last is None:
            (loss / accumulation).backward()
            return
        found = self._last.gradients
        before = [p.grad for p in self.parameters if p.grad is not None]
        if before:
            torch._foreach_add_(before, list(found), alpha=1 / accumulation)
            return
        if accumulation > 1:  # else the next micro-batch would overwrite them
            found = torch._foreach_mul(found, 1 / accumulation)
        for parameter, gradient in zip(self.parameters, found, strict=True):
            parameter.grad = gradient

    def _evaluate(self, drawn: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        device = self.parameters[0].device
        # Weights are cast in each pass: a recording must not read what another pass has cast.
        with torch.autocast(
            device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=False
        ):
            return self.module.evaluate(**drawn)

    def _record(self, drawn: dict[str, Tensor]) -> _Recording:
        inputs = {name: value.clone() for name, value in drawn.items()}

        def run() -> tuple[Tensor, dict[str, Tensor], Tensors]:
            loss, figures = self._evaluate(inputs)
            gradients = torch.autograd.grad(loss, self.parameters)
            return loss.detach(), figures, gradients

        with constants.hold_cached() as kept:
            (loss, figures, gradients), replay, self._pool = record(run, self._pool)
        return _Recording(
            replay, inputs, loss, list(figures), list(figures.values()), gradients, kept
        )


def record(run: Callable[[], Any], pool: Any) -> tuple[Any, Replay, Any]:
    """Record what ``run`` starts on the GPU, in a memory pool of other recordings if there is one.

    Returns what it returns, which holds nothing yet, a function that does it all again with the
    same tensors, and the pool. The state of torch's generators is as before.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.random.fork_rng([torch.cuda.current_device()]), torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Threads that load data may use the GPU's driver meanwhile.
    with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
        result = run()
    return result, graph.replay, graph.pool()
