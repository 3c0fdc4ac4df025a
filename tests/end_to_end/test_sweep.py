"""A sweep is a folder, a record and a wandb run for each job, failed ones too, and one table at the end."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.records import load
from harness.records.record import INTERRUPTED, read_status
from harness.records.search import read_search
from tests.fixtures.commands import LIMIT_S, hashes, inspect, processes_about, record_of, run, started, wait_for
from tests.fixtures.records import assert_valid

HERE = [
    "launch.mode=inprocess",
    "launch.threads_per_rank=1",
    "request.prompt=rocket",
]  # imports torch once


def sweep(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "harness", "-m", *HERE, f"hydra.sweep.dir={folder}", *overrides])


def jobs(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.rglob("status.json"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a sweep of two solvers and two step counts, with wandb in offline mode."""
    folder = tmp_path_factory.mktemp("sweep") / "four"
    measured = ["task=bench", "task.repeats=2", f"task.references={folder.parent / 'references'}"]
    mirrored = ["logger=default", "logger.wandb.mode=offline"]
    done = sweep(folder, "scheduler/solver=euler,heun", "request.steps=1,2", *measured, *mirrored)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ok") >= 4, done.stdout
    assert "triptych: job 1 of 4: ok, scheduler/solver=euler, request.steps=1; 3 left, about " in done.stderr
    assert "triptych: job 4 of 4: ok, scheduler/solver=heun, request.steps=2\n" in done.stderr
    return folder


def test_every_job_has_its_folder_record_and_status(four: Path) -> None:
    assert len(jobs(four)) == 4
    seen = {}
    for job in jobs(four):
        record = record_of(job)
        assert read_status(job).state == "ok"
        assert (job / "config.yaml").exists()
        assert (job / record.samples[0].path).exists()
        request, solver = record.config["request"], record.config["scheduler"]["solver"]["name"]
        seen[solver, request["steps"]] = record.summary.nfe
        assert f"request.steps={request['steps']}" in job.name
    assert seen == {("euler", 1): 1, ("euler", 2): 2, ("heun", 1): 1, ("heun", 2): 3}
    assert len({record_of(job).fingerprint for job in jobs(four)}) == 4
    table = load(four)
    assert sorted(table["config.request.steps"]) == [1, 1, 2, 2]
    assert set(table["state"]) == {"ok"}
    assert sorted(table["job"]) == [0, 1, 2, 3]
    assert set(table["sweep"]) == {"-".join(four.parts[-2:])}
    assert table["wandb_id"].nunique() == 4
    assert table.sort_values("job")["started_at"].is_monotonic_increasing
    for job in jobs(four):
        assert_valid(job)


def test_every_job_is_a_finished_wandb_run_of_one_group(four: Path) -> None:
    for job in jobs(four):
        rows: list[dict[str, Any]] = [json.loads(line) for line in inspect(job).splitlines()]
        (declared,) = [row["run"] for row in rows if row["type"] == "run"]
        assert declared["run_group"] == "-".join(four.parts[-2:])
        assert [row["exit"].get("exit_code", 0) for row in rows if row["type"] == "exit"] == [0]


def test_wandb_holds_what_the_record_holds(four: Path) -> None:
    for job in jobs(four)[:2]:
        record, mirror = record_of(job), json.loads(inspect(job, "--summary"))
        solver, steps = record.config["scheduler"]["solver"]["name"], record.config["request"]["steps"]
        expected = f"solver={solver},steps={steps}"
        assert (mirror["state"], mirror["exit_code"], mirror["name"]) == ("finished", 0, expected)
        assert mirror["summary"]["latency_ms_median"] == record.summary.latency_ms.median
        assert mirror["summary"]["step_ms_median"] == record.summary.step_ms.median
        assert mirror["summary"]["nfe"] == record.summary.nfe
        assert mirror["summary"]["fingerprint"] == record.fingerprint
        assert mirror["summary"]["flops_per_step"] == record.summary.flops_per_step
        assert mirror["summary"]["achieved_tflops"] == record.summary.achieved_tflops
        assert record.fidelity is not None
        assert mirror["summary"]["fidelity_verdict"] == record.fidelity.verdict == "within_floor"
        assert mirror["summary"]["fidelity_pixel_rel_l2"] == record.fidelity.pixel.rel_l2
        assert mirror["summary"]["fidelity_floor_latent"] == record.fidelity.floor_latent
        assert record.quality is not None
        assert mirror["summary"]["quality_distance"] == record.quality.distance.value
        for group in ("model", "scheduler", "request", "launch"):
            shown = mirror["config"][group]
            assert shown.items() >= {k: v for k, v in record.config[group].items() if isinstance(v, int | str)}.items()
        assert mirror["summary"]["stages"]["nrows"] == len(record.summary.stage_ms)
        assert mirror["summary"]["grid"]["format"] == "png"


