"""The mathematics of sampling: noise paths, spacings, predictions and solvers.

A family (DDPM, score SDE, rectified flow) is data: a path, a prediction and a spacing. A solver is written once, for
every Gaussian path x = alpha * x0 + sigma * eps. Nothing in this package knows a network, a rank or a configuration
file.
"""

from schedulers.compatibility import NoiseSchedulerSettings, check, resolve

__all__ = ["NoiseSchedulerSettings", "check", "resolve"]
