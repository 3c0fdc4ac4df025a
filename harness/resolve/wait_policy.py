"""launch.wait_policy: how the threads of a rank wait for one another, and what to set for it.

A forward has thousands of barriers, and a thread that has done its part waits there. Turning in a loop (spinning) is
the fastest, as long as every thread has a core. If one of them waits for a core, the others take the time that it
needs: beside one busy process on two cores, a forward of two threads becomes many times slower.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from harness.config.schema import RunConfig, WaitPolicy
from harness.config.tasks import TRAITS

VARIABLES = {
    WaitPolicy.default: {},
    WaitPolicy.adaptive: {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "300000"},  # 1000 while it is brief
    WaitPolicy.brief: {"GOMP_SPINCOUNT": "2000"},
    WaitPolicy.passive: {"OMP_WAIT_POLICY": "PASSIVE"},
}
SCHEDSTAT = Path("/proc/self/schedstat")  # where Linux says how long threads wait for a processor
USERS_OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # what a user sets here wins


def wait_policy(config: RunConfig) -> WaitPolicy:
    """Return launch.wait_policy, with auto decided by the task: a server shares its machine, a measurement does not."""
    if config.launch.wait_policy is not WaitPolicy.auto:
        return config.launch.wait_policy
    if not TRAITS[config.task.name].serves:
        return WaitPolicy.default
    return WaitPolicy.adaptive if SCHEDSTAT.exists() else WaitPolicy.brief


def is_adaptive(config: RunConfig) -> bool:
    """Return whether this rank looks at how long its threads wait for a processor, and changes how they spin."""
    chosen = VARIABLES[WaitPolicy.adaptive]
    return wait_policy(config) is WaitPolicy.adaptive and {name: os.environ.get(name) for name in chosen} == chosen


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
    """Warn if a choice has no effect: the user's environment wins over it, or the kernel does not count."""
    if config.launch.wait_policy is WaitPolicy.adaptive and not SCHEDSTAT.exists():
        warnings.warn(f"launch.wait_policy=adaptive: there is no {SCHEDSTAT}, so threads always spin", stacklevel=2)
    if config.launch.wait_policy is not WaitPolicy.auto and (own := users_own()):
        chosen = config.launch.wait_policy.name
        warnings.warn(f"launch.wait_policy={chosen} has no effect: the environment has {', '.join(own)}", stacklevel=2)
