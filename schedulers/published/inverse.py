"""From settings to the class of diffusers that samples in the same way, the inverse of this package's mapping.

Every number of the configuration is worked out from the settings alone, and never read from a built noise scheduler: a
fault in building one shows as a difference.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from schedulers.compatibility import resolve, starts_at_pure_noise
from schedulers.published import from_diffusers
from schedulers.published.options import parse_options
from schedulers.settings import NoiseSchedulerSettings

Config = dict[str, object]
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction", "flow": "flow_prediction"}
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos": "squaredcos_cap_v2"}
LEVELS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}
VE_CLASSES = ("Euler", "Heun", "KDPM2", "LMS", "EDM", "Cosine", "ScoreSdeVe")
"""How the names of the classes begin whose state is x / alpha."""


@dataclass(frozen=True)
class DiffusersPeer:
    """A class of diffusers with everything that makes it sample as some settings say.

    Attributes:
        class_name: The name of the class.
        config: The configuration of the class, as in scheduler_config.json.
        sigmas: The sigmas that a pipeline passes to set_timesteps; None for the class's own.
        mu: The exponent of a flow's shift that a pipeline passes to set_timesteps.
        rows: Another class, whose timesteps and sigmas this one takes: a solver of diffusers on a grid of diffusers.
        step: More arguments of its step.
        tau_map: How its sigmas become the network's time, on path=edm; None for the class's own timesteps.
    """

    class_name: str
    config: Config
    sigmas: tuple[float, ...] | None = None
    mu: float | None = None
    rows: "DiffusersPeer | None" = None
    step: Mapping[str, object] = field(default_factory=dict)
    tau_map: str | None = None

    @property
    def in_x_over_alpha(self) -> bool:
        """Whether the class's state is x / alpha."""
        return self.class_name.startswith(VE_CLASSES)


def find_peer(settings: NoiseSchedulerSettings, steps: int, tokens: int = 1) -> DiffusersPeer | None:
    """Return the class of diffusers that samples as the settings say, or None if there is none.

    Args:
        settings: The settings of the noise scheduler.
        steps: The number of steps; some conventions differ only where it does not divide the trained timesteps.
        tokens: The number of latent tokens of one sample.

    Returns:
        The class with its configuration; `from_diffusers` takes the configuration.

    Raises:
        ValueError: The settings do not go together.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever builds these settings has been warned
        s = resolve(settings, steps)
        finders: dict[str, Callable[[NoiseSchedulerSettings, int, int], DiffusersPeer | None]] = {
            "flow": _flow,
            "discrete_vp": _discrete_vp,
            "edm": _edm,
            "ve": _ve,
        }
        finder = finders.get(s.path or "")
        peer = finder(s, steps, tokens) if finder else None
        return peer if peer is not None and _accepted(peer) else None


def _accepted(peer: DiffusersPeer) -> bool:
    """Return whether from_diffusers takes the configuration; it refuses what diffusers does otherwise or wrongly."""
    try:
        from_diffusers({"_class_name": peer.class_name, **peer.config})
    except ValueError:
        return False
    return True


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _threshold(s: NoiseSchedulerSettings) -> Config:
    if s.threshold is None:
        return {}
    return {"thresholding": True, "dynamic_thresholding_ratio": s.threshold, "sample_max_value": _or(s.clip, 1.0)}


def _x0_limits(s: NoiseSchedulerSettings) -> Config:
    """Return the clipping of the classes that have both kinds."""
    if s.threshold is not None or s.clip is None:
        return {"clip_sample": False, **_threshold(s)}
    return {"clip_sample": True, "clip_sample_range": s.clip}


def _eta(s: NoiseSchedulerSettings) -> float:
    """Return the amount of noise of a first-order solver."""
    return 1.0 if s.solver == "ancestral" else _or(s.eta, 0.0) if s.solver == "ddim" else 0.0


def _multistep_solver(s: NoiseSchedulerSettings, steps: int) -> tuple[str, Config] | None:
    """Return the class and options of a DPM-Solver, UniPC, DEIS or first-order solver; None for any other."""
    lower: Config = {"lower_order_final": s.lower_order_final is not False}
    kind: Config = {"solver_type": s.kind or "midpoint"}
    multi, single = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
    match s.solver:
        case "euler" | "ddim" | "ancestral" | "ddpm" | "dpmpp_1":
            eta = 1.0 if s.solver == "ddpm" else _eta(s)
            if eta not in (0.0, 1.0):
                return None
            return multi, {"algorithm_type": "sde-dpmsolver++" if eta else "dpmsolver++", "solver_order": 1}
        case "dpmpp_2m":
            return multi, {"algorithm_type": "dpmsolver++", "solver_order": 2, **kind, **lower}
        case "dpmpp_2m_sde":
            return multi, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, **kind, **lower}
        case "dpmpp_2s" | "dpmpp_3s":
            return single, {"algorithm_type": "dpmsolver++", "solver_order": int(s.solver[6]), **kind, **lower}
        case "unipc":
            off = list(range(steps)) if s.corrector is False else []
            options: Config = {"solver_order": s.order or 2, "solver_type": s.b or "bh2", "disable_corrector": off}
            return "UniPCMultistepScheduler", {**options, **lower}
        case "deis":
            return "DEISMultistepScheduler", {"solver_order": s.order or 2, **lower}
    return None  # dpmpp_3m has order 3 here; the published rule has order 2


def _finite_at_the_end(s: NoiseSchedulerSettings, name: str, options: Config, clean: bool) -> bool:
    """Return whether a solver of diffusers gives finite numbers in its last step.

    Args:
        s: The settings.
        name: The name of the class.
        options: The options of the solver.
        clean: Whether the last row is at sigma = 0. If not, it may be the row before it again.
    """
    if clean:
        falls = s.lower_order_final is not False or options["solver_order"] == 1
        return name.startswith("DPM") or (name.startswith("UniPC") and s.b != "bh1" and falls)
    if s.path == "discrete_vp" and (s.sigma_min is not None or s.spacing not in (*LEVELS, "leading", "linspace")):
        return True
    if s.path == "discrete_vp" and (s.spare_row or s.steps_offset):
        return True
    ode = options.get("algorithm_type") == "dpmsolver++" and options.get("solver_type", "midpoint") == "midpoint"
    return name in ("DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler") and ode


def _uses_raw_eps(s: NoiseSchedulerSettings) -> bool:
    """Return whether the network's own eps is used beside a thresholded x0."""
    return s.threshold is not None and s.solver in ("euler", "ddim", "ancestral", "deis")


