"""torchrun with what its ranks import already imported: `python -m harness.agent` takes torchrun's own command line.

Ranks are forked from torchrun's agent (its own --start-method fork): one process of a machine imports PyTorch,
transformers and diffusers, not the agent and every rank, and all share that memory. The driver of a GPU does not
outlive a fork; where there is one, ranks start by exec, as under any torchrun.
"""

from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path

from harness import rank
from harness.config.schema import RunConfig
from harness.config.written import from_yaml
from harness.peer.table import NATIVE, PEERS
from models.registry import ARCHITECTURES


def main() -> None:
    """Entry point of the launcher's child process; it ends when all ranks have."""
    *options, flag, name, folder = sys.argv[1:]  # ... -m harness.rank FOLDER
    gc.disable()  # imports leave next to nothing to collect
    import torch
    from torch.distributed import run

    start = [flag, name]
    if not torch.accelerator.is_available():
        for module in imports(from_yaml((Path(folder) / "config.yaml").read_text())):
            importlib.import_module(module)
        gc.freeze()  # so that no rank's collector touches, and so copies, what they share
        start = ["--start-method", "fork", "--run-path", rank.__file__]
    gc.enable()
    run.main([*options, *start, folder])


def imports(config: RunConfig) -> list[str]:
    """The modules that a rank of this configuration imports, with all that they import."""
    architecture = config.model.architecture
    peer = [] if config.engine.name == NATIVE else [PEERS[architecture].module]
    return ["harness.serving.build", "harness.serving.steps", ARCHITECTURES[architecture].module, *peer]


if __name__ == "__main__":
    main()
