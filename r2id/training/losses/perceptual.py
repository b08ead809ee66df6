"""The loss of appearance: how unlike two pictures are in the features of a trained network.

Features are compared as in LPIPS (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep
Features as a Perceptual Metric", arXiv:1801.03924): scaled to length 1 at every place, and then by
their squared difference.

The network comes from a file that the user names:

* TorchScript: a program from pictures [B, 3, H, W] in [−1, 1] to one tensor of features or several,
  each [B, C, h, w], [B, N, C] (tokens) or [B, C]. The program in such a file is run.
* safetensors: the weights of a VGG16 under torchvision's names (``features.0.weight`` and so on),
  or of an LPIPS of VGG16 under those of its authors. LPIPS's weights of features are used where
  they are there.

It is no part of the model: it is not trained, and not in checkpoints.

Shape letters: B batch · C colours or features · H, W picture · h, w places · N tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from r2id.config import LossConfig
from r2id.errors import InputError
from r2id.images import resize
from r2id.models.coords import Size

_TRIED = (64, 64)  # the size of the pictures that a network is tried on

_VGG = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of VGG16's convolutions, between pools (Simonyan & Zisserman 2015)."""
_LAYER = re.compile(r"(?:.*\.)?(?:features|slice\d)\.(\d+)\.(weight|bias)")
"""Names of its layers: torchvision numbers them, and LPIPS puts the same numbers into slices."""
_LPIPS = re.compile(r"(?:.*\.)?lin(?:s\.)?(\d)\.model\.1\.weight")
"""Names of LPIPS's weights of its features."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's colours in [0, 1], with which VGG16 was trained."""


class PerceptualLoss:
    """A network and its distance. It is no module, so that nothing trains or saves it."""

    weight_bytes: int
    """Bytes of the network's weights."""

    def __init__(self, file: Path, size: Size | None = None) -> None:
        """Load a network, and try it.

        Raises InputError when there is no such file, or it holds no such network.
        """
        self.file, self.size = file, size
        if not file.is_file():
            raise self._error("no such file")
        self.features: nn.Module
        self.weights: Sequence[Tensor | None] = ()
        if file.suffix == ".safetensors":
            self.features, self.weights = _read_vgg(self._read_tensors(), self._error)
        else:
            self.features = self._read_program()
        self.features.eval()
        for weight in self.features.parameters():
            weight.requires_grad_(False)
        held = [*self.features.parameters(), *self.features.buffers()]
        self.weight_bytes = sum(tensor.nbytes for tensor in held)
        self._flops, self._bytes = self._try()

    def __call__(self, decoded: Tensor, truth: Tensor) -> Tensor:
        """Mean distance of decoded pictures from true ones, both [B, C, H, W] in [−1, 1].

        Of each layer it is the sum over features and the mean over places. With LPIPS's weights
        these are summed, and without any averaged. Raises InputError when the network does not take
        pictures of this size.
        """
        self.features.to(decoded.device)
        with torch.autocast(decoded.device.type, enabled=False):
            with torch.no_grad():
                expected = self._see(truth)
            # A small picture may not have the last layers.
            weights = self.weights[: len(expected)] or [None] * len(expected)
            distances = [
                _distance(*layer)
                for layer in zip(self._see(decoded), expected, weights, strict=True)
            ]
        total = torch.stack(distances).sum()
        return total if self.weights else total / len(distances)

    def flops(self, picture: Size) -> int:
        """Operations that the loss of a picture takes, with its backward pass."""
        return round(self._flops * self._pixels(picture))

    def activations(self, picture: Size) -> int:
        """Bytes that a picture's loss keeps for the backward pass."""
        return round(self._bytes * self._pixels(picture))

    def _pixels(self, picture: Size) -> int:
        height, width = self.size or picture
        return height * width

    def _see(self, images: Tensor) -> list[Tensor]:
        """Compute features of images [B, C, H, W] → [B, C, h, w] or [B, C, N] of each layer."""
        images = resize(images, self.size) if self.size else images.float()
        images = images.expand(-1, 3, -1, -1)
        found = self._run(images)
        layers = [found] if isinstance(found, Tensor) else found
        if (
            not isinstance(layers, (tuple, list))
            or not layers
            or not all(_is_features(layer, len(images)) for layer in layers)
        ):
            raise self._error(
                f"makes {_described(found)} of pictures {list(images.shape)}; must be one tensor "
                "or several, each [B, C, h, w], [B, N, C] or [B, C]"
            )
        return [_features_first(layer.float()) for layer in layers]

    def _run(self, images: Tensor) -> object:
        """Run the network on pictures [B, 3, H, W], which it may not take."""
        try:
            # Without the optimisations of TorchScript, which come with the second run: a resumed
            # run is to equal one that was not.
            with torch.jit.optimized_execution(False):
                return self.features(images)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            size = f"{images.shape[2]}x{images.shape[3]}"
            hint = "" if self.size else "; loss.perceptual_size resizes pictures to what it takes"
            reason = str(error).strip().splitlines()[-1]
            raise self._error(f"does not take pictures of {size}: {reason}{hint}") from None

    def _try(self) -> tuple[float, float]:
        """Compute a loss, and return its operations and the bytes that it keeps, per pixel."""
        height, width = size = self.size or _TRIED
        generator = torch.Generator().manual_seed(0)
        images = (2 * torch.rand(2, 2, 3, *size, generator=generator) - 1).unbind()
        decoded = images[0].requires_grad_()
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {tensor.untyped_storage().data_ptr() for tensor in self.features.parameters()}
        with FlopCounterMode(display=False) as counter, torch.enable_grad():
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = self(decoded, images[1])
            if not loss.requires_grad:
                raise self._error("its features have no gradient")
            loss.backward()
        if not loss.isfinite():
            raise self._error("makes features that are not finite")
        pixels = len(decoded) * height * width
        total = sum(size for place, size in kept.items() if place not in weights)
        return counter.get_total_flops() / pixels, total / pixels

    def _read_program(self) -> nn.Module:
        try:
            return torch.jit.load(str(self.file), map_location="cpu")
        except RuntimeError as error:
            raise self._error(
                "neither a TorchScript file nor a .safetensors one: "
                + str(error).strip().splitlines()[0]
            ) from None

    def _read_tensors(self) -> dict[str, Tensor]:
        try:
            with safe_open(self.file, framework="pt") as file:
                names = file.keys()
                used = [it for it in names if _LAYER.fullmatch(it) or _LPIPS.fullmatch(it)]
                return {name: file.get_tensor(name).float() for name in used}
        except (OSError, SafetensorError) as error:
            raise self._error(f"damaged, or no safetensors file: {error}") from None

    def _error(self, what: str) -> InputError:
        return InputError(f"loss.perceptual_file = '{self.file}': {what}")