def _flow(s: NoiseSchedulerSettings, steps: int, tokens: int) -> DiffusersPeer | None:
    rows = _flow_rows(s, steps, tokens)
    if rows is None or s.prediction not in ("flow", "x0"):
        return None
    if s.prediction == "flow" and s.clip is None and s.threshold is None:
        if s.solver in ("euler", "dpmpp_1") or (s.solver == "ddim" and not s.eta):
            return rows
        if s.solver == "heun":
            return DiffusersPeer("FlowMatchHeunDiscreteScheduler", {"num_train_timesteps": 1000}, rows=rows)
        if s.solver == "lcm" and not s.boundary:
            return DiffusersPeer("FlowMatchLCMScheduler", rows.config, rows.sigmas, rows.mu)
    solver = _multistep_solver(s, steps)
    if solver is None or s.solver == "ddpm" or (s.clip is not None and s.threshold is None):
        return None
    if solver[0] != "DPMSolverMultistepScheduler" and starts_at_pure_noise(s):
        return None  # these divide by alpha; diffusers' own rows of a flow stop short of pure noise
    if not _finite_at_the_end(s, solver[0], solver[1], clean=True) or _uses_raw_eps(s):
        return None
    config = {"use_flow_sigmas": True, "prediction_type": PREDICTIONS[s.prediction], **solver[1], **_threshold(s)}
    return DiffusersPeer(solver[0], config, rows=rows)


