"""The table a solver goes through: one row per point, from noise to data.

Every convention of a published checkpoint ends up here as numbers: the timesteps, the last row, and what the network is
given. A solver therefore never branches on where it is used.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from schedulers.paths import NoisePath


@dataclass(frozen=True)
class Point:
    """One row of a grid, as Python floats. The state there is x = alpha * x0 + sigma * eps.

    Attributes:
        t: The path's own time.
        alpha: The factor of the data.
        sigma: The factor of the noise.
        tau: The timestep passed to the network.
        c_in: The input scale: the network receives c_in * x.
    """

    t: float
    alpha: float
    sigma: float
    tau: float
    c_in: float

    @property
    def ratio(self) -> float:
        """The ratio sigma / alpha, infinite at alpha = 0."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf

    @property
    def log_snr(self) -> float:
        """The value lambda = log(alpha / sigma): minus infinity at alpha = 0, infinity at sigma = 0."""
        if self.sigma == 0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf


@dataclass(frozen=True, eq=False)
class Grid:
    """The n + 1 points of n steps, noise first.

    All columns are float64 tensors of shape (n + 1,) on the CPU.

    Attributes:
        t: The path's own time at each row.
        alpha: The factor of the data at each row.
        sigma: The factor of the noise at each row.
        tau: The timestep passed to the network at each row.
        c_in: The input scale of the network at each row.
        init_std: The standard deviation of the first noise that the checkpoint expects.
        path: The source of points between rows, for solvers that evaluate there.
        landing_t: The path's times at which first-order steps land, shape (steps,), for published implementations that
            miss the next row. None, or NaN for one step, means the next row.

    Raises:
        ValueError: The columns differ in length, are not finite, or sigma / alpha rises along the table.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    tau: Tensor
    c_in: Tensor
    init_std: float
    path: NoisePath | None = None
    landing_t: Tensor | None = None

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
        rising = (self.sigma[1:] * self.alpha[:-1] > self.sigma[:-1] * self.alpha[1:]).nonzero()
        if len(rising):
            a, b = self[int(rising[0])], self[int(rising[0]) + 1]
            raise ValueError(
                f"sigma / alpha must not rise along a grid, and it goes from {a.ratio:.6g} at t={a.t:g} to "
                f"{b.ratio:.6g} at t={b.t:g}; use fewer steps, or order the points from noise to data"
            )

    @property
    def steps(self) -> int:
        """The number of steps, one less than the number of rows."""
        return len(self.t) - 1

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, i: int) -> Point:
        columns = (self.t, self.alpha, self.sigma, self.tau, self.c_in)
        return Point(*(float(column[i]) for column in columns))

    def at_ratio(self, ratio: float) -> Point:
        """Return the path's point where sigma / alpha equals `ratio`, on a row or between rows.

        Args:
            ratio: A value of sigma / alpha, possibly infinite.

        Returns:
            The point on the path.

        Raises:
            ValueError: The grid was made without a path.
        """
        return self.at_time(self._known_path.t_of(ratio))

    def landing(self, i: int) -> Point:
        """Return the point where a first-order step from row i lands: the next row, or the point at `landing_t[i]`."""
        if self.landing_t is None or self.path is None or not math.isfinite(t := float(self.landing_t[i])):
            return self[i + 1]
        return self.at_time(t)

    def at_time(self, t: float) -> Point:
        """Return the path's point at its own time t.

        Args:
            t: A time between the path's t_min and t_max.

        Returns:
            The point on the path.

        Raises:
            ValueError: The grid was made without a path.
        """
        path = self._known_path
        return Point(t, path.alpha(t), path.sigma(t), path.tau(t), path.c_in(t))

    @property
    def _known_path(self) -> NoisePath:
        if self.path is None:
            raise ValueError("this grid was made without its path, so there is no point between its rows")
        return self.path
