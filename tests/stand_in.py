"""A stand-in for one CUDA GPU, for machines without any: what runs here has no CPU tensor astray.

``with stand_in_gpu() as counts:`` makes PyTorch say that there is a GPU. Tensors moved to it, or
made on it, are StandIns: they say that they are on cuda:0, compute on the CPU, and refuse to mix
with CPU tensors as a GPU's do. Autocast casts as on CUDA, and ``counts`` tells how many kernels
were launched and where the host waited for the device. After the block nothing is changed.

Kernels are PyTorch's operations on StandIns, but for views. That is what a GPU launches within a
few per cent: some operations take two or three kernels there, above all backward passes.

Of this process's threads only the one that entered the block can make StandIns.

With ``R2ID_TEST_GPU=1`` in the environment the block is on a real GPU instead, which PyTorch does
not show outside of it. Nothing is counted or compiled then.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # its import looks at what is replaced here
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import r2id
from r2id.training.engines import local

GPU = torch.device("cuda:0")
_PACKAGE = str(Path(r2id.__file__).parent) + "/"
_aten = torch.ops.aten

_COPIES = {_aten.copy_.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}
_READS = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
    _aten.repeat_interleave.Tensor,
    _aten.bincount.default,
}
"""Operations whose result, or its shape, the host has to read."""
_FREE = ("empty", "new_empty", "detach", "alias", "_unsafe_view", "_local_scalar_dense", "lift")
"""Beginnings of the names of operations that launch nothing, beside views."""
# fmt: off
_FLOAT32 = {
    "rms_norm", "layer_norm", "group_norm", "softmax", "log_softmax", "logsumexp", "softplus",
    "exp", "expm1", "log", "log1p", "log2", "log10", "tan", "pow", "square", "rsqrt", "reciprocal",
    "sum", "prod", "cumsum", "cumprod", "norm", "cosine_similarity",
}
# fmt: on
"""Functions that autocast computes in float32 on CUDA and not on a CPU."""


REAL = os.environ.get("R2ID_TEST_GPU") == "1"
_is_available = torch.cuda.is_available
if REAL:
    if not _is_available():
        raise RuntimeError("R2ID_TEST_GPU=1: PyTorch finds no GPU here")
    torch.cuda.is_available = lambda: False

_ASKS_FOR_GRAPHS = {
    "_accelerator_graph_capture_health_check",
    "_cuda_graph_capture_health_check",  # its name in earlier versions
}
"""Methods of optimizers that look for a driver wherever torch was built for CUDA."""


class Counts:
    """What happened on the GPU: numbers by place in r2id and operation."""

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    def clear(self) -> None:
        self.kernels.clear()
        self.syncs.clear()


_counts = Counts()


def _place(what: str) -> str:
    """Say where in r2id the innermost frame is, and what it does."""
    frame = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return f"? {what}"
    return f"{frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_lineno} {what}"


class StandIn(Tensor):
    """A tensor that says it is on the GPU. ``inner`` holds its values, on the CPU."""

    inner: Tensor
    device = GPU  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]
    is_cpu = False  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> StandIn:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cpu",  # PyTorch without CUDA cannot differentiate tensors of another device
        )
        made.inner = inner
        return made

    def __repr__(self, **_options: Any) -> str:
        return f"StandIn({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        _check_and_count(func, given, args, kwargs)
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        known = {id(_inner(tensor)): tensor for tensor in given}

        def wrapped(made: Any) -> Any:
            if not isinstance(made, Tensor):
                return made
            return known[id(made)] if id(made) in known else StandIn(made)

        return tree_map(wrapped, out)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return _to(self, *args, **kwargs)

    def cpu(self, *_args: Any, **_kwargs: Any) -> Tensor:
        return _to(self, "cpu")

    def tolist(self) -> Any:
        _counts.syncs[_place("tolist")] += 1
        return self.inner.tolist()

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:
        _counts.syncs[_place("new_tensor")] += 1
        return StandIn(self.inner.new_tensor(data, **kwargs))

    def numpy(self, *_args: Any, **_kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, StandIn) else value


def _check_and_count(func: Any, given: list[Tensor], args: Any, kwargs: Any) -> None:
    """Refuse mixed devices as CUDA does, and count what an operation launches and waits for."""
    astray = [tensor for tensor in given if not isinstance(tensor, StandIn) and tensor.dim()]
    waits = func in _READS
    if func in _COPIES:
        waits = bool(astray) and not (kwargs.get("non_blocking") or any(args[2:3]))
    elif func in _INDEXED and isinstance(given[0], StandIn):
        masks = any(part.dtype in (torch.bool, torch.uint8) for part in given[1:])
        # One value under a mask is a masked_fill, which needs no number of elements.
        waits = bool(astray) or (masks and (func is _aten.index.Tensor or given[-1].numel() != 1))
    elif astray:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
            f"and cpu! (stand-in, {_place(str(func))})"
        )
    if waits:
        _counts.syncs[_place(func.__name__)] += 1
    if not func.is_view and not func.__name__.startswith(_FREE):
        _counts.kernels[_place(func.__name__)] += 1


class _Move(torch.autograd.Function):
    """A copy on the other device."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        if isinstance(tensor, StandIn):
            return tensor.inner.clone()
        return StandIn(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _Move.apply(gradient)


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.to: the copy to or from the GPU, which waits unless non_blocking, and the cast."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    rest = {"copy": kwargs.pop("copy")} if "copy" in kwargs else {}  # which _parse_to refuses
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and (device.type == "cuda") != isinstance(tensor, StandIn):
        if not non_blocking:
            _counts.syncs[_place(f"copy to {device.type}")] += 1
        tensor = _Move.apply(tensor)
    if memory_format is not None:
        rest["memory_format"] = memory_format
    return Tensor.to(tensor, dtype or tensor.dtype, **rest)


class _RmsNorm(torch.autograd.Function):
    """One kernel, as on CUDA; a CPU composes it of several operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, shape: Any, eps: float | None) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.options = shape, eps
        _counts.kernels[_place("rms_norm")] += 1
        return StandIn(F.rms_norm(_inner(x), shape, _inner(weight), eps))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        _counts.kernels[_place("rms_norm_backward")] += 1
        shape, eps = ctx.options
        given = [_inner(part).detach() for part in ctx.saved_tensors if part is not None]
        with torch.enable_grad():
            x, *weight = (part.requires_grad_() for part in given)
            out = F.rms_norm(x, shape, *weight, eps=eps)
        found = torch.autograd.grad(out, given, _inner(gradient))
        return StandIn(found[0]), StandIn(found[1]) if weight else None, None, None


class _Functions(TorchFunctionMode):
    """Makes tensors on the GPU, moves them there, and casts as CUDA's autocast does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        kwargs.pop("pin_memory", None)
        if func is Tensor.to and not isinstance(args[0], StandIn):
            return _to(*args, **kwargs)
        if func is Tensor.cuda:
            return _to(args[0], GPU, *args[2:], **kwargs)
        if func is Tensor.pin_memory:
            return args[0]
        if name in _FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_widened, (args, kwargs))
        if func is F.rms_norm and isinstance(args[0], StandIn):
            return _RmsNorm.apply(*_arguments(*args, **kwargs))
        if not _on_gpu(kwargs.get("device")):
            return func(*args, **kwargs)
        out = func(*args, **kwargs | {"device": "cpu"})
        if name in ("tensor", "as_tensor"):
            _counts.syncs[_place(name)] += 1
        elif not name.startswith(_FREE):
            _counts.kernels[_place(name)] += 1
        return tree_map(lambda made: made if isinstance(made, StandIn) else StandIn(made), out)


