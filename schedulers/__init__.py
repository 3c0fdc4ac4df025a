"""The mathematics of sampling: noise paths, spacings, predictions and solvers.

A family (DDPM, score SDE, rectified flow) is data: a path, a prediction and a spacing. Each solver is written once, for
every Gaussian path x = alpha * x0 + sigma * eps. This package knows no network, no rank and no configuration file.
"""

from schedulers.compatibility import check, resolve
from schedulers.settings import NoiseSchedulerSettings

__all__ = ["NoiseSchedulerSettings", "check", "resolve"]