def _flow_rows(s: NoiseSchedulerSettings, steps: int, tokens: int) -> DiffusersPeer | None:
    """Return the class that makes the rows of a flow, with the unshifted sigmas that a pipeline passes to it."""
    if s.round_tau is not None or _or(s.sigma_cap, 1.0) < 1 or _or(s.rho, 7.0) != 7.0:
        return None
    name, mu = "FlowMatchEulerDiscreteScheduler", None
    if s.spacing == "custom":
        return DiffusersPeer(name, {"shift": 1.0}, tuple(s.sigmas or ()))
    if s.spacing in LEVELS:
        ends = _or(s.sigma_max, 1.0), _or(s.sigma_min, 1e-3)
        even = np.linspace(*ends, steps)
        return DiffusersPeer(name, {"shift": 1.0, LEVELS[s.spacing]: True}, tuple(even.tolist()))
    first = _or(s.sigma_first, 1.0)
    last = _or(s.sigma_last, first / steps)
    sigmas = np.linspace(first, last, steps + 1 if s.spare_row else steps)[:steps]
    config: Config = {"shift": _or(s.shift, 1.0)}
    if s.shift_terminal is not None:
        config["shift_terminal"] = s.shift_terminal
    if s.mu is not None:
        config, mu = {**config, "shift": 1.0, "use_dynamic_shifting": True}, s.mu
    elif s.base_shift is not None and s.max_shift is not None:
        ends_of_tokens = s.base_tokens or 256, s.max_tokens or 4096
        mu = shift_exponent(tokens, *ends_of_tokens, s.base_shift, s.max_shift)
        shifts = {"base_shift": s.base_shift, "max_shift": s.max_shift}
        lengths = {"base_image_seq_len": ends_of_tokens[0], "max_image_seq_len": ends_of_tokens[1]}
        config = {**config, "shift": 1.0, "use_dynamic_shifting": True, **shifts, **lengths}
    return DiffusersPeer(name, config, tuple(sigmas.tolist()), mu)


def shift_exponent(tokens: int, low_tokens: int, high_tokens: int, low: float, high: float) -> float:
    """Return mu for a number of tokens, on the line through two points; calculate_shift of diffusers' pipelines."""
    slope = (high - low) / (high_tokens - low_tokens)
    return tokens * slope + (low - slope * low_tokens)


def _trained(s: NoiseSchedulerSettings) -> Config:
    """Return the options of the trained betas and the prediction."""
    config: Config = {
        "num_train_timesteps": s.train_steps or 1000,
        "beta_schedule": BETA_SCHEDULES[s.beta_schedule or "linear"],
        "beta_start": _or(s.beta_start, 1e-4),
        "beta_end": _or(s.beta_end, 0.02),
        "prediction_type": PREDICTIONS[s.prediction or "eps"],
    }
    return {**config, "rescale_betas_zero_snr": True} if s.zero_terminal_snr else config


def _divides(s: NoiseSchedulerSettings, steps: int) -> bool:
    return (s.train_steps or 1000) % steps == 0


def _lands_elsewhere(s: NoiseSchedulerSettings, steps: int) -> bool:
    """Return whether first-order steps land at t - N // n, and that is not the next row."""
    return bool(s.stride_target) and s.spacing == "trailing" and not _divides(s, steps)


def _leading(s: NoiseSchedulerSettings, spare_row: bool) -> Config | None:
    """Return the options of leading timesteps with or without a spare row; None for another spacing."""
    if s.spacing != "leading" or bool(s.spare_row) != spare_row:
        return None
    return {"timestep_spacing": "leading", "steps_offset": s.steps_offset or 0}


def _discrete_vp(s: NoiseSchedulerSettings, steps: int, tokens: int) -> DiffusersPeer | None:
    special = {
        "ddpm": _ddpm,
        "heun": _heun_or_lms,
        "lms": _heun_or_lms,
        "dpm2": _kdpm2,
        "pndm": _pndm,
        "lcm": _consistency,
        "tcd": _consistency,
    }
    if s.solver in special:
        found = special[s.solver](s, steps)
        return found or (_multistep(s, steps) if s.solver == "ddpm" else None)
    if s.solver == "ancestral" and _divides(s, steps) and (found := _euler_ancestral(s)) is not None:
        return found
    multistep = _multistep(s, steps)
    own_rows = multistep if multistep is not None and multistep.rows is None else None
    return _ddim(s, steps) or own_rows or _euler(s, steps) or multistep


def _ddim_rows(s: NoiseSchedulerSettings, steps: int) -> Config | None:
    """Return the options of the rows of DDIM, whose steps land one whole stride further."""
    if s.spacing == "trailing" and (s.stride_target or _divides(s, steps)):
        return {"timestep_spacing": "trailing"}
    return _leading(s, spare_row=False)


