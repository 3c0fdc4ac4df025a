"""Which options of a published configuration are not supported, with the reason. Nothing here imports torch."""

import math
from collections.abc import Callable
from typing import Literal

from schedulers.published.betas import LEVEL_FLAGS, path_betas
from schedulers.published.options import Options
from schedulers.published.values import check_values

BetaWord = Literal["linear", "scaled_linear", "squaredcos"]
BETA_SCHEDULES: dict[str, BetaWord] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "squaredcos",
}
LEARNED = ("learned", "learned_range")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", *LEARNED)
OTHER_SOLVER_TYPES = ("logrho", "bh1", "bh2")  # another sampler's, which diffusers replaces by its own default
EPS, V, X0, FLOW = "epsilon", "v_prediction", "sample", "flow_prediction"
MULTISTEP = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
)
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler")
WORDS: dict[str, tuple[str, ...]] = {
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "time_shift_type": ("exponential", "linear"),
    "sigma_schedule": ("karras", "exponential"),
}


def check_options(o: Options) -> None:
    """Refuse an option of the class that is not supported.

    Args:
        o: The options of the class.

    Raises:
        ValueError: One line with the class, the option and the reason.
    """
    for check in (*CHECKS.get(o.name, ()), _check_words, _check_betas, _check_prediction, check_values, _check_levels):
        check(o)


def _use(words: tuple[str, ...]) -> str:
    return f"use one of {', '.join(words)}"


def _check_words(o: Options) -> None:
    for key, words in WORDS.items():
        if key in o.values and o.text(key) not in words:
            o.refuse(key, _use(words))


def _check_betas(o: Options) -> None:
    if "beta_start" not in o.values or o.numbers("trained_betas") is not None:
        return
    schedule = o.text("beta_schedule")
    own = {"DDPM": "sigmoid", "Heun": "exp"}
    extra = next((word for name, word in own.items() if o.name.startswith(name)), None)
    if schedule not in BETA_SCHEDULES and schedule != extra:
        o.refuse("beta_schedule", _use(tuple(BETA_SCHEDULES)))


def prediction_types(o: Options) -> tuple[str, ...]:
    """Return the prediction types that the class supports with its other options; empty if it has only one."""
    if "prediction_type" not in o.values:
        return ()
    if o.name in EDM:
        return EPS, V
    if o.name.startswith(("EulerAncestral", "KDPM2")):
        return EPS, V
    if o.name in MULTISTEP:  # with use_flow_sigmas alpha + sigma is 1, where v has another meaning
        return (EPS, X0, FLOW) if o.flag("use_flow_sigmas") else (EPS, X0, V)
    return EPS, X0, V


def _check_prediction(o: Options) -> None:
    kinds = prediction_types(o)
    if kinds and o.text("prediction_type") not in kinds:
        o.refuse("prediction_type", _use(kinds))


def requested_levels(o: Options) -> str | None:
    """Return the flag of karras, exponential or beta sigmas that is set, or None."""
    requested = [key for key in LEVEL_FLAGS if key in o.values and o.flag(key)]
    if len(requested) > 1:
        o.refuse(requested[1], f"{requested[0]} is set too; keep one of them")
    return requested[0] if requested else None


def _check_levels(o: Options) -> None:
    """Refuse levels outside the trained table, at which the network would get the timestep of the table's end."""
    flag = requested_levels(o)
    if flag is None or "beta_start" not in o.values:
        return
    if o.name in MULTISTEP and o.flag("use_flow_sigmas"):
        if o.name != "UniPCMultistepScheduler" or flag != "use_karras_sigmas":
            o.refuse("use_flow_sigmas", "it cannot be combined with karras, exponential or beta sigmas here")
        return
    given = {key: o.optional(key) for key in ("sigma_min", "sigma_max")}
    if all(level is None for level in given.values()) or _is_continuous(o):
        return
    low, high = trained_range(o)
    for key, level in given.items():
        if level is not None and not low * (1 - 1e-6) <= level <= high * (1 + 1e-6):
            o.refuse(key, f"the trained table goes from {low:.6g} to {high:.6g}")


def trained_range(o: Options) -> tuple[float, float]:
    """Return sigma / alpha at the first and the last trained timestep."""
    betas = path_betas(o, rescaled=False)
    first, last = math.log1p(-betas[0]), math.fsum(math.log1p(-beta) for beta in betas)
    high = math.sqrt(math.expm1(-last))
    return math.sqrt(math.expm1(-first)), 4096.0 if o.values.get("rescale_betas_zero_snr") else high


def _is_continuous(o: Options) -> bool:
    """Return whether Euler has EDM's timesteps and both ends of its levels, as Stable Video Diffusion."""
    v = o.values.get("timestep_type") == "continuous" and o.text("prediction_type") == V
    return v and None not in (o.optional("sigma_min"), o.optional("sigma_max"))


def _check_pure_noise(o: Options) -> None:
    """Refuse a noise prediction at alpha = 0, where it does not determine x0; a clipped x0 is finite there."""
    clipped = o.flag("clip_sample") and not o.flag("thresholding") and o.name != "TCDScheduler"
    starts_there = o.name in ("LCMScheduler", "TCDScheduler") or o.text("timestep_spacing") != "leading"
    if o.flag("rescale_betas_zero_snr") and o.text("prediction_type") == EPS and starts_there and not clipped:
        o.refuse("prediction_type", "it does not determine x0 where a zero terminal SNR starts; use v_prediction")


