"""R2ID: a diffusion transformer on a grid of any size, which sees places as coordinates.

Shape letters: B batch · L channels of the diffused grid · h, w its size · N = h·w tokens · D width
· K conditions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from r2id.checkpoints.trained import Trained, open_trained, read_section
from r2id.config import R2idConfig
from r2id.models import coords
from r2id.models.attention import RMSNorm
from r2id.models.conditioning import AttributeCondition, ClassCondition, EmbeddingCondition
from r2id.models.coords import Size, frequencies
from r2id.models.layers import DiffusionBlock, modulate, zero_linear
from r2id.models.levels import Levels
from r2id.models.mixing import mixes


class R2ID(nn.Module):
    """Predicts the objective's target (ε, x₀, v or velocity) of a noised grid.

    Encoder blocks run once per step; decoder blocks see condition tokens and run once per
    condition, so that guidance costs less than two passes. With levels, both run on a coarser grid,
    and blocks with local attention lie around them (r2id.models.levels).
    """

    def __init__(
        self, config: R2idConfig, channels: int, classes: int, embedding: Sequence[int] = ()
    ) -> None:
        """Build a model for grids of ``channels`` channels.

        ``classes`` is the number of classes (0: none) or, with ``config.condition`` "attributes",
        of attributes. ``embedding`` is the shape of one sample's embedding, [D] or [T, D].
        """
        super().__init__()
        self.config, self.channels, self.classes = config, channels, classes
        width = config.width
        finest = config.levels[0].width if config.levels else width
        times = config.time_fourier[1] - config.time_fourier[0] + 1
        self.token_in = nn.Linear(channels + coords.fourier_dim(config.fourier), finest)
        self.time_in = nn.Sequential(
            nn.Linear(2 * times, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.condition: nn.Module
        self.condition_shape: tuple[int, ...] = ()
        """Shape of one sample's condition; empty for a class."""
        if config.condition == "attributes":
            self.condition = AttributeCondition(classes, config.condition_tokens, width)
            self.condition_shape = (classes,)
        elif config.condition == "embedding":
            self.condition = EmbeddingCondition(embedding, config.condition_tokens, width)
            self.condition_shape = tuple(embedding)
        else:
            self.condition = ClassCondition(classes, config.condition_tokens, width)

        def stack(count: int, conditional: bool) -> nn.ModuleList:
            return nn.ModuleList(
                DiffusionBlock(width, config.heads, config.ffn_ratio, config.dropout, conditional)
                for _ in range(count)
            )

        self.encoder = stack(config.encoder_blocks, conditional=False)
        self.decoder = stack(config.decoder_blocks, conditional=config.conditioning == "cross")
        if config.conditioning == "context":
            self.condition_in = nn.Linear(width, width)
        self.levels = Levels(config)
        self.out_norm = RMSNorm(finest, elementwise_affine=False)
        self.out_modulation = zero_linear(width, 2 * finest)
        self.out = zero_linear(finest, channels)

    @classmethod
    def of(cls, config: R2idConfig, facts: Mapping[str, Any]) -> R2ID:
        """Build a model from its config and the facts that a checkpoint records beside it."""
        return cls(config, facts["latent_channels"], facts["classes"], facts.get("embedding", ()))

    @classmethod
    def from_pretrained(cls, source: Trained | Path | str) -> R2ID:
        """Load a trained model by itself: see RIAE.from_pretrained for what ``source`` may be."""
        trained = open_trained(source, "r2id")
        model = cls.of(read_section(trained, "r2id", R2idConfig), trained.meta.model)
        trained.load_ema(model)
        return model.eval()

    @property
    def conditional(self) -> bool:
        """Whether it was made for conditions."""
        return bool(self.classes or self.condition_shape)

    def blocks(self) -> list[nn.Module]:
        """The modules whose activations may be recomputed."""
        outer = self.levels
        return [*outer.blocks_down(), *self.encoder, *self.decoder, *outer.blocks_up()]

    def forward(
        self,
        x: Tensor,
        alpha_bar: Tensor,
        condition: Tensor,
        coordinates: Tensor | None = None,
        cloud_key: Tensor | None = None,
    ) -> Tensor:
        """Predict under one condition → float32 [B, L, h, w].

        * x [B, L, h, w]: the noised grid
        * alpha_bar [B], or [1] for all: the share of signal in its variance, in (0, 1)
        * condition: classes [B], attributes [B, A], or embeddings [B, D] or [B, T, D]
        * coordinates [B or 1, N, 4]: where the cells are, by default in a grid (h, w)
        * cloud_key: the random key of cloud attention's groups; by default all tokens are one
        """
        return self.predict(x, alpha_bar, condition.unsqueeze(0), coordinates, cloud_key).squeeze(0)

    def predict(
        self,
        x: Tensor,
        alpha_bar: Tensor,
        conditions: Tensor,
        coordinates: Tensor | None = None,
        cloud_key: Tensor | None = None,
    ) -> Tensor:
        """Predict one noised grid under K conditions [K, B, …] → float32 [K, B, L, h, w].

        Costs less than K calls of forward: encoder blocks run once. Other arguments are as there.
        """
        grid: Size = (x.shape[2], x.shape[3])
        if coordinates is None:
            coordinates = coords.grid_coordinates(grid, device=x.device).unsqueeze(0)
        place = coords.fourier_features(coordinates, self.config.fourier).expand(x.shape[0], -1, -1)
        tokens = self.token_in(torch.cat([rearrange(x, "b l h w -> b (h w) l"), place], dim=-1))
        time = self.time_in(_time_features(alpha_bar, self.config.time_fourier))
        tokens, middle, passed = self.levels.descend(tokens, time, grid)
        blocks = len(self.encoder) + len(self.decoder)
        mix = mixes(self.config, middle, blocks, x.device, cloud_key)
        for number, block in enumerate(self.encoder):
            tokens = block(tokens, time, mix=mix[number])
        # From here on, the batch holds all samples under each of the conditions.
        count = conditions.shape[0]
        tokens = repeat(tokens, "b ... -> (k b) ...", k=count)
        if len(time) > 1:  # one time for all stays one row, which is as good and faster
            time = repeat(time, "b ... -> (k b) ...", k=count)
        context = self.condition(conditions.flatten(0, 1))
        among = context.shape[1] if self.config.conditioning == "context" else 0
        if among:
            time = time + self.condition_in(context.mean(1))
            tokens = torch.cat([context, tokens], dim=1)
        for number, block in enumerate(self.decoder, start=len(self.encoder)):
            tokens = block(tokens, time, context, mix[number])
        tokens = tokens[:, among:]
        tokens = self.levels.ascend(tokens, time, passed)
        shift, scale = self.out_modulation(F.silu(time)).unsqueeze(1).chunk(2, dim=-1)
        out = self.out(modulate(self.out_norm(tokens), shift, scale)).float()
        return rearrange(out, "(k b) (h w) l -> k b l h w", k=count, h=grid[0])


def _time_features(alpha_bar: Tensor, powers: Size) -> Tensor:
    """sin and cos of π·2^p·ᾱ, p from powers[0] to powers[1]: [B] → float32 [B, 2·number of p]."""
    angles = alpha_bar.float().unsqueeze(-1) * frequencies(powers, alpha_bar.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
