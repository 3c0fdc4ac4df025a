"""How threads wait: chosen by the task, and left to the user where the environment says something."""

import subprocess
import sys
from pathlib import Path

import pytest

from harness.config.schema import WaitPolicy
from harness.engines.environment import rank_environment
from harness.resolve.compose import compose_run
from harness.resolve.wait_policy import USERS_OWN, is_adaptive, wait_environment, wait_policy
from tests.fixtures.commands import environment

ADAPTIVE = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "300000"}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in USERS_OWN:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("overrides", "variables"),
    [
        (["task=serve"], ADAPTIVE),
        (["task=load"], ADAPTIVE),
        (["task=serve", "launch.wait_policy=brief"], {"GOMP_SPINCOUNT": "2000"}),
        (["task=bench"], {}),
        (["task=generate"], {}),
        (["task=serve", "launch.wait_policy=default"], {}),
        (["task=bench", "launch.wait_policy=passive"], {"OMP_WAIT_POLICY": "PASSIVE"}),
    ],
)
def test_ranks_that_share_a_machine_adapt(overrides: list[str], variables: dict[str, str]) -> None:
    found = rank_environment(compose_run(overrides).config, 1)
    assert {name: found[name] for name in USERS_OWN if name in found} == variables


def test_auto_is_never_what_is_done() -> None:
    assert WaitPolicy.auto not in {wait_policy(compose_run([f"task={task}"]).config) for task in ("serve", "bench")}


def test_a_kernel_that_does_not_count_gives_brief_waits_and_a_choice_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("harness.resolve.wait_policy.SCHEDSTAT", tmp_path / "schedstat")
    assert wait_policy(compose_run(["task=serve"]).config) is WaitPolicy.brief
    notes = compose_run(["task=serve", "launch.wait_policy=adaptive"]).notes
    assert len(notes) == 1
    assert notes[0].endswith("so threads always spin")


def test_ranks_adapt_only_with_the_variables_of_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_run(["task=serve"]).config
    assert not is_adaptive(config)
    for name, value in ADAPTIVE.items():
        monkeypatch.setenv(name, value)
    assert is_adaptive(config)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert not is_adaptive(config)


@pytest.mark.parametrize("name", USERS_OWN)
def test_the_users_own_variable_wins_and_a_choice_without_effect_says_so(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "7")
    composed = compose_run(["task=serve", "launch.wait_policy=passive"])
    assert wait_environment(composed.config) == {}
    assert composed.notes == [f"launch.wait_policy=passive has no effect: the environment has {name}=7"]
    assert compose_run(["task=serve"]).notes == []


def test_openmp_takes_the_variables() -> None:
    """PyTorch's OpenMP says what it has read, as it is loaded."""
    for policy in ("brief", "passive"):
        config = compose_run([f"launch.wait_policy={policy}"]).config
        variables = environment() | wait_environment(config, {}) | {"OMP_DISPLAY_ENV": "verbose"}
        if policy == "brief":
            del variables["OMP_WAIT_POLICY"]  # of the tests
        done = subprocess.run([sys.executable, "-c", "import torch"], env=variables, capture_output=True, text=True)
        if "GOMP_SPINCOUNT" not in done.stderr:
            pytest.skip("PyTorch has another OpenMP here")
        assert f"GOMP_SPINCOUNT = '{2000 if policy == 'brief' else 0}'" in done.stderr
