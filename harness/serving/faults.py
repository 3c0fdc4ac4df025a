"""Classifying exceptions: the kind of failure, and the one line that reports it."""

from __future__ import annotations

import re

NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # c10/core/CPUAllocator; a RuntimeError, unlike CUDA's
TIMED_OUT = re.compile(r"Timed out waiting (\d+)ms")  # gloo's message about a collective
PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "gloo/transport",
)  # gloo's messages, also RuntimeErrors


def failure_kind(error: BaseException) -> str:
    """Return the kind of failure: oom, unsupported or failed."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or NO_MEMORY in str(error):
        return "oom"
    return "unsupported" if isinstance(error, NotImplementedError) else "failed"


def failure_line(error: BaseException) -> str:
    """Return the first line of an error's message, after its type's name unless the message was written for users."""
    line = (str(error).splitlines() or [""])[0]
    if waited := TIMED_OUT.search(str(error)):
        return (
            f"another rank did not answer within {int(waited[1]) / 1000:g} s: it has stopped, or is slower than "
            "launch.collective_timeout_s allows"
        )
    if line and isinstance(error, ValueError | NotImplementedError):
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def is_peer_lost(error: BaseException) -> bool:
    """Return whether a rank failed only because another rank died first, not because it waited in vain for one."""
    return not TIMED_OUT.search(str(error)) and any(words in str(error) for words in PEER_LOST)


def is_in_collective(error: BaseException) -> bool:
    """Return whether an error comes from a collective, after which the groups of the ranks cannot be used."""
    texts = f"{type(error).__name__}: {error}"
    return bool(TIMED_OUT.search(texts)) or "DistBackendError" in texts or any(words in texts for words in PEER_LOST)
