"""Messages: every struct comes back as it was sent, and bytes that are no message raise MessageError, nothing else."""

import random
from typing import get_args

import msgspec
import numpy as np
import pytest

from harness.messages import (
    ArrayRef,
    Cancel,
    Configure,
    EngineInfo,
    Failure,
    GenerationRequest,
    GenerationResult,
    MemoryPoint,
    Message,
    MessageError,
    Ping,
    Progress,
    RankOutcome,
    RankReport,
    SampleResult,
    Shutdown,
    StageTime,
    StepTime,
    array,
    decode,
    encode,
    pack_frames,
    unpack_frames,
)

REPORT = RankReport(
    rank=1,
    stages=[StageTime("denoising", 1.5)],
    denoise_steps_ms=[StepTime(0, 0.25), StepTime(1, 0.5)],
    networks_ms={"denoiser": 1.25},
    network_evaluations={"denoiser": 2},
    peak_memory_mib=512.0,
    memory_checkpoints=[MemoryPoint("denoising", 400.0)],
    notes=["naïve 日本 🍎"],
)
SAMPLES = [SampleResult(k, "red apple", 7 + k, ArrayRef(1 + k, "float32", (3, 8, 16))) for k in range(2)]
MESSAGES: list[Message] = [
    GenerationRequest("a", ["red apple", ""], 4, 3.0, 64, 128, "blur", 2**62, 3, 2),
    Progress("a", "denoising", 3, 20),
    GenerationResult("a", SAMPLES, [REPORT], 12.5),
    Failure("a", "oom", "out of memory", 1),
    RankOutcome(SAMPLES, REPORT),
    RankOutcome([], None, Failure("a", "cancelled", "the request was cancelled", 0)),
    Ping(),
    Cancel("a"),
    Shutdown(),
    Configure("task: {name: bench}"),
    EngineInfo("ready", 2, [10, 11], 1, 5, 123.0, "cpu", "sdpa", 1),
]


def test_there_is_an_example_of_every_message() -> None:
    assert {type(message) for message in MESSAGES} == set(get_args(Message))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_come_back_as_sent(message: Message) -> None:
    assert decode(unpack_frames(pack_frames(encode(message)))) == message


@pytest.mark.parametrize("dtype", ["float32"])
def test_arrays_come_back_bit_for_bit(dtype: str) -> None:
    whole = (np.random.default_rng(0).normal(size=(3, 16, 8)) * 100).astype(dtype)
    turned = whole.transpose(0, 2, 1)  # not contiguous: frames have C order whatever the memory layout was
    refs = [ArrayRef(1, dtype, (3, 16, 8)), ArrayRef(2, dtype, (3, 8, 16))]
    samples = [SampleResult(k, "", k, ref) for k, ref in enumerate(refs)]
    frames = unpack_frames(pack_frames(encode(GenerationResult("a", samples, [], 0.0), [whole, turned])))
    message = decode(frames)
    assert isinstance(message, GenerationResult)
    for sample, sent in zip(message.samples, (whole, turned), strict=True):
        received = array(sample.pixels, frames)
        assert received.dtype == sent.dtype
        assert received.tobytes() == np.ascontiguousarray(sent).tobytes()
        assert not received.flags.writeable


@pytest.mark.parametrize(
    "ref",
    [
        ArrayRef(0, "float32", (1,)),  # the header
        ArrayRef(-1, "float32", (4,)),
        ArrayRef(2, "float32", (4,)),  # no such frame
        ArrayRef(1, "object", (4,)),
        ArrayRef(1, "float64", (2,)),
        ArrayRef(1, "<f4", (4,)),
        ArrayRef(1, "float32", (3,)),  # too few for the bytes
        ArrayRef(1, "float32", (5,)),  # too many
        ArrayRef(1, "float32", (-4,)),
        ArrayRef(1, "float32", (-2, -2)),  # the product fits
        ArrayRef(1, "float32", (2**32, 2**32, 4)),  # the product overflows to 0
        ArrayRef(1, "float32", (2**62 + 1, 4)),  # the product overflows to 4
    ],
    ids=str,
)
def test_a_reference_that_does_not_fit_its_frame_is_refused(ref: ArrayRef) -> None:
    with pytest.raises(MessageError):
        array(ref, [b"head", np.arange(4, dtype=np.float32).tobytes()])


def test_no_frame_is_no_message() -> None:
    with pytest.raises(MessageError, match="empty"):
        decode([])


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_truncated_message_is_refused(message: Message) -> None:
    whole = encode(message)[0]
    for length in range(len(whole)):
        with pytest.raises(MessageError):
            decode([whole[:length]])


def test_random_bytes_raise_nothing_but_message_errors() -> None:
    generator = random.Random(0)
    refused = 0
    for _ in range(3000):
        data = generator.randbytes(generator.randrange(1, 60))
        try:
            decode([data])
        except MessageError:
            refused += 1
    assert refused == 3000


def test_flipped_bytes_raise_nothing_but_message_errors() -> None:
    generator = random.Random(1)
    refused = 0
    for _ in range(3000):
        data = bytearray(encode(generator.choice(MESSAGES))[0])
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        try:
            decode([bytes(data)])  # a flip inside a prompt or a number is a message still
        except MessageError:
            refused += 1
    assert refused > 1000


@pytest.mark.parametrize("opening", [b"", b"\x82\xa4type\xa4Ping\xa1x"])
def test_endless_nesting_is_refused(opening: bytes) -> None:
    with pytest.raises(MessageError):
        decode([opening + b"\x91" * 100_000 + b"\x01"])


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "Ping", "request_id": 1},
        {"type": "GenerationRequest", "request_id": "a"},
        {"type": "GenerationRequest", "request_id": "a", "prompts": "one", "steps": 1, "guidance": 1.0, "height": 8}
        | {"width": 8},
        {"type": "Nothing"},
        {"request_id": "a"},
        ["Ping"],
        None,
    ],
    ids=str,
)
def test_other_msgpack_is_refused_or_harmless(fields: object) -> None:
    """A wrong type or a missing field is refused; an unknown field is ignored, so that a newer client may send it."""
    data = msgspec.msgpack.encode(fields)
    if isinstance(fields, dict) and fields.get("type") == "Ping":
        assert decode([data]) == Ping()
        return
    with pytest.raises(MessageError):
        decode([data])


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x93\x01\x02", msgspec.msgpack.encode(["text"])])
def test_packed_frames_that_are_none_are_refused(data: bytes) -> None:
    with pytest.raises(MessageError):
        unpack_frames(data)
