"""What is minimised: one loss, and three families of it that differ in path, prediction and how times are drawn.

With a time t, unit noise eps and the path's alpha, sigma, c_in and tau at t,

    x = alpha x0 + sigma eps,    loss = |network(c_in x, tau, text) - target(x0, eps, alpha, sigma)|^2.

| family         | target         | times                                 | is                                    |
|----------------|----------------|---------------------------------------|---------------------------------------|
| rectified_flow | eps - x0       | log(sigma / alpha) = logit t, N(0, 1) | Esser et al. 2024, section 3.1        |
| ddpm           | eps            | even over the trained indices         | L_simple, Ho et al. 2020, equation 14 |
| sgm            | EDM's output F | log sigma, N(.29, 1)                  | Karras et al. 2022 and 2023           |

The plain square on F is EDM's weighting 1 / c_out^2 of the error in x0 (arXiv:2206.00364, section 5). Its times are
those of EDM2 (arXiv:2312.02696: P_mean -.4, P_std 1 at sigma_data .5) carried to latents of unit variance: -.4 + log 2.
The other two papers are arXiv:2403.03206 and arXiv:2006.11239.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from harness.config.train import DenoiserConfig, Precision, TimeSampling
from models.components import Conditioning
from schedulers.build import build as build_noise_scheduler
from schedulers.compatibility import NoiseSchedulerSettings, resolve
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.paths import NoisePath

TRAIN_STEPS = 1000  # indices of a discrete path unless its settings say otherwise
LEARNED = (  # settings that a network is trained with; the others are free in sampling
    *("family", "path", "prediction", "train_steps", "beta_schedule", "beta_start", "beta_end", "zero_terminal_snr"),
    *("beta_min", "beta_max", "coordinates", "sigma_data", "tau_map", "edm_sign"),
)


@dataclass(frozen=True)
class Times:
    """The distribution of training times.

    kind: log_normal, log(sigma / alpha) ~ N(mean, std^2); or uniform, over the ``indices`` of a discrete path, or over
    all its times where there are none.
    """

    kind: TimeSampling
    mean: float = 0.0
    std: float = 1.0
    indices: int | None = None

    def draw(self, path: NoisePath, count: int, generator: torch.Generator) -> Tensor:
        """Times of the path, float64 (count,)."""
        if self.kind is TimeSampling.log_normal:
            z = torch.randn(count, generator=generator, dtype=torch.float64)
            return path.t_of((self.mean + self.std * z).exp())
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        if self.indices is None:
            return path.t_min + u * (path.t_max - path.t_min)
        return (u * self.indices).floor()


@dataclass(frozen=True)
class Default:
    """What the training on a path takes where the configuration is silent."""

    times: Times
    sigma_data: float | None = None
    tau_map: Literal["flow_time"] | None = None


DEFAULTS = {
    "flow": Default(Times(TimeSampling.log_normal, 0.0, 1.0)),
    "discrete_vp": Default(Times(TimeSampling.uniform)),
    "edm": Default(Times(TimeSampling.log_normal, 0.29, 1.0), sigma_data=1.0, tau_map="flow_time"),
    **{path: Default(Times(TimeSampling.uniform)) for path in ("ve", "vp", "sub_vp")},  # Song et al. 2021, equation 7
}


@dataclass(frozen=True)
class Objective:
    """The loss of one family.

    settings: the noise scheduler's, resolved. times: how t is drawn. dtype: the network's arithmetic, by autocast.
    """

    settings: NoiseSchedulerSettings
    times: Times
    dtype: Precision = Precision.float32

    @property
    def family(self) -> str:
        """Its name in schedulers.compatibility."""
        return self.settings.family

    def noise_scheduler(self) -> NoiseScheduler:
        """Path, prediction, spacing and solver."""
        return build_noise_scheduler(self.settings)

    def __str__(self) -> str:
        """What decides the loss, in one line; solver and spacing, with which it is sampled later, do not."""
        ends = ("sigma_min", "sigma_max") if self.settings.path == "ve" else ()  # elsewhere they are of the spacing
        given = {name: getattr(self.settings, name) for name in (*LEARNED, *ends)}
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
        """The module's loss on latents x0 (B, C, h, w), text states (B, L, D) and their mask (B, L)."""
        path, prediction = noise_scheduler.path, noise_scheduler.prediction
        t = self.times.draw(path, len(x0), generator)
        eps = torch.randn(x0.shape, generator=generator)
        alpha, sigma, c_in = (f(t).float().view(-1, 1, 1, 1) for f in (path.alpha, path.sigma, path.c_in))
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=self.dtype is Precision.bfloat16):
            output = model(c_in * (alpha * x0 + sigma * eps), path.tau(t).float(), Conditioning(states, mask)).float()
        return (output - prediction.target(x0, eps, alpha, sigma)).square().mean()


def objective(config: DenoiserConfig, settings: NoiseSchedulerSettings) -> Objective:
    """The objective of a configuration, the family's own choices filled in where it is silent.

    Raises:
        ValueError: settings or times that do not go together, with what to change.
    """
    default = DEFAULTS[resolve(settings).path or ""]
    full = resolve(
        replace(
            settings,
            sigma_data=default.sigma_data if settings.sigma_data is None else settings.sigma_data,
            tau_map=default.tau_map if settings.tau_map is None else settings.tau_map,
        )
    )
    if full.prediction == "score":
        raise ValueError(
            "a plain square on the score weighs the smallest noise without bound; train with scheduler.prediction=eps, "
            "which is -sigma times the score"
        )
    if full.learned_variance:
        raise ValueError("the denoiser has no output for a learned variance; drop scheduler.learned_variance")
    return Objective(full, _times(config, full, default.times), config.dtype)


def _times(config: DenoiserConfig, settings: NoiseSchedulerSettings, default: Times) -> Times:
    path = settings.path
    if (config.times or default.kind) is TimeSampling.uniform:
        if path == "edm":
            raise ValueError(
                f"train.denoiser.times=uniform would draw almost no time of {settings.family} where the picture forms; "
                "use log_normal"
            )
        if config.ratio_mean is not None or config.ratio_std is not None:
            raise ValueError(
                "train.denoiser.ratio_mean and ratio_std mean nothing for uniform times; drop them, or set "
                "train.denoiser.times=log_normal"
            )
        return Times(
            TimeSampling.uniform, indices=settings.train_steps or TRAIN_STEPS if path == "discrete_vp" else None
        )
    mean = default.mean if config.ratio_mean is None else config.ratio_mean
    std = default.std if config.ratio_std is None else config.ratio_std
    if std <= 0:
        raise ValueError(f"train.denoiser.ratio_std={std}; give a deviation above 0")
    return Times(TimeSampling.log_normal, mean, std)
