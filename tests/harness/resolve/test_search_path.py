"""A user's own configurations: every door finds them, and what is wrong in one is a line with its file."""

import os
from pathlib import Path

import pytest

from harness import cli
from harness.client import DiffusionGenerator
from harness.resolve.command import parse_command
from harness.resolve.compose import ConfigError, ResolvedRun, compose_run
from harness.resolve.folder_name import folder_name
from harness.resolve.search_path import SearchPath
from harness.tasks.common.comparison import comparison_runs
from tests.fixtures.own import OWN

MINE = ("experiment=mine",)


def compose(*arguments: str) -> ResolvedRun:
    command = parse_command(arguments)
    return compose_run(command.overrides, command.search)


def own(folder: Path, name: str, text: str) -> Path:
    """Write one file of a user's folder."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def is_mine(run: ResolvedRun) -> bool:
    """Return whether the experiment, the model and the solver of the folder were composed."""
    config = run.config
    solver = config.scheduler.solver
    found = (config.request.steps, config.model.steps, solver.name, solver.eta, config.request.prompts)
    return found == (2, 4, "ddim", 0.5, ["rocket"]) and config.meta == {"owner": "me"}


def test_the_flag_adds_a_folder_wherever_it_stands() -> None:
    assert is_mine(compose("--config-dir", str(OWN), *MINE))
    assert is_mine(compose(*MINE, f"--config-dir={OWN}", "request.seed=3"))


def test_the_variable_adds_several_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path, "cache/other.yaml", "defaults: [teacache, _self_]\nthreshold: 0.3\n")
    monkeypatch.setenv("TRIPTYCH_CONF", os.pathsep.join([str(OWN), str(tmp_path)]))
    assert is_mine(compose(*MINE))
    assert compose("cache=other").config.cache.threshold == 0.3
    assert is_mine(compose_run(MINE))


def test_hydras_own_key_adds_folders_and_packages() -> None:
    assert is_mine(compose(f"hydra.searchpath=[file://{OWN},pkg://tests.fixtures]", *MINE))
    assert is_mine(compose("hydra.searchpath=[pkg://tests.fixtures.own]", *MINE))


def test_a_primary_configuration_is_the_users_own(tmp_path: Path) -> None:
    run = compose("--config-dir", str(OWN), "--config-name", "mine")
    assert (run.config.request.steps, run.config.model.steps) == (3, 4)
    assert run.folder.parts[0] == "runs"
    own(tmp_path, "first.yaml", f"defaults: [config, _self_]\nhydra: {{searchpath: ['{OWN}']}}\n")
    assert is_mine(compose("--config-dir", str(tmp_path), "--config-name", "first", *MINE))


def test_the_python_client_takes_a_folder() -> None:
    generator = DiffusionGenerator.from_config(*MINE, config_dir=OWN)
    generator.stop()
    assert generator.config.meta == {"owner": "me"}


def test_both_runs_of_a_comparison_find_the_folder() -> None:
    sides = ["compare.a=[model=mine]", "compare.b=[experiment=mine]", "task.repeats=9"]
    baseline, candidate = comparison_runs(compose("--config-dir", str(OWN), "task=compare", *sides))
    assert baseline.config.model.steps == 4
    assert is_mine(candidate)


@pytest.mark.parametrize("task", ["plan", "serve", "load", "bench"])
def test_every_task_composes_with_the_folder(task: str) -> None:
    config = compose("--config-dir", str(OWN), f"task={task}", "hardware=mine", *MINE).config
    assert (config.hardware.memory_gb, config.request.steps) == (24, 2)


def test_a_group_of_the_user_alone_is_added() -> None:
    assert compose("--config-dir", str(OWN), "+prompt=fruit").config.request.prompts == ["red apple", "lemon"]


def test_a_nested_group_of_the_user_has_a_folder_of_its_own() -> None:
    assert folder_name(["+my/group=a"]) != folder_name(["+my.group=a"])


def test_help_describes_the_users_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch(["--help", "model=mine", "--config-dir", str(OWN)]) == 0
    assert str(OWN / "model/mine.yaml") in capsys.readouterr().out
    assert cli.dispatch(["--config-dir", str(OWN), "--help"]) == 0
    assert "prompt            fruit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (["--cfg", "job", "-p", "meta", "experiment=mine"], "owner: me"),
        (["--info", "searchpath"], str(OWN)),
        (["--hydra-help"], "--config-dir"),
        (["-sc", "install=bash"], "hydra_bash_completion"),
        (["-sc", "query=bash"], "model=mine"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_flags_of_hydra_print(
    flags: list[str], shown: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMP_LINE", "triptych model=m")
    assert cli.dispatch(["--config-dir", str(OWN), *flags]) == 0
    assert shown in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == []


BROKEN = {
    "an unknown key": ("request: {stepz: 3}", "unknown key 'request.stepz'; did you mean request.steps?"),
    "an unknown group": ("reqest: {steps: 3}", "unknown key 'reqest'; did you mean request?"),
    "a wrong type": ("request: {steps: many}", "request.steps: Value 'many' of type 'str' could not be converted"),
    "no YAML": ("request: {steps: 3\n  a: [", ", line 3: not YAML: expected ',' or '}'"),
    "a key twice": ("request: {steps: 3}\nrequest: {seed: 3}", ", line 3: not YAML: found duplicate key request"),
    "a list": ("- request", "a configuration is a mapping, KEY: VALUE"),
    "an option": ("defaults: [override /model: emojy]", "model=emojy: no such option; did you mean emoji?"),
    "a group": ("defaults: [override /modell: emoji]", "unknown key 'modell'; did you mean model?"),
}


@pytest.mark.parametrize(("text", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = own(tmp_path, "experiment/broken.yaml", f"# @package _global_\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        compose("--config-dir", str(tmp_path), "experiment=broken")
    assert str(caught.value).startswith(f"{file}")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_its_package_line_is_told_to_begin_with_it(tmp_path: Path) -> None:
    file = own(tmp_path, "experiment/plain.yaml", "request: {steps: 3}\n")
    with pytest.raises(ConfigError, match=f"{file}: .*begin the file with the line `# @package _global_`"):
        compose("--config-dir", str(tmp_path), "experiment=plain")


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    file = own(tmp_path, "experiment/latin.yaml", "")
    file.write_bytes(b"# @package _global_\nrequest: {prompt: \xe9}\n")
    with pytest.raises(ConfigError, match=f"{file}: not UTF-8"):
        compose("--config-dir", str(tmp_path), "experiment=latin")


def test_a_file_that_names_itself_is_refused(tmp_path: Path) -> None:
    own(tmp_path, "model/loop.yaml", "defaults: [loop, _self_]\n")
    with pytest.raises(ConfigError, match="leads back to its own file"):
        compose("--config-dir", str(tmp_path), "model=loop")


def test_a_file_that_would_never_be_read_is_refused(tmp_path: Path) -> None:
    file = own(tmp_path, "model/emoji.yaml", "steps: 3\n")
    with pytest.raises(
        ConfigError, match=f"{file}: .*conf/model/emoji.yaml has the same name and is read in its place"
    ):
        compose("--config-dir", str(tmp_path), "request.steps=2")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config-dir", "nowhere"], "nowhere: no such folder"),
        (["hydra.searchpath=[nowhere]"], "nowhere: no such folder"),
        (["hydra.searchpath=[pkg://no_such_package]"], "no_such_package: no such folder"),
        (["hydra.searchpath=nowhere"], "must be a list"),
        (["--config-name", "nope"], "--config-name: no such file"),
        (["--config-path", "nowhere"], "add a folder to it: --config-dir DIR"),
        (["--experimental-rerun", "x"], "from=runs/DATE/TIME"),
        (["--confg-dir", "x"], "did you mean --config-dir?"),
        (["--config-dir"], "expected one argument"),
        (["--config-dir", str(OWN), f"--config-dir={OWN}"], "given twice"),
        (["--resolve"], "add --cfg job"),
        (["hydra.mode=MULTIRUN"], "add -m"),
        (["-m", "--cfg", "job"], "leave out one"),
        (["-sc", "install=csh"], "No completion plugin for 'csh'"),
        (["--config-dir", str(OWN), "model=mime"], "did you mean mine?"),
        (["--config-dir", str(OWN), "-m", "model=mime,mine"], "did you mean mine?"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_a_wrong_door_is_refused_in_one_line(
    arguments: list[str], said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.dispatch(arguments) == 2
    lines = capfd.readouterr().err
    assert lines.count("\n") == 1
    assert said in lines
    assert list(tmp_path.iterdir()) == []


def test_what_only_a_sweep_does_is_a_note() -> None:
    assert compose("+hydra.job.env_set.A=b", "request.steps=2").notes == [
        "hydra.job.env_set has an effect in a sweep alone; add -m"
    ]
    assert compose("request.steps=2").notes == []


def test_a_folder_of_the_variable_has_to_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIPTYCH_CONF", "/no/such/folder")
    with pytest.raises(ConfigError, match="TRIPTYCH_CONF=/no/such/folder: no such folder"):
        SearchPath.of_user()


def test_ranks_of_the_users_torchrun_take_folders_and_no_sweep() -> None:
    assert parse_command(["--config-dir", str(OWN), *MINE]).without_flags("torchrun").search.folders == (str(OWN),)
    with pytest.raises(ConfigError, match="do not go with torchrun; sweep outside"):
        parse_command(["-m", *MINE]).without_flags("torchrun")
