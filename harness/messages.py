"""What clients, rank 0 and the other ranks say to one another: msgspec structs in msgpack, tensors as raw frames.

A message is a list of frames: the header (one struct, tagged by its type), then one raw frame for each array it refers
to. Nothing is ever pickled.
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
QUEUED = "queued"  # the stage of a request that waits
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)  # what foreign bytes make of the decoder


class ArrayRef(msgspec.Struct, frozen=True):
    """An array that travels as frame `frame` of the same message, C order."""

    frame: int
    dtype: str
    shape: tuple[int, ...]


class GenerationRequest(msgspec.Struct, frozen=True, tag=True):
    """Pictures to draw: samples_per_prompt of each prompt; picture k (over prompts, then samples) has seed + k.

    Sizes in pixels; guidance 1 is none; batch_size is the number of pictures a network forward carries; more than one
    of frames makes each picture a video. `latents` asks for latents beside the pixels: the final one, or the state
    after every solver step. `count_flops` counts operations and `profile` times operators, either slows the request
    down. `timeout_s` counts from the request's arrival at rank 0; what is not drawn by then is answered with a Failure
    of kind expired.
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
    timeout_s: float | None = None


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Rank 0 is in `stage`, and has finished `done` of `total` solver steps of its share (0 of 0 in other stages).

    The first is of stage QUEUED, sent when the request is accepted: `done` requests are ahead of it.
    """

    request_id: str
    stage: str
    done: int
    total: int


class StageTime(msgspec.Struct, frozen=True):
    """One stage of one rank, device synchronised at both edges."""

    name: str
    duration_ms: float


class StepTime(msgspec.Struct, frozen=True):
    """One solver step of one micro-batch; `step` counts over the rank's whole share."""

    step: int
    duration_ms: float


class MemoryPoint(msgspec.Struct, frozen=True):
    """Memory at the end of a stage, MiB: the allocator's on CUDA, the resident set on the CPU."""

    name: str
    used_mib: float


class Traffic(msgspec.Struct, frozen=True):
    """What one rank sent to the ranks that it computes with, by one kind of collective."""

    bytes: int
    calls: int
    exposed_ms: float


def sent_bytes(comm: Mapping[str, Mapping[str, Traffic]]) -> int:
    """All bytes that a rank sent, over stages and kinds of collective."""
    return sum(kind.bytes for stage in comm.values() for kind in stage.values())


class Skips(msgspec.Struct, frozen=True):
    """What a cache spared picture `index`: of `evaluations` of the denoiser it made do in those of `skipped`, numbered
    from 0, with what earlier ones had computed; of their `branches`, two where a picture is guided, `branches_computed`
    went through the whole network.
    """

    index: int
    evaluations: int
    skipped: list[int]
    branches: int
    branches_computed: int


class OperatorTime(msgspec.Struct, frozen=True):
    """An operator of PyTorch: how often it was called, and its time without that of the operators that it calls, on the
    device, ms.
    """

    name: str
    calls: int
    self_ms: float


class RankReport(msgspec.Struct, frozen=True):
    """What one rank did for one request; the networks are text_encoder, denoiser and decoder, `comm` is what it sent by
    stage and kind of collective, `flops` the operations of each network where they were counted, `operators` its
    operators where they were timed, `skips` what a cache spared its pictures, `energy_j` what its GPU used meanwhile,
    or on the first rank of a machine its processors; None where that is not reported, or shared.
    """

    rank: int
    stages: list[StageTime]
    denoise_steps_ms: list[StepTime]
    networks_ms: dict[str, float]
    network_evaluations: dict[str, int]
    peak_memory_mib: float
    memory_checkpoints: list[MemoryPoint]
    notes: list[str]
    comm: dict[str, dict[str, Traffic]] = {}
    flops: dict[str, int] = {}
    operators: dict[str, list[OperatorTime]] = {}
    skips: list[Skips] = []
    energy_j: float | None = None


class SampleResult(msgspec.Struct, frozen=True):
    """One picture or video: pixels (3, height, width) or (frames, 3, height, width), float32 in [0, 1]; and where they
    were asked for latents, (1 or solver steps, *latent shape), float32.
    """

    index: int
    prompt: str
    seed: int
    pixels: ArrayRef
    latents: ArrayRef | None = None


