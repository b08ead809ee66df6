"""Settings of R2ID's diffusion, and of the samples that it draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from r2id.config.section import (
    Fraction0,
    Guidance,
    Label,
    Labels,
    Section,
    Seed,
    Sizes,
    Solver,
    Strings,
    as_int,
    as_tuple,
    check_seeds,
)
from r2id.errors import InputError

Objective = Literal["epsilon", "x0", "v", "flow"]
NoiseSchedule = Literal["cosine", "linear_beta", "flow"]
Weighting = Literal["uniform", "min_snr", "soft_min_snr"]

_NAMED = 20
"""The most classes that an error lists."""


class DiffusionConfig(Section):
    """How R2ID is trained to denoise."""

    objective: Objective = "v"
    """What the network predicts: the noise, the data, v (Salimans & Ho 2022) or the velocity of the
    flow (Lipman et al. 2023)."""
    schedule: NoiseSchedule = "cosine"
    """How much noise there is at each time: cosine (Nichol & Dhariwal 2021), the linear β of DDPM,
    or a straight line from data to noise, which goes with objective flow."""
    time_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """How training draws times: uniformly, or mostly in the middle (Esser et al. 2024)."""
    weighting: Weighting = "uniform"
    """Weight of the loss over time: the same for all, min-SNR-γ with γ = 5 (Hang et al. 2023), or
    its smooth form (Crowson et al. 2024)."""
    condition_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of training samples whose condition is dropped; classifier-free guidance needs it."""
    shift_exponent: float = Field(default=1.0, ge=0)
    """How much noisier a larger latent grid is made: k in logSNR_n(t) = logSNR(t) −
    2·k·log(n/n_base), where n = √(h·w) is the side of the grid and n_base that of the training
    images (Hoogeboom et al. 2023); 0 makes no difference between sizes."""

    multiscale: int = Field(default=0, ge=0)
    """How often the error is averaged down to half the sides and counted again, for pixels: at a
    side of 1/s with the weight s (simple diffusion, Hoogeboom et al. 2023). 2 counts the error
    itself, that of means of 2x2 cells twice, and that of means of 4x4 cells four times."""

    @model_validator(mode="after")
    def _flow_goes_with_flow(self) -> DiffusionConfig:
        if (self.objective == "flow") != (self.schedule == "flow"):
            raise ValueError(
                f"objective {self.objective!r} does not go with schedule {self.schedule!r}: "
                "'flow' needs 'flow', the others need 'cosine' or 'linear_beta'"
            )
        return self


class SamplerConfig(Section):
    """How one sample is computed."""

    steps: Annotated[int, BeforeValidator(as_int)] = Field(default=20, ge=1)
    """Steps of the solver."""
    guidance: Guidance = 2.0
    """Classifier-free guidance scale: 1 is none, 0 ignores the condition."""
    autoguidance: float = Field(default=0.0, ge=0, le=10)
    """Autoguidance, for models without conditions too: moves away from what an early average of the
    same weights predicts, which the run kept (``train.guide_after``); 0 is none (Karras et al.
    2024b)."""
    guidance_interval: Annotated[tuple[Fraction0, Fraction0], BeforeValidator(as_tuple)] = (
        0.0,
        1.0,
    )
    """Range of times in which both kinds of guidance apply, from 0 (data) to 1 (noise); at other
    times there is none (Kynkäänniemi et al. 2024)."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """Share of fresh noise in the steps of solver ddim: 0 is none, 1 is ancestral sampling."""
    solver: Solver = Field(
        default_factory=lambda settings: "ddim" if settings.get("eta") else "dpmpp_2m"
    )
    """Numerical method of the steps: DPM-Solver++ 2M (Lu et al. 2022), which needs the fewest; DDIM
    (Song et al. 2021), Euler, or Heun, which evaluates the network twice per step. Where only eta
    is set, it is ddim."""

    @model_validator(mode="after")
    def _solver_options(self) -> Self:
        low, high = self.guidance_interval
        if low >= high:
            raise ValueError(f"guidance_interval = {[low, high]}: must rise")
        if self.eta and self.solver != "ddim":
            raise ValueError(f"eta = {self.eta}: goes with solver 'ddim', not {self.solver!r}")
        return self


def check_guidance(
    guidance: float | None, autoguidance: float | None, *, conditional: bool, guided: bool
) -> None:
    """Raise InputError for guidance that a model cannot have; None is guidance not asked for.

    ``conditional``: it was trained with conditions; ``guided``: it has a guide.
    """
    if guidance not in (None, 0, 1) and not conditional:
        raise InputError(
            f"guidance {guidance}: the model was trained without conditions; must be 0 or 1 "
            "(autoguidance needs none)"
        )
    if autoguidance and not guided:
        raise InputError(
            f"autoguidance {autoguidance}: the model was trained without a guide "
            "(train.guide_after); must be 0, or export it with a --guide"
        )


class PictureConfig(Section):
    """What one picture shows."""

    seed: Seed = 0
    """Seed of the noise."""
    label: Label | None = None
    """Class of the picture, by its name or number; by default none, so that it may be of any."""
    attributes: Strings = ()
    """Attribute that the picture has, NAME, or lacks, -NAME, if the model was trained on
    attributes."""
    embedding: Path | None = None
    """``.npy`` file of an embedding, in the shape that the model was trained on."""


def find_labels(labels: Sequence[int | str], classes: int, names: Sequence[str] = ()) -> list[int]:
    """Return the numbers of classes, of which some may be given by their names.

    A text that is a name is that class. Else it may be a number, as a command line has it, but not
    with zeros before it: those are names. Raises InputError for what is none of a model's classes.
    """
    numbers = {str(number): number for number in range(classes)}
    numbers |= {name: number for number, name in enumerate(names)}
    found = [numbers.get(label, -1) if isinstance(label, str) else label for label in labels]
    for label, number in zip(labels, found, strict=True):
        if not 0 <= number < classes:
            allowed = f"0 to {classes - 1}" if classes else "none: the model has no classes"
            if not {*names} <= {*map(str, range(classes))}:
                shown = [*names[:_NAMED], *(["…"] if len(names) > _NAMED else [])]
                allowed += f", or one of {', '.join(shown)}"
            raise InputError(f"label {label}: must be {allowed}")
    return [int(number) for number in found]


class SampleConfig(SamplerConfig):
    """Which samples are drawn, and how."""

    sizes: Sizes = ()
    """Height x width of the images in pixels. Without any, the size of the training images."""
    count: int = Field(default=40, ge=1)
    """Number of images per size."""
    labels: Labels = ()
    """Class of the images, by its name or number. With several, images take them in turn; by
    default all classes, from the first on."""
    seed: Seed = 0
    """Seed of the first image of each size; image i has this seed + i."""

    @model_validator(mode="after")
    def _seeds_are_seeds(self) -> Self:
        check_seeds(self.seed, self.count)
        return self
