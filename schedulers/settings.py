"""Every setting of a noise scheduler, declared once: default, meaning, words and range.

A configuration takes these classes as they are. `schedulers.compatibility` says which settings go together.
"""

from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from schedulers.options import KEY, Option, option
from schedulers.registry import Names
from schedulers.tables import FAMILIES, PATHS, PREDICTIONS, SOLVERS, SPACINGS

MAX_MU = 7.0  # a shift of 1097
MAX_TOKENS = 100_000_000
MIN_SIGMA, MAX_SIGMA = 1e-6, 1e6


@dataclass(kw_only=True)
class TrainingSettings:
    """What the weights were trained with and a noise scheduler has to follow. None means that nothing is stated.

    Under `model.checkpoint_defaults`, they fill the keys of the same name in group `scheduler`.
    """

    path: str | None = option(
        None,
        "Gaussian probability path. null = the first of the family's.",
        words=Names(PATHS),
    )
    prediction: str | None = option(
        None, "What the network predicts. null = the first prediction of the path.", words=PREDICTIONS
    )
    learned_variance: bool | None = option(
        None, "Whether the network outputs twice the channels, the second half a variance. null = false."
    )
    train_steps: int | None = option(None, "Number N of discrete training timesteps. null = 1000.", low=2, high=10_000)
    beta_schedule: str | None = option(
        None, "Schedule of the N betas. null = linear.", words=("linear", "scaled_linear", "squaredcos")
    )
    beta_start: float | None = option(None, "First beta. null = 1e-4.", above=0, below=1)
    beta_end: float | None = option(None, "Last beta, at least the first. null = 0.02.", above=0, below=1)
    zero_terminal_snr: bool | None = option(
        None, "Whether the betas are rescaled so that the last timestep is pure noise. null = false."
    )
    beta_min: float | None = option(
        None, "Smallest beta of the score SDE's vp and sub_vp paths. null = 0.1.", low=1e-4, high=10
    )
    beta_max: float | None = option(
        None, "Largest beta of the score SDE's vp and sub_vp paths, above beta_min. null = 20.", low=0.01, high=50
    )
    sigma_data: float | None = option(
        None, "Standard deviation of the data, for path=edm. null = 0.5.", low=1e-3, high=1000
    )
    tau_map: str | None = option(
        None,
        "How the noise level of path=edm becomes the network's time. null = log_sigma.",
        words=("log_sigma", "sigma", "flow_time", "arctan"),
    )
    edm_sign: int | None = option(None, "Sign of the output of prediction=edm. null = 1.", words=(1, -1))


@dataclass(kw_only=True)
class SamplingDefaults:
    """How the authors of a checkpoint sample from it, if the noise scheduler is not the published one.

    Under `model.checkpoint_defaults`, they are defaults of the keys of the same name in group `scheduler`.
    """

    spacing: str | None = option(
        None, "How timesteps are spaced. null = the first spacing of the path.", words=Names(SPACINGS)
    )
    end: str | None = option(None, "Last row of the timesteps. null = clean.", words=("clean", "t_min"))
    steps_offset: int | None = option(
        None, "Offset added to the timesteps of spacing=leading. null = 0.", low=-10_000, high=10_000
    )
    shift: float | None = option(None, "Static timestep shift of a flow. null = 1, no shift.", low=1e-3, high=1000)
    base_shift: float | None = option(
        None, "Shift exponent mu at base_tokens, for a shift that grows with the image.", low=-MAX_MU, high=MAX_MU
    )
    max_shift: float | None = option(None, "Shift exponent mu at max_tokens.", low=-MAX_MU, high=MAX_MU)
    base_tokens: int | None = option(
        None, "Image tokens at which the shift exponent is base_shift. null = 256.", low=1, high=MAX_TOKENS
    )
    max_tokens: int | None = option(
        None,
        "Image tokens at which the shift exponent is max_shift, more than base_tokens. null = 4096.",
        low=1,
        high=MAX_TOKENS,
    )
    shift_terminal: float | None = option(
        None,
        "Last shifted sigma of a flow, to which the others are stretched. null = they are not stretched.",
        low=1e-4,
        high=0.99,
    )
    sigma_min: float | None = option(
        None,
        "Smallest sigma of spacing=karras, exponential and beta, and of path=ve. null = the path's: 0.002 for edm, "
        "0.001 for a flow, 0.01 for ve.",
        low=MIN_SIGMA,
        high=MAX_SIGMA,
    )
    sigma_max: float | None = option(
        None,
        "Largest sigma of spacing=karras, exponential and beta, and of path=ve. null = the path's: 80 for edm, 1 for a "
        "flow, 50 for ve.",
        low=MIN_SIGMA,
        high=MAX_SIGMA,
    )


