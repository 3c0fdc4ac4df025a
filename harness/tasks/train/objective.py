"""The training objective: one loss, and three families of it that differ in path, prediction and sampled times.

With a time t, unit noise eps and the path's alpha, sigma, c_in and tau at t,

    x = alpha x0 + sigma eps,    loss = |network(c_in x, tau, text) - target(x0, eps, alpha, sigma)|^2.

| family         | target         | times                                 | source                                |
|----------------|----------------|---------------------------------------|---------------------------------------|
| rectified_flow | eps - x0       | log(sigma / alpha) = logit t, N(0, 1) | Esser et al. 2024, section 3.1        |
| ddpm           | eps            | uniform over the trained indices      | L_simple, Ho et al. 2020, equation 14 |
| sgm            | EDM's output F | log sigma, N(.29, 1)                  | Karras et al. 2022 and 2023           |

The plain squared error on F is EDM's weighting 1 / c_out^2 of the error in x0 (arXiv:2206.00364, section 5). Its times
are those of EDM2 (arXiv:2312.02696: P_mean -.4, P_std 1 at sigma_data .5), converted to latents of unit variance:
-.4 + log 2. The other two papers are arXiv:2403.03206 and arXiv:2006.11239.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from harness.config.train import DenoiserConfig, Precision, TimeSampling
from harness.resolve.training import check_objective, time_sampling
from models.components import Conditioning
from schedulers.build import build as build_noise_scheduler
from schedulers.compatibility import resolve
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.paths import NoisePath
from schedulers.settings import NoiseSchedulerSettings

TRAIN_STEPS = 1000  # indices of a discrete path by default
TRAINED_SETTINGS = (  # settings fixed by training; the others may differ in sampling
    *("family", "path", "prediction", "train_steps", "beta_schedule", "beta_start", "beta_end", "zero_terminal_snr"),
    *("beta_min", "beta_max", "coordinates", "sigma_data", "tau_map", "edm_sign"),
)


@dataclass(frozen=True)
class TimeDistribution:
    """The distribution of training times.

    Attributes:
        kind: log_normal means log(sigma / alpha) ~ N(mean, std^2). uniform means uniform over the ``indices`` of a
            discrete path, or over all its times if there are none.
        mean: Mean of log(sigma / alpha).
        std: Standard deviation of log(sigma / alpha).
        indices: Number of indices of a discrete path.
    """

    kind: TimeSampling
    mean: float = 0.0
    std: float = 1.0
    indices: int | None = None

    def sample(self, path: NoisePath, count: int, generator: torch.Generator) -> Tensor:
        """Sample times of the path, float64 (count,).

        Args:
            path: Noise path.
            count: Number of times.
            generator: Random stream.

        Returns:
            The times.
        """
        if self.kind is TimeSampling.log_normal:
            z = torch.randn(count, generator=generator, dtype=torch.float64)
            return path.t_of((self.mean + self.std * z).exp())
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        if self.indices is None:
            return path.t_min + u * (path.t_max - path.t_min)
        return (u * self.indices).floor()


@dataclass(frozen=True)
class TrainingDefaults:
    """Values that training on a path uses for unset configuration keys.

    Attributes:
        times: Distribution of the times.
        sigma_data: Standard deviation of the data.
        tau_map: Map from times to the network's time input.
    """

    times: TimeDistribution
    sigma_data: float | None = None
    tau_map: Literal["flow_time"] | None = None


DEFAULTS = {
    "flow": TrainingDefaults(TimeDistribution(TimeSampling.log_normal, 0.0, 1.0)),
    "discrete_vp": TrainingDefaults(TimeDistribution(TimeSampling.uniform)),
    "edm": TrainingDefaults(TimeDistribution(TimeSampling.log_normal, 0.29, 1.0), sigma_data=1.0, tau_map="flow_time"),
    **{
        path: TrainingDefaults(TimeDistribution(TimeSampling.uniform)) for path in ("ve", "vp", "sub_vp")
    },  # Song et al. 2021, equation 7
}


@dataclass(frozen=True)
class Objective:
    """The loss of one family.

    Attributes:
        settings: Resolved settings of the noise scheduler.
        times: Distribution of the times t.
        dtype: Arithmetic of the network, by autocast.
    """

    settings: NoiseSchedulerSettings
    times: TimeDistribution
    dtype: Precision = Precision.float32

    @property
    def family(self) -> str:
        """The family's name in schedulers.compatibility."""
        return self.settings.family

    def noise_scheduler(self) -> NoiseScheduler:
        """Build path, prediction, spacing and solver."""
        return build_noise_scheduler(self.settings)

    def __str__(self) -> str:
        """Return everything that decides the loss, in one line.

        Solver and spacing are not part of it: they only matter for sampling later.
        """
        ends = (
            ("sigma_min", "sigma_max") if self.settings.path == "ve" else ()
        )  # on other paths they belong to the spacing
        given = {name: getattr(self.settings, name) for name in (*TRAINED_SETTINGS, *ends)}
        stated = [f"{name}={value}" for name, value in given.items() if value is not None]
        times = f"times={self.times.kind.name}"
        if self.times.kind is TimeSampling.log_normal:
            times += f"({self.times.mean}, {self.times.std})"
        return " ".join([*stated, times, f"dtype={self.dtype.name}"])

    def loss(
        self,
        model: nn.Module,
        noise_scheduler: NoiseScheduler,
        x0: Tensor,
        states: Tensor,
        mask: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Compute the module's loss.

        Args:
            model: The denoiser.
            noise_scheduler: Noise scheduler of the family.
            x0: Latents, (B, C, h, w).
            states: Text states, (B, L, D).
            mask: Mask of the text states, (B, L).
            generator: Random stream of the step.

        Returns:
            The mean loss, a scalar.
        """
        path, prediction = noise_scheduler.path, noise_scheduler.prediction
        t = self.times.sample(path, len(x0), generator)
        eps = torch.randn(x0.shape, generator=generator)
        alpha, sigma, c_in = (f(t).float().view(-1, 1, 1, 1) for f in (path.alpha, path.sigma, path.c_in))
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=self.dtype is Precision.bfloat16):
            output = model(c_in * (alpha * x0 + sigma * eps), path.tau(t).float(), Conditioning(states, mask)).float()
        return (output - prediction.target(x0, eps, alpha, sigma)).square().mean()


def objective(config: DenoiserConfig, settings: NoiseSchedulerSettings) -> Objective:
    """Build the objective of a configuration, with the family's defaults for unset keys.

    Args:
        config: Configuration of the denoiser.
        settings: Declared settings of the noise scheduler.

    Returns:
        The objective.

    Raises:
        ValueError: The settings or times do not go together; the message says what to change.
    """
    default = DEFAULTS[resolve(settings).path or ""]
    full = resolve(
        replace(
            settings,
            sigma_data=default.sigma_data if settings.sigma_data is None else settings.sigma_data,
            tau_map=default.tau_map if settings.tau_map is None else settings.tau_map,
        )
    )
    check_objective(config, full)
    return Objective(full, _times(config, full, default.times), config.dtype)


def _times(config: DenoiserConfig, settings: NoiseSchedulerSettings, default: TimeDistribution) -> TimeDistribution:
    path = settings.path
    if time_sampling(config, settings) is TimeSampling.uniform:
        return TimeDistribution(
            TimeSampling.uniform, indices=settings.train_steps or TRAIN_STEPS if path == "discrete_vp" else None
        )
    mean = default.mean if config.ratio_mean is None else config.ratio_mean
    std = default.std if config.ratio_std is None else config.ratio_std
    if std <= 0:
        raise ValueError(f"train.denoiser.ratio_std={std}; give a deviation above 0")
    return TimeDistribution(TimeSampling.log_normal, mean, std)
