"""The options of diffusers' scheduler classes with their defaults, and the classes that are not supported here.

As of diffusers 0.42.1. A scheduler_config.json may leave options out. It may also have options of another class, which
the class that it names ignores. Both work here as in diffusers.
"""

import difflib
import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeGuard

Table = dict[str, object]
LARGEST = int(sys.float_info.max)

BETAS: Table = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
}
SD_BETAS: Table = BETAS | {"beta_start": 0.00085, "beta_end": 0.012}
EPS: Table = {"prediction_type": "epsilon"}
ZERO_SNR: Table = {"rescale_betas_zero_snr": False}
THRESHOLD: Table = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
CLIP: Table = {"clip_sample": True, "clip_sample_range": 1.0}
TIMESTEP_SPACING: Table = {"timestep_spacing": "linspace", "steps_offset": 0}
LEADING_SPACING: Table = {"timestep_spacing": "leading", "steps_offset": 0}
SIGMA_LEVELS: Table = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
SIGMA_ENDS: Table = {"sigma_min": None, "sigma_max": None}
FINAL_SIGMA: Table = {"final_sigmas_type": "zero"}
RESOLUTION_SHIFT: Table = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
DYNAMIC_SHIFT: Table = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}
MULTISTEP: Table = (
    BETAS
    | EPS
    | THRESHOLD
    | SIGMA_LEVELS
    | DYNAMIC_SHIFT
    | {"solver_order": 2, "use_flow_sigmas": False, "flow_shift": 1.0}
)
DPM: Table = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True}
DDPM: Table = BETAS | EPS | THRESHOLD | CLIP | LEADING_SPACING | ZERO_SNR | {"variance_type": "fixed_small"}
DDIM: Table = BETAS | EPS | THRESHOLD | CLIP | LEADING_SPACING | ZERO_SNR | {"set_alpha_to_one": True}
LCM: Table = (
    SD_BETAS
    | EPS
    | THRESHOLD
    | CLIP
    | LEADING_SPACING
    | ZERO_SNR
    | {
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "original_inference_steps": 50,
        "set_alpha_to_one": True,
        "timestep_scaling": 10.0,
    }
)
FLOW: Table = {"num_train_timesteps": 1000, "shift": 1.0} | DYNAMIC_SHIFT | RESOLUTION_SHIFT | SIGMA_LEVELS
FLOW |= {"invert_sigmas": False, "shift_terminal": None}
EDM: Table = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras", "rho": 7.0}
EDM |= {"num_train_timesteps": 1000} | EPS | FINAL_SIGMA
EDM_DPM: Table = EDM | {
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
}