def _ddim(s: NoiseSchedulerSettings, steps: int) -> DiffusersPeer | None:
    rows = _ddim_rows(s, steps)
    strided = _lands_elsewhere(s, steps)
    if rows is None or s.round_tau is not None or (strided and s.coordinates == "ve"):
        return None
    if s.solver not in ("euler", "ddim", "ancestral", *(() if strided else ("dpmpp_1",))):
        return None
    end: Config = {"set_alpha_to_one": s.end != "t_min"}
    return DiffusersPeer("DDIMScheduler", {**_trained(s), **_x0_limits(s), **rows, **end}, step={"eta": _eta(s)})


def _euler_ancestral(s: NoiseSchedulerSettings) -> DiffusersPeer | None:
    rows = {"timestep_spacing": "trailing"} if s.spacing == "trailing" else _leading(s, spare_row=False)
    if rows is None or s.end == "t_min" or s.zero_terminal_snr or s.prediction == "x0" or _changes_x0_or_tau(s):
        return None
    return DiffusersPeer("EulerAncestralDiscreteScheduler", {**_trained(s), **rows})


def _changes_x0_or_tau(s: NoiseSchedulerSettings) -> bool:
    return s.clip is not None or s.threshold is not None or s.round_tau is not None


def _euler_rows(s: NoiseSchedulerSettings, steps: int) -> DiffusersPeer | None:
    """Return EulerDiscreteScheduler with the rows of the settings, if it has them; its timesteps are not rounded."""
    if s.round_tau is not None or s.zero_terminal_snr or _or(s.rho, 7.0) != 7.0:
        return None
    config = {**_trained(s), "final_sigmas_type": "sigma_min" if s.end == "t_min" else "zero"}
    name, leading = "EulerDiscreteScheduler", _leading(s, spare_row=False)
    if leading is not None:
        return DiffusersPeer(name, {**config, **leading})
    if s.spacing == "trailing":
        return DiffusersPeer(name, {**config, "timestep_spacing": "trailing"})
    if s.spacing in LEVELS and (steps > 1 or None not in (s.sigma_min, s.sigma_max)):
        return DiffusersPeer(
            name, {**config, LEVELS[s.spacing]: True, "sigma_min": s.sigma_min, "sigma_max": s.sigma_max}
        )
    if s.spacing == "custom" and s.end != "t_min":
        return DiffusersPeer(name, config, (*(s.sigmas or ()), 0.0))
    return None


def _euler(s: NoiseSchedulerSettings, steps: int) -> DiffusersPeer | None:
    first_order = s.solver in ("euler", "dpmpp_1") or (s.solver == "ddim" and not s.eta)
    if not first_order or _changes_x0_or_tau(s) or (_lands_elsewhere(s, steps) and s.solver != "dpmpp_1"):
        return None
    return _euler_rows(s, steps)


def _ddpm(s: NoiseSchedulerSettings, steps: int) -> DiffusersPeer | None:
    rows = _leading(s, spare_row=False)
    last = s.steps_offset or 0
    if s.spacing == "trailing" and (not s.stride_target or _divides(s, steps)):
        rows, last = {"timestep_spacing": "trailing"}, 1
    if s.spacing == "linspace" and s.integer_timesteps is not False and not s.spare_row:
        rows, last = ({"timestep_spacing": "linspace"} if steps > 1 else None), 0
    variance = s.variance or "small"
    noise_at_the_end = last == 0 or variance == "small" or s.final_noise  # diffusers adds it above timestep 0
    if rows is None or s.end == "t_min" or s.coordinates == "ve" or s.round_tau is not None or not noise_at_the_end:
        return None
    kinds = {"small": "fixed_small", "large": "fixed_large"}
    kind: Config = {"variance_type": kinds.get(variance, variance)}
    return DiffusersPeer("DDPMScheduler", {**_trained(s), **_x0_limits(s), **rows, **kind})


def _heun_or_lms(s: NoiseSchedulerSettings, steps: int) -> DiffusersPeer | None:
    rows, lms = _euler_rows(s, steps), s.solver == "lms"
    if rows is None or rows.sigmas or s.end == "t_min" or _changes_x0_or_tau(s) or (not lms and s.coordinates != "ve"):
        return None
    own_ends = s.sigma_min is None and s.sigma_max is None
    if s.spacing in LEVELS and not own_ends:
        return None
    left_out = ("final_sigmas_type", "sigma_min", "sigma_max")
    config = {key: value for key, value in rows.config.items() if key not in left_out}
    if lms:
        return DiffusersPeer("LMSDiscreteScheduler", config, step={"order": s.order or 4})
    return DiffusersPeer("HeunDiscreteScheduler", config)


