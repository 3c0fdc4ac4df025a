"""The folder of a run and its record: claimed by one owner, written atomically, read back.

`record.json` is the source of truth; everything else (table, wandb) mirrors it. Its keys are stable and versioned.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import yaml

from harness.messages import CollectiveTraffic, LoadedComponent, MemoryPoint, OperatorTime, StageTime, StepTime
from harness.metrics.fidelity import Fidelity
from harness.metrics.intervals import IntervalEstimate, Share
from harness.metrics.load import LoadSummary
from harness.metrics.pretrained import PretrainedScores
from harness.metrics.quality import Quality
from harness.metrics.summary import Summary
from harness.records.provenance import Provenance, utc_now

SCHEMA = 2
BETWEEN_STAGES = "between_stages"  # the part of a request that no stage has
STATES = ("ok", "failed", "oom", "unsupported", "cancelled")


class RunFolderError(ValueError):
    """A run folder that cannot be used; the message says what to change."""


class Status(msgspec.Struct, frozen=True):
    """`status.json`: how a run ended, and its error in one line."""

    state: str
    error: str | None = None


class StatusFile(Status, frozen=True):
    """`status.json` as it is written: the status, and when the folder was claimed and finished, UTC, ISO 8601.

    A time is empty if it is not known: of a run that was cut off, and in a file from before it was written.
    """

    started: str = ""
    finished: str = ""


RESULTS = ("record.json", "comparison.json")  # a folder with any of them holds a run, even without a status
KEPT = (".owner", "wandb")  # what another attempt at a run leaves of the one before
OF_USER = ("tags", "notes", "meta", "rerun_of")  # keys that are remarks of the user, and change nothing
INTERRUPTED = Status("failed", "the run was cut off before it ended")


class AttentionRow(msgspec.Struct, frozen=True):
    """The attention backend that was requested and the one that ran."""

    requested: str
    resolved: str


class EngineRow(msgspec.Struct, frozen=True):
    """The engine that generated, and the version of its package."""

    name: str
    version: str


class FirstCall(msgspec.Struct, frozen=True):
    """Costs that are paid once, apart from the steady state, in ms.

    `reused` is the folder of the run that started these ranks, if an earlier job of a sweep did. Then this run started
    and loaded nothing itself.
    """

    launch_ms: float
    load_ms: float
    warmup_ms: list[float]
    reused: str | None = None


class MachineLoad(msgspec.Struct, frozen=True):
    """How busy the processors were during a repeat.

    Attributes:
        rank_cores: CPU time of the ranks over the time of the repeat, summed over ranks.
        involuntary_switches: How often another process took a rank's processor, summed over ranks.
        other_cores: Processors that were busy with other processes than the ranks and the client, on the machine of
            rank 0. It is counted in ticks of 10 ms. None if ranks run on several machines, or the kernel does not say.
        steal_share: Share of the processors' time that the hypervisor gave to others; None if the kernel does not say.
        load_average: Processes that ran or waited to run, the mean of about a minute; None if it is not known.
        waited_share: Share of the time in which the ranks' threads could have run and had no processor; None if the
            kernel does not say.
    """

    rank_cores: float
    involuntary_switches: int
    other_cores: float | None = None
    steal_share: float | None = None
    load_average: float | None = None
    waited_share: float | None = None


class Repeat(msgspec.Struct, frozen=True):
    """One measured request; stages and steps are from the slowest rank, memory from the rank with the largest peak.

    `machine` is None if the client did not watch it, and in a record from before it was written.
    """

    total_duration_ms: float
    client_duration_ms: float
    steps: list[StageTime]
    denoise_steps_ms: list[StepTime]
    networks_ms: dict[str, float]
    memory_checkpoints: list[MemoryPoint]
    machine: MachineLoad | None = None

    @property
    def between_stages_ms(self) -> float:
        """The time of the request outside its stages, ms."""
        return self.total_duration_ms - sum(stage.duration_ms for stage in self.steps)

    @property
    def later_steps_ms(self) -> list[float]:
        """The times of the solver steps after the first, ms, or of the first if there is no other."""
        times = [step.duration_ms for step in self.denoise_steps_ms]
        return times[1:] or times


class CacheUse(msgspec.Struct, frozen=True):
    """What a cache saved, as means over images.

    Attributes:
        evaluations: Evaluations of the denoiser.
        computed: Evaluations that were computed.
        branches: Branches of the evaluations, two if an image is guided.
        branches_computed: Branches that went through the whole network.
    """

    evaluations: float
    computed: float
    branches: float
    branches_computed: float


class Statistics(msgspec.Struct, frozen=True):
    """The statistics of a run.

    Attributes:
        latency_ms: Time of a request, ms.
        step_ms: Time of a solver step after the first of a request, ms; of the first if there is no other.
        stage_ms: Time by stage, ms. `between_stages` is the rest of the request, so that the stages of a repeat sum to
            its latency.
        overhead_share: Share of a request outside the forwards of text encoder, denoiser and VAE.
        throughput_per_s: Images or videos per second.
        nfe: Evaluations of the denoiser for one image. A guided pair counts as one; evaluations that a cache skipped do
            not count (`cache` counts both, and a note says which).
        peak_memory_mib: Peak memory by rank, MiB.
        peak_memory_mib_max: Largest of these peaks, MiB.
        flops_per_step: Operations of the ranks of one image in one solver step of one micro-batch, padding included.
        achieved_tflops: Rate in a median step, or over all steps if a cache makes them differ, TFLOP/s.
        ceiling_tflops: Rate of a matrix product in the same dtype on the same ranks at the same time, TFLOP/s.
        comm: What the busiest rank sent to the ranks that it computes with, in the last request, by stage and kind of
            collective.
        cache: What a cache saved.
        energy_j: Energy of the machines' GPUs or processors during a request, idle power included, J. None if they do
            not report it.
        first_step_ms: Time of a request's first solver step, ms; None if there is no other, and in a record from before
            the first step was apart.
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
    first_step_ms: Summary | None = None


