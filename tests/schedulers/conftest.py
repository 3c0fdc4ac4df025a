"""Shared toys: one thread, a fixed float32 network, and a Gaussian whose denoiser and flow are known in closed form."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from schedulers.grid import Grid, Point
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.prediction import Estimate

Network = Callable[[Tensor, float], Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: tensors are small, and more threads only disturb other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def start() -> Tensor:
    """Return standard normal noise, (2, 4, 8, 8), float32."""
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network() -> Network:
    """Return (x, tau) -> output of x's shape; a fixed smooth function that depends on both."""
    weight = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)) / 6

    def forward(x: Tensor, tau: float) -> Tensor:
        return torch.tanh(torch.nn.functional.conv2d(x, weight, padding=1) + 0.7 * x + float(tau) / 2000)

    return forward


@pytest.fixture
def noise(start: Tensor) -> Callable[[int], Tensor]:
    """Return i -> the noise of step i, shaped like start."""
    return lambda i: torch.randn(start.shape, generator=torch.Generator().manual_seed(100 + i))


@pytest.fixture
def run(network: Network, noise: Callable[[int], Tensor]) -> Callable[[NoiseScheduler, Tensor, Grid], Tensor]:
    """Return the whole loop with the toy network behind a scheduler's own prediction."""

    def loop(scheduler: NoiseScheduler, x: Tensor, grid: Grid) -> Tensor:
        def denoise(x: Tensor, point: Point) -> Estimate:
            return scheduler.prediction.estimate(network(point.c_in * x, point.tau), x, point)

        return scheduler.sample(x, grid, denoise, noise)

    return loop


class Gaussian:
    """Data N(mean, std^2): the posterior mean of x0 given x, and the probability flow, in closed form."""

    mean, std = 0.3, 0.6

    def denoise(self, x: Tensor, point: Point) -> Estimate:
        """Return E[x0 | x] and E[eps | x]."""
        total = (point.alpha * self.std) ** 2 + point.sigma**2
        centred = x - point.alpha * self.mean
        return Estimate(self.mean + point.alpha * self.std**2 * centred / total, point.sigma * centred / total)

    def flow(self, z: Tensor, point: Point) -> Tensor:
        """Return where the flow carries the quantile z: alpha * mean + sqrt(alpha^2 std^2 + sigma^2) * z."""
        return point.alpha * self.mean + math.hypot(point.alpha * self.std, point.sigma) * z


@pytest.fixture
def gaussian() -> Gaussian:
    """Return a Gaussian whose denoiser and flow are known in closed form."""
    return Gaussian()
