"""torchrun with the imports of its ranks already done.

`python -m harness.engines.fork_agent` takes torchrun's own command line.

Ranks are forked from torchrun's agent (its own --start-method fork). One process of a machine imports PyTorch,
transformers and diffusers, instead of the agent and every rank, and all ranks share that memory. A GPU driver does not
survive a fork, so with a GPU ranks start by exec, as under plain torchrun.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.config.yaml import from_yaml
from harness.engines import rank
from harness.engines.environment import OWNER
from harness.engines.preimport import import_required

POLL_S = 0.2


def main() -> None:
    """Run the launcher's child process; it ends when all ranks have ended."""
    *options, flag, name, folder = sys.argv[1:]  # ... -m harness.engines.rank FOLDER
    gc.disable()  # imports leave almost nothing to collect
    import torch
    from torch.distributed import run

    start = [flag, name]
    if not torch.accelerator.is_available():
        with exit_with_parent(int(os.environ[OWNER])):
            import_required(from_yaml((Path(folder) / "config.yaml").read_text()))
        gc.freeze()  # so that no rank's garbage collector touches shared memory, which would copy it
        start = ["--start-method", "fork", "--run-path", rank.__file__]
    gc.enable()
    run.main([*options, *start, folder])


@contextmanager
def exit_with_parent(owner: int) -> Iterator[None]:
    """Exit this process if its parent ends meanwhile.

    An interrupt may come before the parent knows of its child. The ranks that are forked later watch their parents
    themselves.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(POLL_S):
            if os.getppid() != owner:
                os._exit(1)

    thread = threading.Thread(target=watch, name="owner")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()  # no thread but the main one may run when ranks are forked


if __name__ == "__main__":
    main()
