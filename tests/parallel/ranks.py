"""Runs a function on several gloo ranks of one thread each, and hands back what each returned.

Ranks are forked from one server process that has imported what they need, and nothing else: importing costs a rank
seconds.
"""

import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.registry import ARCHITECTURES

Work = Callable[..., dict[str, Tensor]]
IMPORTED = [
    "tests.parallel.layouts",
    "tests.parallel.gated",
    "tests.parallel.decoders",
    "tests.parallel.pipelines",
    *(row.module for row in ARCHITECTURES.values()),
]


def on_ranks(size: int, work: Work, *args: object) -> list[dict[str, Tensor]]:
    """work(rank, size, *args) on every rank; its tensors, by rank."""
    return on_worlds(size, work, [args])


def on_worlds(size: int, work: Work, items: Sequence[tuple[object, ...]]) -> list[dict[str, Tensor]]:
    """The same for every item, whose tensors have other names: on the same processes, each in a world of its own.

    A world's groups hold sockets and threads as long as it lives.
    """
    multiprocessing.set_forkserver_preload(IMPORTED)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_enter, (size, folder, work, items), nprocs=size, start_method="forkserver")
        return [load_file(Path(folder) / f"{rank}.safetensors") for rank in range(size)]


def _enter(rank: int, size: int, folder: str, work: Work, items: Sequence[tuple[object, ...]]) -> None:
    torch.set_num_threads(1)
    found: dict[str, Tensor] = {}
    for number, args in enumerate(items):
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/{number}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        with torch.inference_mode():
            found |= work(rank, size, *args)
        dist.destroy_process_group()
    save_file({name: x.contiguous() for name, x in found.items()}, Path(folder) / f"{rank}.safetensors")
