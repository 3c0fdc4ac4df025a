"""Checking whether a process is alive."""

from __future__ import annotations

import os


def is_alive(pid: int) -> bool:
    """Return whether a process with this id exists; a zombie that nobody has waited for counts."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
