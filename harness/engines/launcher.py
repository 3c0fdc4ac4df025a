"""Whether the user's own torchrun started this process, or a shell only has the variables that one left behind."""

from __future__ import annotations

import os
import socket

from harness.config.yaml import ConfigError

RUN_ID = "TORCHELASTIC_RUN_ID"
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # a process that has one of them is meant to be a rank
REQUIRED = (*OF_A_RANK, "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
ANSWER_S = 10.0


def is_under_torchrun() -> bool:
    """Return whether a torchrun that is running started this process.

    Returns:
        False if the environment has no variable of a rank.

    Raises:
        ConfigError: The variables are incomplete, or no torchrun answers at their address; the message names them.
    """
    found = [name for name in (RUN_ID, *REQUIRED) if name in os.environ]
    if RUN_ID not in found and not {*OF_A_RANK} & {*found}:
        return False
    lacking = [name for name in (RUN_ID, *REQUIRED) if name not in found]
    if lacking:
        raise ConfigError(f"{_are_set(found)}, but not {', '.join(lacking)}{_remedy(found)}")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not _answers():
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(f"{_are_set(found)}, but no torchrun answers at {address}{_remedy(found)}")
    return True


def _are_set(names: list[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} set"


def _remedy(names: list[str]) -> str:
    """Return what to change, as the end of a message."""
    unset = " ".join(f"-u {name}" for name in names)
    return f"; start it with torchrun, or without what an earlier one left: env {unset} python -m harness ..."


def _answers() -> bool:
    """Return whether somebody listens at the address of torchrun's store, which its agent opens before any rank."""
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        with socket.create_connection(address, ANSWER_S):
            return True
    except (OSError, ValueError):
        return False