class TraceRow(msgspec.Struct, frozen=True):
    """The request that was traced, which is not among the repeats.

    Attributes:
        path: The Chrome trace of all ranks.
        request: Times of the request. The stages are those of its slowest rank, as in the trace.
        rank: The slowest rank.
        overhead: How much longer its stages took than those of the median repeat, as a share of these.
        memory_snapshots: Histories of GPU memory by rank, for pytorch.org/memory_viz; empty on the CPU.
    """

    path: str
    request: Repeat
    rank: int
    overhead: float
    memory_snapshots: list[str] = []


class SampleRow(msgspec.Struct, frozen=True):
    """One image or video on disk; `sha256` is the hash of its 8-bit pixels."""

    path: str
    prompt: str
    seed: int
    sha256: str


class Rerun(msgspec.Struct, frozen=True):
    """How a run compares with the earlier one that it repeats.

    Attributes:
        folder: Folder of the earlier run.
        changed: Keys of the configuration that differ, with the old and the new value.
        same_code: Whether the sources and configuration files are the same.
        packages: Packages whose versions differ.
        same_machine: Whether processor, device and number of ranks are the same.
        images: Number of images or videos of the run that has more.
        equal_images: How many of them have the same pixels in both, by their hashes.
    """

    folder: str
    changed: list[str]
    same_code: bool
    packages: list[str]
    same_machine: bool
    images: int
    equal_images: int


class CategoryRow(msgspec.Struct, frozen=True):
    """The images of one category of a data set.

    Attributes:
        name: Name of the category.
        images: Number of images.
        duration_ms: Time of an image, which is its request's divided by the request's images, ms.
        top1: Share whose nearest image of the gallery has the prompt's name; None if none was scored.
        distance: Mean distance to the requested image of the gallery; None if none was scored.
        clip_score: Mean CLIP score; None if none was scored.
    """

    name: str
    images: int
    duration_ms: Summary
    top1: Share | None = None
    distance: IntervalEstimate | None = None
    clip_score: IntervalEstimate | None = None


