"""Messages between clients, rank 0 and the other ranks: msgspec structs in msgpack, tensors as raw frames.

A message is a list of frames: the header (one struct, tagged with its type), then one raw frame for each array that the
header refers to. Nothing is ever pickled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float32]
AnyArray: TypeAlias = NDArray[Any]
Latents: TypeAlias = Literal["none", "last", "steps"]
DTYPES = ("float32",)
QUEUED = "queued"  # the stage of a request in the queue
DENOISING = "denoising"  # the stage whose solver steps are counted
DECODING = "decoding"  # the stage whose images are counted
DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)  # raised for bytes that are no message


class ArrayRef(msgspec.Struct, frozen=True):
    """An array that travels as frame `frame` of the same message, in C order."""

    frame: int
    dtype: str
    shape: tuple[int, ...]


class GenerationRequest(msgspec.Struct, frozen=True, tag=True):
    """A request for images: samples_per_prompt of each prompt; image k (over prompts, then samples) has seed + k.

    Args:
        request_id: the client's name for this request, unique among its open requests.
        prompts: the prompts, one or more.
        steps: the number of solver steps.
        guidance: the guidance scale; 1 means no guidance.
        height: the height in pixels.
        width: the width in pixels.
        negative_prompt: the negative prompt of every image.
        seed: the seed of the first image.
        samples_per_prompt: the number of images of each prompt.
        batch_size: the number of images in one network forward.
        frames: the number of video frames; 1 asks for an image.
        latents: the latents to return beside the pixels: none, the last one, or the state after every solver step.
        count_flops: whether to count operations, which slows the request down.
        profile: whether to time operators, which slows the request down.
        trace_from_ns: the moment from which a trace of the request counts its times, ns since 1970; None = no trace.
        timeout_s: the time limit in seconds, counted from the request's arrival at rank 0. A request that exceeds it is
            answered with a Failure of kind expired.
        client: the client that the request counts for when clients take turns; empty for the socket that sent it.
        seeds: the seed of each prompt's first image, in place of seed + k; its other images have the next seeds.
        solver: the solver, in place of the configuration's; its options have their defaults.
        previews: the number of previews of the first image, evenly spread over its steps; none after the last step.
    """

    request_id: str
    prompts: list[str]
    steps: int
    guidance: float
    height: int
    width: int
    negative_prompt: str = ""
    seed: int = 0
    samples_per_prompt: int = 1
    batch_size: int = 1
    frames: int = 1
    latents: Latents = "none"
    count_flops: bool = False
    profile: bool = False
    trace_from_ns: int | None = None
    timeout_s: float | None = None
    client: str = ""
    seeds: list[int] = []
    solver: str = ""
    previews: int = 0

    def seed_of(self, index: int) -> int:
        """Return the seed of an image by its index in the request."""
        if not self.seeds:
            return self.seed + index
        return self.seeds[index // self.samples_per_prompt] + index % self.samples_per_prompt


class Progress(msgspec.Struct, frozen=True, tag=True):
    """A request is in `stage` and has finished `done` of `total` of its parts.

    These are solver steps while it denoises, and images while it decodes more than one batch of them; other stages
    have 0 of 0, and so has the beginning of each. With step batching those of all images count, otherwise those of
    rank 0's share.

    The first message has stage QUEUED and is sent when the request is accepted; `done` is then the number of requests
    before it.

    Args:
        request_id: the request.
        stage: the stage.
        done: the number of finished solver steps or images.
        total: the number of all of them.
        preview: a PNG of the first image's x0 estimate after its latest step; empty if the message brings none.
    """

    request_id: str
    stage: str
    done: int
    total: int
    preview: bytes = b""


class StageTime(msgspec.Struct, frozen=True):
    """The time of one stage on one rank, with the device synchronized before and after."""

    name: str
    duration_ms: float


class StepTime(msgspec.Struct, frozen=True):
    """The time of one solver step of one micro-batch; `step` counts over the rank's whole share."""

    step: int
    duration_ms: float


class MemoryPoint(msgspec.Struct, frozen=True):
    """The memory in MiB at the end of a stage: the allocator's on CUDA, the resident set on the CPU."""

    name: str
    used_mib: float


class CollectiveTraffic(msgspec.Struct, frozen=True):
    """What one rank sent to the other ranks of its replica with one kind of collective."""

    bytes: int
    calls: int
    exposed_ms: float


def total_sent_bytes(comm: Mapping[str, Mapping[str, CollectiveTraffic]]) -> int:
    """Return all bytes that a rank sent, over stages and kinds of collective."""
    return sum(kind.bytes for stage in comm.values() for kind in stage.values())


