"""What task=serve and task=load check alike."""

from __future__ import annotations

from harness.config.schema import RunConfig
from harness.config.serve import check_serve
from harness.resolve.compose import ConfigError
from harness.resolve.engines_table import NATIVE
from harness.resolve.layout_rules import is_approximate


def check_serving(config: RunConfig) -> None:
    """Refuse settings that cannot serve.

    Raises:
        ConfigError: A key of `serve` is wrong, or batches are larger than the engine can share.
    """
    one_by_one = config.model.offload or is_approximate(config.parallel)
    try:
        check_serve(config.serve, config.engine.name == NATIVE and not one_by_one)
    except ValueError as error:
        raise ConfigError(str(error)) from error
