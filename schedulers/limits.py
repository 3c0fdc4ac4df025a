"""Whether the values of a noise scheduler's settings agree with one another, as far as one range cannot say it.

A refusal here takes the place of a grid that is not finite or does not fall. Like `schedulers.compatibility`, which
calls it, this module works without torch.
"""

import itertools
import math
from collections.abc import Sequence

from schedulers.settings import MAX_MU, NoiseSchedulerSettings
from schedulers.tables import PATHS

MAX_ORDERS = {"unipc": 3, "deis": 3, "lms": 4}
MAX_LOG_VARIANCE_LOST = 2 * 24 * math.log(2)
"""The largest -log(alpha^2) of a discrete path: alpha = 2^-24, below which float32 cannot tell data from none."""
FLOAT16_SIGMA = 1e4  # six standard deviations of noise at this sigma are below float16's largest number, 65504
TOLERANCE = 1e-4  # published sigma_min and sigma_max are rounded to about four digits
CONTINUOUS_ENDS = {"ve": 1e-5, "vp": 1e-3, "sub_vp": 1e-3}
"""The time t_min of each path in continuous time."""


def check_values(s: NoiseSchedulerSettings, steps: int | None = None) -> None:
    """Refuse values that do not agree with one another.

    Args:
        s: The settings, with path, prediction, solver and spacing filled in.
        steps: The number of steps, if known.

    Raises:
        ValueError: One line with the keys, their values and what to change.
    """
    _check_solver(s)
    _check_betas(s)
    _check_range_of_levels(s)
    _check_custom(s)
    if s.path == "flow" and s.spacing == "linspace":
        _check_flow(s, steps)
    if s.path == "discrete_vp":
        _check_timesteps(s, steps)
    _check_end(s)
    if s.state_dtype == "float16" and (sigma := largest_sigma(s)) > FLOAT16_SIGMA:
        raise ValueError(
            f"state_dtype=float16 holds no state at sigma {sigma:g}; use state_dtype=bfloat16, or a sigma_max of "
            f"{FLOAT16_SIGMA:g} or less"
        )


def check_tokens(s: NoiseSchedulerSettings, tokens: int) -> None:
    """Refuse an image at which a shift that grows with the image is out of its range.

    Args:
        s: The settings, complete.
        tokens: The image tokens of a request.

    Raises:
        ValueError: The exponent mu is out of range; the message has its value.
    """
    if s.base_shift is None or s.max_shift is None:
        return
    mu = _mu(s, tokens)
    if abs(mu) > MAX_MU:
        raise ValueError(
            f"base_shift={s.base_shift:g} and max_shift={s.max_shift:g} give mu={mu:.3g} for an image of {tokens} "
            f"tokens; it may be -{MAX_MU:g} to {MAX_MU:g}: bring them nearer to each other, or set mu"
        )


def largest_sigma(s: NoiseSchedulerSettings) -> float:
    """Return the largest sigma of the states of complete settings, in their coordinates."""
    if s.path == "edm" and s.spacing == "custom" and s.sigmas:
        return s.sigmas[0]
    return _path_range(s)[1] if s.path in ("edm", "ve") or s.coordinates == "ve" else 1.0


def betas(s: NoiseSchedulerSettings) -> list[float]:
    """Return the betas of a discrete path, as `schedulers.paths.betas` does, before any rescaling."""
    n = 1000 if s.train_steps is None else s.train_steps
    first, last = _beta_ends(s)
    if s.beta_schedule == "squaredcos":
        bar = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
        return [min(1 - after / before, 0.999) for before, after in itertools.pairwise(bar)]
    if s.beta_schedule == "scaled_linear":
        first, last = math.sqrt(first), math.sqrt(last)
        return [(first + (last - first) * i / (n - 1)) ** 2 for i in range(n)]
    return [first + (last - first) * i / (n - 1) for i in range(n)]


def _beta_ends(s: NoiseSchedulerSettings) -> tuple[float, float]:
    return 1e-4 if s.beta_start is None else s.beta_start, 0.02 if s.beta_end is None else s.beta_end


def _check_solver(s: NoiseSchedulerSettings) -> None:
    """Refuse values that the solver cannot take together."""
    highest = MAX_ORDERS.get(s.solver or "")
    if highest is not None and s.order is not None and s.order > highest:
        raise ValueError(f"order={s.order}, but solver={s.solver} has orders 1 to {highest}; use one of these")
    if s.solver == "edm_churn":
        low, high = 0.05 if s.s_tmin is None else s.s_tmin, 50.0 if s.s_tmax is None else s.s_tmax
        if low > high:
            raise ValueError(f"s_tmin={low:g} is above s_tmax={high:g}; lower s_tmin, or raise s_tmax")
    if s.threshold is not None and s.clip is not None and s.clip < 1:
        raise ValueError(
            f"clip={s.clip:g} with threshold={s.threshold:g} is the largest quantile, which is 1 or more; raise clip, "
            "or drop threshold"
        )