def test_a_job_that_fails_is_a_row_and_not_the_end(tmp_path: Path) -> None:
    done = sweep(tmp_path / "sweep", "request.steps=0,2", "logger=default", "logger.wandb.mode=offline")
    assert done.returncode == 1, done.stderr
    table = load(tmp_path / "sweep").set_index("state")
    assert sorted(table.index) == ["failed", "ok"]
    assert "request.steps=0; give 1 to" in table["error"]["failed"]
    assert table["config.request.steps"]["ok"] == 2
    assert "request.steps=0; give 1 to" in " ".join(done.stderr.split())
    assert "failed" in done.stdout
    for state, code in (("ok", 0), ("failed", 1)):
        job = Path(table["folder"][state])
        mirror = json.loads(inspect(job, "--summary"))
        assert (mirror["summary"]["state"], mirror["exit_code"]) == (state, code)
        (declared,) = [row["run"] for row in map(json.loads, inspect(job).splitlines()) if row["type"] == "run"]
        assert declared["run_group"].endswith("-sweep")


def test_prompts_that_differ_in_one_character_have_a_folder_and_an_image_each(tmp_path: Path) -> None:
    done = sweep(tmp_path / "sweep", "request.steps=1", 'request.prompt="a/b","a.b",é', "logger=json")
    assert done.returncode == 0, done.stderr
    samples = [sample for job in jobs(tmp_path / "sweep") for sample in record_of(job).samples]
    assert sorted(sample.prompt for sample in samples) == ["a.b", "a/b", "é"]
    assert len({sample.sha256 for sample in samples}) == 3


def test_an_unknown_name_stops_a_sweep_before_its_first_job(tmp_path: Path) -> None:
    done = sweep(tmp_path / "sweep", "scheduler/solver=euler,huen", "logger=json")
    assert done.returncode == 2
    assert "did you mean heun?" in done.stderr
    assert jobs(tmp_path / "sweep") == []


@pytest.mark.slow
def test_a_sweep_starts_ranks_once_an_engine_and_again_only_what_is_not_done(tmp_path: Path) -> None:
    folder, axes = tmp_path / "sweep", ["request.steps=1,2,0", "logger=json"]
    done = sweep(folder, *axes)
    assert done.returncode == 1
    assert "ranks were started 1 times and reused 1 times, which saved" in done.stdout
    assert "kept" not in done.stdout
    before = {job.name: (job / "status.json").stat().st_mtime_ns for job in jobs(folder)}
    refused, started, reused = (next(job for job in jobs(folder) if f"steps={n}" in job.name) for n in (0, 1, 2))
    assert record_of(started).first_call.reused is None
    assert record_of(reused).first_call.reused == str(started)
    (started / "status.json").write_text('{"state": "failed", "error": "the run was cut off before it ended"}')
    done = sweep(folder, *axes)
    assert done.returncode == 1, done.stderr
    assert "1 jobs were already done" in done.stdout
    after = {job.name: (job / "status.json").stat().st_mtime_ns for job in jobs(folder)}
    assert {name for name in after if after[name] != before[name]} == {started.name, refused.name}
    assert read_status(started).state == "ok"


@pytest.mark.slow
def test_a_bench_over_families_and_solvers_starts_ranks_for_three_roles_only(tmp_path: Path) -> None:
    """Those of the measured runs, references and floors change from job to job; images are those of fresh ones."""
    measured = ["task=bench", "task.repeats=1", f"task.references={tmp_path / 'references'}", "logger=json"]
    folder, where = tmp_path / "sweep", ["launch.mode=torchrun", "request.steps=4", *measured]
    done = sweep(folder, "scheduler=rectified_flow,ddpm", "scheduler/solver=ddim,dpmpp_2m", *where)
    assert done.returncode == 0, done.stderr
    assert "ranks were started 3 times and reused 13 times" in done.stdout
    records = {job: record_of(job) for job in jobs(folder)}
    assert len({record.samples[0].sha256 for record in records.values()}) == 4
    for number, (job, record) in enumerate(records.items()):
        scheduler = record.config["scheduler"]
        names = [f"scheduler={scheduler['family']}", f"scheduler/solver={scheduler['solver']['name']}"]
        alone = tmp_path / f"alone{number}"
        overrides = [*HERE, "launch.mode=torchrun", *where, *names, "task.fidelity=false", f"hydra.run.dir={alone}"]
        assert run([sys.executable, "-m", "harness", *overrides]).returncode == 0
        assert hashes(alone) == hashes(job)
        assert record.fidelity is not None
        assert record.fidelity.verdict in ("identical", "within_floor")
    assert [record.first_call.reused for record in records.values()].count(None) == 1