@lru_cache(maxsize=1)
def _load(file: Path, size: Size | None) -> PerceptualLoss:
    # Making layers draws random numbers, and those of the weights to train must not depend on that.
    with torch.random.fork_rng([]):
        return PerceptualLoss(file, size)


def load_perceptual(config: LossConfig) -> PerceptualLoss | None:
    """Load the network that a loss names, once; None for a loss without. See PerceptualLoss."""
    if not config.perceptual:
        return None
    assert config.perceptual_file is not None
    return _load(config.perceptual_file, config.perceptual_size)


class Vgg16(nn.Module):
    """VGG16's convolutions: pictures [B, 3, H, W] in [−1, 1] → what comes before each pool.

    Simonyan & Zisserman 2015, "Very deep convolutional networks for large-scale image recognition",
    arXiv:1409.1556. Layers that a picture is too small for are left out.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1) * 2 - 1)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1) * 2)
        before = 3
        self.levels = nn.ModuleList()
        for widths in _VGG:
            level = nn.ModuleList()
            for width in widths:
                level.append(nn.Conv2d(before, width, 3, padding=1))
                before = width
            self.levels.append(level)

    def forward(self, images: Tensor) -> list[Tensor]:
        x, found = (images - self.mean) / self.std, []
        for number, level in enumerate(self.levels):
            if number:
                if min(x.shape[2:]) < 2:
                    break
                x = F.max_pool2d(x, 2)
            for layer in level:  # type: ignore[attr-defined]
                x = F.relu(layer(x))
            found.append(x)
        return found


def _read_vgg(
    tensors: dict[str, Tensor], error: Callable[[str], InputError]
) -> tuple[Vgg16, list[Tensor]]:
    """Make a VGG16 with these weights, and LPIPS's weights of its features where they are there."""
    named = {
        f"features.{match[1]}.{match[2]}": tensor
        for name, tensor in tensors.items()
        if (match := _LAYER.fullmatch(name))
    }
    network, number = Vgg16(), 0
    with torch.no_grad():
        for level in network.levels:
            for layer in level:  # type: ignore[attr-defined]
                for kind, own in layer.named_parameters():
                    name = f"features.{number}.{kind}"
                    if name not in named or named[name].shape != own.shape:
                        has = list(named[name].shape) if name in named else "none"
                        raise error(
                            f"no VGG16, the one network that is read from safetensors (use "
                            f"TorchScript for others): {name} must be {list(own.shape)}, it has "
                            f"{has}"
                        )
                    own.copy_(named[name])
                number += 2  # a convolution and its ReLU
            number += 1  # a pool
    return network, _read_lpips(tensors, error)


def _read_lpips(tensors: dict[str, Tensor], error: Callable[[str], InputError]) -> list[Tensor]:
    """Read LPIPS's weights of the features of all layers, [C, 1, 1] each; [] if there are none."""
    found = {
        int(match[1]): tensor.flatten().view(-1, 1, 1)
        for name, tensor in tensors.items()
        if (match := _LPIPS.fullmatch(name))
    }
    expected = {number: widths[-1] for number, widths in enumerate(_VGG)}
    if found and {number: len(weight) for number, weight in found.items()} != expected:
        raise error("its weights lin0 … lin4 are not those of an LPIPS of VGG16")
    return [found[number] for number in sorted(found)]


def _distance(one: Tensor, other: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over places of the squared difference of features [B, C, …], scaled to length 1."""
    difference = (_unit(one) - _unit(other)).square()
    if weight is not None:
        difference = difference * weight.to(difference.device)
    return difference.sum(1).mean()


def _unit(features: Tensor) -> Tensor:
    return features * (features.square().sum(1, keepdim=True) + 1e-10).rsqrt()


def _is_features(layer: object, batch: int) -> bool:
    return isinstance(layer, Tensor) and layer.ndim in (2, 3, 4) and len(layer) == batch


def _features_first(layer: Tensor) -> Tensor:
    """[B, C, h, w], tokens [B, N, C] or [B, C] → [B, C, h, w] or [B, C, N]."""
    if layer.ndim == 4:
        return layer
    return layer.transpose(1, 2) if layer.ndim == 3 else layer.unsqueeze(-1)


def _described(found: object) -> str:
    """Describe what a network has made."""
    if isinstance(found, Tensor):
        return f"a tensor {list(found.shape)}"
    if isinstance(found, (tuple, list)):
        return f"[{', '.join(map(_described, found))}]"
    return f"a {type(found).__name__}"