def _check_ddpm(o: Options) -> None:
    if o.text("variance_type") not in VARIANCES:
        o.refuse(
            "variance_type", "diffusers gives no valid number for it; use fixed_large, fixed_small or a learned one"
        )
    _check_pure_noise(o)


def _check_euler(o: Options) -> None:
    if o.text("interpolation_type") != "linear":
        o.refuse("interpolation_type", "its timesteps and sigmas belong to different points; use linear")
    # Stable Video Diffusion's levels leave the trained table, so its end is no last row
    if _is_continuous(o) and requested_levels(o) and o.text("final_sigmas_type") != "zero":
        o.refuse("final_sigmas_type", "sigma_min is set and timestep_type=continuous; use zero")


def _check_pndm(o: Options) -> None:
    if o.text("timestep_spacing") != "leading":
        o.refuse("timestep_spacing", "its steps go to t - N // n, which is the next row with leading only")
    if o.text("prediction_type") != EPS:
        o.refuse("prediction_type", "diffusers sums v over timesteps before it converts them to noise; use epsilon")


def _check_flow(o: Options) -> None:
    if o.values.get("scale_factors"):
        o.refuse("scale_factors", "a state that grows between steps is not implemented; leave it null")
    if "invert_sigmas" in o.values and o.flag("invert_sigmas"):
        o.refuse("invert_sigmas", "a grid goes from noise to data")


def _check_dpm(o: Options) -> None:
    """Refuse what the four DPM-Solver classes do not support; the cosine one has no algorithm_type."""
    single = o.name == "DPMSolverSinglestepScheduler"
    algorithm = o.text("algorithm_type") if "algorithm_type" in o.values else "sde-dpmsolver++"
    if o.values.get("use_lu_lambdas"):
        o.refuse("use_lu_lambdas", "diffusers' levels even in lambda end before the data; use karras sigmas")
    if algorithm not in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "deis"):
        o.refuse("algorithm_type", "use one of dpmsolver++, dpmsolver, sde-dpmsolver++")
    if o.name in EDM and algorithm == "dpmsolver":
        o.refuse("algorithm_type", "use dpmsolver++ or sde-dpmsolver++")
    if algorithm in ("dpmsolver", "deis") and o.text("final_sigmas_type") == "zero":
        o.refuse("final_sigmas_type", f"algorithm_type={algorithm} cannot step to sigma = 0; use sigma_min")
    if algorithm == "dpmsolver" and single and o.flag("thresholding"):
        o.refuse("thresholding", "with algorithm_type=dpmsolver diffusers' singlestep sampler fails")
    midpoint = o.text("solver_type") == "midpoint"
    if algorithm == "sde-dpmsolver++" and o.count("solver_order") == 3 and not (single and midpoint):
        o.refuse("solver_order", "diffusers' third-order SDE step has a term of the wrong sign or is missing; use 2")
    if o.text("solver_type") not in ("midpoint", "heun", *OTHER_SOLVER_TYPES):
        o.refuse("solver_type", "use midpoint or heun")
    if "use_flow_sigmas" not in o.values:
        return
    if o.flag("use_flow_sigmas") and o.text("final_sigmas_type") != "zero":
        o.refuse("final_sigmas_type", "with use_flow_sigmas it would end at a sigma of another path; use zero")
    clips = o.number("lambda_min_clipped") > -math.inf and not o.flag("use_flow_sigmas") and not requested_levels(o)
    if clips and o.values.get("timestep_spacing") == "trailing":
        o.refuse("lambda_min_clipped", "with trailing timesteps it changes the number of steps; use linspace")


def _check_unipc(o: Options) -> None:
    if o.values["solver_p"] is not None:
        o.refuse("solver_p", "another sampler as the predictor is not implemented; leave it null")
    if o.optional("shift_terminal") and not o.flag("use_flow_sigmas"):
        o.refuse("shift_terminal", "it stretches the sigmas of a flow; set use_flow_sigmas=true, or leave it null")
    if not o.flag("predict_x0") and o.text("final_sigmas_type") == "zero":
        o.refuse("final_sigmas_type", "predict_x0=false cannot step to sigma = 0; use sigma_min")


def _check_order(o: Options) -> None:
    if o.count("solver_order") not in (1, 2, 3):
        o.refuse("solver_order", "use 1, 2 or 3")


CHECKS: dict[str, tuple[Callable[[Options], None], ...]] = {
    "DDPMScheduler": (_check_ddpm,),
    "DDPMParallelScheduler": (_check_ddpm,),
    "DDIMScheduler": (_check_pure_noise,),
    "DDIMParallelScheduler": (_check_pure_noise,),
    "EulerDiscreteScheduler": (_check_euler,),
    "PNDMScheduler": (_check_pndm,),
    "LCMScheduler": (_check_pure_noise,),
    "TCDScheduler": (_check_pure_noise,),
    "FlowMatchEulerDiscreteScheduler": (_check_flow,),
    "FlowMatchLCMScheduler": (_check_flow,),
    "DPMSolverMultistepScheduler": (_check_order, _check_dpm),
    "DPMSolverSinglestepScheduler": (_check_order, _check_dpm),
    "UniPCMultistepScheduler": (_check_order, _check_unipc),
    "DEISMultistepScheduler": (_check_order,),
    "EDMDPMSolverMultistepScheduler": (_check_order, _check_dpm),
    "CosineDPMSolverMultistepScheduler": (_check_order, _check_dpm),
}
"""The checks of each class besides those of all classes."""
