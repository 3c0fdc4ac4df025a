"""An engine that is a thread: harness.messages on two ROUTER sockets, no network, and an end that a prompt asks for."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zmq

from harness.config.schema import RunConfig
from harness.messages import (
    QUEUED,
    ArrayRef,
    Cancel,
    EngineInfo,
    Failure,
    GenerationRequest,
    GenerationResult,
    Message,
    Ping,
    Progress,
    SampleResult,
    decode,
    encode,
)
from harness.serving.transport import Addresses, EngineGone, router

STEP_S = 0.01


@dataclass
class Fleet:
    """Makes engines, and remembers what they did: `lives` of them, the requests `drawn` and `seen`, in order.

    A prompt says what becomes of its request: `choke` ends the engine before it says a word of it, `die` at its second
    step, `answer and die` after its answer, `oom` is a failure, `hang` reports nothing more, `mute` answers no ping
    either. Engines whose number is in `stillborn` die while they load.
    """

    stillborn: tuple[int, ...] = ()
    load_s: float = 0.0
    lives: list["Planted"] = field(default_factory=list)
    seen: list[GenerationRequest] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)

    def make(self, config: RunConfig, folder: Path) -> "Planted":
        self.lives.append(Planted(self, len(self.lives)))
        return self.lives[-1]

    @property
    def alive(self) -> bool:
        return any(life.alive for life in self.lives)


class Planted:
    """One engine."""

    def __init__(self, fleet: Fleet, number: int) -> None:
        self.addresses = Addresses.private()
        self.death: str | None = None  # once its sockets are closed, as a process's are
        self.fleet = fleet
        self._number = number
        self._dying: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() or self.addresses.folder.exists()

    def start(self, on_wait: Callable[[EngineInfo | None], None]) -> EngineInfo:
        ready = time.monotonic() + self.fleet.load_s
        while time.monotonic() < ready:
            on_wait(None)
            time.sleep(0.01)
        if self._number in self.fleet.stillborn:
            raise EngineGone("rank 0: no such checkpoint")
        self._thread.start()
        return EngineInfo("ready", 1, [])

    def check_alive(self) -> None:
        if self.death is not None:
            raise EngineGone(self.death)

    def stop(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self.addresses.remove()

    kill = stop

    def _run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._requests = router(context, self.addresses.requests)
        self._control = router(context, self.addresses.control)
        self._queue: deque[tuple[bytes, GenerationRequest]] = deque()
        self._cancelled: set[str] = set()
        while not self._ended.is_set() and self._dying is None:
            self._listen()
            if self._queue and self._dying is None:
                self._draw(*self._queue.popleft())
        context.destroy(linger=100)
        self.death = self._dying

    def _listen(self) -> None:
        time.sleep(STEP_S)
        while self._control.poll(0):
            client, *frames = self._control.recv_multipart()
            message = decode(frames)
            if isinstance(message, Ping):
                self._control.send_multipart([client, *encode(EngineInfo("busy", 1, [], queued=len(self._queue)))])
            elif isinstance(message, Cancel):
                self._cancelled.add(message.request_id)
        while self._requests.poll(0):
            client, *frames = self._requests.recv_multipart()
            request = decode(frames)
            assert isinstance(request, GenerationRequest)
            self.fleet.seen.append(request)
            if request.prompts[0] == "choke":
                self._dying = "rank 0: TypeError"
                return
            self._tell(client, Progress(request.request_id, QUEUED, len(self._queue), 0))
            self._queue.append((client, request))

    def _draw(self, client: bytes, request: GenerationRequest) -> None:
        name, prompt = request.request_id, request.prompts[0]
        self._tell(client, Progress(name, "text_encoding", 0, 0))
        for step in range(request.steps):
            self._listen()
            if name in self._cancelled:
                return self._tell(client, Failure(name, "cancelled", "the request was cancelled", 0))
            if prompt == "die" and step == 1:
                self._dying = "rank 1 died with SIGKILL"
            if prompt == "oom" and step == 1:
                return self._tell(client, Failure(name, "oom", "out of memory", 1))
            while prompt == "mute" and step == 1 and not self._ended.is_set():
                time.sleep(STEP_S)
            while prompt == "hang" and step == 1 and not self._ended.is_set():
                self._listen()
            if self._ended.is_set() or self._dying is not None:
                return None
            self._tell(client, Progress(name, "denoising", step + 1, request.steps))
        self.fleet.drawn.append(name)
        pixels = np.full((3, 2, 2), request.seed, np.float32)
        sample = SampleResult(0, prompt, request.seed, ArrayRef(1, "float32", pixels.shape))
        self._requests.send_multipart([client, *encode(GenerationResult(name, [sample], [], 1.0), [pixels])])
        if prompt == "answer and die":
            self._dying = "rank 1 died with SIGKILL"
        return None

    def _tell(self, client: bytes, message: Message) -> None:
        self._requests.send_multipart([client, *encode(message)])
