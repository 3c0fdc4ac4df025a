"""An offline wandb run read back: its series and axes, configuration, names, times, artifacts and resumption."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import wandb
import yaml
from PIL import Image

from harness.config.schema import RunConfig, WandbConfig, WandbMode
from harness.config.yaml import to_dict
from harness.loggers.declared import used_config
from harness.loggers.report import log_report
from harness.loggers.run_names import MOST, folder_title, job_title, shorten, wandb_group, wandb_id
from harness.loggers.scalars import record_scalars
from harness.loggers.series import load_series
from harness.loggers.wandb import log_failure, log_load, log_run
from harness.metrics.load import RequestRow, summarize_load
from harness.records.provenance import Git
from harness.records.record import Record, RunFolder, Status
from harness.resolve.compose import compose_run
from tests.fixtures.records import record
from tests.fixtures.training import offline_runs

ROOT = Path(__file__).parents[3]
OFFLINE = WandbConfig(WandbMode.offline)
VARIABLES = ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_TAGS", "WANDB_RUN_ID")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def rows_of(log: Path) -> list[dict[str, Any]]:
    """Return the rows of an offline run's log, as wandb itself reads them back."""
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def parts(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row[kind] for row in rows if row["type"] == kind]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in parts(rows, "summary"):
        found |= part["update"]
    return found


