"""The search space: values in Hydra's sweep grammar as Optuna's distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from harness.config.yaml import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


def distribution(override: Override) -> BaseDistribution:
    """Return the distribution of one swept key.

    A list or choice(...) is categorical. range(...) is numbers, whole ones if its bounds are. interval(...) is numbers
    too, and int(interval(...)) whole ones. The tag in tag(log, interval(...)) samples the logarithm.

    Args:
        override: The parsed override, which has several values.

    Returns:
        The distribution.

    Raises:
        ConfigError: There is no value, or the bounds do not fit.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value, name = override.value(), override.input_line
    try:
        if isinstance(value, RangeSweep):
            numbers = [*value.range()]
            low, high, log = min(numbers), max(numbers), "log" in value.tags
            if all(isinstance(number, int) for number in numbers):
                return IntDistribution(int(low), int(high), log, abs(int(value.step)))
            return FloatDistribution(low, high, log=log, step=abs(float(value.step)))
        if isinstance(value, IntervalSweep):
            bounds, log = (value.start, value.end), "log" in value.tags
            if all(isinstance(bound, int) for bound in bounds):
                return IntDistribution(*map(int, bounds), log=log)  # type: ignore[arg-type]
            return FloatDistribution(*map(float, bounds), log=log)  # type: ignore[arg-type]
        return CategoricalDistribution([*override.sweep_string_iterator()])
    except ValueError as error:
        raise ConfigError(f"{name}: no values to search ({' '.join(str(error).split())})") from error