class DatasetRow(msgspec.Struct, frozen=True):
    """The data set of a run, whose images are the lines of `images.jsonl`.

    Attributes:
        file: The file of prompts.
        format: Format of the file.
        sha256: Hash of its bytes.
        total: Prompts in the file.
        sample: Prompts that are generated, over all shards.
        prompts: Prompts of this record.
        images: Images of this record.
        resumed: Images that earlier commands had generated.
        shards: Jobs that share the prompts.
        shard: Numbers of the jobs of this record.
        categories: One row per category.
    """

    file: str
    format: str
    sha256: str
    total: int
    sample: int
    prompts: int
    images: int
    resumed: int = 0
    shards: int = 1
    shard: tuple[int, ...] = (0,)
    categories: list[CategoryRow] = []


class Record(msgspec.Struct, frozen=True):
    """`record.json`: one run.

    Attributes:
        schema: Version of the file's format.
        fingerprint: Hash of the configuration.
        overrides: The overrides that the user gave.
        config: The resolved configuration.
        provenance: Code, versions, hardware and environment.
        attention: The attention backend.
        first_call: Costs that are paid once.
        repeats: The measured requests; empty for task=load.
        summary: Statistics of the repeats; None for task=load.
        samples: The images or videos; empty for task=load. Of a data set, those of the grid.
        notes: Notes for the reader.
        quality: Scores in the gallery; None if nothing could be scored, and a note says why.
        pretrained: Scores on pretrained weights; None if none were given.
        metrics: Metrics of plug-ins, by name.
        loaded: Components in memory when the ranks were ready.
        fidelity: Error against the reference; None if it was not requested, or if a note says why not.
        engine: The engine; a record without one is a native run's.
        load: What the clients of task=load measured.
        dataset: The data set, if the images are those of one.
        profile: The operators of each network in one more request with task.profile, on the slowest rank, slowest
            first.
        search_path: Folders of the user's own configurations, besides conf/.
        primary: Name of the primary configuration.
        beside: Other jobs of the sweep that ran at the same time on the same machine, by the names of their folders.
        rerun: Comparison with the run that this one repeats; None if it repeats none.
        trace: The traced request with task.trace; None without.
    """

    schema: int
    fingerprint: str
    overrides: list[str]
    config: dict[str, Any]
    provenance: Provenance
    attention: AttentionRow
    first_call: FirstCall
    repeats: list[Repeat]
    summary: Statistics | None
    samples: list[SampleRow]
    notes: list[str]
    quality: Quality | None = None
    pretrained: PretrainedScores | None = None
    metrics: dict[str, float] = {}
    loaded: list[LoadedComponent] = []
    fidelity: Fidelity | None = None
    engine: EngineRow = EngineRow("native", "")
    load: LoadSummary | None = None
    profile: dict[str, list[OperatorTime]] = {}
    dataset: DatasetRow | None = None
    search_path: list[str] = []
    primary: str = "config"
    beside: list[str] = []
    rerun: Rerun | None = None
    trace: TraceRow | None = None

    @property
    def statistics(self) -> Statistics:
        """The statistics of a run that has them.

        Raises:
            ValueError: The run has none.
        """
        if self.summary is None:
            raise ValueError("task=load leaves no summary of one request; its record's `load` has what it measured")
        return self.summary


def fingerprint(config: dict[str, Any]) -> str:
    """Return a hash of the configuration, without the keys that change neither an image nor a time."""
    return hashlib.sha256(json.dumps(declared(config), sort_keys=True).encode()).hexdigest()[:16]


