"""Memory and floating-point operations of a model, counted without computing anything.

The real modules run under FakeTensorMode, on tensors that have shapes but no contents. A ledger
notes the storage of every tensor when it is made and when it is freed. So no module may let a shape
depend on a tensor's values: torch then raises a DynamicOutputShapeException (``nonzero``, a boolean
index) or DataDependentOutputException (``item``), and its traceback names the line.

T is the number of moments of a step, each of which makes or frees a storage. Sizes are in bytes.
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
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from r2id.models.attention import plain_up_to

Case = Callable[[], tuple[nn.Module, dict[str, Any]]]
"""Makes the loss module of a stage, and the keyword arguments of one micro-batch for it."""


@dataclass(frozen=True)
class Trace:
    """Memory that a micro-batch's forward and backward pass holds: bytes by kind, int64 [T] each.

    The weights themselves are not in it.
    """

    activations: np.ndarray
    """Inputs, activations, and all that is in none of the other kinds."""
    casts: np.ndarray
    """Copies of weights in bfloat16, which autocast makes once per pass."""
    gradients: np.ndarray
    """Gradients of weights."""
    forward: int
    """How many of the moments belong to the forward pass."""

    def most(self) -> int:
        """Return the most bytes that are held at once."""
        return int((self.activations + self.casts + self.gradients).max())


def trace_step(case: Case, bfloat16: bool, as_on_gpu: bool = True) -> Trace:
    """Trace what a micro-batch's forward and backward pass keeps, moment by moment.

    Computes nothing and needs no GPU. ``bfloat16`` switches autocast on. ``as_on_gpu`` counts as
    for a GPU; a CPU's attention, norms and dropout keep other tensors.
    """
    with ExitStack() as stack:
        ledger = _enter(stack, as_on_gpu)
        module, inputs = case()
        ledger.weights = weights = {ledger.number(p) for p in module.parameters()}
        start = len(ledger.events)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss, _ = module(**inputs, step=0)
        forward = len(ledger.events) - start
        # Not loss.backward(), which the mode of a GPU's kernels would handle: a mode is off while
        # it handles a function, and blocks that are computed again would be computed otherwise.
        _engine_run_backward(
            (loss,),
            (torch.ones_like(loss),),
            False,
            False,
            (),
            allow_unreachable=True,
            accumulate_grad=True,
        )
        gradients = {ledger.number(p.grad) for p in module.parameters() if p.grad is not None}
        others = weights | gradients | ledger.casts
        activations, casts, gradient_bytes = (
            ledger.series(chosen)[start:]
            for chosen in (
                lambda number: number not in others,
                lambda number: number in ledger.casts,
                lambda number: number in gradients,
            )
        )
    return Trace(activations, casts, gradient_bytes, forward)


def trace_peak(work: Callable[[], Callable[[], Any]], as_on_gpu: bool = True) -> int:
    """Trace the most bytes held at once by a call of the function that ``work`` returns.

    What ``work`` itself made, such as weights, is not counted.
    """
    with ExitStack() as stack:
        ledger = _enter(stack, as_on_gpu)
        function = work()
        before, start = ledger.live(), len(ledger.events)
        function()
        return int(ledger.series(lambda _: True)[start:].max(initial=before)) - before


def count_flops(work: Callable[[], Callable[[], Any]]) -> int:
    """Count the floating-point operations of a call of the function that ``work`` returns.

    Only matrix products count, those of attention included; a multiplication with its addition is
    two operations. Computes nothing.
    """
    # Attention by plain products, because FlopCounterMode does not know every fused kernel.
    with FakeTensorMode(), plain_up_to(math.inf), torch.no_grad():
        function = work()
        with FlopCounterMode(display=False) as counter:
            function()
    return int(counter.get_total_flops())


def _enter(stack: ExitStack, as_on_gpu: bool) -> _Ledger:
    stack.enter_context(FakeTensorMode())
    if as_on_gpu:
        stack.enter_context(plain_up_to(0))
        stack.enter_context(_KernelsOfGpu())
    return stack.enter_context(_Ledger())


class _KernelsOfGpu(TorchFunctionMode):
    """Makes functions keep what a GPU's kernels keep for the backward pass, instead of a CPU's.

    Dropout keeps a mask of one byte per element; on a CPU, PyTorch's is of the input's dtype.
    RMSNorm keeps its input and one number per row, where a CPU's keeps every intermediate; a GPU's
    autocast has it compute in float32. Other functions that r2id uses have the same dtypes under
    both kinds of autocast (tests/models/test_autocast_of_cuda.py).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout and kwargs.get("training", True) and kwargs.get("p", 0.5) > 0:
            return torch.native_dropout(args[0], kwargs.get("p", 0.5), True)[0]
        if func is F.rms_norm:
            return _rms_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _rms_norm(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        x, weight = x.float(), None if weight is None else weight.float()
    # A CPU has no fused RMSNorm. LayerNorm keeps the same, and one more number per row.
    return torch.native_layer_norm(x, normalized_shape, weight, None, eps or 1e-6)[0]


class _Ledger(TorchDispatchMode):
    """Notes when the storage of every tensor that an operation returns is made, and when freed."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.events: list[int] = []
        """The number of a storage when it is made, and −1 − its number when it is freed."""
        self.weights: set[int] = set()
        self.casts: set[int] = set()
        self._numbers: dict[int, int] = {}  # of live storages, by their address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                number = self.number(tensor)
                if func is torch.ops.aten._to_copy.default and self.number(args[0]) in self.weights:
                    self.casts.add(number)
        return made

    def number(self, tensor: Tensor) -> int:
        """Number a tensor's storage; tensors that share one, such as views, share the number."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            self._numbers[key] = len(self.sizes)
            self.events.append(len(self.sizes))
            self.sizes.append(storage.nbytes())
            weakref.finalize(storage, self._note_freed, key)
        return self._numbers[key]

    def _note_freed(self, key: int) -> None:
        self.events.append(-1 - self._numbers.pop(key))

    def series(self, chosen: Callable[[int], bool]) -> np.ndarray:
        """Bytes of the chosen storages that are held after each event, int64."""
        changes = [
            self.sizes[event] if event >= 0 else -self.sizes[-1 - event] for event in self.events
        ]
        mine = [chosen(event if event >= 0 else -1 - event) for event in self.events]
        return np.cumsum(np.where(mine, changes, 0))

    def live(self) -> int:
        """Bytes held now."""
        return sum(self.sizes[number] for number in self._numbers.values())