def _check_betas(s: NoiseSchedulerSettings) -> None:
    """Refuse betas that fall, or that leave nothing of the data."""
    if s.path in ("vp", "sub_vp"):
        low, high = 0.1 if s.beta_min is None else s.beta_min, 20.0 if s.beta_max is None else s.beta_max
        if low >= high:
            raise ValueError(f"beta_min={low:g} is not below beta_max={high:g}; lower beta_min, or raise beta_max")
    if s.path != "discrete_vp":
        return
    first, last = _beta_ends(s)
    if s.beta_schedule != "squaredcos" and first > last:
        raise ValueError(f"beta_start={first:g} is above beta_end={last:g}; lower beta_start, or raise beta_end")
    lost = -sum(math.log1p(-beta) for beta in betas(s))
    if lost > MAX_LOG_VARIANCE_LOST:
        raise ValueError(
            f"{s.train_steps or 1000} betas up to beta_end={last:g} leave alpha={math.exp(-lost / 2):.1g} of the data, "
            "less than float32 resolves; lower beta_end, or train_steps"
        )


def _path_range(s: NoiseSchedulerSettings) -> tuple[float, float]:
    """Return the least and the largest sigma / alpha that the path has, or sigma of a flow."""
    if s.path == "flow":
        return 0.0, 1.0
    if (levels := PATHS[s.path or ""].levels) is not None:
        return levels
    if s.path == "discrete_vp":
        all_betas = betas(s)
        lost = -sum(math.log1p(-beta) for beta in all_betas)
        high = math.inf if s.zero_terminal_snr else math.sqrt(math.expm1(lost))
        return math.sqrt(math.expm1(-math.log1p(-all_betas[0]))), high
    if s.path in ("vp", "sub_vp"):
        low, high = 0.1 if s.beta_min is None else s.beta_min, 20.0 if s.beta_max is None else s.beta_max
        lost = (low + high) / 2
        return 0.0, 2 * math.sinh(lost / 2) if s.path == "sub_vp" else math.sqrt(math.expm1(lost))
    low, high = (0.002, 80.0) if s.path == "edm" else (0.01, 50.0)
    if s.path == "edm" and s.spacing == "custom":
        return low, high  # it uses neither sigma_min nor sigma_max
    return low if s.sigma_min is None else s.sigma_min, high if s.sigma_max is None else s.sigma_max


def _check_range_of_levels(s: NoiseSchedulerSettings) -> None:
    """Refuse sigma_min and sigma_max that do not rise, or that the path does not reach."""
    of_path = s.path in ("edm", "ve")
    if not of_path and s.spacing not in ("karras", "exponential", "beta"):
        return
    least, largest = _path_range(s)
    low = (1e-3 if s.path == "flow" else _lowest_level(s, least)) if s.sigma_min is None else s.sigma_min
    high = largest if s.sigma_max is None else s.sigma_max
    if low >= high:
        raise ValueError(f"sigma_min={low:g} is not below sigma_max={high:g}; lower sigma_min, or raise sigma_max")
    if of_path:
        return
    if high > largest * (1 + TOLERANCE):
        raise ValueError(f"sigma_max={high:g}, but path={s.path} ends at {largest:.6g}; give that or less, or drop it")
    if low < least * (1 - TOLERANCE):
        raise ValueError(f"sigma_min={low:g}, but path={s.path} begins at {least:.6g}; give that or more, or drop it")


def _lowest_level(s: NoiseSchedulerSettings, least: float) -> float:
    """Return the level at which karras, exponential and beta end by default: that of the path's t_min."""
    if s.path not in ("vp", "sub_vp"):
        return least
    low, high = 0.1 if s.beta_min is None else s.beta_min, 20.0 if s.beta_max is None else s.beta_max
    t = CONTINUOUS_ENDS[s.path]
    lost = low * t + (high - low) / 2 * t**2
    return 2 * math.sinh(lost / 2) if s.path == "sub_vp" else math.sqrt(math.expm1(lost))


def _check_custom(s: NoiseSchedulerSettings) -> None:
    """Refuse sigmas that do not fall, or that the path does not reach."""
    if s.spacing != "custom" or not s.sigmas:
        return
    require_falling(s.sigmas)
    if s.path == "edm":
        return  # its time is sigma, without an end
    least, largest = _path_range(s)
    if s.sigmas[0] > largest * (1 + TOLERANCE):
        raise ValueError(f"sigmas begin at {s.sigmas[0]:g}, but path={s.path} ends at {largest:.6g}; lower them")
    if s.sigmas[-1] < least * (1 - TOLERANCE):
        raise ValueError(f"sigmas end at {s.sigmas[-1]:g}, but path={s.path} begins at {least:.6g}; raise them")