class CacheSkips(msgspec.Struct, frozen=True):
    """What a cache skipped for one image.

    Args:
        index: the image's index in the request.
        evaluations: the number of evaluations of the denoiser, skipped ones included.
        skipped: the indices (from 0) of the evaluations that reused earlier results.
        branches: the number of branches in those evaluations, two per evaluation of a guided image.
        branches_computed: the number of branches that went through the whole network.
    """

    index: int
    evaluations: int
    skipped: list[int]
    branches: int
    branches_computed: int


class OperatorTime(msgspec.Struct, frozen=True):
    """One PyTorch operator: its calls, and its own device time in ms without the operators that it calls."""

    name: str
    calls: int
    self_ms: float


class RankReport(msgspec.Struct, frozen=True):
    """What one rank did for one request; the networks are text_encoder, denoiser and decoder, or preview for previews.

    Args:
        rank: the rank's number in the world.
        stages: the times of the stages.
        denoise_steps_ms: the times of the solver steps.
        networks_ms: the time of each network, ms.
        network_evaluations: the number of forwards of each network.
        peak_memory_mib: the peak memory, MiB.
        memory_checkpoints: the memory at the end of each stage.
        notes: notes for the record.
        comm: what the rank sent, by stage and kind of collective.
        flops: the operations of each network, if they were counted.
        operators: the operators of each network, if they were timed.
        skips: what a cache skipped, per image.
        energy_j: the energy of the rank's GPU, or on the first rank of a machine of its processors, in joules; None if
            it is not reported or another rank reports it.
        cpu_s: the CPU time of the rank's process, s; None in answers of other engines.
        involuntary_switches: how often another process took the rank's processor.
        waited_s: the time that its threads waited for a processor, s; None where the kernel does not say.
        operator_errors: the operators that were compared with float64 so far, if fidelity is measured.
        trace: the events of the request's trace, compressed (harness.device.trace); empty if it was not traced.
        memory_snapshot: the history of GPU memory in a traced request; empty on the CPU.
    """

    rank: int
    stages: list[StageTime]
    denoise_steps_ms: list[StepTime]
    networks_ms: dict[str, float]
    network_evaluations: dict[str, int]
    peak_memory_mib: float
    memory_checkpoints: list[MemoryPoint]
    notes: list[str]
    comm: dict[str, dict[str, CollectiveTraffic]] = {}
    flops: dict[str, int] = {}
    operators: dict[str, list[OperatorTime]] = {}
    skips: list[CacheSkips] = []
    energy_j: float | None = None
    cpu_s: float | None = None
    involuntary_switches: int = 0
    waited_s: float | None = None
    operator_errors: list[OperatorError] = []
    trace: bytes = b""
    memory_snapshot: bytes = b""


class SampleResult(msgspec.Struct, frozen=True):
    """One image or video.

    Args:
        index: the sample's index in the request.
        prompt: the sample's prompt.
        seed: the sample's seed.
        pixels: (3, height, width) or (frames, 3, height, width), float32 in [0, 1].
        latents: (1 or solver steps, *latent shape), float32, if the request asked for latents.
    """

    index: int
    prompt: str
    seed: int
    pixels: ArrayRef
    latents: ArrayRef | None = None


class GenerationResult(msgspec.Struct, frozen=True, tag=True):
    """The answer: samples in order and every rank's report; `total_duration_ms` ends when the last rank is done."""

    request_id: str
    samples: list[SampleResult]
    ranks: list[RankReport]
    total_duration_ms: float


class Failure(msgspec.Struct, frozen=True, tag=True):
    """The typed answer to a request that produced no image.

    Args:
        request_id: the request's name; empty if the request could not be read.
        kind: rejected (change the request), busy (the queue is full; try again in `retry_after_s`), expired (the time
            limit passed), cancelled, oom, unsupported or failed.
        message: the reason in one line.
        rank: the rank that failed, if it was one rank.
        retry_after_s: the time after which to try again, s.
    """

    request_id: str
    kind: str
    message: str
    rank: int | None = None
    retry_after_s: float | None = None


class Configure(msgspec.Struct, frozen=True, tag=True):
    """A command to the ranks to run another configuration from now on; the answer is an EngineInfo.

    Args:
        config: the resolved configuration as YAML, checked by its sender. Its layout, launch settings and environment
            are those of the ranks (harness.resolve.engine_key).
    """

    config: str


class RankOutcome(msgspec.Struct, frozen=True, tag=True):
    """What a rank hands to rank 0 after a request: its samples and report, or its failure."""

    samples: list[SampleResult]
    report: RankReport | None
    failure: Failure | None = None


class Ping(msgspec.Struct, frozen=True, tag=True):
    """A question about the engine's state, answered at once, also while work runs."""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """A command to stop a request within one step."""

    request_id: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """A command to end the engine in order, after the running request."""