def bench_record() -> Record:
    config = to_dict(compose_run(["task=bench", "tags=[one]", "notes=a try"]).config)
    made = record()
    origin = msgspec.structs.replace(made.provenance, git=Git("c" * 40, False))
    return msgspec.structs.replace(made, config=config, provenance=origin)


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """Return the wandb runs of a job that failed, and was done again in its folder."""
    folder = RunFolder.claim(tmp_path_factory.mktemp("runs") / "2026-11-30" / "10-00-00")
    made = bench_record()
    log_failure(OFFLINE, made.config, folder.path, "bench", Status("failed", "planted"))
    (folder.path / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(folder.path / made.samples[0].path)
    folder.write_record(made)
    log_run(OFFLINE, made, folder.path, "bench", Status("ok"))
    return [rows_of(log) for log in offline_runs(folder.path)]


def test_every_series_has_its_axis(attempts: list[list[dict[str, Any]]]) -> None:
    rows = attempts[-1]
    axes = {part.get("name") or part["glob_name"]: part.get("step_metric") for part in parts(rows, "metric")}
    for metric in ("latency_ms", "stage_ms/*", "networks_ms/*", "memory_mib/*"):
        assert axes[metric] == "repeat"
    assert axes["step_ms/*"] == "step"
    assert axes["repeat"] is axes["step"] is None
    points = [part["item"] for part in parts(rows, "history")]
    over_repeats = [point for point in points if "repeat" in point]
    assert [(point["repeat"], point["latency_ms"], point["stage_ms/denoising"]) for point in over_repeats] == [
        (0, 10.0, 10.0),
        (1, 10.0, 10.0),
    ]
    assert [(point["step"], point["step_ms/median"]) for point in points if "step" in point] == [(0, 5.0), (1, 5.0)]


def test_the_times_are_those_of_the_run(attempts: list[list[dict[str, Any]]]) -> None:
    ended = summary(attempts[-1])
    assert (ended["started"], ended["duration_s"]) == ("2026-11-30T00:00:00+00:00", 60.0)
    points = [part["item"] for part in parts(attempts[-1], "history") if "repeat" in part["item"]]
    assert {point["_timestamp"] for point in points} == {1795996860.0}


def test_the_configuration_has_the_groups_in_use_and_the_origin(attempts: list[list[dict[str, Any]]]) -> None:
    (run,) = parts(attempts[-1], "run")
    config = run["config"]["update"]
    assert config["provenance"]["git"] == {"commit": "c" * 40, "dirty": False}
    assert run["git"]["commit"] == "c" * 40
    assert config["overrides"] == ["request.steps=2"]
    assert {"request", "scheduler", "model"} <= set(config)
    assert not {"train", "serve", "load", "plan", "hardware", "report"} & set(config)
    assert (run["tags"], run["notes"], run["job_type"]) == (["one"], "a try", "bench")


def test_a_job_that_is_done_again_goes_on_with_its_run(attempts: list[list[dict[str, Any]]]) -> None:
    first, second = (next(iter(parts(rows, "run"))) for rows in attempts)
    assert first["run_id"] == second["run_id"]
    assert first["resume"]
    assert second["resume"]
    assert first["display_name"] == second["display_name"] == "2026-11-30-10-00-00"
    assert (summary(attempts[0])["state"], summary(attempts[0])["error"]) == ("failed", "planted")
    assert (summary(attempts[1])["state"], summary(attempts[1])["error"]) == ("ok", None)


def test_record_and_samples_are_artifacts(attempts: list[list[dict[str, Any]]]) -> None:
    found = {part["type"]: part for part in parts(attempts[-1], "artifact")}
    files = {kind: {entry["path"] for entry in part["manifest"]["contents"]} for kind, part in found.items()}
    assert files["record"] == {"record.json", "status.json"}
    assert files["samples"] == {"samples/0000.png"}
    assert all(Path(entry["local_path"]).is_absolute() for entry in found["samples"]["manifest"]["contents"])


def test_variables_of_wandb_win_over_defaults_and_not_over_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as set_variables:
        for name in VARIABLES:
            set_variables.setenv(name, name.lower().replace("_", "-"))
        wandb.teardown()  # it reads its variables once in a process
        log_failure(WandbConfig(WandbMode.offline, project="mine"), {}, tmp_path, "bench", Status("failed", "planted"))
    wandb.teardown()
    (run,) = parts(rows_of(offline_runs(tmp_path)[0]), "run")
    found = {key: run[key] for key in ("project", "entity", "display_name", "run_group", "tags", "run_id")}
    assert found == {
        "project": "mine",
        "entity": "wandb-entity",
        "display_name": "wandb-name",
        "run_group": "wandb-run-group",
        "tags": ["wandb-tags"],
        "run_id": "wandb-run-id",
    }


def test_a_load_is_a_series_over_its_time(tmp_path: Path) -> None:
    sent = [RequestRow(str(k), k / 2, k / 2, 2, 64, 64, 1, ended_s=k / 2 + 0.25, outcome="ok") for k in range(8)]
    sent.append(RequestRow("late", 3.5, 3.5, 2, 64, 64, 1))
    (tmp_path / "requests.jsonl").write_bytes(b"\n".join(msgspec.json.encode(row) for row in sent))
    load = summarize_load(sent, "zmq", 2.0, 1, 4.0)
    log_load(OFFLINE, msgspec.structs.replace(bench_record(), load=load), load, tmp_path, Status("failed", "lost"))
    rows = rows_of(offline_runs(tmp_path)[0])
    axes = {part.get("name") or part["glob_name"]: part.get("step_metric") for part in parts(rows, "metric")}
    assert axes["load/*"] == "elapsed_s"
    points = [part["item"] for part in parts(rows, "history") if "elapsed_s" in part["item"]]
    assert [point["load/answers_per_s"] for point in points] == [2.0] * 4
    assert [point["load/not_ok"] for point in points] == [0, 0, 0, 1]
    assert points[0]["load/latency_ms_p50"] == 250.0
    assert (summary(rows)["state"], parts(rows, "exit")[0]["exit_code"]) == ("failed", 1)


def test_a_long_load_has_few_points() -> None:
    sent = [RequestRow(str(k), k, k, 2, 64, 64, 1, ended_s=k + 0.5, outcome="ok") for k in range(0, 600, 3)]
    series = load_series(sent, 600.0)
    assert len(series.points) == 60
    assert sum(point["load/answers_per_s"] * 10 for point in series.points) == pytest.approx(len(sent))
    assert load_series([], 600.0).points == []


def test_only_keys_that_have_an_effect_are_mirrored() -> None:
    config = to_dict(RunConfig())
    assert config["task"]["name"] == "generate"
    assert "cache" not in used_config(config)["engine"]
    config["engine"]["name"] = "cache_dit"
    assert used_config(config)["engine"]["cache"] == config["engine"]["cache"]
    assert ("fidelity_per_step" in used_config(config)["task"]) is config["task"]["fidelity"]
    config["task"]["fidelity"] = not config["task"]["fidelity"]
    assert ("fidelity_per_step" in used_config(config)["task"]) is config["task"]["fidelity"]
    assert used_config({"declared": 1}) == {"declared": 1}


def test_what_is_null_or_of_another_family_is_not_mirrored() -> None:
    config = to_dict(compose_run(["task=bench"]).config)
    shown = used_config(config)
    assert shown["model"]["checkpoint_defaults"] == {"rectified_flow": {"prediction": "flow", "weights": "transformer"}}
    assert shown["scheduler"] == {"family": "rectified_flow", "prediction": "flow", "solver": {"name": "euler"}}
    assert shown["cache"] == {"name": "none"}
    assert shown["request"]["guidance"] == config["request"]["guidance"]


def test_a_job_is_named_by_the_keys_that_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["task=bench", "scheduler/solver=heun", "request.steps=4", "+meta.a=1", "meta.b.a=2"]
    assert job_title(None, overrides, {"scheduler/solver", "request.steps"}) == "solver=heun,steps=4"
    assert job_title("mine", overrides, {"meta.a", "meta.b.a"}) == "mine,meta.a=1,meta.b.a=2"
    assert job_title(None, overrides, ()) is None
    monkeypatch.setenv("WANDB_NAME", "ours")
    assert job_title(None, overrides, {"request.steps"}) == "ours,steps=4"


def test_long_names_are_shortened_and_differ() -> None:
    names = {shorten("x" * 200 + end) for end in "ab"}
    assert len(names) == 2
    assert {len(name) for name in names} == {MOST}
    assert MOST < 128
    assert shorten("x" * MOST) == "x" * MOST


def test_a_group_and_a_title_come_from_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder_title(tmp_path / "2026-11-30" / "10-00-00") == "2026-11-30-10-00-00"
    assert folder_title(tmp_path / "mine") == "mine"
    assert wandb_group(None, Path("sweeps/2026-11-30/10-00-00")) == "2026-11-30-10-00-00"
    monkeypatch.setenv("WANDB_RUN_GROUP", "ours")
    assert wandb_group(None, Path("sweeps/a")) == "ours"
    assert wandb_group("mine", Path("sweeps/a")) == "mine"


def test_a_folder_may_have_several_runs(tmp_path: Path) -> None:
    assert wandb_id(tmp_path) == wandb_id(tmp_path) != wandb_id(tmp_path, "report_id")


def test_a_report_is_an_artifact_of_a_run_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<html></html>")
    declared = to_dict(compose_run(["task=report", f"report.runs={tmp_path}"]).config)
    log_report(WandbConfig(WandbMode.auto), tmp_path / "report.html", declared)
    assert not (tmp_path / "wandb").exists()
    for _ in range(2):
        log_report(OFFLINE, tmp_path / "report.html", declared)
    first, second = (rows_of(log) for log in offline_runs(tmp_path))
    assert parts(first, "run")[0]["run_id"] == parts(second, "run")[0]["run_id"] != wandb_id(tmp_path)
    (artifact,) = parts(first, "artifact")
    assert [entry["path"] for entry in artifact["manifest"]["contents"]] == ["report.html"]
    assert parts(first, "run")[0]["config"]["update"]["report"]["runs"] == str(tmp_path)


def test_the_shipped_sweep_starts_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is the one that wandb's own agent makes of it."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    shipped = yaml.safe_load((ROOT / "harness/loggers/sweep.yaml").read_text())
    chosen = {
        name: {"value": row.get("value", row.get("values", [None])[-1])} for name, row in shipped["parameters"].items()
    }
    made = create_sweep_command_args({"args": chosen}) | {"env": ["/usr/bin/env"], "interpreter": ["python"]}
    command = [word for part in create_sweep_command(shipped["command"]) for word in made.get(part[2:-1], [part])]
    assert command[:4] == ["/usr/bin/env", "python", "-m", "harness"]
    config = compose_run(command[4:]).config
    assert (config.task.name.name, config.scheduler.solver.name, config.request.steps) == ("bench", "heun", 16)
    assert shipped["metric"]["name"] in record_scalars(record())


def test_wandb_itself_finds_what_the_page_syncs(tmp_path: Path) -> None:
    log_failure(OFFLINE, {}, tmp_path, "bench", Status("failed", "planted"))
    command = [str(Path(sys.executable).parent / "wandb"), "sync", "--dry-run", str(tmp_path / "wandb")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert f"run-{wandb_id(tmp_path)}.wandb" in "".join((done.stdout + done.stderr).split())
