"""Which packages a run needs: what the extras install, and the versions that work; checked without importing any."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from harness.config.schema import Quantize, RunConfig, Task, WandbMode
from harness.records.provenance import version

VERSIONS: Mapping[str, tuple[str, str]] = {
    "torch": ("2.11", "2.14"),
    "transformers": ("5.0", "6"),
    "diffusers": ("0.42", "0.43"),
}
"""The oldest version that works, and the first one that is too new, as in pyproject.toml."""
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "serve": (
        "fastapi",
        "starlette",
        "pydantic",
        "uvicorn",
        "h11",
        "python-multipart",
        "prometheus-client",
        "httpx",
    ),
    "video": ("imageio-ffmpeg",),
    "wandb": ("wandb",),
    "quantize": ("torchao",),
}
"""The packages of the extras that a key of the configuration needs, as in pyproject.toml."""


def check_packages(config: RunConfig) -> None:
    """Refuse a run whose packages are missing, too old or too new.

    Raises:
        ValueError: One line has the pip command that mends it.
    """
    check_versions()
    task, wandb, quantize = config.task.name, config.logger.wandb.mode, config.model.quantize
    if task in (Task.serve, Task.load):
        require_extra(f"task={task.name}", "serve")
    if wandb in (WandbMode.online, WandbMode.offline):
        require_extra(f"logger.wandb.mode={wandb.name}", "wandb", "; or use logger.wandb.mode=disabled")
    if quantize is not Quantize.none:
        require_extra(f"model.quantize={quantize.name}", "quantize", "; or drop it")


def require_extra(what: str, extra: str, instead: str = "") -> None:
    """Refuse what needs an extra that is not installed.

    Args:
        what: The setting that needs it, such as task=serve.
        extra: The name of the extra.
        instead: What else to do, with the words that join it to the line.

    Raises:
        ValueError: A package of the extra is missing; one line has the pip command.
    """
    missing = [name for name in EXTRAS[extra] if version(name) is None]
    if missing:
        named = f"the package{'s' if len(missing) > 1 else ''} {' and '.join(missing[:2])}"
        more = f" and {len(missing) - 2} more" if len(missing) > 2 else ""
        raise ValueError(f"{what} needs {named}{more}: pip install 'triptych[{extra}]'{instead}")


@cache
def check_versions() -> None:
    """Refuse a version of torch, transformers or diffusers that this version of Triptych does not work with.

    Raises:
        ValueError: One is missing or out of range; one line has the pip command.
    """
    for name, (oldest, too_new) in VERSIONS.items():
        found = version(name)
        if found is None or not _release(oldest) <= _release(found) < _release(too_new):
            is_there = "is not installed" if found is None else f"{found} is installed"
            raise ValueError(
                f"{name} {is_there}; Triptych needs {oldest} or newer, but older than {too_new}: "
                f"pip install '{name}>={oldest},<{too_new}'"
            )


def _release(text: str) -> tuple[int, ...]:
    """Return the release of a version as numbers without zeros at its end: 2.13.0+cpu is (2, 13)."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    numbers = [int(part) for part in found.group().split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