class GenerationResult(msgspec.Struct, frozen=True, tag=True):
    """The answer: pictures in order, and every rank's report; `total_duration_ms` lasts until the last rank is done."""

    request_id: str
    samples: list[SampleResult]
    ranks: list[RankReport]
    total_duration_ms: float


class Failure(msgspec.Struct, frozen=True, tag=True):
    """The typed answer when there is no picture.

    `kind`: rejected (ask for something else), busy (the queue is full; try again in `retry_after_s`), expired (its
    deadline passed), cancelled, oom, unsupported or failed.
    """

    request_id: str
    kind: str
    message: str
    rank: int | None = None
    retry_after_s: float | None = None


class RankOutcome(msgspec.Struct, frozen=True, tag=True):
    """What a rank hands to rank 0 after a request: its pictures and report, or its failure."""

    samples: list[SampleResult]
    report: RankReport | None
    failure: Failure | None = None


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Asks how the engine is; answered at once, also while work runs."""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Stops a request within one step."""

    request_id: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Ends the engine in order, after the request in hand."""


class LoadedComponent(msgspec.Struct, frozen=True):
    """One component as a rank holds it: where it was read, in which dtype, how large it is, and how long that took.

    `parameters` and `bytes` are those that the rank holds, `read_bytes` what it read of the checkpoint's files (0 for
    random weights); `merged` counts the tensors that low-rank updates were merged into.
    """

    component: str
    path: str
    dtype: str
    parameters: int
    bytes: int
    load_ms: float
    merged: int = 0
    read_bytes: int = 0


class EngineInfo(msgspec.Struct, frozen=True, tag=True):
    """How the engine is. `state`: loading, ready, busy or stopping; `load_ms`: the slowest rank's loading time;
    `loaded`: rank 0's components, each with the slowest rank's time; `ceiling_tflops`: by rank, the rate of a matrix
    product in the denoiser's dtype, where it was measured; `hosts`: by node (a torchrun agent), the machine's name.

    `queued` requests wait, `running` are being drawn, `served` were answered; `evaluations` counts the forwards of the
    denoiser since the ranks were ready, on the first rank of each replica, and `rows` what they carried (a guided
    picture is two rows, a guided picture of cfg=2 one).
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


Message: TypeAlias = (
    GenerationRequest | Progress | GenerationResult | Failure | RankOutcome | Ping | Cancel | Shutdown | EngineInfo
)


class MessageError(ValueError):
    """Frames that are not a message of ours."""


def encode(message: Message, arrays: Sequence[AnyArray] = ()) -> list[bytes]:
    """The frames of a message: header first, then its arrays in the order that its ArrayRefs number them from 1."""
    return [msgspec.msgpack.encode(message), *(np.ascontiguousarray(array).tobytes() for array in arrays)]


def decode(frames: Sequence[bytes]) -> Message:
    """The message of the header frame.

    Raises:
        MessageError: no frame, bytes that are no message, or a message of an unknown shape.
    """
    if not frames:
        raise MessageError("an empty message")
    try:
        return msgspec.msgpack.decode(frames[0], type=Message)
    except UNREADABLE as error:
        raise MessageError(f"not a message of this engine ({error})") from error


def array(ref: ArrayRef, frames: Sequence[bytes]) -> AnyArray:
    """The array that a reference points at, as a read-only view of its frame.

    Raises:
        MessageError: no such frame, an unknown dtype, or another number of bytes than the shape asks for.
    """
    if ref.dtype not in DTYPES or not 0 < ref.frame < len(frames):
        raise MessageError(f"no {ref.dtype} array in frame {ref.frame} of {len(frames)}")
    frame = frames[ref.frame]
    if min(ref.shape, default=0) < 0 or len(frame) != np.dtype(ref.dtype).itemsize * math.prod(ref.shape):
        raise MessageError(f"frame {ref.frame} has {len(frame)} bytes, not an array of {ref.dtype} {ref.shape}")
    return np.frombuffer(frame, dtype=ref.dtype).reshape(ref.shape)


def pack(frames: Sequence[bytes]) -> bytes:
    """Frames as one byte string, for a transport that has no frames of its own."""
    return msgspec.msgpack.encode(list(frames))


def unpack(data: bytes) -> list[bytes]:
    """The frames of `pack`.

    Raises:
        MessageError: bytes that `pack` did not make.
    """
    try:
        return msgspec.msgpack.decode(data, type=list[bytes])
    except UNREADABLE as error:
        raise MessageError(f"not packed frames ({error})") from error
