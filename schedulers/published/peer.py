"""A noise scheduler held to diffusers' own class of the same settings: same start, same noise, same network.

An error against a kept reference cannot see arithmetic that both share. This comparison can: the grid and the solver
on the other side are diffusers' own code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from schedulers.build import build
from schedulers.grid import Grid
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.published import from_diffusers
from schedulers.published.inverse import DiffusersPeer, find_peer, network_times, published_peer
from schedulers.published.original import (
    NoiseKey,
    differences,
    new_scheduler,
    sample_noise,
    trace_ours,
    trace_theirs,
)
from schedulers.settings import NoiseSchedulerSettings


@dataclass(frozen=True)
class SchedulerDifference:
    """How far a noise scheduler is from diffusers' class of the same settings.

    Attributes:
        class_name: The name of diffusers' class.
        config: The configuration of the class, as in scheduler_config.json.
        rel_l2: The largest relative L2 difference over all evaluations: of the network's input, which is the scaled
            state, of its timestep (relative to at least 1), of the final state, and of the first noise's scale.
        where: The place of the largest difference.
        rows_of: The class that made the timesteps and sigmas, if it is another one of diffusers.
    """

    class_name: str
    config: dict[str, object]
    rel_l2: float
    where: str
    rows_of: str | None = None


def diffusers_config(
    settings: NoiseSchedulerSettings, steps: int = 50, tokens: int = 1
) -> tuple[str, dict[str, object]] | None:
    """Return the class of diffusers that samples as the settings say, and its configuration; None if there is none.

    Args:
        settings: The settings of the noise scheduler.
        steps: The number of steps.
        tokens: The number of latent tokens of one sample.

    Returns:
        The name of the class and its configuration. `find_peer` also has what its pipeline passes to its methods.

    Raises:
        ValueError: The settings do not go together.
    """
    peer = find_peer(settings, steps, tokens)
    return None if peer is None else (peer.class_name, peer.config)


def difference_from_diffusers(
    settings: NoiseSchedulerSettings, steps: int, tokens: int = 1
) -> SchedulerDifference | None:
    """Compare the noise scheduler of the settings with diffusers' class, in float64.

    The settings are built as for a run. Their rounding of the state (state_dtype) is left out.

    Args:
        settings: The settings of the noise scheduler.
        steps: The number of steps.
        tokens: The number of latent tokens of one sample.

    Returns:
        The difference, or None if diffusers has no class of the same settings.

    Raises:
        ValueError: The settings do not go together.
    """
    peer = find_peer(settings, steps, tokens)
    return None if peer is None else compare_with(peer, build(settings), steps, tokens)


def published_difference(
    config: Mapping[str, object], steps: int, tokens: int = 1, even_sigmas: bool = False
) -> SchedulerDifference:
    """Compare the noise scheduler made from a scheduler_config.json with the class that the file names, in float64.

    Args:
        config: The content of the file.
        steps: The number of steps.
        tokens: The number of latent tokens of one sample.
        even_sigmas: Whether the pipeline passes sigmas from 1 to 1 / n, as in `from_diffusers`.

    Returns:
        The difference.

    Raises:
        ValueError: The class or an option is not supported, as in `from_diffusers`.
    """
    peer = published_peer(config, even_sigmas, steps, tokens)
    return compare_with(peer, from_diffusers(config, even_sigmas), steps, tokens)


def compare_with(peer: DiffusersPeer, scheduler: NoiseScheduler, steps: int, tokens: int) -> SchedulerDifference:
    """Run a noise scheduler and diffusers' class from the same noise, and return their largest difference.

    Args:
        peer: The class with its configuration.
        scheduler: The noise scheduler.
        steps: The number of steps.
        tokens: The number of latent tokens of one sample.

    Returns:
        The largest difference.
    """
    clock = NoiseKey()
    made = with_timesteps(peer, steps, clock)
    scheduler = replace(scheduler, state_dtype=None)
    grid = scheduler.grid(steps, tokens)
    first = grid[0]
    # diffusers' VE classes hold x / alpha, and its other classes x, in whichever coordinates the settings are
    alpha = 1.0 if peer.in_x_over_alpha else 1 / math.hypot(1, first.ratio) if first.alpha == 1 else first.alpha
    scale = alpha / first.alpha if first.alpha > 0 else 1.0
    start = scheduler.init_noise(sample_noise(-1, torch.float64), grid)
    theirs = trace_theirs(made, peer.class_name, scale * start, clock, peer.step)
    ours = trace_ours(scheduler, grid, start, theirs.variance)
    ours.final, theirs.final = ours.final / grid[-1].alpha, theirs.final / _last_alpha(peer, grid)
    found = [*differences(ours, theirs), (_start_difference(made, grid, scale), "the scale of the first noise")]
    rel_l2, where = max(found)
    rows_of = None if peer.rows is None else peer.rows.class_name
    return SchedulerDifference(peer.class_name, dict(peer.config), rel_l2, where, rows_of)


def _last_alpha(peer: DiffusersPeer, grid: Grid) -> float:
    """Return the factor of the data in diffusers' last state."""
    last = grid[-1]
    if peer.in_x_over_alpha:
        return 1.0
    return 1 / math.hypot(1, last.ratio) if grid[0].alpha == 1 else last.alpha


def _start_difference(made: Any, grid: Grid, scale: float) -> float:
    """Return the relative difference of the first noise's scale from the nearest of diffusers' conventions.

    Its classes differ in it: the noise alone, the whole state, or 1.
    """
    declared = float(getattr(made, "init_noise_sigma", 1.0))
    first = grid[0]
    conventions = (declared, scale * first.sigma, scale * math.hypot(first.alpha, first.sigma))
    return min(abs(scale * grid.init_std - value) / value for value in conventions)


def with_timesteps(peer: DiffusersPeer, steps: int, clock: NoiseKey) -> Any:
    """Return an object of the class whose timesteps are set.

    Args:
        peer: The class with its configuration.
        steps: The number of steps.
        clock: The key of the object's next noise.

    Returns:
        The object.
    """
    made = new_scheduler(peer.class_name, peer.config, clock.noise)
    given: dict[str, object] = {} if peer.mu is None else {"mu": peer.mu}
    if peer.sigmas is None:
        made.set_timesteps(steps, **given)
    else:
        made.set_timesteps(sigmas=list(peer.sigmas), **given)
    if peer.rows is not None:
        _take_rows(made, peer, with_timesteps(peer.rows, steps, clock))
    if peer.tau_map is not None:
        made.timesteps = made.sigmas.new_tensor(network_times(peer.tau_map, made.sigmas[:steps].tolist()))
    return made


def _take_rows(made: Any, peer: DiffusersPeer, rows: Any) -> None:
    """Give an object the timesteps and sigmas of another one; Heun's classes hold inner rows twice."""
    timesteps, sigmas = rows.timesteps, rows.sigmas
    if "Heun" in peer.class_name:
        timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    made.timesteps, made.sigmas = timesteps, sigmas
