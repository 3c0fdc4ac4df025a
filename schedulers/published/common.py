"""What several published classes share: from options to a path, a prediction and a spacing."""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from schedulers.conventions import InitStdOverride, RespacedLevels
from schedulers.paths import DiscreteVPPath, FlowPath, NoisePath, VECoordinates, betas, zero_terminal_snr
from schedulers.prediction import X0, Clipped, Eps, Flow, Prediction, Thresholded, V
from schedulers.published.options import Options
from schedulers.published.refusals import BETA_SCHEDULES, requested_levels
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

NEARLY_ZERO = 2.0**-24  # the last alpha-bar of a zero terminal SNR, in diffusers' samplers in x / alpha
LEVELS = {"use_karras_sigmas": Karras, "use_exponential_sigmas": Exponential, "use_beta_sigmas": Beta}


def trained_betas(o: Options) -> Tensor:
    """Return the trained noise increments, float64 of shape (N,), rescaled if the file wants a zero terminal SNR."""
    if (given := o.numbers("trained_betas")) is not None:
        value = torch.tensor(given, dtype=torch.float64)
    else:
        value = _scheduled_betas(o, o.count("num_train_timesteps"))
    return zero_terminal_snr(value) if o.values.get("rescale_betas_zero_snr") else value


def _scheduled_betas(o: Options, steps: int) -> Tensor:
    """Return the betas of the schedule that the file names, float64 of shape (steps,)."""
    schedule = o.text("beta_schedule")
    if schedule == "squaredcos_cap_v2":
        return betas("squaredcos", steps=steps)
    if schedule == "exp":
        return torch.full((steps,), -math.expm1(-12 / steps), dtype=torch.float64)
    start, end = o.number("beta_start"), o.number("beta_end")
    if schedule in BETA_SCHEDULES:
        return betas(BETA_SCHEDULES[schedule], start, end, steps)
    return torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid() * (end - start) + start


def discrete_path(o: Options, divides_by_alpha: bool = True) -> DiscreteVPPath:
    """Return the trained path; for a sampler that divides by alpha, a zero terminal SNR ends just above 0."""
    raised = divides_by_alpha and o.values.get("rescale_betas_zero_snr")
    return DiscreteVPPath(trained_betas(o), last_alpha_bar=NEARLY_ZERO if raised else None)


def prediction(o: Options, recompute_eps: bool = False) -> Prediction:
    """Return the prediction of the file, with x0 clipped or thresholded as the file says."""
    named: dict[str, Prediction] = {"epsilon": Eps(), "sample": X0(), "v_prediction": V(), "flow_prediction": Flow()}
    kind = o.text("prediction_type")
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
    return "t_min" if o.values.get("final_sigmas_type") == "sigma_min" else "clean"


def timestep_spacing(
    o: Options, last: End, integer: bool, spare_row: bool = False, stride_target: bool = False
) -> Spacing:
    """Return the spacing of the trained timesteps, from the option timestep_spacing."""
    match o.values.get("timestep_spacing", "linspace"):
        case "leading":
            return Leading(o.count("steps_offset"), last, spare_row, spare_row or not integer, stride_target)
        case "trailing":
            return Trailing(last, stride_target)
    return Linspace(integer, last, spare_row, stride_target)


def level_spacing(o: Options, last: End, level_kind: LevelKind = "ratio") -> Karras | Exponential | Beta | None:
    """Return karras, exponential or beta levels, with the file's own ends, or None if the file sets none of them."""
    flag = requested_levels(o)
    if flag is None:
        return None
    return LEVELS[flag](
        end=last, level_kind=level_kind, sigma_min=o.optional("sigma_min"), sigma_max=o.optional("sigma_max")
    )


def ve_path_and_spacing(o: Options, last: End) -> tuple[NoisePath, Spacing]:
    """Return path and spacing of the samplers that step in x / alpha: Euler, Heun, KDPM2, LMS."""
    table, levels = discrete_path(o), level_spacing(o, last)
    rows = timestep_spacing(o, last, integer=False)
    start: Literal["state", "sigma"] = "state" if o.text("timestep_spacing") == "leading" else "sigma"
    if levels is None:
        return VECoordinates(replace(table, interpolation="linear")), InitStdOverride(rows, start)
    return VECoordinates(table), InitStdOverride(RespacedLevels(rows, levels), start)


def dynamic_shift(o: Options, flow: FlowLinspace) -> Spacing:
    """Return the flow's spacing, with a shift that grows with the resolution if the file sets use_dynamic_shifting."""
    if not o.flag("use_dynamic_shifting"):
        return flow
    return ResolutionShift(
        flow,
        o.number("base_shift"),
        o.number("max_shift"),
        o.count("base_image_seq_len"),
        o.count("max_image_seq_len"),
        "linear" if o.text("time_shift_type") == "linear" else "exponential",
    )


def flow_path_and_spacing(o: Options, flow: FlowLinspace) -> tuple[NoisePath, Spacing]:
    """Return path and spacing of the multistep samplers with use_flow_sigmas; the network gets whole timesteps."""
    path = FlowPath(float(o.count("num_train_timesteps")))
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
    return table, TimestepMap(levels, "round" if isinstance(levels, Karras) and rounded else "floor")
