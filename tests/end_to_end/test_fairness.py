"""Real ranks share their time: small requests beside large ones, on one replica and on two, and between clients."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from harness.client.generator import DiffusionGenerator
from harness.messages import Failure
from harness.serving.transport import Connection
from harness.tasks.load.background import send_without_pause
from tests.fixtures.faults import raised_alike
from tests.fixtures.serving.batching import (
    FLOOR,
    answers,
    connected,
    generate,
    info,
    kinds,
    rel_l2,
    request,
    running,
    serving,
)

SMALL = {"height": 32, "width": 32, "steps": 8}


def seconds(engine: DiffusionGenerator, connection: Connection, name: str, **changes: object) -> float:
    """Return the latency of one request."""
    began = time.perf_counter()
    connection.send(request(engine, name, **changes))
    assert kinds(answers(connection, 1)) == {name: "ok"}
    return time.perf_counter() - began


@pytest.mark.slow
def test_a_small_image_does_not_wait_for_a_request_of_eight() -> None:
    with serving() as engine, connected(engine) as connection:
        alone_s = [seconds(engine, connection, f"alone {k}", **SMALL) for k in range(6)][1:]
        many = {"prompts": ["rocket", "pizza"], "samples_per_prompt": 4, "seed": 3, "steps": 40}
        began = time.perf_counter()
        connection.send(request(engine, "many", **many))
        running(connection)
        small_s = seconds(engine, connection, "small", **SMALL)
        (images,) = [images for _, images in answers(connection, 1).values()]
        many_s = time.perf_counter() - began
        assert small_s < 0.25 * many_s, (alone_s, small_s, many_s)
        singles = {f"{k}": {"prompts": [("rocket", "pizza")[k // 4]], "seed": 3 + k, "steps": 40} for k in (0, 5)}
        for name, (image,) in generate(engine, singles).items():
            assert rel_l2(images[int(name)], image) < FLOOR
    print(f"small alone {np.median(alone_s):.3f} s, beside eight {small_s:.3f} s, the eight {many_s:.2f} s")


@pytest.mark.slow
def test_small_images_do_not_wait_for_a_large_one_on_another_replica() -> None:
    with serving("parallel=dp2") as engine, connected(engine) as connection:
        alone_s = [seconds(engine, connection, f"alone {k}", **SMALL) for k in range(10)]
        connection.send(request(engine, "large", height=256, width=256, steps=100))
        running(connection)
        small_s = [seconds(engine, connection, f"small {k}", **SMALL) for k in range(10)]
        assert info(connection).running == 1  # the large one
        connection.cancel("large")
        assert kinds(answers(connection, 1)) == {"large": "cancelled"}
    # the two replicas share the machine's cores and caches
    assert np.median(small_s) < 3 * np.median(alone_s), (alone_s, small_s)
    print(f"small alone {np.median(alone_s):.3f} s, beside a large one {np.median(small_s):.3f} s")


@pytest.mark.slow
def test_a_client_keeps_its_share_beside_one_that_takes_all_it_can_get() -> None:
    with serving("load.background=2") as engine, connected(engine) as connection:
        alone_s = [seconds(engine, connection, f"alone {k}") for k in range(12)]
        stop, began = threading.Event(), threading.Event()
        with connected(engine) as greedy:
            arguments = (engine.config, greedy, stop, began)
            thread = threading.Thread(target=send_without_pause, args=arguments)
            thread.start()
            began.wait()
            time.sleep(2.0)  # until the large requests run
            beside_s = [seconds(engine, connection, f"beside {k}") for k in range(12)]
            assert info(connection).running >= 1
            stop.set()
            thread.join()
    alone, beside = np.quantile(alone_s, 0.99), np.quantile(beside_s, 0.99)
    assert beside < 3 * alone, (alone_s, beside_s)
    print(f"p99 alone {alone:.3f} s, beside {beside:.3f} s")


@pytest.mark.slow
@pytest.mark.parametrize("max_batch", [8, 1])
@pytest.mark.parametrize("layout", ["single", "dp2", "cfg2", "tp2", "ulysses2"])
def test_what_all_ranks_raise_alike_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, max_batch: int
) -> None:
    for name, value in raised_alike(tmp_path).items():
        monkeypatch.setenv(name, value)
    with serving(f"parallel={layout}", f"serve.max_batch={max_batch}") as engine, connected(engine) as connection:
        pids = info(connection).pids
        for prompt, says in (("raises", "planted fault"), ("spoils", "not finite")):
            connection.send(request(engine, "beside", steps=4))
            connection.send(request(engine, "bad", prompts=[prompt], steps=2))
            found = answers(connection, 2)
            assert kinds(found) == {"beside": "ok", "bad": "failed"}
            failure = found["bad"][0]
            assert isinstance(failure, Failure)
            assert says in failure.message
        assert info(connection).pids == pids
        connection.send(request(engine, "good", steps=3))
        assert kinds(answers(connection, 1)) == {"good": "ok"}
