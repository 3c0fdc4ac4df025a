"""The environment of a rank, set before torch is imported: threads, and arithmetic that does not depend on their
number.
"""

from __future__ import annotations

from pathlib import Path

import harness
from harness.config.schema import LaunchConfig
from harness.records.provenance import usable_cores

SOCKETS = "TRIPTYCH_SOCKETS"  # folder of the engine's ipc:// sockets
OWNER = "TRIPTYCH_OWNER"  # process id whose death ends the ranks


def threads_per_rank(launch: LaunchConfig, local_ranks: int) -> int:
    """CPU threads of each rank: what the configuration says, else an even share of the cores.

    Where results shall be reproducible, the share is rounded down to a power of two: elementwise kernels cut a tensor
    by the number of threads, and a cut that falls inside a vector register rounds otherwise than one between two (seen
    at 3 threads).
    """
    share = max(1, usable_cores() // local_ranks)
    return launch.threads_per_rank or (1 << (share.bit_length() - 1) if launch.reproducible else share)


def arithmetic(launch: LaunchConfig, local_ranks: int) -> dict[str, str]:
    """The variables that decide a rank's CPU arithmetic.

    Strict conditional numerical reproducibility makes MKL's products equal, bit for bit, at any number of threads
    (oneMKL Developer Guide, "Obtaining Numerically Reproducible Results").
    """
    threads = str(threads_per_rank(launch, local_ranks))
    variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    if launch.reproducible:
        variables["MKL_CBWR"] = "AUTO,STRICT"
    return variables


def import_path(existing: str | None) -> str:
    """PYTHONPATH under which a child finds this very copy of the packages, from any folder."""
    here = str(Path(harness.__file__).parent.parent)
    return here if not existing else f"{here}:{existing}"
