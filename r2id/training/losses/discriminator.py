"""A network that tells decoded pictures from real ones, and the losses of both sides.

The decoder learns to make its pictures look more real than the pictures that they should be, the
discriminator learns the opposite: the relativistic loss of pairs of R3GAN (Huang et al. 2024,
"The GAN is dead; long live the GAN!", arXiv:2501.05441). A pair is a decoded picture and its
original. Two penalties of the discriminator's gradient, R1 at real pictures and R2 at decoded ones,
keep training stable.

Both sides learn in one step of one optimizer: the decoder's term sees the discriminator's weights
as constants, and the discriminator's terms see pictures as constants.

Shape letters: B batch · C colours · H, W picture · h, w places of the discriminator · D width.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn
from torch.func import functional_call

from r2id.constants import constant

_LEVELS = 3  # places of 2, 4 and 8 pixels


class AdversarialTerms(NamedTuple):
    """Scalar losses of both sides, unweighted."""

    generator: Tensor
    """Of the decoder. It has no gradient for the discriminator's weights."""
    discriminator: Tensor
    """Of the discriminator, as are the next two. It has no gradient for pictures."""
    r1: Tensor
    """Squared norm of the gradient at real pictures; see squared_gradient."""
    r2: Tensor
    """The same at decoded pictures."""


class Discriminator(nn.Module):
    """How real a picture looks, at every place of 8×8 pixels.

    A residual network of convolutions without norms. It is told how large pixels are, because
    pictures that were encoded smaller than they are decoded can only be so sharp (the idea of INFD,
    Kim et al. 2024, arXiv:2406.07480).
    """

    start: int
    """Step at which it begins to learn."""

    def __init__(self, channels: int, width: int, start: int = 0) -> None:
        super().__init__()
        self.start = start
        self.see = nn.Conv2d(4 * channels + 2, width, 3, padding=1)
        widths = [width << level for level in range(_LEVELS)]
        self.blocks = nn.ModuleList(_Block(count) for count in widths)
        self.widen = nn.ModuleList(nn.Conv2d(narrow, wide, 1) for narrow, wide in pairwise(widths))
        # No bias, because losses compare judgements, and penalties their gradients.
        self.judge = nn.Conv2d(widths[-1], 1, 1, bias=False)

    def forward(self, pictures: Tensor, pixel: tuple[float, float]) -> Tensor:
        """Judge pictures [B, C, H, W] → [B, 1, h, w]; a higher number looks more real.

        ``pixel``: height and width of a pixel, in pixels of the image that was encoded.
        """
        height, width = pictures.shape[2:]
        even = F.pad(pictures, (0, width % 2, 0, height % 2), mode="replicate")
        x = F.pixel_unshuffle(even, 2)
        told = constant(tuple(math.log(side) for side in pixel), x.device).to(x.dtype)
        told = repeat(told, "n -> b n h w", b=len(x), h=x.shape[2], w=x.shape[3])
        x = self.blocks[0](self.see(torch.cat([x, told], dim=1)))
        for widen, block in zip(self.widen, self.blocks[1:], strict=True):
            # Places at the border may be of fewer pixels: their mean is that of the pixels there.
            x = block(widen(F.avg_pool2d(x, 2, ceil_mode=True)))
        return self.judge(F.leaky_relu(x, 0.2))


class _Block(nn.Module):
    """Two convolutions, residual. Their output starts as zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        assert self.second.bias is not None
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.leaky_relu(self.first(F.leaky_relu(x, 0.2)), 0.2)
        return x + self.second(hidden)


def adversarial_terms(
    network: nn.Module, decoded: Tensor, truth: Tensor, pixel: tuple[float, float]
) -> AdversarialTerms:
    """Losses of decoded pictures and of the discriminator; both pictures are [B, C, H, W].

    ``network`` is a Discriminator, or another module with its forward. Float32 under autocast too:
    the penalties are differentiated twice.
    """
    # Gradients are needed even where nobody asks for those of the loss.
    with torch.autocast(decoded.device.type, enabled=False), torch.enable_grad():
        real, fake = (x.detach().float().requires_grad_() for x in (truth, decoded))
        # Views, because torch's FlopCounterMode cannot follow leaves through autograd.grad.
        judged_real, judged_fake = (network(x.view_as(x), pixel) for x in (real, fake))
        r1 = squared_gradient(judged_real, real)
        r2 = squared_gradient(judged_fake, fake)
    with torch.autocast(decoded.device.type, enabled=False):
        constants = {name: value.detach() for name, value in network.named_parameters()}
        judged = functional_call(network, constants, (decoded.float(), pixel))
    return AdversarialTerms(
        F.softplus(judged_real.detach() - judged).mean(),
        F.softplus(judged_fake - judged_real).mean(),
        r1,
        r2,
    )


def nothing(network: nn.Module) -> Tensor:
    """Return 0 as a function of all weights, for steps in which a network does not learn yet.

    Engines treat weights without a gradient differently, and those with a gradient of 0 alike.
    """
    return 0 * torch.stack([weight.sum() for weight in network.parameters()]).sum()


def squared_gradient(judged: Tensor, pictures: Tensor) -> Tensor:
    """Squared norm of the gradient of the sum of [B, 1, h, w] for a picture, over h·w; the mean.

    If each place saw pixels of its own, this would be the mean over places of the squared norm of
    their gradients. So it does not grow with the picture.
    """
    (gradient,) = torch.autograd.grad(judged.sum(), pictures, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean() / judged[0].numel()
