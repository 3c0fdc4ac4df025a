"""The rules of what does not go together, against what composes, and the pages' tables against the rules."""

import copy
from functools import cache
from itertools import combinations

import pytest

from harness.config.optimize import Optimize
from harness.config.schema import RunConfig
from harness.resolve.compatibility_table import pages, pair, short_table, with_settings
from harness.resolve.compose import ConfigError, compose_run
from harness.resolve.conflicts import BY_NAME, CONFLICTS, FEATURES, Feature, check_conflicts, refusal
from harness.resolve.rules import resolve_config
from tests.fixtures.packages import pretend

PACKAGES = ("cache_dit", "sglang", "torchao")
SCHEDULERS = ("rk45", "learned_variance")  # these need a configuration composed with them
PAIRS = [
    (first, second)
    for first, second in combinations(BY_NAME, 2)
    if not {first, second} & set(SCHEDULERS)
    and not (second == "train" and BY_NAME[first].key == "model")  # whose scheduler=published cannot be trained
]
DECLARED = [(conflict.when, other) for conflict in CONFLICTS for other in conflict.with_what]


@pytest.fixture(autouse=True)
def _packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PACKAGES:
        pretend(monkeypatch, name, object())


@cache
def composed(model: str) -> RunConfig:
    guidance = 1 if model == "ddpm_cifar10" else 3  # that model has no guidance
    overrides = [f"model={model}", "model.load=dummy", f"request.guidance={guidance}", "request.steps=4"]
    config = compose_run(overrides).config
    config.engine.optimize = Optimize.auto
    return config


def resolves(settings: tuple[str, ...]) -> bool:
    named = [setting.partition("=")[2] for setting in settings if setting.startswith("model=")]
    rest = tuple(setting for setting in settings if not setting.startswith("model="))
    config = with_settings(copy.deepcopy(composed(named[-1] if named else "emoji")), rest)
    try:
        resolve_config(config)
    except ValueError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_pair_is_refused_if_and_only_if_a_conflict_says_so() -> None:
    wrong = []
    for first, second in PAIRS:
        settings = pair(first, second)
        if settings is None:
            continue
        allowed = refusal(with_settings(RunConfig(), settings)) is None
        if resolves(settings) != allowed:
            wrong.append((first, second, allowed))
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), DECLARED)
def test_every_declared_pair_is_refused_on_the_command_line(first: str, second: str) -> None:
    settings = pair(first, second)
    assert settings is not None, "the examples of the two features exclude each other"
    with pytest.raises(ConfigError) as caught:
        compose_run(["model.load=dummy", *settings])
    assert "does not go with" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "{" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_every_feature_runs_alone(feature: Feature) -> None:
    engine = ["engine=diffusers"] if feature.name == "compiled_graphs" else []
    assert feature.used(compose_run(["model.load=dummy", *feature.example, *engine]).config)


def test_a_refusal_says_what_why_and_what_instead() -> None:
    config = with_settings(RunConfig(), ("parallel.pipe=2", "parallel.tp=2"))
    with pytest.raises(ValueError, match=r"^parallel\.pipe=2 does not go with parallel\.tp=2: it goes with .*; leave"):
        check_conflicts(config)


def test_the_pages_hold_what_the_rules_say() -> None:
    stale = [page.name for page, content in pages().items() if page.read_text() != content]
    assert stale == [], "run make pages"


def test_the_short_table_is_short() -> None:
    lines = short_table().splitlines()
    assert len(lines) <= 17
    assert max(map(len, lines)) <= 120
