"""When requests are sent: bursts, ramps, a given number, all at once, and arrivals of a trace."""

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from harness.config.load import LoadConfig, Ramp, check_load
from harness.datasets.trace import read_trace
from harness.loggers.load import describe_arrivals, describe_rules
from harness.metrics.load import RequestRow, is_within_slo
from harness.resolve.compose import ConfigError, ResolvedRun, compose_run
from harness.tasks.load import entry
from harness.tasks.load.arrivals import ArrivalRate, arrival_schedule, generate_requests, random_arrivals, warmup_load
from harness.tasks.load.measurement import summarize
from tests.fixtures.commands import record_of
from tests.fixtures.foreign_server import ForeignServer, foreign_server


def dues(load: LoadConfig, length_s: float = 10.0) -> list[float]:
    """Return all times of an open loop."""
    schedule = arrival_schedule(load, length_s, 1)
    times = []
    while schedule.next_due is not None:
        times.append(schedule.pop())
    return times


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 16.0])
def test_gaps_vary_by_the_burstiness_and_keep_the_rate(burstiness: float) -> None:
    arrivals = random_arrivals(ArrivalRate(20.0, 20.0, 1.0), burstiness, np.random.default_rng(0))
    gaps = np.diff(list(islice(arrivals, 40_000)))
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert (gaps.std() / gaps.mean()) ** 2 == pytest.approx(1 / burstiness, rel=0.1)


@pytest.mark.parametrize("ramp", list(Ramp))
def test_a_ramp_has_its_rates_at_both_ends_and_its_mean(ramp: Ramp) -> None:
    rate = ArrivalRate(2.0, 32.0, 10.0, ramp)
    times = [rate.time_of(0.001 * k) for k in range(1_000_000)]
    per_s = np.histogram(times, bins=2_000, range=(0, 20))[0] * 0.001 / 0.01
    middle = 17.0 if ramp is Ramp.linear else 8.0  # the arithmetic and the geometric mean
    assert per_s[0] == pytest.approx(2.0, rel=0.1)
    assert per_s[500] == pytest.approx(middle, rel=0.02)
    assert per_s[999] == pytest.approx(32.0, rel=0.02)
    assert per_s[1500] == pytest.approx(32.0, rel=0.02)
    for length_s in (5.0, 10.0, 15.0):
        assert rate.mean(length_s) == pytest.approx(np.mean(per_s[: int(100 * length_s)]), rel=0.01)
    assert times == sorted(times)


def test_a_number_of_requests_is_sent_whatever_the_time() -> None:
    assert len(dues(LoadConfig(rate=5.0, requests=200), length_s=1.0)) == 200
    assert dues(LoadConfig(at_once=True, requests=7)) == [0.0] * 7
    closed = arrival_schedule(LoadConfig(clients=2, requests=5), 1.0, 1)
    sent = 0
    while closed.next_due is not None:
        sent += 1
        closed.on_answer(closed.pop() + 60.0, 0.0)
    assert sent == 5
    assert dues(LoadConfig(clients=9, requests=4)) == [0.0] * 4


def test_a_warm_up_is_steady_and_ends_by_time() -> None:
    ramp = warmup_load(LoadConfig(rate=100.0, ramp_from=2.0, requests=9))
    assert (ramp.rate, ramp.ramp_from, ramp.requests) == (2.0, None, None)
    assert warmup_load(LoadConfig(at_once=True, requests=9)).at_once is False
    assert warmup_load(LoadConfig(trace="x.csv")).trace is None


JSONL = [
    {"time_ms": 5000, "prompt": "late", "size": "96x64"},
    {"time_ms": 4500, "steps": 3},
    {"time_ms": 4600, "num_inference_steps": 4, "seed": 9, "negative_prompt": "blur", "height": 8, "width": 16},
]


