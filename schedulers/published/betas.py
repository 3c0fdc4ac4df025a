"""The betas of a published configuration as Python numbers, and where its path ends. Nothing here imports torch."""

import itertools
import math

from schedulers.published.options import Options

LAST_RATIO = math.sqrt(2.0**24 - 1)
"""The last sigma / alpha of a zero terminal SNR in samplers that divide by alpha: diffusers' alpha-bar is 2^-24."""
LEVEL_FLAGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def needs_betas(o: Options) -> bool:
    """Return whether the noise scheduler reads betas: not that of a flow, but for UniPC's karras levels."""
    if "beta_start" not in o.values or not o.values.get("use_flow_sigmas"):
        return "beta_start" in o.values
    return o.name == "UniPCMultistepScheduler" and bool(o.values["use_karras_sigmas"])


def path_betas(o: Options, rescaled: bool = True) -> list[float]:
    """Return the trained noise increments.

    Args:
        o: The options of the class.
        rescaled: Whether they are rescaled if the file wants a zero terminal SNR.

    Returns:
        The betas; a rescaled one is NaN if the betas cannot be rescaled.
    """
    given, count = (
        o.numbers("trained_betas"),
        o.count("num_train_timesteps") if o.values["trained_betas"] is None else 0,
    )
    formula = given is None and o.values["beta_schedule"] not in ("squaredcos_cap_v2", "exp")
    start, end = (o.number("beta_start"), o.number("beta_end")) if formula else (0.0, 0.0)
    ramp = [i / max(count - 1, 1) for i in range(count)]
    match o.values["beta_schedule"]:
        case _ if given is not None:
            betas = given
        case "linear":
            betas = [start + r * (end - start) for r in ramp]
        case "scaled_linear":
            betas = [(math.sqrt(start) + r * (math.sqrt(end) - math.sqrt(start))) ** 2 for r in ramp]
        case "squaredcos_cap_v2":
            bars = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
            betas = [min(1 - after / before, 0.999) for before, after in itertools.pairwise(bars)]
        case "exp":
            betas = [-math.expm1(-12 / count)] * count
        case _:
            betas = [(end - start) / (1 + math.exp(6 - 12 * r)) + start for r in ramp]
    return _rescaled(betas) if rescaled and o.values.get("rescale_betas_zero_snr") else betas


def _rescaled(betas: list[float]) -> list[float]:
    """Return betas that end at pure noise, as `schedulers.paths.zero_terminal_snr` does."""
    roots = [math.sqrt(bar) for bar in itertools.accumulate((1 - beta for beta in betas), lambda a, b: a * b)]
    if not roots[0] > roots[-1]:
        return [math.nan] * len(betas)
    scale = roots[0] / (roots[0] - roots[-1])
    bars = [((root - roots[-1]) * scale) ** 2 for root in roots]
    bars[-1] = 0.0
    later = [1 - after / before if before > 0 else math.nan for before, after in itertools.pairwise(bars)]
    return [1 - bars[0], *later]


def path_ratios(o: Options) -> list[float]:
    """Return sigma / alpha at each trained timestep; a zero terminal SNR ends at LAST_RATIO."""
    lost = itertools.accumulate(-math.log1p(-beta) if beta < 1 else math.inf for beta in path_betas(o))
    ratios = [math.sqrt(math.expm1(loss)) if loss < math.inf else math.inf for loss in lost]
    if o.values.get("rescale_betas_zero_snr"):
        ratios[-1] = LAST_RATIO
    return ratios
