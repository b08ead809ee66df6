"""How R2ID diffuses, and how samples are drawn."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from r2id.config.section import Fraction0, Labels, Section, Sizes, Solver, as_tuple


class DiffusionConfig(Section):
    """How R2ID is trained to denoise."""

    objective: Literal["epsilon", "x0", "v", "flow"] = "v"
    """What the network predicts: noise, data, v (Salimans & Ho 2022) or the flow's velocity (Lipman
    et al. 2023)."""
    schedule: Literal["cosine", "linear_beta", "flow"] = "cosine"
    time_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """How training draws t: evenly, or bunched in the middle (Esser et al. 2024)."""
    weighting: Literal["uniform", "min_snr", "soft_min_snr"] = "uniform"
    """Of the loss over time: min_snr is min-SNR-γ with γ = 5 (Hang et al. 2023), soft_min_snr its
    smooth form (Crowson et al. 2024)."""
    condition_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of training samples whose condition is dropped, for guidance."""
    shift_exponent: float = Field(default=1.0, ge=0)
    """k of logSNR_n(t) = logSNR(t) − 2·k·log(n/n_base), n = √(h·w) of the diffused grid (Hoogeboom
    et al. 2023)."""

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

    steps: int = Field(default=30, ge=1)
    """Steps of the solver."""
    guidance: float = Field(default=2.0, ge=0)
    """Classifier-free guidance scale: 1 is none, 0 ignores the condition."""
    guidance_interval: Annotated[tuple[Fraction0, Fraction0], BeforeValidator(as_tuple)] = (
        0.0,
        1.0,
    )
    """Times from and to which guidance applies, 0 is data and 1 noise (Kynkäänniemi et al. 2024);
    the rest of the way is conditional."""
    solver: Solver = "ddim"
    """How the steps are made: DDIM (Song et al. 2021), DPM-Solver++ 2M (Lu et al. 2022), Euler or
    Heun."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """Share of fresh noise in ddim's steps: 0 is deterministic, 1 ancestral."""

    @model_validator(mode="after")
    def _solver_options(self) -> Self:
        low, high = self.guidance_interval
        if low >= high:
            raise ValueError(f"guidance_interval = {[low, high]}: must rise")
        if self.eta and self.solver != "ddim":
            raise ValueError(f"eta = {self.eta}: goes with solver 'ddim', not {self.solver!r}")
        return self


class SampleConfig(SamplerConfig):
    """Which samples are drawn, and how."""

    sizes: Sizes = ()
    """Image height x width in pixels; empty is the size of the training images."""
    count: int = Field(default=40, ge=1)
    """Images per size."""
    labels: Labels = ()
    """Class, by its index; they repeat in turn until there are ``count``. Empty takes all."""
    seed: int = Field(default=0, ge=0)
    """Image i has seed + i, at every size."""
