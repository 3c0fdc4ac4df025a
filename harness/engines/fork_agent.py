"""torchrun with what its ranks import already imported.

`python -m harness.engines.fork_agent` takes torchrun's own command line.

Ranks are forked from torchrun's agent (its own --start-method fork): one process of a machine imports PyTorch,
transformers and diffusers, not the agent and every rank, and all share that memory. The driver of a GPU does not
outlive a fork; where there is one, ranks start by exec, as under any torchrun.
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
from harness.engines.preimport import import_parts

POLL_S = 0.2


def main() -> None:
    """Entry point of the launcher's child process; it ends when all ranks have."""
    *options, flag, name, folder = sys.argv[1:]  # ... -m harness.engines.rank FOLDER
    gc.disable()  # imports leave next to nothing to collect
    import torch
    from torch.distributed import run

    start = [flag, name]
    if not torch.accelerator.is_available():
        with ended_with(int(os.environ[OWNER])):
            import_parts(from_yaml((Path(folder) / "config.yaml").read_text()))
        gc.freeze()  # so that no rank's collector touches, and so copies, what they share
        start = ["--start-method", "fork", "--run-path", rank.__file__]
    gc.enable()
    run.main([*options, *start, folder])


@contextmanager
def ended_with(owner: int) -> Iterator[None]:
    """Ends this process if its parent does meanwhile: an interrupt may come before the parent knows of its child. (The
    ranks that are forked later watch for themselves.)
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
        thread.join()  # nothing but this thread may be there when ranks are forked


if __name__ == "__main__":
    main()