def _kdpm2(s: NoiseSchedulerSettings, steps: int) -> DiffusersPeer | None:
    name = {0.0: "KDPM2DiscreteScheduler", 1.0: "KDPM2AncestralDiscreteScheduler"}.get(_or(s.eta, 0.0))
    rows = {"timestep_spacing": "trailing"} if s.spacing == "trailing" else _leading(s, spare_row=False)
    if name is None or rows is None or s.zero_terminal_snr or s.end == "t_min" or _changes_x0_or_tau(s):
        return None
    return DiffusersPeer(name, {**_trained(s), **rows})


def _pndm(s: NoiseSchedulerSettings, steps: int) -> DiffusersPeer | None:
    rows = _leading(s, spare_row=False)
    if rows is None or s.coordinates == "ve" or s.zero_terminal_snr or _changes_x0_or_tau(s):
        return None
    own: Config = {"skip_prk_steps": not s.runge_kutta, "set_alpha_to_one": s.end != "t_min"}
    return DiffusersPeer("PNDMScheduler", {**_trained(s), **rows, **own})


def _consistency(s: NoiseSchedulerSettings, steps: int) -> DiffusersPeer | None:
    if s.spacing != "lcm" or s.coordinates == "ve" or s.round_tau is not None:
        return None
    config = {**_trained(s), "original_inference_steps": s.original_steps or 50}
    if s.solver == "tcd":  # its class ignores clipping, and its last step stops at its own lowest row
        plain = s.clip is None and s.threshold is None
        return DiffusersPeer("TCDScheduler", config, step={"eta": _or(s.gamma, 0.3)}) if plain else None
    if s.boundary is False or s.end == "t_min":
        return None
    scaling: Config = {"timestep_scaling": _or(s.timestep_scaling, 10.0)}
    return DiffusersPeer("LCMScheduler", {**config, **_x0_limits(s), **scaling})


def _multistep_rows(s: NoiseSchedulerSettings, steps: int, name: str) -> Config | None:
    """Return the options of the rows of DPM-Solver, UniPC and DEIS: a spare row, and whole timesteps."""
    if s.spacing in LEVELS:
        rounded = s.spacing == "karras" and not (name.startswith("DPM") and s.beta_schedule == "squaredcos")
        own_ends = s.sigma_min is None and s.sigma_max is None
        repeats = s.end == "t_min" and not name.startswith("DPM")  # their last row is the one before it again
        if s.round_tau != ("round" if rounded else "floor") or _or(s.rho, 7.0) != 7.0 or not own_ends or repeats:
            return None
        return {LEVELS[s.spacing]: True}
    if s.round_tau is not None:
        return None
    single = name == "DPMSolverSinglestepScheduler"
    if s.spacing == "linspace" and s.integer_timesteps is not False and s.spare_row:
        return {} if single else {"timestep_spacing": "linspace"}
    if single:
        return None
    return {"timestep_spacing": "trailing"} if s.spacing == "trailing" else _leading(s, spare_row=True)


def _multistep(s: NoiseSchedulerSettings, steps: int) -> DiffusersPeer | None:
    """Return DPM-Solver, UniPC or DEIS, on its own rows or on those of EulerDiscreteScheduler."""
    solver = _multistep_solver(s, steps)
    elsewhere = _lands_elsewhere(s, steps) and s.solver in ("euler", "ddim", "ancestral", "ddpm")
    limited = s.clip is not None and s.threshold is None
    if solver is None or limited or elsewhere or s.zero_terminal_snr:
        return None
    if s.solver == "ddpm" and (s.variance not in (None, "small") or s.threshold is not None):
        return None
    name, own = solver
    last = "sigma_min" if s.end == "t_min" else "zero"
    if _uses_raw_eps(s) or not _finite_at_the_end(s, name, own, clean=last == "zero"):
        return None
    end: Config = {} if name == "DEISMultistepScheduler" else {"final_sigmas_type": last}
    config = {**_trained(s), **own, **_threshold(s), **end}
    rows = _multistep_rows(s, steps, name)
    if rows is not None:
        return DiffusersPeer(name, {**config, **rows})
    other = _euler_rows(s, steps)
    return None if other is None else DiffusersPeer(name, config, rows=other)