def declared(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration without the keys that change neither an image nor a time."""
    apart: tuple[str, ...] = (*OF_USER, "logger", "train", "quality", "plan", "hardware", "compare", "report")
    if config.get("task", {}).get("name") not in ("serve", "load"):
        apart += ("serve", "load")
    if not config.get("plugins"):
        apart += ("plugins", "plugin", "plugin_sources")
    found = {key: value for key, value in config.items() if key not in apart}
    if "plugin_sources" in found:
        sources = found["plugin_sources"].items()
        found["plugin_sources"] = {name: {**source, "folder": ""} for name, source in sources}
    if "launch" in found:
        launch = found["launch"].items()
        found["launch"] = {key: value for key, value in launch if key != "reuse" and not key.endswith("_timeout_s")}
    return found


class RunFolder:
    """The folder of one run.

    It is made by `claim`, and its owner is the only writer, except that each rank writes its own log.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._owned: BinaryIO | None = None
        self._started = ""

    @classmethod
    def claim(cls, path: Path, again: bool = False, resumes: dict[str, Any] | None = None) -> RunFolder:
        """Claim a folder for one run; until `finish`, its status says that the run was cut off.

        Args:
            path: The folder.
            again: Whether a folder is taken too if it holds a failed run whose process is gone; its files are removed.
            resumes: Configuration that goes on with the images of a run that did not end well, if it is the same.

        Returns:
            The claimed folder.

        Raises:
            RunFolderError: The folder holds another run, or it cannot be made.
        """
        folder = cls(path)
        try:
            path.mkdir(0o700, parents=True, exist_ok=True)
            (path / "logs").mkdir(0o700, exist_ok=True)
            folder._owned, folder._started = lock_file(path / ".owner"), utc_now()
            if resumes is not None and folder._can_resume(resumes):
                folder._clear_for_resume()
            elif again and (path / "status.json").exists() and read_status(path).state != "ok":
                folder._clear()
            if any((path / name).exists() for name in RESULTS):
                raise RunFolderError(_holds_a_run(path))
            descriptor = os.open(path / "status.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except (FileExistsError, BlockingIOError) as error:
            raise RunFolderError(_holds_a_run(path)) from error
        except OSError as error:
            raise RunFolderError(cannot_be_written(path, error)) from error
        os.close(descriptor)
        with suppress(OSError):  # a folder that another user made and lets us write
            path.chmod(0o700)
        try:
            folder.finish(INTERRUPTED)
        except RunFolderError:
            (path / "status.json").unlink()  # it is empty, and would hold the folder for good
            raise
        return folder

    def _can_resume(self, config: dict[str, Any]) -> bool:
        """Return whether the folder holds images of this same configuration, from a run that did not end well."""
        if not (self.path / "images.jsonl").exists() or not (self.path / "status.json").exists():
            return False
        if read_status(self.path).state == "ok":
            return False
        try:
            earlier = yaml.safe_load((self.path / "config.yaml").read_text())
            return fingerprint(earlier) == fingerprint(config)
        except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
            return False

    def _clear_for_resume(self) -> None:
        """Remove what an earlier run left, but its images: errors of its ranks would be taken for those of new ones."""
        for name in (*RESULTS, "status.json"):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / "logs", ignore_errors=True)
        (self.path / "logs").mkdir(0o700)

    def _clear(self) -> None:
        """Remove what an earlier run left, so that nothing of it is shown beside this one's status."""
        for left in self.path.iterdir():
            if left.is_dir() and not left.is_symlink() and left.name not in KEPT:
                shutil.rmtree(left)
            elif left.name not in KEPT:
                left.unlink()
        (self.path / "logs").mkdir(0o700)

    def restore(self, config: str) -> None:
        """Make the folder again if somebody has removed it, or its configuration, while the run goes on.

        Args:
            config: The text of `config.yaml`.

        Raises:
            OSError: The folder cannot be made.
            RunFolderError: A file cannot be written.
        """
        self.path.mkdir(0o700, parents=True, exist_ok=True)
        (self.path / "logs").mkdir(0o700, exist_ok=True)
        if not (self.path / "config.yaml").exists():
            self.write_config(config)
        if not (self.path / "status.json").exists():
            self.finish(INTERRUPTED)

    def finish(self, status: Status) -> None:
        """Write `status.json`, with the times at which the folder was claimed and finished.

        Raises:
            RunFolderError: It cannot be written.
        """
        finished = "" if status == INTERRUPTED else utc_now()
        file = StatusFile(status.state, status.error, self._started, finished)
        self._write("status.json", msgspec.json.encode(file))

    def write_record(self, record: Record) -> None:
        """Write `record.json`."""
        self.write_json("record.json", record)

    def write_json(self, name: str, data: msgspec.Struct) -> None:
        """Write a struct as an indented file.

        Raises:
            RunFolderError: It cannot be written.
        """
        self._write(name, msgspec.json.format(msgspec.json.encode(data), indent=1))

    def write_file(self, name: str, data: bytes) -> None:
        """Write a file of a few megabytes.

        Raises:
            RunFolderError: It cannot be written; no part of it is left.
        """
        self._write(name, data)

    def write_config(self, text: str) -> None:
        """Write `config.yaml`, the resolved configuration.

        Raises:
            RunFolderError: It cannot be written.
        """
        self._write("config.yaml", text.encode())

    def _write(self, name: str, data: bytes) -> None:
        try:
            write_atomically(self.path / name, data, 0o600)
        except OSError as error:
            raise RunFolderError(cannot_be_written(self.path / name, error)) from error

    def log_file(self, rank: int) -> Path:
        """Return the log file of one rank."""
        return self.path / "logs" / f"rank{rank}.log"


def lock_file(path: Path) -> BinaryIO:
    """Open a file and lock it while the process lives, or until the file is closed.

    Args:
        path: The file, created if missing.

    Returns:
        The open file.

    Raises:
        OSError: The file cannot be locked; BlockingIOError if another living process holds the lock.
    """
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Args:
        path: The file.
        data: The new content of the file.
        mode: The permissions of the file, before the umask.

    Raises:
        OSError: The file cannot be written, such as on a full disk; the old content stays, and no other file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)  # some file systems report a full disk or quota only here
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _holds_a_run(path: Path) -> str:
    if (path / "images.jsonl").exists() and read_status(path).state != "ok":
        return (
            f"{path} holds images of another configuration; go on with the overrides in its config.yaml, or choose "
            "another folder with hydra.run.dir=..."
        )
    return f"{path} already holds a run; choose another folder with hydra.run.dir=..."


