"""How many steps a published configuration has timesteps for. Nothing here imports torch."""

import math
from collections.abc import Sequence

from schedulers.compatibility import most_steps
from schedulers.published.betas import LAST_RATIO, path_ratios
from schedulers.published.options import Options
from schedulers.published.refusals import MULTISTEP, requested_levels
from schedulers.published.values import BY_TIMESTEP

WHOLE_TIMESTEPS = ("DDPM", "DDIM", "PNDM")
"""Classes that look their noise level up by timestep; the others interpolate, and pass timesteps above N - 1 on."""


def check_steps(o: Options, steps: int) -> None:
    """Refuse more steps than the class has timesteps for.

    Args:
        o: The options of the class.
        steps: The number of steps.

    Raises:
        ValueError: The message is one line and names the most steps.
    """
    if (offset := _negative_offset(o, steps)) is not None:
        raise ValueError(
            f"steps={steps} is not possible with the checkpoint's {o.name}; its steps_offset={offset} is too low"
        )
    most = _most(o, steps)
    if most is not None and not 1 <= steps <= most:
        raise ValueError(f"steps={steps} is not possible with the checkpoint's {o.name}; {_advice(o, most)}")


def _most(o: Options, steps: int) -> int | None:
    """Return the largest number of steps up to `steps`, or None if the class has no such limit."""
    if "original_inference_steps" in o.values:
        return o.count("original_inference_steps")
    if "beta_start" not in o.values:
        return None
    multistep = o.name in MULTISTEP
    if multistep and (o.flag("use_flow_sigmas") or requested_levels(o)):
        return None
    trained = _trained(o)
    if o.values.get("rescale_betas_zero_snr") and not o.name.startswith(BY_TIMESTEP):
        trained = min(trained, _most_falling(o, min(steps, trained)))
    if o.values.get("timestep_spacing") != "leading":
        return trained
    offset = o.count("steps_offset") if o.name.startswith(WHOLE_TIMESTEPS) else 0
    return most_steps(trained, multistep, offset, steps)


def _trained(o: Options) -> int:
    """Return the number of timesteps of the path: those of lambda_min_clipped are dropped."""
    given = o.numbers("trained_betas")
    trained = o.count("num_train_timesteps") if given is None else len(given)
    lowest = o.number("lambda_min_clipped") if "lambda_min_clipped" in o.values else -math.inf
    if lowest == -math.inf:
        return trained
    count = sum(-math.log(ratio) >= lowest for ratio in path_ratios(o))
    return count if count > 1 else 0  # a path has two timesteps or more


def _negative_offset(o: Options, steps: int) -> int | None:
    """Return a steps_offset that makes a timestep of interpolating classes negative, or None."""
    if o.values.get("timestep_spacing") != "leading" or o.name.startswith(BY_TIMESTEP):
        return None
    if o.name in MULTISTEP and (o.flag("use_flow_sigmas") or requested_levels(o)):
        return None
    spare = 1 if o.name in MULTISTEP else 0
    last = spare * (_trained(o) // (max(steps, 1) + spare)) + o.count("steps_offset")
    return o.count("steps_offset") if last < 0 else None


def _most_falling(o: Options, steps: int) -> int:
    """Return the largest number of steps whose second row is not noisier than the end of a zero terminal SNR."""
    ratios = path_ratios(o)
    return next((count for count in range(steps, 0, -1) if _second_ratio(o, count, ratios) <= LAST_RATIO), 0)


def _second_ratio(o: Options, steps: int, ratios: Sequence[float]) -> float:
    """Return sigma / alpha of the second row, if the first is at the end of the path; else 0."""
    total, spare = len(ratios), 1 if o.name in MULTISTEP else 0
    if steps == 1:
        return 0.0
    match o.values.get("timestep_spacing", "linspace"):
        case "leading":
            stride, offset = total // (steps + spare), o.count("steps_offset")
            first, t = (float((steps - 1 + spare - i) * stride + offset) for i in range(2))
            if first < total - 1:
                return 0.0
        case "trailing":
            t = float(round(total - total / steps) - 1)
        case _:
            rows = steps + spare
            t = (rows - 2) * (total - 1) / (rows - 1)
            t = round(t) if spare else t
    low = min(math.floor(t), total - 2)
    fraction = min(t, total - 1) - low
    if spare or o.values.get("timestep_spacing") is None or low == total - 2:
        return math.exp((1 - fraction) * math.log(ratios[low]) + fraction * math.log(ratios[low + 1]))
    return (1 - fraction) * ratios[low] + fraction * ratios[low + 1]


def _advice(o: Options, most: int) -> str:
    if most:
        return f"it has timesteps for {most} steps at most"
    key = "lambda_min_clipped" if "lambda_min_clipped" in o.values and _trained(o) < 2 else "steps_offset"
    return f"its {key}={o.values[key]} leaves no timestep"
