"""torch.compile by repeated block: the blocks of a stack run one function, so one graph serves them all.

A block's `forward` is compiled and not the block, so that hooks, which deal tokens to ranks, stay outside of it.
"""

from __future__ import annotations

import shutil

import torch
from torch import nn

from harness.config.optimize import CompileConfig
from models.plan import ParallelPlan

GRAPHS = 64  # of one function: sizes, dtypes and masks that a run may meet, or the blocks where each has its own


def compile_blocks(network: nn.Module, plan: ParallelPlan, config: CompileConfig, device: torch.device) -> str:
    """Compiles the blocks of every stack of a plan, in place; what ran, for the record.

    Raises:
        NotImplementedError: no C++ compiler, which inductor needs on the CPU.
    """
    if device.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise NotImplementedError("engine.optimize=compile needs a C++ compiler; install g++, or use optimize=eager")
    freezing = config.freezing and device.type == "cpu"
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._inductor.config.freezing = freezing
    mode = "reduce-overhead" if config.cuda_graphs else None
    for stack in plan.stacks:
        for block in network.get_submodule(stack.blocks).children():
            block.forward = torch.compile(block.forward, mode=mode)
    return "blocks compiled" + (", frozen" if freezing else "") + (", in CUDA graphs" if config.cuda_graphs else "")
