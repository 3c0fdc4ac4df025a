"""How a client handles messages: only its own answers count, and every exception has one state and one line."""

from collections.abc import Sequence

import pytest
import torch

from harness.config.yaml import from_yaml
from harness.engines.protocol import RequestFailed, configure_and_wait, send_and_wait
from harness.messages import (
    Configure,
    EngineInfo,
    Failure,
    GenerationRequest,
    GenerationResult,
    Message,
    Progress,
    encode,
)
from harness.records.record import Status
from harness.resolve.compose import compose_run
from harness.serving.faults import failure_kind, failure_line, is_peer_lost
from harness.serving.transport import Connection, EngineGone
from harness.tasks.common.lifecycle import status_from_error


class Script(Connection):
    """A connection that delivers prepared messages; nothing is sent anywhere."""

    def __init__(self, said: Sequence[Message]) -> None:
        self.said = list(said)
        self.cancelled: list[str] = []
        self.sent: list[Message] = []

    def send(self, message: Message) -> None:
        assert isinstance(message, GenerationRequest | Configure)
        self.sent.append(message)

    def receive_within(self, timeout_s: float) -> Message | None:
        return self.said.pop(0) if self.said else None

    def receive(self) -> tuple[Message, list[bytes]]:
        if not self.said:
            raise KeyboardInterrupt
        message = self.said.pop(0)
        return message, encode(message)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)


REQUESTED = GenerationRequest("mine", ["a"], 1, 1.0, 8, 8)
ANSWER = GenerationResult("mine", [], [], 1.0)


def test_answers_to_other_requests_are_passed_over() -> None:
    heard: list[Progress] = []
    said = [
        Failure("old", "cancelled", "the request was cancelled"),
        GenerationResult("old", [], [], 1.0),
        Progress("old", "denoising", 1, 2),
        Progress("mine", "denoising", 1, 2),
        ANSWER,
    ]
    assert send_and_wait(Script(said), REQUESTED, heard.append)[0] == ANSWER
    assert heard == [Progress("mine", "denoising", 1, 2)]


@pytest.mark.parametrize("request_id", ["mine", ""])
def test_a_failure_of_this_request_is_raised_with_its_kind(request_id: str) -> None:
    with pytest.raises(RequestFailed, match="rank 1: out") as caught:
        send_and_wait(Script([Failure(request_id, "oom", "out of memory", 1)]), REQUESTED, lambda progress: None)
    assert caught.value.kind == "oom"


def test_a_configuration_is_sent_without_its_prompts_and_answered_with_the_state() -> None:
    config, ready = compose_run(["request.prompts=[secret,other]"]).config, EngineInfo("ready", 1, [])
    script = Script([Progress("old", "denoising", 1, 2), ready])
    assert configure_and_wait(script, config) == ready
    (sent,) = script.sent
    assert isinstance(sent, Configure)
    assert "secret" not in sent.config
    assert len(from_yaml(sent.config).request.prompts or []) == 2
    assert config.request.prompts == ["secret", "other"]


def test_a_refused_configuration_and_a_silent_engine_end_the_wait() -> None:
    with pytest.raises(RequestFailed, match="another layout"):
        configure_and_wait(Script([Failure("", "rejected", "another layout")]), compose_run([]).config)
    config = compose_run(["launch.start_timeout_s=0.05"]).config
    with pytest.raises(EngineGone, match=r"raise launch\.start_timeout_s"):
        configure_and_wait(Script([]), config)


def test_an_interrupt_cancels_the_request() -> None:
    connection = Script([])
    with pytest.raises(KeyboardInterrupt):
        send_and_wait(connection, REQUESTED, lambda progress: None)
    assert connection.cancelled == ["mine"]


def no_memory() -> Exception:
    try:
        torch.empty(2**60)
    except RuntimeError as error:
        return error
    raise AssertionError("this machine has an exbibyte of memory")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (no_memory(), "oom"),
        (torch.OutOfMemoryError("CUDA"), "oom"),
        (MemoryError(), "oom"),
        (NotImplementedError("no such kernel"), "unsupported"),
        (ValueError("steps"), "failed"),
    ],
)
def test_an_exception_has_one_kind(error: Exception, kind: str) -> None:
    assert failure_kind(error) == kind
    assert "\n" not in failure_line(error)


def test_a_lost_connection_to_another_rank_is_not_the_cause() -> None:
    assert is_peer_lost(RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"))
    assert not is_peer_lost(RuntimeError("shape mismatch"))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), Status("cancelled", "interrupted")),
        (RequestFailed(Failure("r", "unsupported", "no mask")), Status("unsupported", "no mask")),
        (RequestFailed(Failure("r", "rejected", "steps")), Status("failed", "steps")),
        (EngineGone("rank 1 died", "oom"), Status("oom", "rank 1 died")),
        (ValueError("two\nlines"), Status("failed", "two")),
        (OSError(28, "No space left on device"), Status("failed", "OSError: [Errno 28] No space left on device")),
    ],
)
def test_every_exception_has_a_state_and_a_line(error: BaseException, status: Status) -> None:
    assert status_from_error(error) == status
