"""The sampler, which turns seeds and conditions into images of any size.

Shape letters: B samples · C colours · H, W image · L latent channels · h, w latent grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2id import rng
from r2id.checkpoints.trained import Trained, open_trained, read_section
from r2id.config import DiffusionConfig, SampleConfig, change, check_guidance
from r2id.diffusion import objective, schedule, solvers
from r2id.diffusion.noise import noise_field
from r2id.errors import WorkError
from r2id.models.codec import Codec
from r2id.models.coords import Size
from r2id.models.layers import store_in_bfloat16
from r2id.models.r2id import R2ID
from r2id.sampling.batching import explain_out_of_memory, in_batches
from r2id.sampling.guidance import Guidance
from r2id.sampling.noise_shift import applied_exponent
from r2id.sampling.steps import Adjust, Step, Watch, watch_part

# Upper limits of a batch: its images and their latent cells by device, and its pixels. A single
# image costs as much as a whole batch, so on a CPU batches are no longer than throughput needs.
_BATCH = {"cpu": (16, 512), "cuda": (64, 4096)}
_BATCH_PIXELS = 1 << 20
_STRENGTH = 0.45
"""Time of the schedule at which sampling on a larger grid than training saw begins, divided by how
much longer its sides are: more cells show more of the noise."""


@dataclass(frozen=True, eq=False)
class Sampler:
    """Draws images with an R2ID and the codec of its latents."""

    model: R2ID
    """Its weights are bfloat16 where it computes in that; a checkpoint has the exact ones."""
    codec: Codec
    diffusion: DiffusionConfig
    defaults: SampleConfig
    base_side: float
    """√(h·w) of the latent grids at which the noise schedule is not shifted."""
    areas: tuple[int, int]
    """Smallest and largest number of latent cells trained on."""
    ratios: tuple[float, float]
    """Smallest and largest height / width of the latent grids trained on."""
    bfloat16: bool
    """Whether to compute under bfloat16 autocast, as in training, rather than in float32."""
    attributes: tuple[str, ...] = ()
    """Names of the attributes that samples can be conditioned on, in order."""
    guide: R2ID | None = None
    """An early average of the model, which autoguidance moves away from."""
    class_names: tuple[str, ...] = ()
    """Names of the classes, in order: numbers, if the model was trained before names were kept."""

    @classmethod
    def load(cls, source: Trained | Path | str, device: torch.device | str = "cpu") -> Sampler:
        """Load an R2ID and its RIAE from a checkpoint, a run directory or an exported file.

        A noise shift that was measured and applied to this checkpoint (see
        r2id.sampling.noise_shift) replaces the trained one. Raises InputError when the model is no
        R2ID or is damaged, or when the RIAE is not the one that it was trained with.
        """
        trained = open_trained(source, "r2id")
        meta = trained.meta
        codec = Codec.of_r2id(trained, device)
        model = R2ID.from_pretrained(trained)
        guide, early = None, trained.guide()
        if early is not None:
            guide = deepcopy(model)
            guide.load_state_dict(early)
        bfloat16 = meta.config["train"]["precision"] != "float32"
        for network in filter(None, (model, guide)):
            network.to(device).requires_grad_(False)
            if bfloat16:
                store_in_bfloat16(network)
        diffusion = read_section(trained, "diffusion", DiffusionConfig)
        exponent = applied_exponent(trained)
        if exponent is not None:
            diffusion = change(diffusion, {"shift_exponent": exponent})
        defaults = read_section(trained, "sample", SampleConfig)
        return cls.of(model, codec, meta.model, diffusion, defaults, bfloat16, guide)

    @classmethod
    def of(
        cls,
        model: R2ID,
        codec: Codec,
        facts: Mapping[str, Any],
        diffusion: DiffusionConfig,
        defaults: SampleConfig,
        bfloat16: bool,
        guide: R2ID | None = None,
    ) -> Sampler:
        """Make a sampler of models that are built already; ``facts`` are those of the R2ID's run.

        A default guidance counts as 1 if the model has no conditions.
        """
        if defaults.guidance and not model.conditional:
            defaults = change(defaults, {"guidance": 1.0})
        numbers = map(str, range(model.classes if model.config.condition == "class" else 0))
        return cls(
            model=model,
            codec=codec,
            diffusion=diffusion,
            defaults=defaults,
            base_side=facts["base_side"],
            areas=tuple(facts["areas"]),
            ratios=tuple(facts["ratios"]),
            bfloat16=bfloat16,
            attributes=tuple(facts.get("attributes", ())),
            guide=guide,
            class_names=tuple(facts.get("class_names", numbers)),
        )

    @property
    def trained_on_one_shape(self) -> bool:
        """Whether all latent grids trained on had one area and one aspect ratio."""
        return self.areas[0] == self.areas[1] and self.ratios[0] == self.ratios[1]

    @property
    def num_classes(self) -> int:
        """Number of classes to condition samples on; 0 when the condition is something else."""
        return self.model.classes if self.model.config.condition == "class" else 0

    def grid_for(self, size: Size) -> Size:
        """Return the latent grid (h, w) on which an image of a size (H, W) is diffused.

        It is the codec's grid for that size, changed where necessary to lie within the areas and
        aspect ratios that the R2ID was trained on. The decoder renders any grid at any size.
        """
        height, width = self.codec.grid_for(size)
        area = min(max(height * width, self.areas[0]), self.areas[1])
        ratio = min(max(size[0] / size[1], self.ratios[0]), self.ratios[1])
        if area == height * width and ratio == size[0] / size[1]:
            return height, width
        return max(1, round((area * ratio) ** 0.5)), max(1, round((area / ratio) ** 0.5))

    def diffused_grids(self, size: Size, grid: Size | None = None) -> list[Size]:
        """Return the latent grids on which a picture of a size (H, W) is drawn one after the other.

        The last is ``grid``, by default grid_for(size). Where it has more cells than training saw,
        noise would become parts of a picture several times; so a trained grid comes before it.
        """
        grid = grid or self.grid_for(size)
        if grid[0] * grid[1] <= self.areas[1]:
            return [grid]
        return [self.grid_for(self.codec.size_of(grid, size)), grid]

    def batch_length(self, size: Size, grid: Size | None = None) -> int:
        """Return how many images are computed together; it depends on size and grid alone.

        It is a power of two, so that a shard holds whole batches.
        """
        return min(self._at_once(grid or self.grid_for(size)), self._at_once(size, _BATCH_PIXELS))

    def batches(self, count: int, grid: Size) -> int:
        """Return in how many batches the latents of ``count`` images are drawn on a grid."""
        return -(-count // self._at_once(grid))

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        seeds: Tensor,
        size: Size,
        *,
        grid: Size | None = None,
        watch: Watch | None = None,
        **settings: Any,
    ) -> Tensor:
        """Draw images of any size, one per condition and seed.

        condition: int64 [B] of classes (−1: none), float [B, A] of attributes (−1 without, 1 with,
        0 either), or [B, D] or [B, T, D] of embeddings · seeds: int64 [B] · size: (H, W) in pixels
        · grid: (h, w) of latent cells, by default grid_for(size) · settings: fields of
        SamplerConfig; those that are None or left out are the run's own. → float32 [B, C, H, W] in
        [−1, 1], on the CPU.

        An image has the same bits whatever else is drawn in the same call. All batches have one
        length for this, because matrix products of other lengths round differently.

        On a grid with more cells than training saw, sampling begins with the picture of a trained
        grid, encoded and noised (SDEdit): it keeps its layout, and gets the detail of more cells.
        """
        grids = self.diffused_grids(size, grid)
        batches = [self.batches(len(seeds), one) for one in grids]
        begin: dict[str, Any] = {}
        for part, one in enumerate(grids):
            told = watch and watch_part(watch, part, batches)
            latents = self.latents(condition, seeds, one, watch=told, **begin, **settings)
            if one != grids[-1]:
                begin = self._begin_larger(latents, grids[-1], size)
        return self.render(latents, size)

    def _begin_larger(self, latents: Tensor, grid: Size, size: Size) -> dict[str, Any]:
        """Return where ``latents`` begins on a larger grid (h, w), of pictures of smaller ones.

        Raw latents [B, L, h', w'] of pictures for a size (H, W) → start and strength.
        """
        native, smaller = self.codec.size_of(grid, size), latents.shape[2:]
        # One at a time, so that an image has the same bits in any batch.
        drawn = (self.render(one, native) for one in latents.split(1))
        longer = math.sqrt(math.prod(grid) / math.prod(smaller))
        start = torch.cat([self.codec.encode(image) for image in drawn])
        return {"start": start, "strength": _STRENGTH / longer}

    @torch.no_grad()
    def latents(
        self,
        condition: Tensor,
        seeds: Tensor,
        grid: Size,
        *,
        noise: Tensor | None = None,
        start: Tensor | None = None,
        strength: float = 1.0,
        adjust: Adjust | None = None,
        watch: Watch | None = None,
        **overrides: Any,
    ) -> Tensor:
        """Draw the latents of ``sample`` on a grid (h, w), without rendering them.

        Sampling begins at pure noise: ``noise`` [B, L, h, w], by default the seeds'. With ``start``
        it begins at these raw latents [B, L, h, w] with noise added, at the time ``strength`` in
        (0, 1] of the schedule (SDEdit, Meng et al. 2022). ``adjust`` may improve each estimate, and
        ``watch`` is told each of them. ``overrides`` are the settings of ``sample``.

        → raw latents [B, L, h, w]. Raises the errors of check_guidance, and WorkError when they are
        not finite.
        """
        settings = change(
            self.defaults, {name: value for name, value in overrides.items() if value is not None}
        )
        self.check_guidance(overrides.get("guidance"), settings.autoguidance)
        condition, length = self.adapt(condition), self._at_once(grid)
        batches, kind = self.batches(len(seeds), grid), self.diffusion.schedule
        # On the CPU, since the GPU takes a number along with a kernel.
        times = solvers.time_steps(settings.steps, strength)
        log_snrs = schedule.log_snr(times, kind, self.shift(grid))

        def draw(rows: Tensor) -> Tensor:
            x = self.noise(seeds[rows], grid) if noise is None else noise[rows]
            x = x.to(self.codec.device, non_blocking=True)
            alpha, sigma = schedule.alpha_sigma(log_snrs[0], kind)
            x = sigma * x
            if start is not None:
                x = x + alpha * self.codec.normalise(start[rows].to(x.device))
            done = int(rows[0]) // length * settings.steps

            def estimated(latents: Tensor, step: int) -> Tensor | None:
                better = None if adjust is None else adjust(rows, latents)
                if watch is not None:
                    shown = latents if better is None else better
                    watch(Step(done + step + 1, batches * settings.steps, rows, shown))
                return better

            plain = adjust is None and watch is None
            return self._solve(
                condition[rows],
                seeds[rows],
                x,
                times,
                log_snrs,
                settings,
                None if plain else estimated,
            )

        with explain_out_of_memory(f"denoising {length} grids of {grid[0]}x{grid[1]} at once"):
            latents = in_batches(draw, len(seeds), length)
        if not torch.isfinite(latents).all():  # would be drawn black
            raise WorkError(
                f"samples on a grid of {grid[0]}x{grid[1]} are not finite: the weights are, or "
                f"guidance {settings.guidance} or autoguidance {settings.autoguidance} is too much "
                "for them"
            )
        return latents

    def noise(self, seeds: Tensor, grid: Size) -> Tensor:
        """Return the noise that sampling begins with: seeds int64 [B] → float32 [B, L, h, w]."""
        return noise_field(rng.fold(seeds), self.codec.latent_channels, grid, self.codec.device)

    def check_guidance(self, guidance: float | None, autoguidance: float | None = None) -> None:
        """Raise InputError for guidance of a model without conditions, or without a guide."""
        guided = self.guide is not None
        check_guidance(guidance, autoguidance, conditional=self.model.conditional, guided=guided)

    @torch.no_grad()
    def render(self, latents: Tensor, size: Size, native: Size | None = None) -> Tensor:
        """Decode raw latents [B, L, h, w] → float32 [B, C, H, W] in [−1, 1], on the CPU.

        ``native`` is the size of the images that were encoded, by default that of native_size.
        """
        length = self._at_once(size, _BATCH_PIXELS)
        native = native or self.native_size(latents, size)
        with explain_out_of_memory(f"decoding {length} pictures of {size[0]}x{size[1]} at once"):
            return in_batches(
                lambda rows: self.codec.decode(latents[rows], size, native=native).cpu(),
                len(latents),
                length,
            )

    def native_size(self, latents: Tensor, size: Size) -> Size | None:
        """Return the size of the images that sampled latents [B, L, h, w] stand for, at a size.

        None is the codec's own choice; see RIAE.decode.
        """
        grid = latents.shape[2:]
        if self.codec.grid_for(size) == grid:
            return size
        if self.codec.grid_for(self.codec.image) == grid:
            # The grid of the training images, drawn at another size: cells at the border hold as
            # much of the picture as theirs did.
            return self.codec.image
        return None

    def adapt(self, condition: Tensor) -> Tensor:
        """Replace classes by empty conditions for a model of attributes or embeddings."""
        if condition.dim() == 1 and self.model.condition_shape:
            shape = len(condition), *self.model.condition_shape
            return torch.zeros(shape, dtype=torch.float32, device=condition.device)
        return condition

    def shift(self, grid: Size) -> float:
        """Return the shift of the noise schedule on a grid (h, w)."""
        return schedule.size_shift(
            (grid[0] * grid[1]) ** 0.5, self.base_side, self.diffusion.shift_exponent
        )

    def autocast(self) -> torch.autocast:
        """Make the context in which the model computes."""
        return torch.autocast(self.codec.device.type, torch.bfloat16, enabled=self.bfloat16)

    def _solve(
        self,
        condition: Tensor,
        seeds: Tensor,
        x: Tensor,
        times: Tensor,
        log_snrs: Tensor,
        settings: SampleConfig,
        estimated: Callable[[Tensor, int], Tensor | None] | None,
    ) -> Tensor:
        """Draw one batch of ``latents``: solve the diffusion equation from a noised grid.

        x [B, L, h, w] at the first of the times [S], conditions and seeds [B] → raw latents.
        ``estimated(raw latents, step)`` is told each estimate, and may return a better one.
        """
        grid: Size = (x.shape[2], x.shape[3])
        kind = self.diffusion.schedule
        condition = condition.to(x.device, non_blocking=True)
        guidance = Guidance(self.model, self.guide, settings, condition)

        def denoise(x: Tensor, step: int) -> tuple[Tensor, Tensor]:
            log_snr = log_snrs[step]
            alpha_bar = float(schedule.alpha_bar(log_snr))
            alpha, sigma = schedule.alpha_sigma(log_snr, kind)
            with self.autocast():
                predicted = guidance.predict(x, float(times[step]), alpha_bar)
            data, eps = objective.to_data_and_noise(
                self.diffusion.objective, x, predicted, alpha, sigma
            )
            if estimated is None:
                return data, eps
            better = estimated(self.codec.denormalise(data), step)
            if better is None:
                return data, eps
            data = self.codec.normalise(better)
            return data, (x - alpha * data) / sigma

        def fresh_noise(step: int) -> Tensor:
            keys = rng.fold(seeds, step)
            return noise_field(keys, self.codec.latent_channels, grid, x.device)

        solve = solvers.SOLVERS[settings.solver]
        if settings.eta:
            solve = partial(solvers.ddim, eta=settings.eta, fresh=fresh_noise)
        return self.codec.denormalise(solve(denoise, x, log_snrs, kind))

    def _at_once(self, size: Size, most: int | None = None) -> int:
        """Return how many grids or images of a size have at most ``most`` cells or pixels together.

        By default as many cells as the device's batches have. It is a power of two.
        """
        images, cells = _BATCH.get(self.codec.device.type, _BATCH["cuda"])
        fits = (most or cells) // (size[0] * size[1])
        return 1 << max(1, min(images, fits)).bit_length() - 1