def write(path: Path, lines: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_trace_gives_times_and_fields_in_their_order(tmp_path: Path) -> None:
    file = write(tmp_path / "trace.jsonl", JSONL)
    config = compose_run(["task=load", f"load.trace={file}", "request.prompt=rocket", "request.seed=3"]).config
    assert dues(config.load) == pytest.approx([0.0, 0.1, 0.5])
    found = [(r.prompts, r.steps, r.seed, r.height, r.width, r.negative_prompt) for r in generate_requests(config, 1)]
    assert found == [
        (["rocket"], 3, 3, 64, 64, ""),
        (["rocket"], 4, 9, 8, 16, "blur"),
        (["late"], 20, 5, 64, 96, ""),
    ]
    assert len(dues(replace(config.load, requests=2))) == 2
    table = tmp_path / "trace.csv"
    table.write_text("time_s,prompt,size\n1.5,a,\n0.5,b,96x64\n")
    assert [(r.time_s, r.prompt, r.width, r.line) for r in read_trace(str(table))] == [
        (0.0, "b", 96, 3),
        (1.0, "a", None, 2),
    ]


@pytest.fixture(scope="module")
def plain() -> ResolvedRun:
    """Return a load with the defaults."""
    return compose_run(["task=load"])


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        ([], "has no arrivals"),
        ([{"time_s": 0}, {"prompt": "x"}], "line 2: give time_s or time_ms, and one of them only"),
        ([{"timestamp": 0}], "line 1: unknown field 'timestamp'; give time_s or time_ms"),
        ([{"time_s": "soon"}], "line 1: time_s=soon; give a number"),
        ([{"time_s": 0, "steps": 0}], "line 1: steps=0; give a whole number from 1 to 10000"),
        ([{"time_s": 0, "size": "64"}], "line 1: size=64; write it as 512x768, width first"),
        ([{"time_s": 0, "height": 64}], "line 1: give both height and width"),
        ([{"time_s": 0, "prompt": 3}], "line 1: prompt=3; give a text"),
        ([3], "line 1: not a JSON object"),
        ([{"time_s": 0, "size": "65x64"}], "line 1: request.width=65 is not a multiple of 8"),
        ([{"time_s": 0}, {"time_s": 1, "steps": 251}], "line 2: the request asks for 251 steps"),
    ],
)
def test_a_broken_trace_is_refused_by_its_line(
    plain: ResolvedRun, tmp_path: Path, lines: list[object], line: str
) -> None:
    file = write(tmp_path / "trace.jsonl", lines)
    run = replace(plain, config=copy.deepcopy(plain.config))
    run.config.load.trace = str(file)
    with pytest.raises(ConfigError, match=line) as caught:
        entry.check(run)
    assert str(file) in str(caught.value)


def test_a_file_that_is_no_trace_is_refused_before_anything_starts() -> None:
    for file, line in (("x.txt", "does not end in .jsonl or .csv"), ("missing.csv", "cannot be read")):
        with pytest.raises(ConfigError, match=line):
            compose_run(["task=load", f"load.trace={file}"])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"trace": "x.csv", "rate": 2.0}, "load.trace has arrivals of its own; drop load.rate"),
        ({"at_once": True}, "add load.requests"),
        ({"at_once": True, "requests": 3, "rate": 2.0}, "drop load.rate"),
        ({"burstiness": 2.0}, "add load.rate"),
        ({"ramp_from": 2.0}, "add load.rate, the one at the end"),
        ({"rate": 2.0, "ramp_s": 2.0}, "from load.ramp_from; add that"),
        ({"slo_percentile": 99.0}, "add load.slo_ms"),
    ],
)
def test_arrivals_that_contradict_one_another_are_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        check_load(LoadConfig(**changes))


def test_a_queue_that_cannot_hold_all_at_once_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"serve.max_queue=64 of them may wait; add serve.max_queue=5000"):
        entry.check(compose_run(["task=load", "load=offline"]))


