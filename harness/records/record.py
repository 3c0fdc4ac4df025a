"""A run's folder and its record: claimed by one owner, written atomically, read back as a table.

`record.json` is the source of truth; everything else (table, wandb) mirrors it. Its keys are stable and versioned.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from harness.messages import CollectiveTraffic, LoadedComponent, MemoryPoint, OperatorTime, StageTime, StepTime
from harness.metrics.fidelity import Fidelity
from harness.metrics.load import LoadSummary
from harness.metrics.pretrained import Pretrained
from harness.metrics.quality import Quality
from harness.metrics.summary import Summary
from harness.records.provenance import Provenance

if TYPE_CHECKING:
    import pandas

SCHEMA = 1
STATES = ("ok", "failed", "oom", "unsupported", "cancelled")


class RunFolderError(ValueError):
    """A run folder that cannot be used, with what to change."""


class Status(msgspec.Struct, frozen=True):
    """`status.json`: how a run ended, and the error in one line."""

    state: str
    error: str | None = None


CUT_OFF = Status("failed", "the run was cut off before it ended")


class Attention(msgspec.Struct, frozen=True):
    """What was asked for and what ran."""

    requested: str
    resolved: str


class Engine(msgspec.Struct, frozen=True):
    """Who drew, and the version of its package."""

    name: str
    version: str


class FirstCall(msgspec.Struct, frozen=True):
    """What is paid once, apart from the steady state, ms; `reused` is the folder of the run that started these ranks,
    where that is an earlier job of a sweep, and started and loaded nothing itself.
    """

    launch_ms: float
    load_ms: float
    warmup_ms: list[float]
    reused: str | None = None


class Repeat(msgspec.Struct, frozen=True):
    """One measured request; stages and steps are the slowest rank's, memory the largest rank's."""

    total_duration_ms: float
    client_duration_ms: float
    steps: list[StageTime]
    denoise_steps_ms: list[StepTime]
    networks_ms: dict[str, float]
    memory_checkpoints: list[MemoryPoint]


class CacheUse(msgspec.Struct, frozen=True):
    """What a cache spared, means over pictures: of `evaluations` of the denoiser those that were `computed`, and of
    their `branches` (two where a picture is guided) those that went through the whole network.
    """

    evaluations: float
    computed: float
    branches: float
    branches_computed: float


class Statistics(msgspec.Struct, frozen=True):
    """The row's numbers. `nfe` counts the denoiser's evaluations of one picture, a guided pair as one, without
    those that a cache cut short (`cache` counts both, a note says which); `overhead_share` is the part of a request
    that was no forward of the text encoder, the denoiser or the VAE; `comm` is what the busiest rank sent to the ranks
    that it computes with, in the last request, by stage and kind of collective.

    `flops_per_step` are the operations that the ranks of one picture do in one solver step of one micro-batch, padding
    included; `achieved_tflops` is their rate in a median step (over all steps where a cache makes them differ),
    `ceiling_tflops` that of a matrix product in the same dtype on the same ranks at once. `energy_j` is what the
    machines' GPUs, or their processors, used in a request, at rest too; None where they do not report it.
    """

    latency_ms: Summary
    step_ms: Summary
    stage_ms: dict[str, Summary]
    overhead_share: Summary
    throughput_per_s: float
    nfe: int
    peak_memory_mib: list[float]
    peak_memory_mib_max: float
    flops_per_step: float | None = None
    achieved_tflops: float | None = None
    ceiling_tflops: float | None = None
    comm: dict[str, dict[str, CollectiveTraffic]] = {}
    cache: CacheUse | None = None
    energy_j: Summary | None = None


class SampleRow(msgspec.Struct, frozen=True):
    """One picture; `sha256` is of its 8-bit pixels."""

    path: str
    prompt: str
    seed: int
    sha256: str


class Record(msgspec.Struct, frozen=True):
    """`record.json`. `quality` is None where nothing could be scored, and a note says why; `pretrained` where no
    weights for it were given; `fidelity` where it was not asked for, or a note says why not. `loaded` are the
    components in memory when the ranks were ready. A record without an `engine` is a native run's. `load` is what
    clients of task=load measured, whose record has no `summary`, repeats nor samples. `profile` are the operators of
    each network in one more request on the slowest rank, the slowest first, where task.profile asked for them.
    """

    schema: int
    fingerprint: str
    overrides: list[str]
    config: dict[str, Any]
    provenance: Provenance
    attention: Attention
    first_call: FirstCall
    repeats: list[Repeat]
    summary: Statistics | None
    samples: list[SampleRow]
    notes: list[str]
    quality: Quality | None = None
    pretrained: Pretrained | None = None
    loaded: list[LoadedComponent] = []
    fidelity: Fidelity | None = None
    engine: Engine = Engine("native", "")
    load: LoadSummary | None = None
    profile: dict[str, list[OperatorTime]] = {}

    @property
    def timed(self) -> Statistics:
        """The summary of a run that has one.

        Raises:
            ValueError: it has none.
        """
        if self.summary is None:
            raise ValueError("task=load leaves no summary of one request; its record's `load` has what it measured")
        return self.summary


def fingerprint(config: dict[str, Any]) -> str:
    """Hash of what was declared: the configuration without what cannot change a picture or a time."""
    apart: tuple[str, ...] = ("logger", "train", "quality", "plan", "hardware", "a", "b")
    if config["task"]["name"] not in ("serve", "load"):
        apart += ("serve", "load")
    declared = {key: value for key, value in config.items() if key not in apart}
    launch = config["launch"].items()
    declared["launch"] = {key: value for key, value in launch if key != "reuse" and not key.endswith("_timeout_s")}
    return hashlib.sha256(json.dumps(declared, sort_keys=True).encode()).hexdigest()[:16]


class RunFolder:
    """One run's folder. Made by `claim`; whoever claims it is its only writer (each rank writes only its own log)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._owned: BinaryIO | None = None

    @classmethod
    def claim(cls, path: Path, again: bool = False) -> RunFolder:
        """Takes a folder for one run; until `finish`, its status says that the run was cut off.

        Args:
            path: the folder.
            again: also where a run is in it that did not end well, and whose process is gone; what it left is removed.

        Raises:
            RunFolderError: another run is in it, or it cannot be made.
        """
        folder = cls(path)
        try:
            (path / "logs").mkdir(parents=True, exist_ok=True)
            folder._owned = own(path / ".owner")
            if again and read_status(path).state != "ok":
                folder._clear()
            descriptor = os.open(path / "status.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except (FileExistsError, BlockingIOError) as error:
            raise RunFolderError(f"{path} already holds a run; choose another folder with hydra.run.dir=...") from error
        except OSError as error:
            raise RunFolderError(
                f"{path} cannot be written ({error.strerror}); choose another with hydra.run.dir=..."
            ) from error
        os.close(descriptor)
        folder.finish(CUT_OFF)
        return folder

    def _clear(self) -> None:
        for left in (*self.path.glob("*.json"), *self.path.glob("logs/*.error.json")):
            left.unlink()

    def finish(self, status: Status) -> None:
        """Writes `status.json`."""
        write_atomically(self.path / "status.json", msgspec.json.encode(status))

    def write_record(self, record: Record) -> None:
        """Writes `record.json`."""
        self.write_json("record.json", record)

    def write_json(self, name: str, data: msgspec.Struct) -> None:
        """Writes a struct as an indented file."""
        write_atomically(self.path / name, msgspec.json.format(msgspec.json.encode(data), indent=1))

    def write_config(self, text: str) -> None:
        """Writes `config.yaml`, the resolved configuration."""
        write_atomically(self.path / "config.yaml", text.encode())

    def log_file(self, rank: int) -> Path:
        """The log of one rank."""
        return self.path / "logs" / f"rank{rank}.log"


def own(path: Path) -> BinaryIO:
    """A file that is locked while the process lives, or until it is closed.

    Raises:
        BlockingIOError: another living process has it.
    """
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def write_atomically(path: Path, data: bytes) -> None:
    """A reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


def read_status(folder: Path) -> Status:
    """The status of a run's folder; `failed` where there is none."""
    try:
        return msgspec.json.decode((folder / "status.json").read_bytes(), type=Status)
    except (OSError, msgspec.MsgspecError):
        return Status("failed", "no readable status.json")


def read_record(folder: Path) -> Record | None:
    """The record of a run's folder, or None where the run left none.

    Raises:
        RunFolderError: a record of another schema, or one that cannot be read.
    """
    path = folder / "record.json"
    if not path.exists():
        return None
    try:
        record = msgspec.json.decode(path.read_bytes(), type=Record)
    except msgspec.MsgspecError as error:
        raise RunFolderError(f"{path}: not a record of schema {SCHEMA} ({error})") from error
    if record.schema != SCHEMA:
        raise RunFolderError(f"{path}: schema {record.schema}; this version reads {SCHEMA}")
    return record


def is_done(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the row of this very configuration is in a folder, well or ill."""
    try:
        record = read_record(folder)
    except RunFolderError:
        return False
    return record is not None and record.fingerprint == fingerprint(config) and read_status(folder) != CUT_OFF


def load(path: str | Path) -> pandas.DataFrame:
    """A table of a tree of runs, one row each, failed ones too; nested keys become dotted columns.

    Args:
        path: a run's folder, a sweep's, or any folder above them.
    """
    import pandas

    rows = []
    for status_file in sorted(Path(path).rglob("status.json")):
        folder = status_file.parent
        status = read_status(folder)
        row: dict[str, Any] = {"folder": str(folder), "state": status.state, "error": status.error}
        try:
            record = read_record(folder)
        except RunFolderError as error:
            record = None
            row["error"] = str(error)
        if record is not None:
            nested = msgspec.to_builtins(record)
            row |= {key: nested[key] for key in ("overrides", "repeats", "samples", "notes", "loaded")}
            parts = (
                "fingerprint",
                "config",
                "provenance",
                "engine",
                "attention",
                "first_call",
                "summary",
                "quality",
                "pretrained",
                "fidelity",
                "load",
            )
            flat = {key: nested[key] for key in parts if nested[key] is not None}
            row |= {str(key): value for key, value in pandas.json_normalize(flat, sep=".").iloc[0].items()}
        rows.append(row)
    return pandas.DataFrame(rows)
