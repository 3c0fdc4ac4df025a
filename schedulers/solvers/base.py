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
"""i -> standard normal noise of step i, float32 and shaped like x; the same i always gives the same tensor."""


@dataclass
class Memory:
    """What a multistep solver remembers of one request, oldest first; one object a request, never shared."""

    history: list[tuple[Point, Estimate]] = field(default_factory=list)


class Solver(Protocol):
    """A frozen rule for one step."""

    def step(self, x: Tensor, i: int, grid: Grid, denoise: Denoise, memory: Memory, noise: Noise) -> Tensor:
        """The state at grid[i + 1] from the state x at grid[i], same shape and dtype."""

    def evaluations(self, grid: Grid) -> int:
        """Network evaluations of the whole loop, guidance not counted."""
