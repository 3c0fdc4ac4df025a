"""torchrun on one machine without a port: its agent meets nobody, and its ranks meet in a file.

The store of torchrun's own rendezvous (`--standalone`) listens on every interface. It asks nobody for a password, and
the agent unpickles what it finds there, so whoever reaches the port runs commands as the user of the run.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, HashStore
from torch.distributed import run
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from harness.engines.environment import OWNER
from harness.engines.processes import end_with_parent

BACKEND = "private"
STORE = "store"  # the file of the ranks' key-value store, in the private folder of their sockets


class PrivateRendezvous(RendezvousHandler):
    """The rendezvous of one agent with itself, over a store in its own memory.

    Args:
        run_id: torchrun's name of the run.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id

    def get_backend(self) -> str:
        """Return the name in torchrun's registry."""
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """Return a group of one agent. No rank uses its address, because ranks meet in a file."""
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

    def is_closed(self) -> bool:
        """Return False: the rendezvous lives as long as its agent."""
        return False

    def set_closed(self) -> None:
        """Do nothing: no other agent has to know."""

    def num_nodes_waiting(self) -> int:
        """Return 0: no other agent can join."""
        return 0

    def get_run_id(self) -> str:
        """Return torchrun's name of the run."""
        return self._run_id

    def shutdown(self) -> bool:
        """Return True: there is nothing to close."""
        return True


def run_torchrun(arguments: Sequence[str]) -> None:
    """Run torchrun's agent in this process until its ranks have ended.

    Args:
        arguments: torchrun's command line without a rendezvous.
    """
    rendezvous_handler_registry.register(BACKEND, lambda parameters: PrivateRendezvous(parameters.run_id))
    run.main(["--rdzv-backend", BACKEND, "--rdzv-endpoint", "none", "--rdzv-id", uuid.uuid4().hex, *arguments])


def main() -> None:
    """Run torchrun with the command line of this process, for ranks that end with the process that started it."""
    end_with_parent(int(os.environ[OWNER]))
    os.environ[OWNER] = str(os.getpid())
    run_torchrun(sys.argv[1:])


def join_ranks(folder: Path, backend: str = "gloo") -> None:
    """Join the process group of the ranks of one machine.

    Args:
        folder: a folder of these ranks alone, which other users cannot enter.
        backend: the backends of the group.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = FileStore(str(folder / STORE), ranks)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)


if __name__ == "__main__":
    main()
