"""Faults planted in one rank, in the middle of a forward: what a process does to itself at a collective of its own, or
at a prompt that asks for it.
"""

from pathlib import Path

import harness
from harness.engines.environment import SOCKETS

ENDS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "raises": "raise ValueError('planted fault')",
    "no memory": "import torch; torch.empty(2**60)",
}
PLANTED = """
import os, signal
if {about}:
    from harness.parallel.group import Group
    whole, calls = Group._run_timed, []
    def timed(self, *rest):
        if os.environ["RANK"] == "{rank}":
            calls.append(None)
        if len(calls) == {collective}:
            open({marker!r}, "w").close()
            {end}
        return whole(self, *rest)
    Group._run_timed = timed
"""
POISONED = """
import os, signal
if {about}:
    from harness.pipeline.decode import Decoding
    whole = Decoding.forward
    def forward(self, samples, run):
        for sample in samples:
            if os.environ["RANK"] == "{rank}":
                exec({ends!r}.get(sample.spec.prompt, "pass"))
        whole(self, samples, run)
    Decoding.forward = forward
"""
ABOUT = f'"RANK" in os.environ or {SOCKETS!r} in os.environ'  # a rank, or the agent that it is forked from


def planted(folder: Path, end: str, rank: int = 1, collective: int = 100) -> dict[str, str]:
    """The environment in which a rank comes to this end at its n-th collective, after it has made `folder`/fault.

    Python imports a sitecustomize that it finds on its path before anything else.
    """
    marker = str(folder / "fault")
    text = PLANTED.format(about=ABOUT, rank=rank, collective=collective, marker=marker, end=ENDS[end])
    (folder / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": f"{folder}:{Path(harness.__file__).parent.parent}"}


def poisoned(folder: Path, rank: int = 1) -> dict[str, str]:
    """The environment in which a rank that decodes a picture of the prompt "killed", "raises" ... comes to that end."""
    (folder / "sitecustomize.py").write_text(POISONED.format(about=ABOUT, rank=rank, ends=ENDS))
    return {"PYTHONPATH": f"{folder}:{Path(harness.__file__).parent.parent}"}