SWEEPS = (
    ["launch.mode=inprocess", "model.load=checkpoint,dummy", "request.steps=1,2"],
    ["launch.mode=inprocess", "scheduler=rectified_flow,ddpm,sgm", "scheduler/solver=ddim,heun", "request.steps=2"],
    ["attention=sdpa,math", "parallel=single,dp2", "request.samples_per_prompt=2", "request.steps=1,2"],
    ["launch.mode=inprocess", "request.guidance=1", "request.steps=1,2,3,4,5,0"],
)


@pytest.mark.slow
def test_a_sweep_that_was_killed_ends_with_every_row_once(tmp_path: Path) -> None:
    """24 jobs over model, family, solver, steps, attention and layout: one cannot run, and one command is killed."""
    folder = tmp_path / "sweep"
    common = [sys.executable, "-m", "harness", "-m", "launch.threads_per_rank=1", "request.prompt=rocket"]
    commands = [[*common, "logger=json", f"hydra.sweep.dir={folder}", *axes] for axes in SWEEPS]
    assert [run(command).returncode for command in commands[:2]] == [0, 0]
    with started(commands[2]) as process:
        wait_for(lambda: len(jobs(folder)) == 13, "the third job of eight to start", LIMIT_S)
        process.kill()
        process.wait(timeout=LIMIT_S)
    wait_for(lambda: not processes_about(folder), "its ranks to end")
    before = {job: (job / "status.json").stat().st_mtime_ns for job in jobs(folder)}
    cut = [job for job in before if read_status(job) == INTERRUPTED]
    assert len(before) == 13
    assert len(cut) == 1
    outcomes = [run(command) for command in commands]
    assert [done.returncode for done in outcomes] == [0, 0, 0, 1], [done.stderr for done in outcomes]
    kept = [next(line for line in done.stdout.splitlines() if "were already done" in line) for done in outcomes[:3]]
    assert [line.split()[0] for line in kept] == ["4", "6", "2"]
    table = load(folder)
    assert len(table) == 24
    assert table["fingerprint"].nunique() == 23
    assert table["state"].value_counts().to_dict() == {"ok": 23, "failed": 1}
    (error,) = table["error"].dropna()
    assert error.startswith("request.steps=0")
    again = {job for job, at in before.items() if (job / "status.json").stat().st_mtime_ns != at}
    assert again == set(cut)


@pytest.mark.slow
def test_a_launcher_may_run_the_jobs_in_processes_of_its_own(tmp_path: Path) -> None:
    """As on a cluster: submitit pickles each job, and its result is read back from the sweep's folder."""
    pytest.importorskip("submitit", reason="pip install 'triptych[slurm]'")
    overrides = ["hydra/launcher=submitit_local", "logger=json", "request.steps=1", "request.height=64,65"]
    done = sweep(tmp_path / "sweep", *overrides, "launch.mode=torchrun", "parallel=dp2")
    assert done.returncode == 1, done.stderr
    generated, refused = jobs(tmp_path / "sweep")
    assert (read_status(generated).state, read_status(refused).state) == ("ok", "failed")
    assert record_of(generated).provenance.world_size == 2
    assert "the nearest this model can make is 64 or 72" in done.stdout


@pytest.mark.slow
def test_a_search_for_time_and_error_finds_what_its_records_say(tmp_path: Path) -> None:
    """The built-in model: the front is that of the records on disk, and a size that was refused is not on it."""
    pytest.importorskip("optuna", reason="pip install 'triptych[optuna]'")
    folder = tmp_path / "search"
    search = ["hydra/sweeper=optuna_search", "hydra.sweeper.objectives=[latency_ms,error]", "hydra.sweeper.n_trials=6"]
    measured = ["task=bench", "task.repeats=1", "task.warmup=0", "task.reference_steps=6", "task.fidelity_peer=false"]
    done = sweep(folder, *search, *measured, "logger=json", "request.steps=range(1,6)", "request.height=64,65")
    found = read_search(folder)
    assert done.returncode == 0, done.stderr
    assert found is not None
    values = {}
    for job in jobs(folder):
        if read_status(job).state == "ok":
            row = record_of(job)
            assert row.fidelity is not None
            values[job.name] = (row.statistics.latency_ms.median, row.fidelity.pixel.rel_l2)
    unbeaten = {
        name
        for name, own in values.items()
        if not any(other != own and other[0] <= own[0] and other[1] <= own[1] for other in values.values())
    }
    assert {trial.measured.folder for trial in found.best} == unbeaten
    assert {trial.params["request.height"] for trial in found.best} == {"64"}
    refused = [trial for trial in found.trials if trial.params["request.height"] == "65"]
    assert refused
    assert all("64 or 72" in (trial.measured.error or "") for trial in refused)
