"""Memory and operations of a model's work, counted by running it on tensors that have sizes and no
contents.

The real modules run under FakeTensorMode, and every tensor's storage is noted as it comes and goes.
So no module may let a shape depend on a tensor's values: torch then raises a
DynamicOutputShapeException (``nonzero``, a boolean index) or DataDependentOutputException
(``item``), and its traceback names the line.

Letters: T moments of a step. All sizes are bytes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from r2id.models.attention import plain_up_to

Case = Callable[[], tuple[nn.Module, dict[str, Any]]]
"""→ a stage module, and keyword arguments of one micro-batch for it."""


@dataclass(frozen=True)
class Trace:
    """One micro-batch's forward and backward pass: bytes that live, int64 [T] each, by kind."""

    activations: np.ndarray
    """Inputs, activations, and all that comes and goes."""
    casts: np.ndarray
    """Copies of weights in bfloat16, which autocast makes once a pass."""
    gradients: np.ndarray
    """Of weights."""
    forward: int
    """Moments of the forward pass."""


def trace_step(case: Case, bfloat16: bool, as_on_gpu: bool = True) -> Trace:
    """What a micro-batch's forward and backward pass keeps, moment by moment. Computes nothing and
    needs no GPU.

    ``bfloat16`` is autocast. Without ``as_on_gpu``, as on a CPU, whose attention and dropout keep
    other things.
    """
    with ExitStack() as stack:
        ledger = _enter(stack, as_on_gpu)
        module, inputs = case()
        ledger.weights = weights = {ledger.number(p) for p in module.parameters()}
        start = len(ledger.events)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss, _ = module(**inputs, step=0)
        forward = len(ledger.events) - start
        loss.backward()
        gradients = {ledger.number(p.grad) for p in module.parameters() if p.grad is not None}
        known = weights | gradients | ledger.casts
        activations, casts, of_weights = (
            ledger.series(chosen)[start:]
            for chosen in (
                lambda number: number not in known,
                lambda number: number in ledger.casts,
                lambda number: number in gradients,
            )
        )
    return Trace(activations, casts, of_weights, forward)


def trace_peak(work: Callable[[], Callable[[], Any]], as_on_gpu: bool = True) -> int:
    """Most bytes that live at once in a call of what ``work`` makes, beside those from before."""
    with ExitStack() as stack:
        ledger = _enter(stack, as_on_gpu)
        function = work()
        before, start = ledger.live(), len(ledger.events)
        function()
        return int(ledger.series(lambda _: True)[start:].max(initial=before)) - before


def count_flops(work: Callable[[], Callable[[], Any]]) -> int:
    """Count floating-point operations of matrix products in a call of what ``work`` makes.

    Attention is among them, and a multiplication with its addition is two. Computes nothing.
    """
    with FakeTensorMode(), plain_up_to(math.inf), torch.no_grad():
        function = work()
        with FlopCounterMode(display=False) as counter:
            function()
    return int(counter.get_total_flops())


def _enter(stack: ExitStack, as_on_gpu: bool) -> _Ledger:
    stack.enter_context(FakeTensorMode())
    if as_on_gpu:
        stack.enter_context(plain_up_to(0))
        stack.enter_context(_FusedDropout())
    return stack.enter_context(_Ledger())


class _FusedDropout(TorchFunctionMode):
    """Dropout as on a GPU, where its mask takes one byte an element; on a CPU it is of the input's
    own type."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout and kwargs.get("training", True) and kwargs.get("p", 0.5) > 0:
            return torch.native_dropout(args[0], kwargs.get("p", 0.5), True)[0]
        return func(*args, **kwargs)


class _Ledger(TorchDispatchMode):
    """Notes the storage of every tensor that an operation makes, when it comes and when it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.events: list[int] = []
        """The number of a storage that comes, −1 − the number of one that goes."""
        self.weights: set[int] = set()
        self.casts: set[int] = set()
        self._numbers: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                number = self.number(tensor)
                if func is torch.ops.aten._to_copy.default and self.number(args[0]) in self.weights:
                    self.casts.add(number)
        return made

    def number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            self._numbers[key] = len(self.sizes)
            self.events.append(len(self.sizes))
            self.sizes.append(storage.nbytes())
            weakref.finalize(storage, self._gone, key)
        return self._numbers[key]

    def _gone(self, key: int) -> None:
        self.events.append(-1 - self._numbers.pop(key))

    def series(self, chosen: Callable[[int], bool]) -> np.ndarray:
        """Bytes of the chosen storages that live after each event, int64."""
        changes = [
            self.sizes[event] if event >= 0 else -self.sizes[-1 - event] for event in self.events
        ]
        mine = [chosen(event if event >= 0 else -1 - event) for event in self.events]
        return np.cumsum(np.where(mine, changes, 0))

    def live(self) -> int:
        return sum(self.sizes[number] for number in self._numbers.values())
