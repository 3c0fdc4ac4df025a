"""Clients of task=load: arrivals by rate and seed, percentiles, and one outcome for every request."""

import asyncio
import base64
import json
import math
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
from rich.console import Console

from harness.config.load import LoadConfig
from harness.config.schema import RunConfig
from harness.engines.processes import children
from harness.engines.protocol import AttachedEngine
from harness.messages import GenerationRequest, Message
from harness.metrics.load import OK, Chaos, RequestRow, longest_gap_s, percentiles, summarize_load
from harness.records import load
from harness.records.record import RunFolder, Status, read_record
from harness.resolve.compose import ConfigError, compose_run
from harness.resolve.request import to_message
from harness.serving.transport import Connection
from harness.tasks.common.comparison import comparison_runs
from harness.tasks.load import entry, http
from harness.tasks.load.arrivals import (
    ArrivalRate,
    ArrivalSchedule,
    arrival_schedule,
    generate_requests,
    random_arrivals,
)
from harness.tasks.load.compare import compare_loads, round_times
from harness.tasks.load.measurement import LoadMeasurement, merge_rounds
from harness.tasks.load.neighbours import busy_processes, neighbour_rounds
from harness.tasks.load.over_http import server_overrides
from harness.tasks.load.phases import with_rate
from harness.tasks.load.run import REQUESTS_FILE, status_from_loads
from harness.tasks.load.server import command_line, descendants, fit_memory_growth, rank_processes
from harness.tasks.load.tracker import RequestTracker
from harness.tasks.load.zeromq import drive
from tests.fixtures.commands import cpu_seconds, record_of, wait_for
from tests.fixtures.foreign_server import png
from tests.fixtures.records import assert_valid, record
from tests.fixtures.serving.fake_engine import Script, failure, fake_result, planted, progress


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return compose_run(["task=load", "load.rate=100", "request.prompts=[red apple,rocket]"]).config


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    arrivals = random_arrivals(ArrivalRate(50.0, 50.0, 400.0), 1.0, np.random.default_rng(0))
    times = np.asarray(list(takewhile(lambda time_s: time_s < 400.0, arrivals)))
    assert len(times) == pytest.approx(20_000, abs=4 * math.sqrt(20_000))
    gaps = np.diff(times)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)  # of an exponential distribution they are equal
    assert np.mean(gaps > 2 / 50) == pytest.approx(math.exp(-2), abs=0.01)
    counts = np.histogram(times, bins=400, range=(0, 400))[0]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.25)  # nor do they avoid each other or come in groups
    assert times.min() >= 0
    assert times.max() < 400


def test_a_phase_of_a_seed_is_the_same_and_others_differ() -> None:
    def dues(seed: int, phase: int) -> list[float]:
        made = arrival_schedule(LoadConfig(rate=5.0, seed=seed), 20.0, phase)
        return [made.pop() for _ in range(50) if made.next_due is not None]

    assert dues(1, 0) == dues(1, 0)
    assert dues(1, 0) != dues(2, 0)
    assert dues(1, 0) != dues(1, 1)


def test_requests_are_generated_by_seed_with_images_of_their_own(config: RunConfig) -> None:
    sampled_from = msgspec.convert(msgspec.to_builtins(config), RunConfig)
    sampled_from.load.steps, sampled_from.load.sizes = [2, 4], [64, 128]

    def first(phase: int, number: int = 40) -> list[GenerationRequest]:
        return list(islice(generate_requests(sampled_from, phase), number))

    a, b = first(1), first(1)
    assert [(r.steps, r.height, r.seed, r.prompts) for r in a] == [(r.steps, r.height, r.seed, r.prompts) for r in b]
    assert len({r.request_id for r in [*a, *b]}) == 80
    assert {r.steps for r in a} == {2, 4}
    assert {(r.height, r.width) for r in a} == {(64, 64), (128, 128)}
    assert [r.seed for r in a] == list(range(40))
    assert [r.prompts for r in a[:3]] == [["red apple"], ["rocket"], ["red apple"]]
    assert {r.timeout_s for r in a} == {config.serve.timeout_s}
    assert [r.steps for r in a] != [r.steps for r in first(2)]


def test_percentiles_are_those_of_the_sample() -> None:
    found = percentiles([float(x) for x in range(1, 102)])
    assert found is not None
    assert (found.n, found.p50, found.p90, found.p99, found.mean) == (101, 51.0, 91.0, 100.0, 51.0)
    assert percentiles([]) is None


