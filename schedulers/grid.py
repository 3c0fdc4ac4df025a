"""The table a solver walks down: one row a point, from noise to data.

Every convention of a published checkpoint (which timesteps, which last row, what the network is told) ends up here as
numbers, so that a solver never branches on where it is used.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Point:
    """One row of a grid, as Python floats: the state there is x = alpha * x0 + sigma * eps.

    t is the path's own time. tau is the number the network is told. The network is fed c_in * x.
    """

    t: float
    alpha: float
    sigma: float
    tau: float
    c_in: float


@dataclass(frozen=True, eq=False)
class Grid:
    """n + 1 points for n steps, noise first; all columns are float64 tensors of shape (n + 1,) on the CPU.

    init_std is the standard deviation of the noise that a checkpoint expects at the first row.
    Raises ValueError when the columns disagree in length, are not finite, or sigma / alpha rises along the table.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    tau: Tensor
    c_in: Tensor
    init_std: float

    def __post_init__(self) -> None:
        for name in ("t", "alpha", "sigma", "tau", "c_in"):
            column = getattr(self, name).detach().to("cpu", torch.float64).clone()
            if column.ndim != 1 or len(column) != len(self.t) or len(column) < 2:
                raise ValueError(
                    f"grid column {name} has shape {tuple(column.shape)}; all need one shape (steps + 1,), steps >= 1"
                )
            if not torch.isfinite(column).all():
                raise ValueError(f"grid column {name} is not finite; keep t inside the path's [t_min, t_max]")
            object.__setattr__(self, name, column)
        if (self.sigma[1:] * self.alpha[:-1] > self.sigma[:-1] * self.alpha[1:]).any():
            raise ValueError("sigma / alpha must not rise along a grid; order the points from noise to data")

    @property
    def steps(self) -> int:
        """Number of steps, one less than the number of rows."""
        return len(self.t) - 1

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, i: int) -> Point:
        columns = (self.t, self.alpha, self.sigma, self.tau, self.c_in)
        return Point(*(float(column[i]) for column in columns))
