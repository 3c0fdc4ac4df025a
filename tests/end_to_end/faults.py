"""Faults planted in one rank, in the middle of a forward: what a process does to itself at a collective of its own, or
at a prompt that asks for it.
"""

from pathlib import Path

import harness

ENDS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "raises": "raise ValueError('planted fault')",
    "no memory": "import torch; torch.empty(2**60)",
}
PLANTED = """
import os, signal
if os.environ.get("RANK") == "{rank}":
    from harness.parallel.group import Group
    whole, calls = Group._timed, []
    def timed(self, *rest):
        calls.append(None)
        if len(calls) == {collective}:
            open({marker!r}, "w").close()
            {end}
        return whole(self, *rest)
    Group._timed = timed
"""


def planted(folder: Path, end: str, rank: int = 1, collective: int = 100) -> dict[str, str]:
    """The environment in which a rank comes to this end at its n-th collective, after it has made `folder`/fault.

    Python imports a sitecustomize that it finds on its path before anything else.
    """
    text = PLANTED.format(rank=rank, collective=collective, marker=str(folder / "fault"), end=ENDS[end])
    (folder / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": f"{folder}:{Path(harness.__file__).parent.parent}"}


POISONED = """
import os, signal
if os.environ.get("RANK") == "{rank}":
    from harness.pipeline.decode import Decoding
    whole = Decoding.forward
    def forward(self, samples, run):
        for sample in samples:
            exec({ends!r}.get(sample.ask.prompt, "pass"))
        whole(self, samples, run)
    Decoding.forward = forward
"""


def poisoned(folder: Path, rank: int = 1) -> dict[str, str]:
    """The environment in which a rank that decodes a picture of the prompt "killed", "raises" ... comes to that end."""
    (folder / "sitecustomize.py").write_text(POISONED.format(rank=rank, ends=ENDS))
    return {"PYTHONPATH": f"{folder}:{Path(harness.__file__).parent.parent}"}