class LoadedComponent(msgspec.Struct, frozen=True):
    """One component as a rank holds it.

    Args:
        component: the component's name.
        path: the path that it was read from.
        dtype: the dtype of its weights.
        parameters: the number of parameters on this rank.
        bytes: the bytes of those parameters.
        load_ms: the loading time, ms.
        merged: the number of tensors that low-rank updates were merged into.
        read_bytes: the bytes that this rank read of the checkpoint's files; 0 for random weights.
    """

    component: str
    path: str
    dtype: str
    parameters: int
    bytes: int
    load_ms: float
    merged: int = 0
    read_bytes: int = 0


class OperatorError(msgspec.Struct, frozen=True):
    """The error of one operator in the run's dtype, against the same rounded numbers computed in float64.

    Args:
        operator: the operator, its sizes, and the modules that it computes.
        dtype: the dtype of its output.
        rel_l2: the relative L2 error.
        bound: the error that rounding alone explains.
    """

    operator: str
    dtype: str
    rel_l2: float
    bound: float

    @property
    def is_within(self) -> bool:
        """Whether rounding alone explains the error."""
        return self.rel_l2 <= self.bound


class EngineInfo(msgspec.Struct, frozen=True, tag=True):
    """The engine's state, the answer to a Ping.

    Args:
        state: loading, ready, busy or stopping.
        world_size: the number of ranks.
        pids: the process ids of the ranks.
        queued: the number of waiting requests.
        served: the number of answered requests.
        load_ms: the loading time of the slowest rank, ms.
        device: rank 0's device.
        attention: the attention backend.
        threads: the CPU threads of each rank.
        loaded: rank 0's components, each with the loading time of the slowest rank.
        ceiling_tflops: the rate of a matrix product in the denoiser's dtype by rank, TFLOP/s, if it was measured.
        hosts: the machine's name by node (a torchrun agent).
        running: the number of requests in progress.
        evaluations: the forwards of the denoiser since the ranks were ready, on the first rank of each replica.
        rows: the batch rows of those forwards: two for a guided image, one for a guided image with cfg=2.
        cpu_capability: the instruction set of PyTorch's CPU kernels on rank 0; empty if no rank said so.
        max_request_bytes: the largest frame that the request socket takes; 0 if it is not known.
    """

    state: str
    world_size: int
    pids: list[int]
    queued: int = 0
    served: int = 0
    load_ms: float = 0.0
    device: str = ""
    attention: str = ""
    threads: int = 0
    loaded: list[LoadedComponent] = []
    ceiling_tflops: list[float] = []
    hosts: list[str] = []
    running: int = 0
    evaluations: int = 0
    rows: int = 0
    cpu_capability: str = ""
    max_request_bytes: int = 0


Message: TypeAlias = (
    GenerationRequest
    | Progress
    | GenerationResult
    | Failure
    | Configure
    | RankOutcome
    | Ping
    | Cancel
    | Shutdown
    | EngineInfo
)


class MessageError(ValueError):
    """Frames that are not one of our messages."""


def encode(message: Message, arrays: Sequence[AnyArray] = ()) -> list[bytes]:
    """Return the frames of a message: the header, then its arrays as its ArrayRefs number them, from 1."""
    return [msgspec.msgpack.encode(message), *(np.ascontiguousarray(array).tobytes() for array in arrays)]


def decode(frames: Sequence[bytes]) -> Message:
    """Return the message of the header frame.

    Raises:
        MessageError: no frame, bytes that are no message, or a message of an unknown shape.
    """
    if not frames:
        raise MessageError("an empty message")
    try:
        return msgspec.msgpack.decode(frames[0], type=Message)
    except DECODE_ERRORS as error:
        raise MessageError(f"not a message of this engine ({error})") from error


def array(ref: ArrayRef, frames: Sequence[bytes]) -> AnyArray:
    """Return the array that a reference points at, as a read-only view of its frame.

    Raises:
        MessageError: no such frame, an unknown dtype, or a number of bytes that does not match the shape.
    """
    if ref.dtype not in DTYPES or not 0 < ref.frame < len(frames):
        raise MessageError(f"no {ref.dtype} array in frame {ref.frame} of {len(frames)}")
    frame = frames[ref.frame]
    if min(ref.shape, default=0) < 0 or len(frame) != np.dtype(ref.dtype).itemsize * math.prod(ref.shape):
        raise MessageError(f"frame {ref.frame} has {len(frame)} bytes, not an array of {ref.dtype} {ref.shape}")
    return np.frombuffer(frame, dtype=ref.dtype).reshape(ref.shape)


def pack_frames(frames: Sequence[bytes]) -> bytes:
    """Return frames as one byte string, for a transport that has no frames of its own."""
    return msgspec.msgpack.encode(list(frames))


def unpack_frames(data: bytes) -> list[bytes]:
    """Return the frames in the output of `pack_frames`.

    Raises:
        MessageError: bytes that `pack_frames` did not make.
    """
    try:
        return msgspec.msgpack.decode(data, type=list[bytes])
    except DECODE_ERRORS as error:
        raise MessageError(f"not packed frames ({error})") from error
