"""Processes of an engine: how they end with their parent, what they are called, and whether they are alive (Linux)."""

from __future__ import annotations

import ctypes
import os
import select
import signal
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36  # of prctl(2)
RANK_NAME = "triptych-{rank}"  # the kernel shows 15 characters
SERVER_NAME = "triptych-forks"
WATCH_S = 0.5  # between two looks at whether another process lives


def is_alive(pid: int) -> bool:
    """Return whether a process with this id exists; a zombie that nobody has waited for counts."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def set_parent_death_signal(number: signal.Signals) -> None:
    """Make the kernel send this process a signal when the thread that started it ends; exec keeps the setting."""
    _prctl(PR_SET_PDEATHSIG, number)


def end_with_parent(parent: int) -> None:
    """End this process when its parent ends, even while it is stopped: the kernel sends SIGKILL.

    Args:
        parent: the id of the parent; if another process has adopted this one already, it ends now.
    """
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent ends, so that it can wait for them."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def set_process_name(name: str) -> None:
    """Set the name that `ps -o comm` and `top` show for this process."""
    _prctl(PR_SET_NAME, ctypes.c_char_p(name.encode()))


def process_name(pid: int) -> str:
    """Return the name of a process as `set_process_name` set it, empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def children(pid: int) -> list[int]:
    """Return the ids of the processes that the main thread of a process has started, and that live."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal; False if nobody can say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
    except (OSError, IndexError):
        return False


class ProcessHandle:
    """Another process, by a descriptor that never means a later process with the same id.

    Args:
        pid: the id of the process.
        descriptor: a descriptor of it (pidfd_open(2)), which this handle owns.
    """

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid = pid
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    @classmethod
    def open(cls, pid: int) -> ProcessHandle | None:
        """Return a handle of a process, or None if there is no process with this id."""
        try:
            return cls(pid, os.pidfd_open(pid))
        except ProcessLookupError:
            return None

    def has_ended(self, wait_s: float = 0.0) -> bool:
        """Return whether the process has ended; a zombie has.

        Args:
            wait_s: the longest wait for its end, s.
        """
        return bool(self._poll.poll(1e3 * wait_s))

    def send(self, number: signal.Signals) -> None:
        """Send a signal; a process that has ended gets none."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, number)

    @property
    def exit_code(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs, or once its parent has waited."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return None
        return os.waitstatus_to_exitcode(int(fields[-1])) if fields[0] == "Z" else None

    def close(self) -> None:
        """Close the descriptor; the handle cannot be used any more."""
        os.close(self._descriptor)


def _prctl(option: int, value: int | ctypes.c_char_p) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option})")
