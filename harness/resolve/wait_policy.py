"""launch.wait_policy: how the threads of a rank wait for one another, and what to set for it.

A forward has thousands of barriers, and a thread that has done its part waits there. Turning in a loop (spinning) is
the fastest, as long as every thread has a core. If one of them waits for a core, the others take the time that it
needs: beside one busy process on two cores, a forward of two threads becomes many times slower.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

from harness.config.schema import RunConfig, WaitPolicy
from harness.config.tasks import TRAITS

VARIABLES = {
    WaitPolicy.default: {},
    WaitPolicy.brief: {"GOMP_SPINCOUNT": "2000"},
    WaitPolicy.passive: {"OMP_WAIT_POLICY": "PASSIVE"},
}
USERS_OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # what a user sets here wins


def wait_policy(config: RunConfig) -> WaitPolicy:
    """Return launch.wait_policy, with auto decided by the task: a server shares its machine, a measurement does not."""
    if config.launch.wait_policy is not WaitPolicy.auto:
        return config.launch.wait_policy
    return WaitPolicy.brief if TRAITS[config.task.name].serves else WaitPolicy.default


def wait_environment(config: RunConfig, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment variables for the waiting of threads.

    Args:
        config: the resolved configuration.
        given: the user's environment; what it sets about waiting is left alone.
    """
    return {} if users_own(given) else VARIABLES[wait_policy(config)]


def users_own(given: Mapping[str, str] = os.environ) -> list[str]:
    """Return what the user's environment sets about waiting, as NAME=value."""
    return [f"{name}={given[name]}" for name in USERS_OWN if name in given]


def check_wait_policy(config: RunConfig) -> None:
    """Warn if the user's environment wins over a choice."""
    if config.launch.wait_policy is not WaitPolicy.auto and (own := users_own()):
        chosen = config.launch.wait_policy.name
        warnings.warn(f"launch.wait_policy={chosen} has no effect: the environment has {', '.join(own)}", stacklevel=2)