DEFAULTS: dict[str, Table] = {
    "DDPMScheduler": DDPM,
    "DDPMParallelScheduler": DDPM,
    "DDIMScheduler": DDIM,
    "DDIMParallelScheduler": DDIM,
    "EulerDiscreteScheduler": BETAS
    | EPS
    | TIMESTEP_SPACING
    | SIGMA_LEVELS
    | SIGMA_ENDS
    | FINAL_SIGMA
    | ZERO_SNR
    | {"interpolation_type": "linear", "timestep_type": "discrete"},
    "EulerAncestralDiscreteScheduler": BETAS | EPS | TIMESTEP_SPACING | ZERO_SNR,
    "HeunDiscreteScheduler": SD_BETAS | EPS | TIMESTEP_SPACING | SIGMA_LEVELS | CLIP | {"clip_sample": False},
    "KDPM2DiscreteScheduler": SD_BETAS | EPS | TIMESTEP_SPACING | SIGMA_LEVELS,
    "KDPM2AncestralDiscreteScheduler": SD_BETAS | EPS | TIMESTEP_SPACING | SIGMA_LEVELS,
    "LMSDiscreteScheduler": BETAS | EPS | TIMESTEP_SPACING | SIGMA_LEVELS,
    "DPMSolverMultistepScheduler": MULTISTEP
    | DPM
    | TIMESTEP_SPACING
    | FINAL_SIGMA
    | ZERO_SNR
    | {
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
    },
    "DPMSolverSinglestepScheduler": MULTISTEP
    | DPM
    | FINAL_SIGMA
    | {"lower_order_final": False, "lambda_min_clipped": -float("inf"), "variance_type": None},
    "UniPCMultistepScheduler": MULTISTEP
    | TIMESTEP_SPACING
    | SIGMA_ENDS
    | FINAL_SIGMA
    | ZERO_SNR
    | {
        "predict_x0": True,
        "solver_type": "bh2",
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
        "shift_terminal": None,
    },
    "DEISMultistepScheduler": MULTISTEP
    | TIMESTEP_SPACING
    | {"algorithm_type": "deis", "solver_type": "logrho", "lower_order_final": True},
    "PNDMScheduler": BETAS | EPS | LEADING_SPACING | {"skip_prk_steps": False, "set_alpha_to_one": False},
    "LCMScheduler": LCM,
    "TCDScheduler": LCM,
    "FlowMatchEulerDiscreteScheduler": FLOW | {"stochastic_sampling": False},
    "FlowMatchHeunDiscreteScheduler": {"num_train_timesteps": 1000, "shift": 1.0},
    "FlowMatchLCMScheduler": FLOW | {"scale_factors": None, "upscale_mode": "bicubic"},
    "EDMEulerScheduler": EDM,
    "EDMDPMSolverMultistepScheduler": EDM_DPM | THRESHOLD | {"algorithm_type": "dpmsolver++"},
    "CosineDPMSolverMultistepScheduler": EDM_DPM
    | {
        "sigma_min": 0.3,
        "sigma_max": 500.0,
        "sigma_data": 1.0,
        "sigma_schedule": "exponential",
        "prediction_type": "v_prediction",
    },
    "ScoreSdeVeScheduler": {
        "num_train_timesteps": 2000,
        "snr": 0.15,
        "sigma_min": 0.01,
        "sigma_max": 1348.0,
        "sampling_eps": 1e-5,
        "correct_steps": 1,
    },
    "ScoreSdeVpScheduler": {"num_train_timesteps": 2000, "beta_min": 0.1, "beta_max": 20.0, "sampling_eps": 1e-3},
}
"""Every supported class, with the arguments of its constructor and their defaults."""

UNDECLARED_OPTIONS: dict[str, Table] = {
    "DPMSolverMultistepScheduler": SIGMA_ENDS | RESOLUTION_SHIFT,
    "DPMSolverSinglestepScheduler": SIGMA_ENDS | RESOLUTION_SHIFT,
    "DEISMultistepScheduler": SIGMA_ENDS | RESOLUTION_SHIFT,
    "UniPCMultistepScheduler": RESOLUTION_SHIFT,
    "HeunDiscreteScheduler": SIGMA_ENDS,
    "KDPM2DiscreteScheduler": SIGMA_ENDS,
    "KDPM2AncestralDiscreteScheduler": SIGMA_ENDS,
}
"""Options that a class (or its pipeline) reads from a file, though its constructor does not have them."""