def row(due_s: float, ended_s: float | None, outcome: str = OK) -> RequestRow:
    return RequestRow("x", due_s, due_s + 0.5, 4, 64, 64, 2, due_s + 0.75, ended_s, outcome)


def test_latency_counts_from_when_a_request_was_meant_to_be_sent_and_throughput_to_the_last_answer() -> None:
    rows = [row(0.0, 1.0), row(1.0, 4.0), row(2.0, 8.0), row(3.0, 3.5, "busy"), row(3.0, None, "lost")]
    found = summarize_load(rows, "zmq", 2.0, 4, 5.0, slo_ms=3000.0, evaluations=6)
    assert found.latency_ms is not None
    assert (found.latency_ms.n, found.latency_ms.p50) == (3, 3000.0)
    assert found.queue_ms is not None
    assert found.queue_ms.p50 == 750.0
    assert found.late_ms is not None
    assert found.late_ms.p99 == 500.0
    assert found.outcomes == {"ok": 3, "busy": 1, "lost": 1}
    assert found.elapsed_s == 8.0
    assert found.throughput_per_s == 3 / 8
    assert found.goodput_per_s == 2 / 8
    assert found.images_per_evaluation == 3 * 4 * 2 / 6
    assert (found.offered_per_s, found.clients) == (2.0, None)
    early = summarize_load(rows[:1], "zmq", None, 4, 5.0)
    assert (early.elapsed_s, early.goodput_per_s, early.clients) == (5.0, None, 4)
    assert summarize_load([], "zmq", None, 1, 5.0).latency_ms is None


def driven(
    config: RunConfig, script: Script, times: ArrivalSchedule, patience_s: float = 5.0
) -> tuple[RequestTracker, list[str]]:
    """Return the requests that a fake engine saw, and those that were cancelled at the end."""
    with planted(script) as (engine, addresses):
        with closing(Connection(addresses)) as connection:
            tracker = drive(connection, times, generate_requests(config, 0), patience_s)
            connection.ping()  # after the cancellations, on the same socket
        return tracker, engine.cancelled


def test_every_request_has_one_outcome(config: RunConfig) -> None:
    def script(request: GenerationRequest, number: int) -> list[tuple[float, object]]:
        queued = (0.0, progress(request))
        return [
            [queued, (0.05, progress(request, "denoising")), (0.1, fake_result(request))],
            [(0.0, failure(request, "busy", 1.0))],
            [queued, (0.2, failure(request, "expired"))],
            [queued, (0.05, fake_result(request)), (0.1, fake_result(request))],
            [queued],
        ][number]  # type: ignore[return-value]

    tracker, cancelled = driven(config, script, ArrivalSchedule([0.0] * 5), patience_s=0.5)
    assert [each.outcome for each in tracker.rows] == ["ok", "busy", "expired", "ok", "lost"]
    assert tracker.strays == 1
    assert cancelled == [tracker.rows[4].request_id]
    first = tracker.rows[0]
    assert 0.05 <= (first.began_s or 0) <= (first.ended_s or 0) - 0.03
    assert [each.began_s for each in tracker.rows[1:]] == [None] * 4
    assert tracker.rows[1].message == "planted busy"


def test_a_second_answer_to_the_last_request_is_a_stray_too(config: RunConfig) -> None:
    tracker, _ = driven(
        config,
        lambda request, number: [(0.0, fake_result(request)), (0.05, fake_result(request))],
        ArrivalSchedule([0.0]),
    )
    assert tracker.strays == 1


def test_an_open_loop_sends_on_while_answers_are_late_and_charges_the_wait_to_them(config: RunConfig) -> None:
    dues = [0.05 * k for k in range(10)]
    tracker, _ = driven(config, lambda request, number: [(1.0, fake_result(request))], ArrivalSchedule(dues))
    rows = tracker.rows
    assert [each.due_s for each in rows] == dues
    assert rows[-1].sent_s < min(each.ended_s or 0 for each in rows)  # all were sent before the first answer
    assert all(1000 <= each.latency_ms < 1500 for each in rows)