def test_presets_have_the_minimums_of_mlperf_and_each_can_be_overridden() -> None:
    def load(*overrides: str) -> LoadConfig:
        return compose_run(["task=load", *overrides]).config.load

    single, server, offline = load("load=single_stream"), load("load=server"), load("load=offline")
    assert [each.min_duration_s for each in (single, server, offline)] == [600, 600, 600]
    assert (single.clients, single.rate, single.min_queries) == (1, None, 64)
    assert (server.slo_ms, server.slo_percentile, server.burstiness) == (20_000, 99, 1)
    assert (server.rate or 0) * server.duration_s > server.min_queries + 3 * server.min_queries**0.5
    assert (offline.at_once, offline.requests, offline.min_queries) == (True, 5000, 5000)
    short = load("load=server", "load.duration_s=5", "load.rate=3", "load.min_queries=9")
    assert (short.duration_s, short.rate, short.min_queries, short.min_duration_s) == (5, 3, 9, 600)


def row(due_s: float, ended_s: float, outcome: str = "ok") -> RequestRow:
    return RequestRow("x", due_s, due_s, 4, 64, 64, 1, None, ended_s, outcome)


def test_a_record_says_whether_the_minimums_were_met() -> None:
    config = compose_run(["task=load", "load=server", "load.min_duration_s=20", "load.min_queries=2"]).config
    config.load.duration_s = 10.0
    cases = {
        "long enough": [row(0.0, 1.0), row(9.0, 21.0)],
        "too short": [row(0.0, 1.0), row(9.0, 19.0)],
        "too few": [row(0.0, 1.0), row(9.0, 21.0, "busy")],
    }
    found = {name: summarize(config, rows, 0, None) for name, rows in cases.items()}
    assert [each.minimums is not None and each.minimums.met for each in found.values()] == [True, False, False]
    assert [each.slo_met for each in found.values()] == [True, True, False]
    assert found["too few"].scenario == "server"
    assert "not met, so this run does not count (21 s and 1)" in describe_rules(found["too few"])[0]
    assert summarize(compose_run(["task=load"]).config, cases["too short"], 0, None).minimums is None


def test_an_objective_counts_what_failed_as_late() -> None:
    rows = [row(0.0, 0.1)] * 98 + [row(0.0, 5.0), row(0.0, 0.1, "busy")]
    assert is_within_slo(rows, 1000.0, 98)
    assert not is_within_slo(rows, 1000.0, 99)
    assert not is_within_slo([], 1000.0, 50)


def test_a_trace_is_replayed_and_its_rate_and_hash_are_recorded(tmp_path: Path) -> None:
    file = write(tmp_path / "trace.jsonl", [{"time_s": 0.1 * k, "prompt": f"p{k}"} for k in range(4)])
    with foreign_server(ForeignServer("sglang")) as server:
        own = ["load.transport=http", f"load.url={server.url}", "load.dialect=sglang", "load.warmup_s=0", "logger=json"]
        run = replace(compose_run(["task=load", f"load.trace={file}", *own]), folder=tmp_path / "run")
        entry.check(run)
        assert entry.execute(run, Console(quiet=True)).state == "ok"
    assert [body["prompt"] for body in server.bodies] == ["p0", "p1", "p2", "p3"]
    found = record_of(tmp_path / "run").load
    assert found is not None
    assert (found.arrivals, found.sent, found.clients) == ("trace", 4, None)
    assert found.duration_s == pytest.approx(0.3)
    assert found.offered_per_s == pytest.approx(4 / 0.3)
    assert record_of(tmp_path / "run").config["load"]["trace_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ConfigError, match=r"and load.trace_sha256 is "):
        compose_run(["task=load", f"load.trace={file}", f"load.trace_sha256={run.config.load.trace_sha256}"])
    assert describe_arrivals(found) == "13.3333 requests/s offered (trace)"


def test_more_connections_than_open_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (1024, 1024))
    many = ["task=load", "load.at_once=true", "load.requests=2000", "serve.max_queue=2000"]
    with pytest.raises(ConfigError, match=r"may have 1024 files open; run `ulimit -n 2100` first"):
        entry.check(compose_run([*many, "load.transport=http"]))
    entry.check(compose_run(many))