DISCRETE_DATA = "it works on tokens or classes, not on Gaussian noise"
OWN_PATH = "its noise path is its own, outside the three families"
UNSUPPORTED = {
    "AmusedScheduler": DISCRETE_DATA,
    "BlockRefinementScheduler": DISCRETE_DATA,
    "DiscreteDDIMScheduler": DISCRETE_DATA,
    "EntropyBoundScheduler": DISCRETE_DATA,
    "VQDiffusionScheduler": DISCRETE_DATA,
    "CMStochasticIterativeScheduler": "a consistency model's own boundary and noise levels are not implemented",
    "CogVideoXDDIMScheduler": "its betas are shifted in signal-to-noise for one model",
    "CogVideoXDPMScheduler": "it needs the network's output at two timesteps at once",
    "DDIMInverseScheduler": "it goes from data to noise, and a grid goes from noise to data",
    "DPMSolverMultistepInverseScheduler": "it goes from data to noise, and a grid goes from noise to data",
    "DDPMWuerstchenScheduler": OWN_PATH,
    "IPNDMScheduler": OWN_PATH,
    "SCMScheduler": OWN_PATH,
    "KarrasVeScheduler": "its table holds sigma squared where its formulas mean sigma; use the sgm family with churn",
    "DPMSolverSDEScheduler": "its noise is a Brownian path, which one tensor per step cannot give",
    "SASolverScheduler": "stochastic Adams steps with their own variance schedule are not implemented",
    "UnCLIPScheduler": "the pipeline passes it the previous timestep",
    "FlowMapEulerDiscreteScheduler": "the network of a flow map takes the start and the end of a step",
    "HeliosScheduler": "it samples several resolutions in stages",
    "HeliosDMDScheduler": "it samples several resolutions in stages",
    "LTXEulerAncestralRFScheduler": "it is made for one model",
    "MiniMaxH3Scheduler": "it is made for one model",
    "PiflowScheduler": "the network gives a policy for a step, not an estimate at a point",
    "RFD4ProteinaScheduler": "it is made for one model",
    "RePaintScheduler": "it goes back and forth in time over a mask",
}
"""Every other scheduler class of diffusers, with the reason why it is not supported."""


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a number, perhaps infinite."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < LARGEST
    return isinstance(value, float) and not math.isnan(value)


@dataclass(frozen=True)
class Options:
    """The options of one class, read by type; each reader raises ValueError with the option's name for another type.

    Attributes:
        name: The name of the diffusers class.
        values: The options with their values, defaults filled in.
    """

    name: str
    values: Mapping[str, object]

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise the one-line error that says which option is not supported, and why."""
        raise ValueError(f"{self.name} with {key}={self.values[key]!r} is not supported: {why}")

    def number(self, key: str) -> float:
        """Return a float."""
        value = self.values[key]
        if not is_number(value):
            self.refuse(key, "give a number")
        return float(value)

    def optional(self, key: str) -> float | None:
        """Return a float, or None if the file has null or nothing."""
        return None if self.values.get(key) is None else self.number(key)

    def count(self, key: str) -> int:
        """Return a whole number."""
        if not self.number(key).is_integer():
            self.refuse(key, "give a whole number")
        return int(self.number(key))

    def flag(self, key: str) -> bool:
        """Return true or false; null is false."""
        value = self.values[key]
        if not isinstance(value, bool | None):
            self.refuse(key, "give true or false")
        return bool(value)

    def text(self, key: str) -> str:
        """Return a name."""
        value = self.values[key]
        if not isinstance(value, str):
            self.refuse(key, "give a name")
        return value

    def numbers(self, key: str) -> list[float] | None:
        """Return a list of numbers, or None."""
        value = self.values[key]
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(is_number(v) and math.isfinite(v) for v in value):
            self.refuse(key, "give a list of numbers")
        return [float(v) for v in value]


def parse_options(config: Mapping[str, object]) -> Options:
    """Return the options of the class that config names under _class_name, with its defaults filled in.

    An option that no supported class has gives a warning.

    Args:
        config: The content of a scheduler_config.json.

    Returns:
        The options.

    Raises:
        ValueError: The class is missing, unknown (with the nearest name) or not supported (with the reason).
    """
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise ValueError("a noise scheduler's configuration needs _class_name, as in diffusers' scheduler_config.json")
    if name in UNSUPPORTED:
        raise ValueError(f"{name} is not supported: {UNSUPPORTED[name]}")
    if name not in DEFAULTS:
        near = difflib.get_close_matches(name, [*DEFAULTS, *UNSUPPORTED], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown class {name!r}; {hint}Supported classes: {', '.join(sorted(DEFAULTS))}")
    known = DEFAULTS[name] | UNDECLARED_OPTIONS.get(name, {})
    elsewhere = {key for options in DEFAULTS.values() for key in options}
    for key in config:
        if not key.startswith("_") and key not in known and key not in elsewhere:
            near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.7)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            warnings.warn(f"{name} has no option {key!r}{hint}", stacklevel=3)
    return Options(name, known | {key: value for key, value in config.items() if key in known})
