"""torch.compile by repeated block: the blocks of a stack run one function, so that one graph serves all of them.

A module's `forward` is compiled and not the module. So the runners of a stack, and the hooks that time the network of a
baseline engine, stay outside of the graph. The first sizes get a graph of their own. If a dimension changes, the next
graph leaves it dynamic, so that there are few graphs. Graphs are stored on disk for the next process.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from harness.config.optimize import CompileConfig
from models.plan import ParallelPlan

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
MAX_GRAPHS_PER_FUNCTION = 16
"""Graphs of one function for different sizes, dtypes and masks; more are an error, because each takes seconds."""


def blocks_of(network: nn.Module, plan: ParallelPlan) -> list[nn.Module]:
    """Return the blocks of every stack of a plan."""
    return [block for stack in plan.stacks for block in network.get_submodule(stack.blocks).children()]


def compile_forwards(modules: Sequence[nn.Module], config: CompileConfig, device: torch.device) -> str:
    """Compile the forward of each module, in place, when it is first called.

    Args:
        modules: the modules; those of one class share their graphs, unless weights are frozen into them.
        config: the compilation settings.
        device: the device that computes.

    Returns:
        What was set, for the record.

    Raises:
        NotImplementedError: if there is no C++ compiler, which inductor needs on the CPU; or no GPU for CUDA graphs.
    """
    if device.type == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise NotImplementedError("engine.optimize=compile needs a C++ compiler; install g++, or use optimize=eager")
    if config.cuda_graphs and device.type == "cpu":
        raise NotImplementedError("engine.compile.cuda_graphs=true needs a GPU; drop it")
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # takes a second, only if compiling

    freezing = config.freezing and device.type == "cpu"
    if os.environ.get(CACHE_VARIABLE) in (None, default_cache_dir()):  # inductor sets its default itself
        os.environ[CACHE_VARIABLE] = str(cache_folder())
    torch._inductor.config.freezing = freezing  # torch.compile(options=...) does not reach its reader
    torch._dynamo.config.recompile_limit = MAX_GRAPHS_PER_FUNCTION * (len(modules) if freezing else 1)
    torch._dynamo.config.accumulated_recompile_limit = MAX_GRAPHS_PER_FUNCTION * len(modules)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for module in modules:
        module.forward = torch.compile(module.forward, mode="reduce-overhead" if config.cuda_graphs else None)
    return "compiled" + ", frozen" * freezing + ", in CUDA graphs" * config.cuda_graphs


def cache_folder() -> Path:
    """Return the folder in which inductor stores its graphs."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "triptych" / "inductor"
