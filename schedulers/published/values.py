"""Whether the values of a published configuration can be: their types, and the ranges of paths and spacings.

Each refusal here takes the place of one when the noise scheduler is built. Nothing here imports torch.
"""

import math
from collections.abc import Callable

from schedulers.published.betas import needs_betas, path_betas
from schedulers.published.options import DEFAULTS, Options

UNREAD = {"upscale_mode", "solver_p", "scale_factors", "variance_type"}  # none, or checked by another rule
NOT_OF: dict[str, tuple[str, ...]] = {
    "EDM": ("num_train_timesteps",),
    "CosineDPM": ("num_train_timesteps",),
    "ScoreSde": ("num_train_timesteps",),
    "DEIS": ("algorithm_type", "solver_type"),
    "LCM": ("timestep_spacing", "steps_offset", "set_alpha_to_one"),
    "TCD": ("timestep_spacing", "steps_offset", "set_alpha_to_one", "timestep_scaling"),
}
"""Options without effect, by the beginning of a class's name."""
BETA_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
SHIFT_KEYS = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type")
NEEDS: dict[str, tuple[str, ...]] = {
    "thresholding": ("dynamic_thresholding_ratio", "sample_max_value"),
    "clip_sample": ("clip_sample_range",),
    "use_dynamic_shifting": SHIFT_KEYS,
}
"""Options that only another one, if true, gives an effect."""
LARGEST = 1e30  # its square is finite in float64
MAX_EXPONENT = 30.0  # of a flow's shift; above it every sigma of a grid is 1
BY_TIMESTEP = ("DDPM", "DDIM", "PNDM", "LCM", "TCD")  # classes that may start at alpha = 0
MAX_LOG_VARIANCE_LOST = 700.0  # above it sigma / alpha is infinite


def check_values(o: Options) -> None:
    """Refuse an option of another type, and a value out of the range of a path, a spacing or a solver.

    Args:
        o: The options of the class.

    Raises:
        ValueError: One line with the class, the option and what to give.
    """
    _check_types(o)
    for check in (_check_betas, _check_flow, _check_dynamic_shift, _check_levels, _check_distilled):
        check(o)
    if o.name.startswith(("EDM", "CosineDPM")):
        _check_rising(o, "sigma_min", "sigma_max")
        _check_positive(o, "sigma_data", "rho")
        powers = (abs(math.log(o.number(key))) / o.number("rho") for key in ("sigma_min", "sigma_max"))
        if max(powers) > MAX_LOG_VARIANCE_LOST:
            o.refuse("rho", "its powers of sigma_min and sigma_max are infinite; raise it")
    if o.name == "ScoreSdeVeScheduler":
        _check_rising(o, "sigma_min", "sigma_max")
        _check_positive(o, "snr")
        if o.count("correct_steps") < 1:
            o.refuse("correct_steps", "give a whole number above 0")
    if o.name == "ScoreSdeVpScheduler":
        _check_rising(o, "beta_min", "beta_max")
    if o.name.startswith("ScoreSde") and not 0 < o.number("sampling_eps") < 1:
        o.refuse("sampling_eps", "give a number between 0 and 1")


def _without_effect(o: Options) -> set[str]:
    """Return the options that the noise scheduler does not read, for which any value is taken."""
    found = set(UNREAD)
    for start, keys in NOT_OF.items():
        found |= set(keys) if o.name.startswith(start) else set()
    for flag, keys in NEEDS.items():
        found |= set(keys) if flag in o.values and not o.values[flag] else set()
    if "beta_start" in o.values and not needs_betas(o):
        found |= {key for key in BETA_KEYS if key != "num_train_timesteps"}
    elif o.values.get("trained_betas") is not None:
        found |= {key for key in BETA_KEYS if key != "trained_betas"}
    elif o.values.get("beta_schedule") in ("squaredcos_cap_v2", "exp"):
        found |= {"beta_start", "beta_end"}
    if "timestep_spacing" in o.values and o.values["timestep_spacing"] != "leading":
        found |= {"steps_offset"}
    if not o.values.get("use_flow_sigmas"):
        found |= {"flow_shift"}
    return found


def _check_types(o: Options) -> None:
    ignored = _without_effect(o)
    for key, default in DEFAULTS[o.name].items():
        if key in ignored:
            continue
        readers: list[tuple[type, Callable[[str], object]]] = [
            (bool, o.flag),
            (int, o.count),
            (float, o.number),
            (str, o.text),
            (list, o.numbers),
        ]
        if default is None:
            (o.numbers if key == "trained_betas" else o.optional)(key)
        else:
            next(read for kind, read in readers if isinstance(default, kind))(key)
        if isinstance(default, float) and key != "lambda_min_clipped" and not math.isfinite(o.number(key)):
            o.refuse(key, "give a finite number")


