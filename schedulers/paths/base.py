"""A Gaussian path: alpha(t) and sigma(t) of x = alpha * x0 + sigma * eps, and the timestep for the network.

Methods take a Python float or a tensor and compute elementwise in float64. They return the same kind of number: a
float, or a tensor of the same shape, device and floating dtype. Integer tensors give the default dtype.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Scalar = TypeVar("Scalar", float, Tensor)


class NoisePath(Protocol):
    """A Gaussian path; t grows from data (t_min) to noise (t_max), and sigma / alpha grows with it."""

    @property
    def t_min(self) -> float:
        """The time nearest to the data that a network was trained on."""

    @property
    def t_max(self) -> float:
        """The time of the noisiest state that a network was trained on."""

    def alpha(self, t: Scalar) -> Scalar:
        """Return the factor of the data."""

    def sigma(self, t: Scalar) -> Scalar:
        """Return the factor of the noise."""

    def tau(self, t: Scalar) -> Scalar:
        """Return the timestep passed to the network."""

    def c_in(self, t: Scalar) -> Scalar:
        """Return the input scale: the factor of the state on its way into the network."""

    def t_of(self, ratio: Scalar) -> Scalar:
        """Return the time at which sigma / alpha equals `ratio`; a ratio outside the path gives its nearest end."""

    def init_std(self, t: float) -> float:
        """Return the standard deviation of the pure noise that sampling starts from at t."""

    def drift(self, t: Scalar) -> Scalar:
        """Return f = alpha'(t) / alpha(t) of the forward SDE dx = f x dt + g dw."""

    def diffusion(self, t: Scalar) -> Scalar:
        """Return g^2 = 2 sigma sigma' - 2 f sigma^2 = 2 sigma^2 d log(sigma / alpha) / dt of the forward SDE."""


def elementwise(f: Callable[[Tensor], Tensor], t: Scalar) -> Scalar:
    """Apply f in float64 and return the kind of number that was given."""
    if isinstance(t, Tensor):
        dtype = t.dtype if t.is_floating_point() else torch.get_default_dtype()
        return f(t.to(torch.float64, copy=True)).to(dtype)  # a copy, so that sigma = t never aliases t
    return float(f(torch.tensor(t, dtype=torch.float64)))
