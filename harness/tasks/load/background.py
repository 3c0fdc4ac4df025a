"""A second client that takes all it can get: does the first one still have its share?

With load.background=2 it has two requests without an answer at any time, each as large as the engine takes. Its first
request is a single default one, from which the engine learns its speed. After each refusal it sends less.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import msgspec

from harness.config.schema import RunConfig
from harness.engines.protocol import Engine
from harness.messages import Failure, GenerationRequest, GenerationResult
from harness.resolve.request import to_message
from harness.serving.transport import Connection

LISTEN_S = 0.1
END_S = 30.0


@dataclass(frozen=True)
class LargestRequest:
    """The largest request that the engine has not refused yet.

    Attributes:
        side: Height and width, pixels.
        images: The number of images.
        steps: The number of solver steps.
        multiple: Pixels of which a side is a multiple.
        least_side: The side under which it does not go, pixels.
    """

    side: int
    images: int
    steps: int
    multiple: int
    least_side: int

    @classmethod
    def of(cls, config: RunConfig) -> LargestRequest:
        """Return the largest request that the configuration allows."""
        multiple, default = config.model.size_multiple, to_message(config.request)
        side = int(config.model.max_pixels**0.5) // multiple * multiple
        return cls(side, config.serve.max_images, config.serve.max_steps, multiple, min(default.height, side))

    def lowered(self) -> LargestRequest:
        """Return a smaller one: half the side first, then half the images, then half the steps."""
        if self.side > self.least_side:
            side = max(self.least_side, self.side // 2 // self.multiple * self.multiple)
            return replace(self, side=side)
        if self.images > 1:
            return replace(self, images=self.images // 2)
        return replace(self, steps=max(1, self.steps // 2))

    def message(self, template: GenerationRequest) -> GenerationRequest:
        """Return it with a new id, as a change of another request."""
        return msgspec.structs.replace(
            template,
            request_id=uuid.uuid4().hex,
            prompts=template.prompts[:1],
            samples_per_prompt=self.images,
            steps=self.steps,
            height=self.side,
            width=self.side,
        )


@contextmanager
def background_client(config: RunConfig, engine: Engine) -> Iterator[None]:
    """Load an engine with a second client inside a `with` block; it has a socket, and so turns, of its own.

    Args:
        config: The resolved configuration of the load.
        engine: The started engine.

    Yields:
        Nothing; the client runs from its first answer on.

    Raises:
        EngineGone: The engine died.
    """
    if not config.load.background:
        yield
        return
    stop, began = threading.Event(), threading.Event()

    def run(connection: Connection) -> None:
        try:
            send_without_pause(config, connection, stop, began)
        finally:
            began.set()

    thread = threading.Thread(target=lambda: engine.with_connection(run), name="background", daemon=True)
    thread.start()
    began.wait()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def send_without_pause(
    config: RunConfig, connection: Connection, stop: threading.Event, began: threading.Event
) -> LargestRequest:
    """Keep load.background requests unanswered until the end, and then cancel them.

    Args:
        config: The resolved configuration of the load.
        connection: The client's own connection.
        stop: The event that ends it.
        began: The event that is set after the first answer.

    Returns:
        The largest request that was not refused.

    Raises:
        EngineGone: The engine died.
    """
    largest, template = LargestRequest.of(config), to_message(config.request)
    first = msgspec.structs.replace(template, request_id=uuid.uuid4().hex, prompts=template.prompts[:1])
    outstanding = {first.request_id: largest}
    connection.send(first)
    ends = float("inf")
    while outstanding and time.monotonic() < ends:
        answer = connection.receive_within(LISTEN_S)
        if isinstance(answer, GenerationResult | Failure):
            sent = outstanding.pop(answer.request_id, largest)
            if isinstance(answer, Failure) and answer.kind == "rejected" and sent == largest:
                largest = largest.lowered()
            began.set()
        if stop.is_set() and ends == float("inf"):
            ends = time.monotonic() + END_S
            for request_id in outstanding:
                connection.cancel(request_id)
        while began.is_set() and not stop.is_set() and len(outstanding) < config.load.background:
            message = largest.message(template)
            outstanding[message.request_id] = largest
            connection.send(message)
    return largest
