"""What kind of failure an exception is, and the one line that says so."""

from __future__ import annotations

NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # c10/core/CPUAllocator; a RuntimeError, unlike CUDA's
PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "gloo/transport",
)  # gloo's words, also RuntimeErrors


def failure_kind(error: BaseException) -> str:
    """oom, unsupported or failed."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or NO_MEMORY in str(error):
        return "oom"
    return "unsupported" if isinstance(error, NotImplementedError) else "failed"


def failure_line(error: BaseException) -> str:
    """The first line of the message; the type before it where the message was not written for a user."""
    line = (str(error).splitlines() or [""])[0]
    if line and isinstance(error, ValueError | NotImplementedError):
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def is_peer_lost(error: BaseException) -> bool:
    """Whether a rank failed only because another one went first."""
    return any(words in str(error) for words in PEER_LOST)
