"""How many steps a published configuration has timesteps for. Nothing here imports torch."""

from schedulers.compatibility import most_steps
from schedulers.published.options import Options
from schedulers.published.refusals import MULTISTEP, requested_levels

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
    given = o.numbers("trained_betas")
    trained = o.count("num_train_timesteps") if given is None else len(given)
    if o.values.get("timestep_spacing") != "leading":
        return trained
    offset = o.count("steps_offset") if o.name.startswith(WHOLE_TIMESTEPS) else 0
    return most_steps(trained, multistep, offset, steps)


def _advice(o: Options, most: int) -> str:
    if not most:
        return f"its steps_offset={o.values['steps_offset']} leaves no timestep"
    return f"it has timesteps for {most} steps at most"
