"""The environment of a rank, set before torch is imported.

It sets the number of threads and how they wait for one another, arithmetic that does not depend on their number, and
the network interface of ranks that share a machine.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import harness
from harness.config.schema import LaunchConfig, RunConfig
from harness.records.provenance import usable_cores
from harness.resolve.wait_policy import wait_environment

SOCKETS = "TRIPTYCH_SOCKETS"  # the folder of the engine's ipc:// sockets
OWNER = "TRIPTYCH_OWNER"  # the id of the process whose death ends this one


def threads_per_rank(launch: LaunchConfig, local_ranks: int) -> int:
    """Return the CPU threads of each rank: the configured number, or an even share of the cores.

    With launch.reproducible the share is rounded down to a power of two. Elementwise kernels split a tensor by the
    number of threads. A split inside a vector register rounds differently from one between two registers (seen at 3
    threads).
    """
    share = max(1, usable_cores() // local_ranks)
    return launch.threads_per_rank or (1 << (share.bit_length() - 1) if launch.reproducible else share)


def arithmetic_environment(launch: LaunchConfig, local_ranks: int) -> dict[str, str]:
    """Return the environment variables that decide a rank's CPU arithmetic.

    Strict conditional numerical reproducibility makes MKL's products equal, bit for bit, at any number of threads
    (oneMKL Developer Guide, "Obtaining Numerically Reproducible Results").
    """
    threads = str(threads_per_rank(launch, local_ranks))
    variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    if launch.reproducible:
        variables["MKL_CBWR"] = "AUTO,STRICT"
    return variables


def rank_environment(config: RunConfig, local_ranks: int) -> dict[str, str]:
    """Return the environment variables that a launch sets for the arithmetic and the threads of a rank."""
    return arithmetic_environment(config.launch, local_ranks) | wait_environment(config)


def loopback_environment() -> dict[str, str]:
    """Return the environment variables with which gloo and NCCL listen on the loopback interface alone.

    They replace the user's: those are for ranks on several machines.
    """
    name = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}


def import_environment() -> dict[str, str]:
    """Return the environment with which a child process imports this copy of the packages from any folder.

    The working folder is not searched for modules: a torch.py or a folder models/ there is the user's.
    """
    here, given = str(Path(harness.__file__).parent.parent), os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {"PYTHONPATH": os.pathsep.join([here, *filter(None, given)]), "PYTHONSAFEPATH": "1"}