@dataclass(kw_only=True)
class SchedulerOptions(SamplingDefaults, TrainingSettings):
    """The settings of a noise scheduler besides its family and its solver. None means the default of the path."""

    state_dtype: str | None = option(
        None,
        "Dtype to which the state is rounded after each step, as in diffusers. null = float32, not rounded.",
        words=("float32", "float16", "bfloat16"),
    )
    clip: float | None = option(
        None,
        "Limit of |x0|, to which x0 is clamped; with threshold, the largest quantile. null = not clamped; with "
        "threshold, 1.",
        low=1e-3,
        infinite=True,
    )
    threshold: float | None = option(
        None,
        "Quantile of |x0| to which x0 is clamped per image, if it is above 1 and below clip. null = not clamped.",
        low=0,
        high=1,
    )
    coordinates: str | None = option(
        None, "Coordinates of the steps; ve means x / alpha. null = native.", words=("native", "ve")
    )
    integer_timesteps: bool | None = option(
        None, "Whether the timesteps of spacing=linspace are rounded to trained indices. null = true."
    )
    spare_row: bool | None = option(
        None, "Whether spacing=linspace or leading makes one more row and drops the last one. null = false."
    )
    stride_target: bool | None = option(
        None, "Whether first-order steps of spacing=trailing land at t - N // n. null = false."
    )
    round_tau: str | None = option(
        None, "How the network's time is rounded to whole numbers. null = not rounded.", words=("round", "floor")
    )
    rho: float | None = option(None, "Exponent of spacing=karras. null = 7.", low=1, high=100)
    sigmas: list[float] | None = option(
        None, "Sigmas of spacing=custom, falling, without 0.", low=MIN_SIGMA, high=MAX_SIGMA
    )
    t_last: float | None = option(
        None, "Time of the last evaluation of spacing=uniform. null = the path's.", low=1e-5, high=0.999
    )
    geometric_sigma: bool | None = option(
        None, "Whether spacing=uniform steps with sigmas even in their logarithm. null = true for path=ve, else false."
    )
    original_steps: int | None = option(
        None, "Number of timesteps that a checkpoint was distilled on, for spacing=lcm. null = 50.", low=1, high=10_000
    )
    mu: float | None = option(
        None,
        "Exponent of the timestep shift of a flow, shift = e^mu, in place of shift.",
        low=-MAX_MU,
        high=MAX_MU,
    )
    sigma_last: float | None = option(
        None,
        "Unshifted sigma of the last evaluation of a flow, below sigma_first; 0 goes with spare_row=true. "
        "null = sigma_first / steps.",
        low=0,
        below=1,
    )
    sigma_first: float | None = option(
        None, "Unshifted sigma of the first evaluation of a flow. null = 1.", low=1e-3, high=1
    )
    sigma_cap: float | None = option(None, "Largest shifted sigma of a flow. null = 1.", low=1e-3, high=1)


@dataclass(kw_only=True)
class SolverOptions:
    """The options of the solvers. None means the solver's own default; `schedulers.tables` says which each takes."""

    eta: float | None = option(None, "Amount of noise; 0 = deterministic, 1 = ancestral. null = 0.", low=0, high=1)
    variance: str | None = option(
        None,
        "Variance of the noise that each step adds. null = small.",
        words=("small", "large", "learned_range", "learned"),
    )
    final_noise: bool | None = option(None, "Whether the last step adds noise too. null = false.")
    kind: str | None = option(None, "Variant of the second-order step. null = midpoint.", words=("midpoint", "heun"))
    order: int | None = option(
        None, "Order of the method; unipc and deis have 1 to 3. null = 2 for unipc and deis, 4 for lms.", low=1, high=4
    )
    b: str | None = option(None, "Function B(h) of the method. null = bh2.", words=("bh1", "bh2"))
    corrector: bool | None = option(None, "Whether the corrector runs. null = true.")
    lower_order_final: bool | None = option(None, "Whether the last of few steps use a lower order. null = true.")
    runge_kutta: bool | None = option(None, "Whether the method starts with Runge-Kutta steps. null = false.")
    boundary: bool | None = option(
        None, "Whether the boundary scalings of LCM's checkpoints are used. null = true for ddpm, else false."
    )
    timestep_scaling: float | None = option(
        None, "Factor of the timestep in the boundary scalings. null = 10.", low=1e-3, high=1e6
    )
    gamma: float | None = option(None, "Share of new noise in the next row's noise. null = 0.3.", low=0, high=1)
    s_churn: float | None = option(
        None, "Amount of noise added over all steps, S_churn of Karras et al. 2022. null = 40.", low=0, high=1e6
    )
    s_tmin: float | None = option(None, "Smallest sigma / alpha at which noise is added. null = 0.05.", low=0)
    s_tmax: float | None = option(
        None, "Largest sigma / alpha at which noise is added, at least s_tmin. null = 50.", low=0, infinite=True
    )
    s_noise: float | None = option(None, "Factor of the added noise, S_noise. null = 1.003.", low=0, high=10)
    corrections: int | None = option(None, "Number of Langevin steps per solver step. null = 1.", low=1, high=100)
    snr: float | None = option(
        None, "Signal-to-noise ratio that sets the size of the Langevin steps. null = 0.15.", low=1e-4, high=1
    )
    rtol: float | None = option(None, "Relative tolerance. null = 1e-3.", low=1e-5, high=1)
    atol: float | None = option(None, "Absolute tolerance. null = 1e-3.", low=1e-5, high=1)


@dataclass
class NoiseSchedulerSettings(SolverOptions, SchedulerOptions):
    """All settings of a noise scheduler. None means the default of the path or solver."""

    family: str = field(metadata={KEY: Option("Family of the noise scheduler.", words=FAMILIES)})
    _: KW_ONLY
    solver: str | None = option(None, "Rule for one step. null = euler.", words=Names(SOLVERS))
    plugin: dict[str, dict[str, Any]] | None = option(
        None, "Options of registered solvers, paths and spacings, by name."
    )