def is_full(error: BaseException) -> bool:
    """Return whether an error says that a disk or a quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def cannot_be_written(path: Path, error: OSError) -> str:
    """Return what to change if the disk does not take a run's folder or file."""
    remedy = "free some space, or choose another disk" if is_full(error) else "choose another folder"
    return f"{path} cannot be written ({error.strerror}); {remedy} with hydra.run.dir=..."


def read_status(folder: Path) -> Status:
    """Return the status of a run's folder; `failed` if there is none."""
    try:
        return msgspec.json.decode((folder / "status.json").read_bytes(), type=Status)
    except (OSError, msgspec.MsgspecError):
        return Status("failed", "no readable status.json")


def read_started(folder: Path) -> str:
    """Return the time at which a run's folder was claimed, UTC, ISO 8601; empty if its status does not say."""
    try:
        return msgspec.json.decode((folder / "status.json").read_bytes(), type=StatusFile).started
    except (OSError, msgspec.MsgspecError):
        return ""


def read_record(folder: Path) -> Record | None:
    """Read the record of a run's folder.

    Args:
        folder: The run's folder.

    Returns:
        The record, or None if the run left none.

    Raises:
        RunFolderError: The record has another schema or cannot be read.
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
    """Return whether a folder holds the record of exactly this configuration, successful or not."""
    try:
        record = read_record(folder)
    except RunFolderError:
        return False
    if record is None or record.fingerprint != fingerprint(config) or read_status(folder) == INTERRUPTED:
        return False
    return bool(record.config.get("quality", config["quality"]) == config["quality"])