def _edm(s: NoiseSchedulerSettings, steps: int, tokens: int) -> DiffusersPeer | None:
    if s.prediction != "edm" or s.spacing not in ("karras", "exponential") or s.clip is not None or steps == 1:
        return None  # with one step, diffusers' levels begin at the lowest
    config: Config = {
        "sigma_min": _or(s.sigma_min, 0.002),
        "sigma_max": _or(s.sigma_max, 80.0),
        "sigma_data": _or(s.sigma_data, 0.5),
        "sigma_schedule": s.spacing,
        "rho": _or(s.rho, 7.0),
        "prediction_type": "v_prediction" if s.edm_sign == -1 else "epsilon",
        "final_sigmas_type": "sigma_min" if s.end == "t_min" else "zero",
    }
    tau_map = None if s.tau_map in (None, "log_sigma") else s.tau_map
    euler = s.solver in ("euler", "dpmpp_1") or (s.solver == "ddim" and not s.eta)
    if euler and s.threshold is None:
        return DiffusersPeer("EDMEulerScheduler", config, tau_map=tau_map)
    solver = _multistep_solver(s, steps)
    if (
        solver is None
        or solver[0] != "DPMSolverMultistepScheduler"
        or (s.threshold is not None and s.solver != "dpmpp_2m")
    ):
        return None
    if s.solver == "ddpm" and s.variance not in (None, "small"):
        return None
    name = "EDMDPMSolverMultistepScheduler"
    if not _finite_at_the_end(s, solver[0], solver[1], clean=s.end != "t_min"):
        return None
    return DiffusersPeer(name, {**config, **solver[1], **_threshold(s)}, tau_map=tau_map)


def _ve(s: NoiseSchedulerSettings, steps: int, tokens: int) -> DiffusersPeer | None:
    plain = s.spacing == "uniform" and s.t_last is None and s.geometric_sigma is not False and s.end != "t_min"
    if s.solver != "predictor_corrector" or s.prediction != "score" or not plain or _changes_x0_or_tau(s) or steps == 1:
        return None
    ends = {"sigma_min": _or(s.sigma_min, 0.01), "sigma_max": _or(s.sigma_max, 50.0)}
    corrector = {"correct_steps": 1 if s.corrections is None else s.corrections, "snr": _or(s.snr, 0.15)}
    return DiffusersPeer("ScoreSdeVeScheduler", {"num_train_timesteps": max(steps, 2000), **ends, **corrector})


def published_peer(config: Mapping[str, object], even_sigmas: bool, steps: int, tokens: int) -> DiffusersPeer:
    """Return the class that a scheduler_config.json names, with what its pipeline passes to set_timesteps.

    Args:
        config: The content of the file.
        even_sigmas: Whether the pipeline passes sigmas from 1 to 1 / n.
        steps: The number of steps.
        tokens: The number of latent tokens of one sample.

    Returns:
        The class with its configuration.

    Raises:
        ValueError: The class or an option is not supported, as in `from_diffusers`.
    """
    options = parse_options(config)
    sigmas = tuple(np.linspace(1.0, 1 / steps, steps).tolist()) if even_sigmas and "shift" in options.values else None
    mu = None
    if options.values.get("use_dynamic_shifting"):
        lengths = options.count("base_image_seq_len"), options.count("max_image_seq_len")
        mu = shift_exponent(tokens, *lengths, options.number("base_shift"), options.number("max_shift"))
    given = {key: value for key, value in config.items() if key in options.values}
    return DiffusersPeer(options.name, given, sigmas, mu)


def network_times(tau_map: str, sigmas: list[float]) -> list[float]:
    """Return the network's time at each sigma, as path=edm has it."""
    maps: dict[str, Callable[[float], float]] = {
        "sigma": lambda sigma: sigma,
        "flow_time": lambda sigma: 1000 * sigma / (1 + sigma),
        "arctan": lambda sigma: 2 * math.atan(sigma) / math.pi,
    }
    return [maps[tau_map](sigma) for sigma in sigmas]
