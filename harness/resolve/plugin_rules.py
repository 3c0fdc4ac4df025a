"""What the entries of registries that a configuration uses may not go with; checked without torch and Hydra."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from harness.config.schema import RunConfig
from harness.config.tasks import TRAITS
from harness.resolve.checkpoint_defaults import PUBLISHED_FAMILY
from schedulers.registry import AXES, REGISTRIES, Registration


def in_use(config: RunConfig) -> Iterator[tuple[str, Registration]]:
    """Yield what a configuration uses of each registry, with the key that names it; all of a registry without a key."""
    for registry in REGISTRIES:
        if registry.key.startswith("scheduler.") and config.scheduler.family == PUBLISHED_FAMILY:
            continue  # the checkpoint's own noise scheduler
        chosen = attrgetter(registry.key)(config) if registry.key else registry.names()
        for name in [chosen] if isinstance(chosen, str) else chosen or ():
            if name in registry:
                yield registry.key, registry.registration(name)


def check_plugins(config: RunConfig) -> None:
    """Refuse a layout, or step batching, that something in use is registered not to run with.

    Raises:
        ValueError: One line says what does not go together, and what to use instead.
    """
    batches = TRAITS[config.task.name].serves and config.serve.max_batch > 1
    for key, row in in_use(config):
        name = f"{key or row.kind}={row.name}"
        for axis in AXES:
            degree = getattr(config.parallel, axis)
            if row.layouts is not None and axis not in row.layouts and degree > 1:
                allowed = f"parallel.{', parallel.'.join(row.layouts)}" if row.layouts else "parallel=single"
                raise ValueError(f"{name} does not go with parallel.{axis}={degree}; use {allowed}")
        if batches and not row.step_batching:
            raise ValueError(
                f"{name} does not go with serve.max_batch={config.serve.max_batch}: requests cannot share its "
                "forwards; set serve.max_batch=1"
            )
