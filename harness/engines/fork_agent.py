"""The fork server: a process that has imported what ranks import, and forks torchrun's agent for each set of ranks.

`python -m harness.engines.fork_agent DESCRIPTOR FOLDER` imports what the run in FOLDER needs, and takes orders on a
socket of its owner (harness.engines.fork_server). An agent forks its ranks (torchrun's own --start-method fork), so one
process of a machine imports PyTorch, transformers and diffusers, and all others share that memory. A GPU driver does
not survive a fork, so with a GPU ranks start by exec, as under plain torchrun.

The server has one thread. It ends with its owner, and its agents and their ranks end with it.
"""

from __future__ import annotations

import gc
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from harness.config.yaml import from_yaml
from harness.engines import rank
from harness.engines.environment import OWNER
from harness.engines.fork_server import MAX_ORDER_BYTES, AgentOrder
from harness.engines.preimport import fill_tables, import_required
from harness.engines.processes import (
    SERVER_NAME,
    adopt_orphans,
    end_with_parent,
    set_parent_death_signal,
    set_process_name,
)
from harness.engines.rank import redirect_output

POLL_S = 0.5


def main() -> None:
    """Fork agents until the owner has gone."""
    # A signal that does no harm: a stopped server runs again when its owner ends, and sees that it has gone.
    set_parent_death_signal(signal.SIGCONT)
    adopt_orphans()  # the ranks of an agent that was killed
    set_process_name(SERVER_NAME)
    descriptor, folder = sys.argv[1:]
    server = ForkServerProcess(socket.socket(fileno=int(descriptor)), int(os.environ[OWNER]))
    server.prepare(Path(folder))
    server.run()


class ForkServerProcess:
    """The loop of the fork server.

    Args:
        orders: the socket of the owner.
        owner: the id of the owner.
    """

    def __init__(self, orders: socket.socket, owner: int) -> None:
        self._orders = orders
        self._owner = owner
        self._start = ["--start-method", "fork", "--run-path", rank.__file__]
        self._agents: dict[int, Path] = {}  # the folder of sockets of each agent
        self._poll = select.poll()
        self._poll.register(orders, select.POLLIN)

    def prepare(self, folder: Path) -> None:
        """Import what the ranks of a run need, unless they start by exec."""
        gc.disable()  # imports leave almost nothing to collect
        import torch

        import harness.engines.rendezvous  # noqa: F401

        if torch.accelerator.is_available():
            self._start = ["-m", "harness.engines.rank"]
        else:
            self._import_for(folder)
        gc.enable()

    def _import_for(self, folder: Path) -> None:
        """Import what the ranks of a run need; a rank meets a failed import again, and reports it."""
        try:
            import_required(from_yaml((folder / "config.yaml").read_text()))
            fill_tables()
        except Exception:
            traceback.print_exc()
        gc.freeze()  # so that no rank's garbage collector touches shared memory, which would copy it

    def run(self) -> None:
        """Take orders until the owner has gone, and remove what its agents leave."""
        while True:
            hung_up = any(event & select.POLLHUP for _, event in self._poll.poll(1e3 * POLL_S))
            for pid in ended_children():
                self._agents.pop(pid, None)
            if hung_up or os.getppid() != self._owner:
                break
            if self._poll.poll(0):
                self._take_order()
        for pid in self._agents:
            os.kill(pid, signal.SIGKILL)
        for sockets in (*self._agents.values(), *self._unread_sockets()):
            shutil.rmtree(sockets, ignore_errors=True)

    def _unread_sockets(self) -> Iterator[Path]:
        """Yield the folders of orders that came before the owner ended."""
        self._orders.setblocking(False)
        with suppress(BlockingIOError):
            while data := self._orders.recv(MAX_ORDER_BYTES):
                yield Path(msgspec.json.decode(data, type=AgentOrder).sockets)

    def _take_order(self) -> None:
        data, descriptors, _, _ = socket.recv_fds(self._orders, MAX_ORDER_BYTES, 1)
        if not data:
            return
        order = msgspec.json.decode(data, type=AgentOrder)
        with socket.socket(fileno=descriptors[0]) as reply:
            if "--run-path" in self._start:
                self._import_for(Path(order.folder))
            server = os.getpid()
            pid = os.fork()
            if pid == 0:
                reply.close()
                self._be_agent(order, server)
            self._agents[pid] = Path(order.sockets)
            descriptor = os.pidfd_open(pid)
            try:
                socket.send_fds(reply, [str(pid).encode()], [descriptor])
            except OSError:  # nobody waits for the agent any more
                os.kill(pid, signal.SIGKILL)
            finally:
                os.close(descriptor)

    def _be_agent(self, order: AgentOrder, server: int) -> None:
        """Run torchrun's agent in this forked process, which ends here."""
        status = 1
        try:
            end_with_parent(server)
            self._orders.close()
            redirect_output(Path(order.log))
            if order.working_folder:
                os.chdir(order.working_folder)
            os.environ.update(order.variables)
            os.environ[OWNER] = str(os.getpid())
            tempfile.tempdir = order.sockets  # PyTorch unpickles the errors of ranks from there: nobody else may write
            from harness.engines.rendezvous import run_torchrun

            run_torchrun([*order.options, *self._start, order.folder])
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def ended_children() -> Iterator[int]:
    """Wait for the children that have ended, and yield their ids."""
    with suppress(ChildProcessError):  # there are no children at all
        while (pid := os.waitpid(-1, os.WNOHANG)[0]) > 0:
            yield pid


if __name__ == "__main__":
    main()