class _Made(TorchDispatchMode):
    """Puts tensors on the GPU that PyTorch's own backward passes make of nothing, such as zeros."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
        return StandIn(out) if type(out) is Tensor and not given else out


def _arguments(x: Tensor, shape: Any, weight: Tensor | None = None, eps: Any = None) -> Any:
    return x, weight, shape, eps


def _widened(value: Any) -> Any:
    if isinstance(value, StandIn) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value


def _on_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Event:
    """torch.cuda.Event: the host waits for it as for a read."""

    def __init__(self, **_options: Any) -> None: ...

    def record(self, *_args: Any) -> None: ...

    def synchronize(self) -> None:
        _counts.syncs[_place("event")] += 1


def _nothing(*_args: Any, **_kwargs: Any) -> None: ...


@contextmanager
def stand_in_gpu() -> Iterator[Counts]:
    """Let there be one GPU within the block; see the module's docstring."""
    if REAL:
        with (
            mock.patch.object(torch.cuda, "is_available", _is_available),
            mock.patch.object(torch, "compile", lambda function, **_: function),
        ):
            yield _counts
        return
    autocast, group = torch.autocast.__init__, torch._C._group_tensors_by_device_and_dtype

    def autocast_on_cpu(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        autocast(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def grouped(tensors: Any, *args: Any) -> Any:
        device = next(tensor.device for part in tensors for tensor in part if tensor is not None)
        return {(device, kind[1]): value for kind, value in group(tensors, *args).items()}

    run_backward, functions = torch.autograd._engine_run_backward, _Functions()

    def run_backward_on_gpu(roots: Any, *args: Any, **kwargs: Any) -> Any:
        with functions, _Made() if isinstance(roots[0], StandIn) else nullcontext():
            return run_backward(roots, *args, **kwargs)

    before = torch.__future__.get_overwrite_module_params_on_conversion()
    memory = 16 << 30, 16 << 30
    cuda: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "stand-in",
        "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda *_: memory,
        **dict.fromkeys(
            ("memory_reserved", "memory_allocated", "max_memory_allocated"), lambda *_: 0
        ),
        "Event": _Event,
        **dict.fromkeys(
            ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"), _nothing
        ),
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **cuda))
        stack.enter_context(mock.patch.object(torch.autocast, "__init__", autocast_on_cpu))
        # No compiler knows this device: what would be compiled stays as it is.
        stack.enter_context(mock.patch.object(torch, "compile", lambda function, **_: function))
        # Nor can a graph of its kernels be recorded.
        stack.enter_context(mock.patch.object(local, "recorded_loss", _nothing))
        for name in _ASKS_FOR_GRAPHS & vars(torch.optim.Optimizer).keys():
            stack.enter_context(mock.patch.object(torch.optim.Optimizer, name, _nothing))
        stack.enter_context(
            mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped)
        )
        stack.enter_context(
            mock.patch.object(torch.autograd, "_engine_run_backward", run_backward_on_gpu)
        )
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        # A module's parameter is one on the CPU, whose storage a StandIn cannot replace.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(functions)
        _counts.clear()
        yield _counts
