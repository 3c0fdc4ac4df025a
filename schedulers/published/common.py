"""What several published classes share: from options to a path, a prediction and a spacing."""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from schedulers.conventions import InitStdOverride, RespacedLevels
from schedulers.paths import BetaSchedule, DiscreteVPPath, FlowPath, NoisePath, VECoordinates, betas, zero_terminal_snr
from schedulers.prediction import X0, Clipped, Eps, Flow, Prediction, Thresholded, V
from schedulers.published.options import Options
from schedulers.spacing import (
    Beta,
    End,
    Exponential,
    FlowLinspace,
    Karras,
    Leading,
    LevelKind,
    Linspace,
    ResolutionShift,
    Spacing,
    TimestepMap,
    Trailing,
)

BETA_SCHEDULES: dict[str, BetaSchedule] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "squaredcos",
}
NEARLY_ZERO = 2.0**-24  # the last alpha-bar of a zero terminal SNR, in diffusers' samplers in x / alpha
LEVEL_FLAGS = {"use_karras_sigmas": Karras, "use_exponential_sigmas": Exponential, "use_beta_sigmas": Beta}


def trained_betas(o: Options, last_alpha_bar: float = 0.0) -> Tensor:
    """Return the trained noise increments, float64 of shape (N,), rescaled if the file wants a zero terminal SNR."""
    given, steps = o.numbers("trained_betas"), o.count("num_train_timesteps")
    schedule, start, end = o.text("beta_schedule"), o.number("beta_start"), o.number("beta_end")
    if given is not None:
        value = torch.tensor(given, dtype=torch.float64)
    elif schedule in BETA_SCHEDULES:
        value = betas(BETA_SCHEDULES[schedule], start, end, steps)
    elif schedule == "sigmoid" and o.name.startswith("DDPM"):
        value = torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid() * (end - start) + start
    elif schedule == "exp" and o.name == "HeunDiscreteScheduler":
        value = torch.full((steps,), -math.expm1(-12 / steps), dtype=torch.float64)
    else:
        o.refuse("beta_schedule", f"use one of {', '.join(BETA_SCHEDULES)}")
    return zero_terminal_snr(value, last_alpha_bar) if o.values.get("rescale_betas_zero_snr") else value


def discrete_path(o: Options, last_alpha_bar: float = NEARLY_ZERO) -> DiscreteVPPath:
    """Return the trained path."""
    return DiscreteVPPath(trained_betas(o, last_alpha_bar))


def prediction(o: Options, *kinds: str, recompute_eps: bool = False) -> Prediction:
    """Return the prediction of the file, one of `kinds`, with x0 clipped or thresholded as the file says."""
    named: dict[str, Prediction] = {"epsilon": Eps(), "sample": X0(), "v_prediction": V(), "flow_prediction": Flow()}
    kind = o.text("prediction_type")
    if kind not in kinds:
        o.refuse("prediction_type", f"use one of {', '.join(kinds)}")
    if "thresholding" in o.values and o.flag("thresholding"):
        share, limit = o.number("dynamic_thresholding_ratio"), o.number("sample_max_value")
        return Thresholded(named[kind], share, limit, recompute_eps)
    if "clip_sample" in o.values and o.flag("clip_sample"):
        return Clipped(named[kind], o.number("clip_sample_range"), recompute_eps)
    return named[kind]


def last_row(o: Options) -> End:
    """Return the last row, from final_sigmas_type or set_alpha_to_one."""
    if "set_alpha_to_one" in o.values:
        return "clean" if o.flag("set_alpha_to_one") else "t_min"
    if "final_sigmas_type" not in o.values or o.text("final_sigmas_type") == "zero":
        return "clean"
    if o.text("final_sigmas_type") != "sigma_min":
        o.refuse("final_sigmas_type", "use zero or sigma_min")
    return "t_min"


def timestep_spacing(
    o: Options, last: End, integer: bool, spare_row: bool = False, stride_target: bool = False
) -> Spacing:
    """Return the spacing of the trained timesteps, from the option timestep_spacing."""
    match o.values.get("timestep_spacing", "linspace"):
        case "leading":
            return Leading(o.count("steps_offset"), last, spare_row)
        case "trailing":
            return Trailing(last, stride_target)
        case "linspace":
            return Linspace(integer, last, spare_row, stride_target)
    o.refuse("timestep_spacing", "use one of linspace, leading, trailing")


