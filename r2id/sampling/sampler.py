"""Seeds to images of any size, and the pictures that a training run shows of itself.

Shape letters: B samples · C colours · H, W image · L latent channels · h, w latent grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2id import rng
from r2id.checkpoints import Checkpoint
from r2id.config import DiffusionConfig, R2idConfig, SampleConfig, change
from r2id.diffusion import objective, schedule, solvers
from r2id.diffusion.denoising import denoising_loss
from r2id.diffusion.noise import noise_field
from r2id.errors import InputError
from r2id.models.codec import Codec
from r2id.models.conditioning import empty
from r2id.models.coords import Size
from r2id.models.r2id import R2ID
from r2id.sampling.noise_shift import applied_exponent

_BATCH, _BATCH_TOKENS, _BATCH_PIXELS = (
    64,
    4096,
    1 << 20,
)  # images drawn together, and what they have in all, at most


@dataclass(frozen=True)
class Sampler:
    """An R2ID with the codec of its latents."""

    model: R2ID
    codec: Codec
    diffusion: DiffusionConfig
    defaults: SampleConfig
    base_side: float
    """√(h·w) of the grid at which the noise schedule is not shifted."""
    areas: tuple[int, int]
    """Smallest and largest number of latent cells trained on."""
    ratios: tuple[float, float]
    """Smallest and largest height / width of the latent grids trained on."""
    bfloat16: bool

    @classmethod
    def load(
        cls,
        source: Checkpoint | Path | str,
        device: torch.device | str = "cpu",
        codec: Codec | None = None,
    ) -> Sampler:
        """Load an R2ID from its checkpoint or run directory, and the RIAE that it names.

        ``codec`` is used instead when it is given. A noise shift that was measured of this
        checkpoint and applied (see r2id.sampling.noise_shift) replaces the trained one.
        Raises InputError when it is no checkpoint of an R2ID, is damaged, or the RIAE is not the
        one it was trained with.
        """
        checkpoint = Checkpoint.open(source)
        meta = checkpoint.meta
        if meta.stage != "r2id":
            raise InputError(f"{checkpoint.path}: a checkpoint of stage {meta.stage!r}, not 'r2id'")
        codec = codec or Codec.of_r2id(checkpoint, device)
        if codec.identity != meta.model["codec_hash"]:
            raise InputError(
                f"{codec.name}: not the RIAE checkpoint that {checkpoint.path} was trained with "
                f"({meta.model['codec']}, identity {meta.model['codec_hash'][:12]})"
            )
        model = R2ID.of(R2idConfig.model_validate(meta.config["r2id"]), meta.model)
        checkpoint.load_ema(model)
        model.to(device).eval().requires_grad_(False)
        diffusion = DiffusionConfig.model_validate(meta.config["diffusion"])
        exponent = applied_exponent(checkpoint)
        if exponent is not None:
            diffusion = change(diffusion, {"shift_exponent": exponent})
        return cls(
            model,
            codec,
            diffusion,
            SampleConfig.model_validate(meta.config["sample"]),
            meta.model["base_side"],
            tuple(meta.model["areas"]),
            tuple(meta.model["ratios"]),
            meta.config["train"]["precision"] != "float32",
            tuple(meta.model.get("attributes", ())),
        )

    attributes: tuple[str, ...] = ()
    """Their names, in order, where those are what samples are drawn under."""

    @property
    def num_classes(self) -> int:
        """Classes that samples can be drawn of; 0 where the condition is another."""
        return self.model.classes if self.model.config.condition == "class" else 0

    def grid_for(self, size: Size) -> Size:
        """The latent grid on which an image of this size is diffused: the codec's own, brought within the numbers of
        cells and the aspect ratios that the model was trained on. The decoder renders it at the size asked for."""
        height, width = self.codec.grid_for(size)
        area = min(max(height * width, self.areas[0]), self.areas[1])
        ratio = min(max(size[0] / size[1], self.ratios[0]), self.ratios[1])
        if area == height * width and ratio == size[0] / size[1]:
            return height, width
        return max(1, round((area * ratio) ** 0.5)), max(1, round((area / ratio) ** 0.5))

    def batch_length(self, size: Size, grid: Size | None = None) -> int:
        """How many images are computed together, which follows from their size and grid alone: a power of two."""
        return min(
            _batch_length(_BATCH_TOKENS, grid or self.grid_for(size)),
            _batch_length(_BATCH_PIXELS, size),
        )

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        seeds: Tensor,
        size: Size,
        *,
        grid: Size | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        solver: str | None = None,
        eta: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> Tensor:
        """Images of any size, one per condition and seed.

        condition int64 [B] of classes (−1: none), [B, A] of attributes (−1, 1, or 0 for any), or [B, D] or [B, T, D] of
        embeddings, seeds int64 [B], size (H, W) in pixels, grid (h, w) of latents (by default grid_for(size)); what is None
        is the run's own setting → float32 [B, C, H, W] in [−1, 1], on the CPU.

        An image is the same bits whatever is drawn with it: all are computed in batches of one length, since matrix
        products of another length round differently.
        """
        asked = {
            "steps": steps,
            "guidance": guidance,
            "solver": solver,
            "eta": eta,
            "guidance_interval": guidance_interval,
        }
        return self.render(
            self.latents(condition, seeds, grid or self.grid_for(size), **asked), size
        )

    @torch.no_grad()
    def latents(self, condition: Tensor, seeds: Tensor, grid: Size, **asked: Any) -> Tensor:
        """What ``sample`` renders: conditions and seeds on a grid (h, w), settings as there → raw latents [B, L, h, w]."""
        if asked.get("guidance") not in (None, 0, 1) and not (
            self.model.classes or self.model.condition_shape
        ):
            raise InputError(
                f"guidance {asked['guidance']}: the model was trained without conditions; must be 0 or 1"
            )
        settings = change(
            self.defaults, {name: value for name, value in asked.items() if value is not None}
        )
        condition, length = self._known(condition), _batch_length(_BATCH_TOKENS, grid)
        return _in_batches(
            lambda rows: self._latents(condition[rows], seeds[rows], grid, settings),
            len(seeds),
            length,
        )

    @torch.no_grad()
    def render(self, latents: Tensor, size: Size) -> Tensor:
        """Raw latents [B, L, h, w] → float32 [B, C, H, W] in [−1, 1], on the CPU."""
        length = _batch_length(_BATCH_PIXELS, size)
        return _in_batches(
            lambda rows: self.codec.decode(latents[rows], size).cpu(), len(latents), length
        )

    def _latents(
        self, condition: Tensor, seeds: Tensor, grid: Size, settings: SampleConfig
    ) -> Tensor:
        device, channels = self.codec.device, self.codec.latent_channels
        kind, shift = self.diffusion.schedule, self._shift(grid)
        guided, plain = (
            _conditions(condition.to(device), scale)
            for scale in (settings.guidance, float(settings.guidance > 0))
        )
        latest, earliest = schedule.log_snr(
            torch.tensor(settings.guidance_interval), kind, shift
        ).tolist()

        def denoise(x: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
            alpha_bar = schedule.alpha_bar(log_snr).expand(len(seeds))
            conditions = guided if earliest <= float(log_snr) <= latest else plain
            with self._autocast():
                predicted = _guide(self.model.predict(x, alpha_bar, conditions), settings.guidance)
            return objective.to_data_and_noise(
                self.diffusion.objective, x, predicted, *schedule.alpha_sigma(log_snr, kind)
            )

        def fresh(step: int) -> Tensor:
            return noise_field(rng.fold(seeds, step), channels, grid).to(device)

        solve = solvers.SOLVERS[settings.solver]
        if settings.eta:
            solve = partial(solvers.ddim, eta=settings.eta, fresh=fresh)
        log_snrs = solvers.time_steps(settings.steps, kind, shift).to(device)
        noise = noise_field(rng.fold(seeds), channels, grid).to(device)
        return self.codec.denormalise(solve(denoise, noise, log_snrs, kind))

    @torch.no_grad()
    def loss_at(self, latents: Tensor, condition: Tensor, time: float, seed: int = 0) -> Tensor:
        """Unweighted squared error of the prediction at one time in (0, 1), per sample: raw latents [B, L, h, w] and
        conditions [B, …] → float32 [B]."""
        noise = rng.normal(rng.fold(seed, torch.arange(len(latents))), *latents.shape[1:])
        with self._autocast():
            return denoising_loss(
                self.model,
                self.diffusion,
                self.base_side,
                self.codec.normalise(latents),
                self._known(condition),
                torch.full((len(latents),), time, device=latents.device),
                noise.to(latents.device),
            )[1]

    @torch.no_grad()
    def data_error(
        self, latents: Tensor, condition: Tensor, log_snr: float, seed: int = 0
    ) -> Tensor:
        """Squared error of the x₀ that the model predicts at a logSNR, which is not shifted and which it is told as it is,
        per sample: raw latents [B, L, h, w] and conditions [B, …] → float32 [B]."""
        data, level = self.codec.normalise(latents), torch.tensor(log_snr, device=latents.device)
        alpha, sigma = schedule.alpha_sigma(level, self.diffusion.schedule)
        noise = rng.normal(rng.fold(seed, torch.arange(len(latents))), *latents.shape[1:]).to(
            latents.device
        )
        x = alpha * data + sigma * noise
        with self._autocast():
            predicted = self.model(
                x, schedule.alpha_bar(level).expand(len(x)), self._known(condition)
            )
        found, _ = objective.to_data_and_noise(
            self.diffusion.objective, x, predicted.float(), alpha, sigma
        )
        return (found - data).square().flatten(1).mean(1)

    def _known(self, condition: Tensor) -> Tensor:
        """A model that knows attributes or embeddings is told none where it would be told a class."""
        if condition.dim() == 1 and self.model.condition_shape:
            return torch.zeros(len(condition), *self.model.condition_shape, device=condition.device)
        return condition

    def _shift(self, grid: Size) -> float:
        return schedule.size_shift(
            (grid[0] * grid[1]) ** 0.5, self.base_side, self.diffusion.shift_exponent
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.codec.device.type, torch.bfloat16, enabled=self.bfloat16)


def _batch_length(most: int, side: Size) -> int:
    """How many grids or images are computed together, of ``most`` tokens or pixels in all: a power of two."""
    return 1 << max(1, min(_BATCH, most // (side[0] * side[1]))).bit_length() - 1


def _in_batches(compute: Callable[[Tensor], Tensor], count: int, length: int) -> Tensor:
    """compute(rows int64 [length]) of all rows up to ``count``, the last repeated where the last batch has fewer."""
    parts = [
        compute(torch.arange(start, start + length).clamp(max=count - 1))[: count - start]
        for start in range(0, count, length)
    ]
    return torch.cat(parts)


def _conditions(condition: Tensor, guidance: float) -> Tensor:
    """The conditions that guidance needs: [1 or 2, B, …]."""
    if guidance == 0:
        return empty(condition).unsqueeze(0)
    return condition.unsqueeze(0) if guidance == 1 else torch.stack([empty(condition), condition])


def _guide(predictions: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): empty + scale·(conditional − empty)."""
    if len(predictions) == 1:
        return predictions[0]
    return torch.lerp(predictions[0], predictions[1], guidance)