def test_a_closed_loop_has_as_many_outstanding_as_clients_and_a_refused_one_waits(config: RunConfig) -> None:
    load = LoadConfig(rate=None, clients=3)

    def script(request: GenerationRequest, number: int) -> list[tuple[float, object]]:
        return [(0.0, failure(request, "busy", 10.0)) if number == 0 else (0.1, fake_result(request))]  # type: ignore[list-item]

    tracker, _ = driven(config, script, arrival_schedule(load, 1.0, 0))
    rows = tracker.rows
    assert {each.outcome for each in rows} == {"ok", "busy"}
    assert 6 <= len(rows) <= 21  # two clients for a second, 0.1 s each, and one request in progress
    for each in rows:
        assert sum(other.sent_s <= each.sent_s < (other.ended_s or 0) for other in rows) <= 3
    assert max(each.due_s for each in rows) < 1.0


def test_a_run_leaves_a_record_and_a_line_a_request_and_fails_where_an_answer_came_twice(tmp_path: Path) -> None:
    composed = compose_run(
        ["task=load", "load.rate=40", "load.duration_s=0.5", "load.warmup_s=0.1", "logger=json", "request.steps=3"]
    )

    def run(name: str, script: Script) -> Status:
        run = replace(composed, folder=tmp_path / name)
        with planted(script) as (_, addresses):
            return entry.execute(run, Console(quiet=True), lambda config, path: AttachedEngine(addresses, 5.0, {}))

    good = run("good", lambda request, number: [(0.01, fake_result(request))])
    assert good.state == "ok"
    found = read_record(tmp_path / "good")
    assert found is not None
    assert found.load is not None
    assert found.summary is None
    rows = [msgspec.json.decode(line) for line in (tmp_path / "good" / REQUESTS_FILE).read_bytes().splitlines()]
    assert len(rows) == found.load.sent == found.load.outcomes["ok"] > 5
    assert found.load.images_per_evaluation == 1.0  # warm-up is not among them
    assert load(tmp_path)["load.sent"][0] == found.load.sent
    assert_valid(tmp_path / "good")
    twice = run("twice", lambda request, number: [(0.0, fake_result(request)), (0.01, fake_result(request))])
    assert twice.state == "failed"
    assert "unexpected answers arrived" in (twice.error or "")
    assert read_record(tmp_path / "twice") is not None


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["load.steps=[0]"], "load.steps=0; give 1 to 10000"),
        (["load.sizes=[65]"], "the nearest this model can make is 64 or 72"),
        (["launch.mode=inprocess"], "use launch.mode=torchrun"),
        (["load.rate=0"], "load.rate=0.0; give 1e-06 to 10000"),
        (["serve.max_steps=3", "load.steps=[2,4]"], "asks for 4 steps; this server takes 3"),
        (["load.kill_every_s=5"], "add load.transport=http"),
        (["load.neighbours=[0,1]", "load.transport=http", "load.url=http://x"], "drop load.url"),
        (["load.neighbours=[0,1]", "compare.a=[]", "compare.b=[]"], "drop one of them"),
        (["compare.a=[]"], "give compare.a=.* and compare.b=.*, or neither"),
    ],
)
def test_what_cannot_be_sent_is_refused(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        entry.check(compose_run(["task=load", *overrides]))


def test_both_configurations_get_the_same_arrivals_in_alternation_and_their_ratio_is_found(tmp_path: Path) -> None:
    wait_s = {"a": 0.08, "b": 0.03}
    composed = compose_run(
        [
            "task=load",
            "load.clients=2",
            "load.duration_s=0.2",
            "load.warmup_s=0",
            "logger=json",
            "compare.a=[serve.max_batch=1]",
            "compare.b=[serve.max_batch=4]",
            f"hydra.run.dir={tmp_path / 'run'}",
        ]
    )
    said: list[tuple[str, int]] = []

    def script(name: str) -> Script:
        def answer(request: GenerationRequest, number: int) -> list[tuple[float, Message]]:
            said.append((name, request.seed))
            return [(wait_s[name], fake_result(request))]

        return answer

    with planted(script("a")) as (_, a), planted(script("b")) as (_, b):
        comparison, loads = compare_loads(
            composed,
            comparison_runs(composed),
            RunFolder.claim(tmp_path / "run"),
            Console(quiet=True),
            lambda config, path: AttachedEngine(a if path.name == "a" else b, 5.0, {}),
        )
    rounds = "".join(name for name, seed in said if seed == 0)
    assert rounds == "abba" * 4
    assert list(comparison.ratios) == ["answer", "latency_p50", "latency_p99"]
    assert 1.3 < comparison.ratios["latency_p50"].ratio < 4
    assert comparison.headline.differs
    assert comparison.headline.n == 8
    for name, summary in zip("ab", loads, strict=True):
        found = read_record(tmp_path / "run" / name)
        assert found is not None
        assert found.load == summary
        assert summary.duration_s == pytest.approx(1.6)
        assert 0 < summary.throughput_per_s <= 2 / wait_s[name]


def test_a_load_beside_busy_processes_alternates_and_says_how_much_slower_each_number_is(tmp_path: Path) -> None:
    """The engine is slower by as many busy processes as this process has children."""
    overrides = ["task=load", "load.neighbours=[0,2]", "task.repeats=2", "load.clients=1", "load.duration_s=0.4"]
    composed = compose_run([*overrides, "load.warmup_s=0", "logger=json"])
    assert neighbour_rounds(composed.config) == [0, 2, 2, 0]
    before = len(children(os.getpid()))

    def script(request: GenerationRequest, number: int) -> list[tuple[float, Message]]:
        return [(0.05 * (1 + len(children(os.getpid())) - before), fake_result(request))]

    run = replace(composed, folder=tmp_path / "run")
    with planted(script) as (_, addresses):
        status = entry.execute(run, Console(quiet=True), lambda config, path: AttachedEngine(addresses, 5.0, {}))
    assert status.state == "ok", status.error
    assert len(children(os.getpid())) == before
    found = record_of(tmp_path / "run").load
    assert found is not None
    assert [row.neighbours for row in found.neighbours] == [0, 2]
    assert found.neighbours[0].slowdown == 1.0
    assert found.neighbours[1].slowdown == pytest.approx(3.0, rel=0.3)
    assert sum(row.latency_ms.n for row in found.neighbours) == found.sent
    assert found.duration_s == pytest.approx(4 * 0.4)


def test_busy_processes_are_busy_and_end_with_the_block() -> None:
    with busy_processes(1) as (pid,):
        wait_for(lambda: cpu_seconds(pid) > 0.3, "the process to use a core")
    assert command_line(pid) == b""


def test_rounds_of_one_load_follow_one_another(config: RunConfig) -> None:
    rows = [[row(0.0, 1.0)], [row(0.25, 1.5), row(0.5, None, "lost")]]
    rounds = [LoadMeasurement(summarize_load(own, "zmq", 4.0, 4, 1.0, evaluations=2), own) for own in rows]
    whole = merge_rounds(config, rounds)
    assert [each.due_s for each in whole.rows] == [0.0, 1.25, 1.5]
    assert [each.ended_s for each in whole.rows] == [1.0, 2.5, None]
    assert [each.latency_ms for each in whole.rows][:2] == [1000.0, 1250.0]
    assert whole.summary.evaluations == 4
    assert whole.summary.outcomes == {"ok": 2, "lost": 1}


def test_a_round_without_a_good_answer_does_not_compare() -> None:
    with pytest.raises(ValueError, match="no request succeeded"):
        round_times(summarize_load([row(0.0, 1.0, "busy"), row(0.0, 1.0, "busy")], "zmq", 4.0, 4, 1.0))


def answer_of(request: httpx.Request) -> httpx.Response:
    """Return what a server answers to the k-th request, by its seed."""
    requested = json.loads(request.content)
    seed = requested["triptych"]["seed"]
    if seed == 0:
        image = {"b64_json": base64.b64encode(png("64x64")).decode()}
        return httpx.Response(200, json={"data": [image], "triptych": {"queued_ms": 250.0, "seed": 0}})
    if seed == 1:
        return httpx.Response(429, json={"error": {"code": "busy", "message": "m"}}, headers={"retry-after": "3"})
    if seed == 2:
        raise httpx.ReadError("the connection broke off")
    return httpx.Response(408, json={"error": {"code": "expired", "message": "late"}})


def test_over_http_an_outcome_is_the_error_s_code_and_a_broken_connection_is_lost(config: RunConfig) -> None:
    async def run() -> RequestTracker:
        async with httpx.AsyncClient(base_url="http://planted", transport=httpx.MockTransport(answer_of)) as client:
            return await http.drive(client, ArrivalSchedule([0.0] * 4), generate_requests(config, 0))

    rows = asyncio.run(run()).rows
    assert [each.outcome for each in rows] == ["ok", "busy", "lost", "expired"]
    assert rows[0].began_s == pytest.approx(rows[0].sent_s + 0.25, abs=0.05)
    assert rows[2].message == "ReadError: the connection broke off"
    sent = http.OWN.body(next(generate_requests(config, 0)))
    assert (sent["prompt"], sent["size"], sent["n"]) == ("red apple", "64x64", 1)
    assert http.retry_wait_s({"retry-after": "3"}) == 3.0
    assert http.retry_wait_s({"retry-after": "Mon, 30 Nov 2026 10:00:00 GMT"}) == http.BACKOFF_S


def test_a_server_s_overrides_are_the_load_s_without_what_is_ours_alone() -> None:
    common = ["parallel=dp2", "request.steps=4", "serve.max_batch=2"]
    ours = ["task=load", "load.rate=4", "logger=json", "logger.table=true", "hydra.run.dir=x", "+load.seed=1"]
    ours += ["dataset.file=a.txt", "request.prompts_file=a.txt"]
    assert server_overrides([*ours, *common]) == common


def test_growth_is_a_slope_and_descendants_are_found() -> None:
    found = fit_memory_growth([(10.0 + k, 100.0 + 0.5 * k) for k in range(5)])
    assert found is not None
    assert (found.n, found.start_mib, found.end_mib) == (5, 100.0, 102.0)
    assert found.slope_mib_per_min == pytest.approx(30.0)
    assert found.late_slope_mib_per_min == pytest.approx(30.0)
    levelled = fit_memory_growth([(0.0, 0.0), (10.0, 90.0), (20.0, 100.0), (30.0, 100.0)])
    assert levelled is not None
    assert levelled.late_slope_mib_per_min == pytest.approx(30.0, abs=0.1)
    assert levelled.slope_mib_per_min > 100
    assert fit_memory_growth([(0.0, 1.0)]) is None
    with subprocess.Popen(
        [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"], stdout=-1
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in descendants(os.getpid())
        assert b"time.sleep" in command_line(child.pid)
        child.kill()
    assert command_line(child.pid) == b""


def test_ranks_are_told_from_the_processes_that_started_them_by_their_names() -> None:
    """The command line of a forked rank is that of its fork server."""
    code = "import sys, time; from harness.engines.processes import set_process_name as name; name(sys.argv[1])\n"
    code += "print(1, flush=True); time.sleep(60)"
    names = ["triptych-forks", "triptych-0", "triptych-12"]
    processes = [subprocess.Popen([sys.executable, "-c", code, name], stdout=subprocess.PIPE) for name in names]
    try:
        assert all(process.stdout is not None and process.stdout.readline() for process in processes)
        assert rank_processes(os.getpid()) == {0: processes[1].pid, 12: processes[2].pid}
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_process_that_outlives_its_server_fails_the_load() -> None:
    leaked = msgspec.structs.replace(summarize_load([], "http", None, 1, 1.0), chaos=Chaos(2, 1))
    assert status_from_loads([leaked]).state == "failed"


def test_a_record_of_another_task_has_no_load() -> None:
    assert record().load is None
    assert status_from_loads([]).state == "ok"
    with pytest.raises(ValueError, match="no summary"):
        _ = msgspec.structs.replace(record(), summary=None).statistics


def test_the_longest_gap_counts_the_start_and_the_end_of_sending() -> None:
    assert longest_gap_s([1.0, 2.5, 4.0], 5.0) == 1.5
    assert longest_gap_s([4.0], 5.0) == 4.0
    assert longest_gap_s([1.0, 9.0], 5.0) == 4.0
    assert longest_gap_s([], 5.0) == 5.0


def test_a_rate_is_a_share_of_the_answers_in_the_warm_up() -> None:
    config = compose_run(["task=load", "load.rate_share=0.5", "load.warmup_s=2"]).config
    tracker = RequestTracker(lambda: 2.0)
    for number in range(6):
        request = msgspec.structs.replace(to_message(config.request), request_id=str(number))
        tracker.record_sent(request, 0.0)
        tracker.record_answer(str(number), OK if number < 4 else "busy")
    assert with_rate(config, tracker).load.rate == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"no request of the warm-up succeeded"):
        with_rate(config, RequestTracker())
    assert with_rate(compose_run(["task=load"]).config, tracker).load.rate is None


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["load.rate_share=0.8", "load.rate=2"], "load.rate_share sets the rate by the warm-up"),
        (["load.rate_share=0.8", "load.warmup_s=0"], "load.rate_share sets the rate by the warm-up"),
        (["load.rate_share=0.8", "compare.a=[]", "compare.b=[]"], "gives a and b the same arrivals"),
    ],
)
def test_a_share_that_sets_no_rate_is_refused(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        entry.check(compose_run(["task=load", *overrides]))