def level_spacing(o: Options, last: End, level_kind: LevelKind = "ratio") -> Karras | Exponential | Beta | None:
    """Return karras, exponential or beta levels, with the file's own ends, or None if the file sets none of them."""
    requested = [key for key in LEVEL_FLAGS if key in o.values and o.flag(key)]
    if len(requested) > 1:
        o.refuse(requested[1], f"{requested[0]} is set too; keep one of them")
    if not requested:
        return None
    return LEVEL_FLAGS[requested[0]](
        end=last, level_kind=level_kind, sigma_min=o.optional("sigma_min"), sigma_max=o.optional("sigma_max")
    )


def check_level_range(o: Options, path: DiscreteVPPath) -> None:
    """Refuse levels outside the trained table, at which the network would get the timestep of the table's end."""
    low, high = (path.sigma(t) / path.alpha(t) for t in (path.t_min, path.t_max))
    for key in ("sigma_min", "sigma_max"):
        level = o.optional(key)
        if level is not None and not low * (1 - 1e-6) <= level <= high * (1 + 1e-6):
            o.refuse(key, f"the trained table goes from {low:.6g} to {high:.6g}")


def ve_path_and_spacing(o: Options, last: End) -> tuple[NoisePath, Spacing]:
    """Return path and spacing of the samplers that step in x / alpha: Euler, Heun, KDPM2, LMS."""
    table, levels = discrete_path(o), level_spacing(o, last)
    rows = timestep_spacing(o, last, integer=False)
    start: Literal["state", "sigma"] = "state" if o.text("timestep_spacing") == "leading" else "sigma"
    if levels is None:
        return VECoordinates(replace(table, interpolation="linear")), InitStdOverride(rows, start)
    check_level_range(o, table)
    return VECoordinates(table), InitStdOverride(RespacedLevels(rows, levels), start)


def dynamic_shift(o: Options, flow: FlowLinspace) -> Spacing:
    """Return the flow's spacing, with a shift that grows with the resolution if the file sets use_dynamic_shifting."""
    if not o.flag("use_dynamic_shifting"):
        return flow
    kind = o.text("time_shift_type")
    if kind not in ("exponential", "linear"):
        o.refuse("time_shift_type", "use exponential or linear")
    return ResolutionShift(
        flow,
        o.number("base_shift"),
        o.number("max_shift"),
        o.count("base_image_seq_len"),
        o.count("max_image_seq_len"),
        "linear" if kind == "linear" else "exponential",
    )


def flow_path_and_spacing(o: Options, flow: FlowLinspace) -> tuple[NoisePath, Spacing]:
    """Return path and spacing of the multistep samplers with use_flow_sigmas; the network gets whole timesteps."""
    path = FlowPath(float(o.count("num_train_timesteps")))
    if level_spacing(o, flow.end) is not None:
        o.refuse("use_flow_sigmas", "it cannot be combined with karras, exponential or beta sigmas here")
    return path, InitStdOverride(TimestepMap(dynamic_shift(o, flow), "floor"), "unit")


def trained_path_and_spacing(o: Options, last: End, levels_last: End, rounded: bool) -> tuple[NoisePath, Spacing]:
    """Return path and spacing of DPM-Solver, UniPC and DEIS on trained indices, with one spare row and whole timesteps.

    Args:
        o: The options of the class.
        last: The last row of trained timesteps.
        levels_last: The last row of karras, exponential and beta levels.
        rounded: Whether karras timesteps are rounded. All other levels truncate theirs.

    Returns:
        The path and the spacing.
    """
    table, levels = discrete_path(o), level_spacing(o, levels_last)
    if levels is None:
        return table, timestep_spacing(o, last, integer=True, spare_row=True)
    check_level_range(o, table)
    return table, TimestepMap(levels, "round" if isinstance(levels, Karras) and rounded else "floor")
