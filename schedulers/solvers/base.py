"""The interface of a solver, and what it receives.

Along the probability-flow ODE of x = alpha * x0 + sigma * eps, with x0 and eps the network's estimate at the current
point,

    dx = x0 d(alpha) + eps d(sigma)                                                                    (*)

A solver pulls: it calls denoise itself, as often and wherever it needs. Guidance, parallel branches, caches, timers and
cancellation wrap denoise, so no solver depends on them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from schedulers.grid import Grid, Point
from schedulers.prediction import Estimate

Denoise = Callable[[Tensor, Point], Estimate]
"""A function (x, point) -> Estimate. x is the unscaled state, of any shape."""

Noise = Callable[[int], Tensor]
"""A function i -> standard normal noise of step i, float32 and shaped like x. The same i always gives the same tensor.
A solver that needs several noise tensors per step requests number k with the key i + k * grid.steps."""


@dataclass
class SolverState:
    """What a solver stores between the steps of one request; one object per request, never shared.

    Attributes:
        history: The points and estimates of earlier steps, oldest first.
        sample: The state of an earlier step, for solvers that step again from it.
        order: The order of the previous step.
        step_size: The last accepted step of an adaptive solver.
    """

    history: list[tuple[Point, Estimate]] = field(default_factory=list)
    sample: Tensor | None = None
    order: int = 0
    step_size: float | None = None

    def append(self, point: Point, estimate: Estimate, length: int, distinct: bool = True) -> None:
        """Append a point with its estimate.

        Args:
            point: The point.
            estimate: The network's estimate there.
            length: The number of entries to keep, the newest ones.
            distinct: Whether the entry replaces the last one if both have the same noise level: a polynomial through
                both would divide by zero. Grids with as many steps as trained timesteps repeat a row.
        """
        again = distinct and self.history and self.history[-1][0].ratio == point.ratio
        self.history = [*(self.history[:-1] if again else self.history), (point, estimate)][-length:]

    def copy(self) -> "SolverState":
        """Return an independent copy; the tensors are shared, since no solver changes them."""
        return SolverState(list(self.history), self.sample, self.order, self.step_size)


class Solver(Protocol):
    """A frozen rule for one step."""

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """Return the state at grid[i + 1].

        Args:
            x: The state at grid[i].
            i: The index of the step.
            grid: The points.
            denoise: The network as a function of state and point.
            state: What the solver stores between steps; changed in place.
            noise: The source of standard normal noise.

        Returns:
            The next state, with the shape and dtype of x.
        """

    def evaluations(self, grid: Grid) -> int | None:
        """Return the network evaluations of all steps, guidance not counted, or None if they depend on the sample."""


def multistep_order(order: int, i: int, grid: Grid, lower_order_final: bool, short: int = 15) -> int:
    """Return the order that a multistep solver can take at step i, given its history and the last rows.

    A row with alpha = 0 is of no use to solvers in log(alpha / sigma), and a step to sigma = 0 is first order.

    Args:
        order: The order of the solver.
        i: The index of the step.
        grid: The points.
        lower_order_final: Whether the last steps of a short grid descend to first order, as in DPM-Solver (Lu et al.
            2022, arXiv 2211.01095, appendix).
        short: The number of steps below which a grid is short.

    Returns:
        The order of step i, at least 1.
    """
    usable = i + 1 if grid.alpha[0] > 0 else max(i, 1)
    if lower_order_final and grid.steps < short:
        order = min(order, grid.steps - i)
    return 1 if grid.sigma[i + 1] == 0 else min(order, usable)
