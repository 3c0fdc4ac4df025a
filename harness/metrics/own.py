"""Metrics of plug-ins: one number for the images of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from harness.config.kinds import METRICS
from harness.plugins.options import own_options
from schedulers.registry import imported


class ImageMetric(Protocol):
    """A metric that a plug-in registers."""

    def __call__(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str], **options: Any) -> float:
        """Return the metric of the images of one answer.

        Args:
            images: 8-bit images (H, W, 3).
            prompts: The prompt of each image.
            **options: The options that the plug-in declared.

        Returns:
            A finite number.
        """


def measure(
    names: Sequence[str],
    images: Sequence[NDArray[np.uint8]],
    prompts: Sequence[str],
    plugin: Mapping[str, object],
) -> tuple[dict[str, float], list[str]]:
    """Return the metrics of 8-bit images that have these prompts, and the reasons why metrics are missing.

    Args:
        names: Names of registered metrics.
        images: Images (H, W, 3).
        prompts: The prompt of each image.
        plugin: The options of plug-ins.

    Returns:
        The metrics by name; and one line for each that failed, since it runs after everything was measured.
    """
    found: dict[str, float] = {}
    failed = []
    for name in names:
        try:
            metric: ImageMetric = imported(METRICS[name])
            value: object = metric(images, prompts, **own_options(METRICS, name, plugin))
        except Exception as error:
            failed.append(f"metric {name} is missing: {type(error).__name__}: {' '.join(str(error).split())}")
            continue
        if isinstance(value, Real) and math.isfinite(value):
            found[name] = float(value)
        else:
            failed.append(f"metric {name} is missing: it returned {value!r}, and a metric is a finite number")
    return found, failed
