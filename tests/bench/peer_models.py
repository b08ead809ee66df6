"""The networks that peers.py compares with R2ID, as their authors use them: loss and sampler.

Shape letters: B batch · C colours · H, W image · L channels of the diffused grid · h, w its size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from r2id import rng
from r2id.diffusion import schedule, solvers
from r2id.diffusion.denoising import draw_times
from r2id.errors import InputError
from r2id.models.coords import Size

LEVELS = 1000
"""Steps of the diffusion that the networks were designed for."""
DROPPED = 0.1
"""Share of the classes that are dropped in training, for guidance."""
UNET = {"channels": (32, 64, 192), "steps": 50}
DIT = {"width": 192, "heads": 3, "blocks": 8, "steps": 20}


class Peer(nn.Module):
    """A class-conditional diffusion model with its loss and its sampler.

    ``model`` is the network that is trained.
    """

    model: nn.Module

    def __init__(self, classes: int, seed: int) -> None:
        super().__init__()
        self.classes, self.seed = classes, seed

    def forward(
        self, latent: Tensor, condition: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scaled grids [B, L, h, w], classes [B] → mean loss, no figures.

        Every draw is keyed by (seed, step, place in the batch).
        """
        keys = rng.fold(self.seed, step, torch.arange(len(latent)))
        dropped = rng.uniform(rng.fold(keys, 0), 1).squeeze(-1) < DROPPED
        noise = rng.normal(rng.fold(keys, 1), *latent.shape[1:])
        condition = torch.where(dropped, self.classes, condition)
        return self.loss(latent, noise, condition, rng.fold(keys, 2)), {}

    def loss(self, data: Tensor, noise: Tensor, condition: Tensor, keys: Tensor) -> Tensor:
        raise NotImplementedError

    def solve(self, noise: Tensor, condition: Tensor, guidance: float) -> Tensor:
        """Noise [B, L, h, w] and classes [B] → scaled grids."""
        raise NotImplementedError

    @torch.no_grad()
    def draw(
        self, condition: Tensor, seeds: Tensor, channels: int, grid: Size, guidance: float
    ) -> Tensor:
        """Draw scaled grids [B, L, h, w], one per class and seed."""
        noise = rng.normal(rng.fold(seeds), channels, *grid)
        with torch.autocast("cpu", torch.bfloat16):
            return self.solve(noise, condition, guidance)

    def guided(self, x: Tensor, time: Tensor, condition: Tensor, guidance: float) -> Tensor:
        """Predict with classifier-free guidance (Ho & Salimans 2022), in float32."""
        times = time.expand(len(x))
        if guidance == 1:
            return self.predict(x, times, condition).float()
        empty = torch.full_like(condition, self.classes)
        both = self.predict(x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([empty, condition]))
        without, given = both.float().chunk(2)
        return torch.lerp(without, given, guidance)

    def predict(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        raise NotImplementedError


class UNetPeer(Peer):
    """diffusers' UNet2DModel, trained to predict ε, sampled by DDIM: as in its authors' course.

    Three levels with attention on the coarsest, and the course's cosine schedule. One class more
    than there are stands for none.
    """

    def __init__(self, channels: int, classes: int, size: Size, seed: int) -> None:
        super().__init__(classes, seed)
        down = ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D")
        up = ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")
        diffusers = _diffusers()
        self.model = diffusers.UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=UNET["channels"],
            down_block_types=down,
            up_block_types=up,
            layers_per_block=1,
            attention_head_dim=32,
            norm_num_groups=16,
            num_class_embeds=classes + 1,
        )
        self.noising = diffusers.DDPMScheduler(LEVELS, beta_schedule="squaredcos_cap_v2")

    def loss(self, data: Tensor, noise: Tensor, condition: Tensor, keys: Tensor) -> Tensor:
        times = (rng.uniform(keys, 1).squeeze(-1) * LEVELS).long()
        noised = self.noising.add_noise(data, noise, times)
        return F.mse_loss(self.predict(noised, times, condition).float(), noise)

    def predict(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return self.model(x, time, condition).sample

    def solve(self, noise: Tensor, condition: Tensor, guidance: float) -> Tensor:
        ddim = _diffusers().DDIMScheduler.from_config(self.noising.config)
        ddim.set_timesteps(UNET["steps"])
        x = noise
        for time in ddim.timesteps:
            x = ddim.step(self.guided(x, time, condition, guidance), time, x).prev_sample
        return x


class AnySizeDiT(nn.Module):
    """diffusers' DiTTransformer2DModel on grids of any height and width, with patches of one cell.

    The class itself takes squares alone: it forgets the height and the width on its way out. Its
    embeddings of places are resized to the grid. Weights begin as the paper's (Peebles & Xie 2023,
    arXiv:2212.09748), which the class leaves to those who load them.
    """

    def __init__(self, channels: int, classes: int, side: int) -> None:
        super().__init__()
        self.inner = _diffusers().DiTTransformer2DModel(
            num_attention_heads=DIT["heads"],
            attention_head_dim=DIT["width"] // DIT["heads"],
            in_channels=channels,
            num_layers=DIT["blocks"],
            sample_size=side,
            patch_size=1,
            num_embeds_ada_norm=classes,
        )
        for block in self.inner.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0  # the loss drops classes itself
            nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
            _zero(block.norm1.linear)
        _zero(self.inner.proj_out_1)
        _zero(self.inner.proj_out_2)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """Grids [B, L, h, w], times [B] in (0, 1), classes [B] → predictions like the grids."""
        inner, time = self.inner, time * LEVELS
        tokens = inner.pos_embed(x)
        for block in inner.transformer_blocks:
            tokens = block(tokens, timestep=time, class_labels=condition)
        embedded = inner.transformer_blocks[0].norm1.emb(time, condition, hidden_dtype=tokens.dtype)
        shift, scale = inner.proj_out_1(F.silu(embedded)).unsqueeze(1).chunk(2, dim=-1)
        out = inner.proj_out_2(inner.norm_out(tokens) * (1 + scale) + shift)
        return rearrange(out, "b (h w) l -> b l h w", h=x.shape[2])


class DiTPeer(Peer):
    """A DiT that predicts the velocity from data to noise (SiT, Ma et al. 2024, arXiv:2401.08740).

    It is sampled by the solver of R2ID's configs; times are drawn as R2ID's, logit-normal.
    """

    def __init__(self, channels: int, classes: int, grid: Size, seed: int) -> None:
        super().__init__(classes, seed)
        self.model = AnySizeDiT(channels, classes, grid[0])

    def loss(self, data: Tensor, noise: Tensor, condition: Tensor, keys: Tensor) -> Tensor:
        times = draw_times(keys, "logit_normal")
        noised = torch.lerp(data, noise, times.view(-1, 1, 1, 1))
        return F.mse_loss(self.predict(noised, times, condition).float(), noise - data)

    def predict(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return self.model(x, time, condition)

    def solve(self, noise: Tensor, condition: Tensor, guidance: float) -> Tensor:
        log_snrs = schedule.log_snr(solvers.time_steps(DIT["steps"]), "flow")

        def denoise(x: Tensor, step: int) -> tuple[Tensor, Tensor]:
            alpha, sigma = schedule.alpha_sigma(log_snrs[step], "flow")
            velocity = self.guided(x, sigma, condition, guidance)
            return x - sigma * velocity, x + alpha * velocity

        return solvers.dpmpp_2m(denoise, noise, log_snrs, "flow")


def _diffusers() -> Any:
    """Import it when it is needed: only what uses it asks for the extra."""
    try:
        import diffusers
    except ImportError as error:
        raise InputError(f"needs diffusers (pip install 'r2id[bench]'): {error}") from None
    return diffusers


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
