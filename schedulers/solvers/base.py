"""What a solver is, and what it is handed.

Along the probability-flow ODE of x = alpha * x0 + sigma * eps, with x0 and eps the network's estimate at the current
point,

    dx = x0 d(alpha) + eps d(sigma)                                                                    (*)

A solver pulls: it calls denoise itself, as often and wherever it needs. Guidance, parallel branches, caches, timers
and cancellation wrap denoise and stay invisible here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from schedulers.grid import Grid, Point
from schedulers.prediction import Estimate

Denoise = Callable[[Tensor, Point], Estimate]
"""(x, point) -> Estimate; x is the unscaled state, of any shape."""

Noise = Callable[[int], Tensor]
"""i -> standard normal noise of step i, float32 and shaped like x; the same i always gives the same tensor. A solver
that needs more than one draw a step asks for draw k under the key i + k * grid.steps."""


@dataclass
class SolverState:
    """What a solver remembers of one request; one object a request, never shared.

    history: points and estimates of earlier steps, oldest first. sample: an earlier state, for solvers that step again
    from it. order: of the step that led here. size: the last accepted step of an adaptive solver.
    """

    history: list[tuple[Point, Estimate]] = field(default_factory=list)
    sample: Tensor | None = None
    order: int = 0
    step_size: float | None = None

    def append(self, point: Point, estimate: Estimate, length: int) -> None:
        """Append, and keep the last `length` entries."""
        self.history = [*self.history, (point, estimate)][-length:]

    def copy(self) -> "SolverState":
        """An independent copy; the tensors, which no solver changes, are shared."""
        return SolverState(list(self.history), self.sample, self.order, self.step_size)


class Solver(Protocol):
    """A frozen rule for one step."""

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, state: SolverState, noise: Noise) -> Tensor:
        """The state at grid[i + 1] from the state x at grid[i], same shape and dtype."""

    def evaluations(self, grid: Grid) -> int | None:
        """Network evaluations of the whole loop, guidance not counted; None where they depend on the sample."""


def multistep_order(order: int, i: int, grid: Grid, lower_order_final: bool, short: int = 15) -> int:
    """The order that a multistep solver can take at step i: what history and the last rows allow.

    History before a row with alpha = 0 is of no use to solvers in log(alpha / sigma). A step to sigma = 0 is first
    order. With lower_order_final, the last steps of a grid of fewer than `short` steps descend to first order, as in
    DPM-Solver (Lu et al. 2022, arXiv 2211.01095, appendix).
    """
    usable = i + 1 if grid.alpha[0] > 0 else max(i, 1)
    if lower_order_final and grid.steps < short:
        order = min(order, grid.steps - i)
    return 1 if grid.sigma[i + 1] == 0 else min(order, usable)
