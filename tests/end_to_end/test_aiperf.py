"""AIPerf, a ruler that belongs to no engine, drives image generation; task=load agrees with what it measures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest

from harness.metrics.load import RequestRow
from harness.metrics.paired import min_rounds, ratio
from harness.tasks.load.run import REQUESTS_FILE
from tests.fixtures.commands import LIMIT_S, command, record_of, run, started, wait_for

VERSION = "0.13"
PROGRAM = "TRIPTYCH_AIPERF"  # the aiperf of an environment that is there already
TOKENIZER = Path(__file__).parents[2] / "models/reference/emoji/tokenizer"
PROMPTS = ("rocket", "red apple", "pizza", "panda")
CLIENTS, STEPS, SECONDS = 4, 4, 15
LEVEL = 0.9
TOLERANCE = 0.1  # AIPerf is six processes that compute beside the ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def aiperf(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the program of an environment of its own."""
    if PROGRAM in os.environ:
        return os.environ[PROGRAM]
    folder = tmp_path_factory.mktemp("aiperf")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(folder / "bin/pip"), "install", "-q", f"aiperf=={VERSION}.*"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=1200, check=False)
    if done.returncode:
        pytest.skip(f"no aiperf {VERSION} from PyPI: {done.stderr.strip().splitlines()[-1]}")
    return str(folder / "bin/aiperf")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("serving") / "run"
    with started(command("task=serve", "serve.port=0", f"hydra.run.dir={folder}")) as process:
        assert process.stdout is not None
        found = re.search(r"http://127.0.0.1:\d+", process.stdout.readline())
        assert found is not None
        wait_for(lambda: httpx.get(f"{found[0]}/ready").status_code == 200, "the ranks", LIMIT_S)
        yield found[0], folder


def profile(aiperf: str, url: str, folder: Path, *arguments: str) -> tuple[list[float], float, list[str]]:
    """Run AIPerf; return the latency of each request in ms, requests a second, and the id of each request."""
    folder.mkdir()
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in PROMPTS))
    extra = {"num_inference_steps": STEPS, "size": "64x64", "guidance_scale": 3.0}
    sent = [argument for key, value in extra.items() for argument in ("--extra-inputs", f"{key}:{value}")]
    done = run(
        [
            *(aiperf, "profile", "--model", "emoji", "--url", url, "--endpoint-type", "image_generation"),
            *("--tokenizer", str(TOKENIZER), "--input-file", str(prompts), "--custom-dataset-type", "single_turn"),
            *("--output-artifact-dir", str(folder / "out"), "--ui", "none", "--export-level", "records"),
            *("--workers-max", "1", "--record-processors", "1", "--no-server-metrics", "--no-gpu-telemetry"),
            *("--warmup-request-count", str(2 * CLIENTS), "--concurrency", str(CLIENTS), *sent, *arguments),
        ]
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    whole = json.loads((folder / "out/profile_export_aiperf.json").read_text())
    lines = [json.loads(line) for line in (folder / "out/profile_export.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["metadata"]["benchmark_phase"] == "profiling"]
    assert not [line for line in lines if line.get("error")]
    latencies = [line["metrics"]["request_latency"]["value"] for line in lines]
    ids = [line["metadata"]["x_request_id"] for line in lines]
    return latencies, whole["request_throughput"]["avg"], ids


def load(url: str, folder: Path) -> tuple[list[float], float]:
    """Run task=load; return the latency of each good request in ms, and requests a second."""
    closed = ["load.transport=http", f"load.url={url}", f"load.clients={CLIENTS}", f"load.duration_s={SECONDS}"]
    prompts = f"request.prompts=[{','.join(PROMPTS)}]"
    done = run(command("task=load", *closed, prompts, f"request.steps={STEPS}", f"hydra.run.dir={folder}"))
    assert done.returncode == 0, done.stderr
    rows = [msgspec.json.decode(line, type=RequestRow) for line in (folder / REQUESTS_FILE).read_bytes().splitlines()]
    found = record_of(folder).load
    assert found is not None
    return [row.latency_ms for row in rows if row.outcome == "ok"], found.throughput_per_s


def test_throughput_and_percentiles_agree_with_task_load(aiperf: str, server: tuple[str, Path], tmp_path: Path) -> None:
    url, _ = server
    theirs: dict[str, list[float]] = {"p50": [], "p90": [], "seconds a request": []}
    ours: dict[str, list[float]] = {name: [] for name in theirs}
    for number in range(min_rounds(LEVEL)):
        latencies, rate, _ = profile(aiperf, url, tmp_path / f"aiperf{number}", "--benchmark-duration", str(SECONDS))
        for found, (each, per_s) in ((theirs, (latencies, rate)), (ours, load(url, tmp_path / f"load{number}"))):
            assert len(each) > CLIENTS
            found["p50"].append(float(np.quantile(each, 0.5)))
            found["p90"].append(float(np.quantile(each, 0.9)))
            found["seconds a request"].append(1.0 / per_s)
    for name, values in theirs.items():
        compared = ratio(values, ours[name], LEVEL)
        low, high = compared.interval
        print(f"{name}: AIPerf {np.median(values):.4g}, task=load {np.median(ours[name]):.4g}, ratio {compared}")
        assert low <= 1 + TOLERANCE, (name, values, ours[name])
        assert high >= 1 - TOLERANCE, (name, values, ours[name])


def test_streams_are_read_and_requests_keep_the_ids_that_aiperf_gave_them(
    aiperf: str, server: tuple[str, Path], tmp_path: Path
) -> None:
    url, folder = server
    inputs = ("--extra-inputs", "partial_images:2", "--extra-inputs", "output_format:jpeg")
    _, _, ids = profile(aiperf, url, tmp_path / "stream", "--streaming", *inputs, "--request-count", "12")
    served = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    streamed = [entry for entry in served if entry["http_id"] in ids]
    assert len(ids) == len(set(ids)) == len(streamed) == 12
    assert {entry["request"]["previews"] for entry in streamed} == {2}
    assert all(sample["path"].endswith(".jpeg") for entry in streamed for sample in entry["samples"])