def _check_positive(o: Options, *keys: str) -> None:
    for key in keys:
        if not 0 < o.number(key) < LARGEST:
            o.refuse(key, f"give a number above 0 and below {LARGEST:g}")


def _check_rising(o: Options, low: str, high: str) -> None:
    _check_positive(o, low, high)
    if o.number(low) >= o.number(high):
        o.refuse(low, f"it is not below {high}={o.number(high):g}")


def _check_betas(o: Options) -> None:
    """Refuse betas outside (0, 1), too few of them, and betas that leave nothing of the data."""
    read = "num_train_timesteps" in o.values and "num_train_timesteps" not in _without_effect(o)
    if read and o.count("num_train_timesteps") < 2:
        o.refuse("num_train_timesteps", "give 2 or more")
    if not needs_betas(o):
        return
    key = "beta_end" if o.values["trained_betas"] is None else "trained_betas"
    if key == "beta_end" and o.text("beta_schedule") not in ("squaredcos_cap_v2", "exp"):
        _check_positive(o, "beta_start", "beta_end")
    betas = path_betas(o, rescaled=False)
    if len(betas) < 2 or not all(0 < beta < 1 for beta in betas[:-1]) or not 0 < betas[-1] <= 1:
        o.refuse(key, "give betas inside (0, 1), two of them or more")
    lost = -math.fsum(math.log1p(-beta) for beta in betas if beta < 1)
    if lost > MAX_LOG_VARIANCE_LOST:
        o.refuse(key, f"{len(betas)} such betas leave nothing of the data; lower them")
    if betas[-1] == 1 and not o.values.get("rescale_betas_zero_snr") and not o.name.startswith(BY_TIMESTEP):
        o.refuse(key, "the last beta is 1, which leaves nothing of the data; lower it")
    if not o.values.get("rescale_betas_zero_snr"):
        return
    if not all(0 < beta < 1 for beta in path_betas(o)[:-1]):
        o.refuse("rescale_betas_zero_snr", "its betas cannot be rescaled to end at pure noise; set it to false")


def _check_flow(o: Options) -> None:
    """Refuse a shift or a last sigma out of range."""
    if "shift" in o.values:
        total, shift = o.count("num_train_timesteps"), o.number("shift")
        _check_positive(o, "shift")
        if not o.values.get("use_dynamic_shifting") and not shift / total / (1 + (shift - 1) / total) < 1:
            o.refuse("shift", "with it every sigma is 1; lower it")
    if o.values.get("use_flow_sigmas"):
        _check_positive(o, "flow_shift")
    terminal = o.optional("shift_terminal")
    if terminal and not 0 < terminal < 1:
        o.refuse("shift_terminal", "give a sigma between 0 and 1, or null")


def _check_dynamic_shift(o: Options) -> None:
    """Refuse a shift that grows with the image, if it has no slope or leaves no grid at its own ends."""
    if not o.values.get("use_dynamic_shifting") or not ("shift" in o.values or o.values.get("use_flow_sigmas")):
        return
    low, high = o.count("base_image_seq_len"), o.count("max_image_seq_len")
    if not 0 < low < high:
        o.refuse("base_image_seq_len", f"give a whole number above 0 and below max_image_seq_len={high}")
    for key in ("base_shift", "max_shift"):
        value = o.number(key)
        if o.text("time_shift_type") == "linear":
            _check_positive(o, key)
        elif not abs(value) <= MAX_EXPONENT:
            o.refuse(key, f"give a number from -{MAX_EXPONENT:g} to {MAX_EXPONENT:g}; it is an exponent")


def _check_levels(o: Options) -> None:
    """Refuse ends of karras, exponential or beta levels that are not rising."""
    given = {key: o.optional(key) for key in ("sigma_min", "sigma_max") if key in o.values}
    if o.name.startswith(("EDM", "CosineDPM", "ScoreSde")):
        return
    for key, level in given.items():
        if level is not None:
            _check_positive(o, key)
    low, high = given.get("sigma_min"), given.get("sigma_max")
    if low is not None and high is not None:
        _check_rising(o, "sigma_min", "sigma_max")


def _check_distilled(o: Options) -> None:
    """Refuse a model distilled on more timesteps than its path has."""
    if "original_inference_steps" not in o.values:
        return
    betas, original = len(path_betas(o, rescaled=False)), o.count("original_inference_steps")
    if not 1 <= original <= betas:
        o.refuse("original_inference_steps", f"give a whole number from 1 to {betas}, the trained timesteps")
