"""The mathematics of sampling: noise paths, spacings, predictions and solvers.

A family (DDPM, score SDE, rectified flow) is data: a path, a prediction and a spacing. A solver is written once, for
every Gaussian path x = alpha * x0 + sigma * eps. Nothing in this package knows a network, a rank or a configuration
file.
"""

from schedulers.families import Settings, check, resolve

__all__ = ["Settings", "check", "resolve"]