def _check_end(s: NoiseSchedulerSettings) -> None:
    """Refuse a last step without length in continuous time, and a last evaluation without noise."""
    if s.geometric_sigma and s.path in ("vp", "sub_vp"):
        raise ValueError(
            f"geometric_sigma=true evaluates the network at t = 0, where path={s.path} has no noise; drop it, or use "
            "path=ve"
        )
    if s.end != "t_min" or s.path in ("flow", "discrete_vp"):
        return
    if s.spacing == "uniform":
        t_min = CONTINUOUS_ENDS[s.path or ""]
        last, key = t_min if s.t_last is None else s.t_last, "t_last"
        geometric = s.path == "ve" if s.geometric_sigma is None else s.geometric_sigma
        if geometric:
            raise ValueError("end=t_min is above the last of geometric sigmas; use end=clean, or geometric_sigma=false")
    else:
        t_min = _lowest_level(s, _path_range(s)[0])
        last, key = t_min if s.sigma_min is None else s.sigma_min, "sigma_min"
        if s.spacing == "custom" and s.sigmas:
            last, key = s.sigmas[-1], "the last of sigmas"
    if last < t_min or (s.path != "edm" and last <= t_min * (1 + TOLERANCE)):
        raise ValueError(
            f"end=t_min ends path={s.path} at {t_min:.6g}, and the last evaluation is there or beyond; raise {key}, or "
            "use end=clean"
        )


def require_falling(sigmas: Sequence[float]) -> None:
    """Raise ValueError for sigmas that rise or repeat, with the first such pair."""
    for before, after in itertools.pairwise(sigmas):
        if not before > after:
            raise ValueError(f"sigmas={list(sigmas)} do not fall from {before:g} to {after:g}; give falling numbers")


def _check_flow(s: NoiseSchedulerSettings, steps: int | None) -> None:
    """Refuse ends of a flow's even sigmas that do not fall, and a cap on more than the first."""
    first = 1.0 if s.sigma_first is None else s.sigma_first
    if s.sigma_last is not None and s.sigma_last >= first:
        raise ValueError(f"sigma_last={s.sigma_last:g} is not below sigma_first={first:g}; lower sigma_last")
    if s.sigma_last == 0 and not s.spare_row:
        raise ValueError("sigma_last=0 evaluates the network at sigma = 0; raise it, or set spare_row=true")
    base, top = 256 if s.base_tokens is None else s.base_tokens, 4096 if s.max_tokens is None else s.max_tokens
    if s.base_shift is not None and base >= top:
        raise ValueError(f"base_tokens={base} is not below max_tokens={top}; lower base_tokens, or raise max_tokens")
    if steps is None:
        return
    rows = [_flow_sigma(s, i, steps) for i in range(2)]
    if s.sigma_cap is not None and steps > 1 and rows[1] >= s.sigma_cap:
        raise ValueError(
            f"sigma_cap={s.sigma_cap:g} is not above the second of {steps} sigmas, {rows[1]:.6g}, so that rows would "
            "be equal; raise sigma_cap, or use fewer steps"
        )


def _flow_sigma(s: NoiseSchedulerSettings, i: int, steps: int) -> float:
    """Return shifted sigma number i of a flow's even sigmas, before its cap."""
    first = 1.0 if s.sigma_first is None else s.sigma_first
    last = first / steps if s.sigma_last is None else s.sigma_last
    rows = steps + 1 if s.spare_row else steps
    shift = 1.0 if s.shift is None else s.shift
    if s.mu is not None:
        shift = math.exp(s.mu)
    if s.base_shift is not None and s.max_shift is not None:
        shift = math.exp(max(s.base_shift, s.max_shift))

    def shifted(number: int) -> float:
        sigma = first + (last - first) * number / max(rows - 1, 1)
        return shift * sigma / (1 + (shift - 1) * sigma)

    if s.shift_terminal is None or steps == 1:
        return shifted(i)
    return 1 - (1 - shifted(i)) / ((1 - shifted(steps - 1)) / (1 - s.shift_terminal))


def _mu(s: NoiseSchedulerSettings, tokens: int) -> float:
    base, top = 256 if s.base_tokens is None else s.base_tokens, 4096 if s.max_tokens is None else s.max_tokens
    low, high = s.base_shift or 0.0, s.max_shift or 0.0
    return low + (tokens - base) * (high - low) / (top - base)


def _check_timesteps(s: NoiseSchedulerSettings, steps: int | None) -> None:
    """Refuse timesteps outside the trained ones, and more rows than trained timesteps."""
    trained = 1000 if s.train_steps is None else s.train_steps
    original = 50 if s.original_steps is None else s.original_steps
    if s.spacing == "lcm" and original > trained:
        raise ValueError(
            f"original_steps={original} of a path of {trained} trained timesteps; use original_steps={trained} or less"
        )
    if steps is None:
        return
    if s.spare_row and s.spacing == "linspace" and steps >= trained:
        raise ValueError(
            f"steps={steps} with spare_row=true make {steps + 1} rows on a path of {trained} trained timesteps; use "
            f"{trained - 1} steps or fewer, or drop spare_row"
        )
