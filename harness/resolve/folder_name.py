"""The name of a sweep's job folder: its overrides, readable, and different for different overrides on any disc.

A name is the overrides themselves as long as nothing had to change. Otherwise a hash of the exact overrides follows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from harness.resolve.names import config_groups

MAX_BYTES = 160  # a file system allows 255
AS_COMPOSED = "as_composed"  # no override is equal to it: an override has a = or begins with ~
REPLACED = re.compile(r"[\x00-\x1f\x7f/\\:*?<>|$]")  # characters that a file system, a shell or Hydra reads otherwise
FOLDED = re.compile(r"[A-Z]|[^\x00-\x7f]|[. ]$")  # what some discs do not keep apart: case, accents, an end


def folder_name(overrides: Sequence[str]) -> str:
    """Return the name of a job's folder.

    Args:
        overrides: The job's overrides, in any order.

    Returns:
        One path component of at most 255 bytes; two different sets of overrides never have the same.
    """
    plain = ",".join(_dotted(override) for override in sorted(overrides))
    name = REPLACED.sub("_", plain).encode()[:MAX_BYTES].decode(errors="ignore")
    if name == plain and not FOLDED.search(name) and not any(_is_ambiguous(override) for override in overrides):
        return name or AS_COMPOSED
    return f"{name}~{hashlib.sha256(chr(0).join(sorted(overrides)).encode()).hexdigest()[:12]}"


def _dotted(override: str) -> str:
    """Return an override with dots for the slashes of its group, as in scheduler.solver=heun."""
    key, equals, value = override.partition("=")
    return f"{key.replace('/', '.')}{equals}{value}"


def _is_ambiguous(override: str) -> bool:
    """Return whether an override reads like the dotted name of a group, or ends like a name with a hash.

    A nested group of the user's own is ambiguous itself.
    """
    key, _, value = override.partition("=")
    nested = {group for group in config_groups() if "/" in group}
    dotted = {group.replace("/", ".") for group in nested}
    name = key.lstrip("+~")
    return name in dotted or ("/" in name and name not in nested) or re.search(r"~[0-9a-f]{12}$", value) is not None
