"""A walk over every key with a wrong word, a negative, zero, nan, inf, a tiny and a huge number.

Each is refused in one line that names the key, or resolves to a configuration that ranks can read. What a noise
scheduler accepts has to give a finite sample of a Gaussian, so that nothing is refused after the ranks have loaded.
"""

import copy
import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import msgspec
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config.schema import Load, RunConfig
from harness.config.yaml import from_dict
from harness.resolve.compose import check_composed, compose_run, register_schema, to_dict
from harness.resolve.names import one_line
from harness.resolve.options import options
from harness.resolve.rules import resolve_config
from harness.resolve.scheduler import noise_scheduler_settings
from schedulers import NoiseSchedulerSettings, resolve
from schedulers.build import build
from schedulers.compatibility import FLOW_LINSPACE_OPTIONS, PREDICTION_OPTIONS
from schedulers.grid import Point
from schedulers.options import Option, option_of
from schedulers.prediction import Estimate, Prediction
from schedulers.tables import PATHS, SOLVERS, SPACINGS, families
from tests.fixtures.options import ANNOTATIONS, KEYS, is_number, put

NUMBERS = (-1.0, 0.0, 1e-30, math.nan, math.inf, -math.inf, 1e30)
WHOLE = (-1, 0, 10**12, 10**30)
START = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
STEPS = 4


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    """Return what Hydra composes without overrides."""
    register_schema()
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", [], return_hydra_config=True)


@pytest.fixture(scope="module")
def plain(composed: DictConfig) -> RunConfig:
    """Return the configuration of random weights, which every family may run, before it is resolved."""
    config = RunConfig(**{f.name: _object(composed[f.name]) for f in fields(RunConfig)})
    config.model.load = Load.dummy
    return config


def _object(value: Any) -> Any:
    return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


def bad_numbers(key: str, declared: Option) -> list[Any]:
    """Return the numbers of the walk that have the key's type."""
    if not is_number(key) or declared.words:
        return []
    return list(NUMBERS if "float" in ANNOTATIONS[key] else WHOLE)


def refusal(config: RunConfig) -> str | None:
    """Return the line that refuses a configuration, or None if ranks can read what it resolves to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            resolve_config(config)
        except ValueError as error:
            return str(error)
    assert from_dict(msgspec.msgpack.decode(msgspec.msgpack.encode(to_dict(config)))) == config
    return None


def resolves(config: RunConfig, key: str) -> bool:
    """Return whether a configuration resolves; a refusal has to be one line that names the key."""
    line = refusal(config)
    assert line is None or ("\n" not in line and short(key) in line), (key, line)
    return line is None


def short(key: str) -> str:
    return key.rsplit(".", 1)[1].removesuffix("[0]")


OWN = [(key, declared) for key, declared in KEYS if "[0]" not in key and "checkpoint_defaults" not in key]


def test_the_walk_has_every_key(plain: RunConfig) -> None:
    walked = {key for key, _, _ in options(plain) if "checkpoint_defaults" not in key}
    assert walked - {key for key, _ in OWN} == {"model.lora"}  # a list of groups, empty here
    assert sum(bool(bad_numbers(key, declared)) for key, declared in KEYS) > 180


@pytest.mark.slow
@pytest.mark.parametrize("group", [f.name for f in fields(RunConfig)])
def test_a_bad_number_is_refused_by_its_key_or_resolves(plain: RunConfig, group: str) -> None:
    refused = 0
    keys = [(key, declared) for key, declared in OWN if key.startswith(f"{group}.")]
    for key, declared in keys:
        for value in bad_numbers(key, declared):
            config = copy.deepcopy(plain)
            put(config, key, [value] if ANNOTATIONS[key].endswith("| None") and "list" in ANNOTATIONS[key] else value)
            fits = resolves(config, key)
            refused += not fits
            assert not fits or (value == value and value != 10**30), (key, value)
    assert refused >= sum(bool(bad_numbers(key, declared)) for key, declared in keys)


def test_a_word_that_a_key_does_not_have_is_refused_by_name(composed: DictConfig) -> None:
    """Hydra refuses a word for a number, a flag or an enum; harness.resolve.options refuses the others."""
    for key, declared in OWN:
        if not (is_number(key) or "bool" in ANNOTATIONS[key] or declared.words):
            continue
        line = refused_word(composed, key)
        assert line is not None, key
        assert "\n" not in line
        assert short(key) in line, line


def refused_word(composed: DictConfig, key: str) -> str | None:
    """Return the line that refuses a word for a key."""
    before = OmegaConf.select(composed, key)
    try:
        OmegaConf.update(composed, key, ["nonsense"] if OmegaConf.is_list(before) else "nonsense")
        check_composed(composed)
    except (OmegaConfBaseException, ValueError) as error:
        return one_line(error)
    finally:
        OmegaConf.update(composed, key, before)
    return None


def readers(name: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield every family, path, spacing and solver that uses a setting, one solver for all but solver options."""
    for family, every_path in families().items():
        for path, spacing in ((one, spacing) for one in every_path for spacing in PATHS[one].spacings):
            flow = (path, spacing) == ("flow", "linspace")
            used = {*PATHS[path].options, *PREDICTION_OPTIONS.get(PATHS[path].predictions[0], ())}
            used |= {
                *(FLOW_LINSPACE_OPTIONS if flow else SPACINGS[spacing].options),
                "clip",
                "threshold",
                "state_dtype",
            }
            for solver in [s for s, own in SOLVERS.items() if name in own.options] or ["dpmpp_3m"] * (name in used):
                yield family, path, spacing, solver


SETTINGS = {
    f.name: option_of(f) for f in fields(NoiseSchedulerSettings) if f.name not in ("family", "solver", "plugin")
}
SAMPLED = [name for name in SETTINGS if name not in ("path", "prediction", "spacing")]


def values_of(name: str) -> list[Any]:
    """Return the numbers of the walk, the edges of a setting's range and numbers near them; or every word."""
    declared, kind = SETTINGS[name], ANNOTATIONS[f"scheduler.{'solver.' * (name in SOLVER_OPTIONS)}{name}"]
    if declared.words:
        return list(declared.words)
    if "bool" in kind:
        return [True, False]
    if "list" in kind:
        return [[0.9, 0.5, 0.3, 0.1], [0.1, 0.3, 0.5, 0.9], [2.0, 1.0, 0.5, 0.1], [1.0, 1.0, 0.5, 0.1]]
    edges = [e for e in (declared.low, declared.high, declared.above, declared.below) if e is not None]
    near = [e * factor for e in edges for factor in (1, 0.9999, 1.0001)]
    middle = [0.02, 0.5, 0.999999, 1, 2, 3, 50, 999, 1000]
    if "float" not in kind:
        return [*WHOLE, *(int(x) for x in (*near, *middle) if x == int(x))]
    return [*NUMBERS, *map(float, (*near, *middle))]


SOLVER_OPTIONS = {name for own in SOLVERS.values() for name in own.options}


def settings_with(reader: tuple[str, str, str, str], name: str, value: Any) -> dict[str, Any]:
    family, path, spacing, solver = reader
    given: dict[str, Any] = {"family": family, "path": path, "spacing": spacing, "solver": solver}
    given |= {"prediction": "v" if name == "zero_terminal_snr" else PATHS[path].predictions[0], name: value}
    if name in ("base_shift", "max_shift", "base_tokens", "max_tokens"):
        given = {"base_shift": 0.5, "max_shift": 1.15} | given
    if spacing == "custom":
        given.setdefault("sigmas", [0.9, 0.5, 0.3, 0.1])
    if (path, spacing) == ("flow", "linspace") and name != "sigma_first":
        given["sigma_first"] = 0.999  # some solvers cannot start at alpha = 0
    return {key: value for key, value in given.items() if value is not None}


def sample(settings: NoiseSchedulerSettings) -> torch.Tensor:
    """Sample a Gaussian of mean 0.3 and deviation 0.6, whose denoiser is known in closed form."""
    scheduler = build(settings)
    grid = scheduler.grid(STEPS, 64)

    def denoise(x: torch.Tensor, p: Point, meaning: Prediction = scheduler.prediction) -> Estimate:
        centred = (x - p.alpha * 0.3) / ((p.alpha * 0.6) ** 2 + p.sigma**2)
        x0, eps = 0.3 + p.alpha * 0.36 * centred, p.sigma * centred
        output = meaning.target(x0, eps, torch.tensor(p.alpha), torch.tensor(p.sigma))
        return meaning.estimate(torch.cat([output] * 2, 1) if settings.learned_variance else output, x, p)

    return scheduler.sample(scheduler.init_noise(START, grid), grid, denoise, lambda i: START.flip(0))


def works(reader: tuple[str, str, str, str]) -> bool:
    """Return whether a path, spacing and solver go together without further settings."""
    return accepted(NoiseSchedulerSettings(**settings_with(reader, "end", None)))


def accepted(settings: NoiseSchedulerSettings) -> bool:
    """Return whether settings resolve, after sampling with them; nothing may be refused later."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            resolve(settings, STEPS)
        except ValueError:
            return False
        assert torch.isfinite(sample(settings)).all(), settings
        return True


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLED)
def test_what_the_noise_scheduler_accepts_gives_a_finite_sample(plain: RunConfig, name: str) -> None:
    """Each value is composed as the command does, for the first path, spacing and solver that use the setting."""
    reader = next(reader for reader in readers(name) if works(reader))
    count = 0
    for value in values_of(name):
        config = copy.deepcopy(plain)
        config.request.steps = STEPS
        for key, given in settings_with(reader, name, value).items():
            if key == "solver":
                config.scheduler.solver.name = given
            else:
                setattr(config.scheduler.solver if key in SOLVER_OPTIONS else config.scheduler, key, given)
        if (line := refusal(config)) is not None:
            assert "\n" not in line
        else:
            count += 1
            assert torch.isfinite(sample(noise_scheduler_settings(config.scheduler))).all(), (name, value)
    assert count, name


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLED)
def test_every_reader_of_a_setting_samples_what_it_accepts(name: str) -> None:
    fitting = [v for v in values_of(name) if isinstance(v, list | str | bool) or SETTINGS[name].fits(v)]
    count = sum(
        accepted(NoiseSchedulerSettings(**settings_with(reader, name, value)))
        for reader, value in itertools.product(readers(name), fitting)
    )
    assert count, name


@pytest.mark.slow
@pytest.mark.parametrize("end", [None, "t_min"])
def test_every_solver_samples_on_every_path_and_spacing(end: str | None) -> None:
    count = 0
    for reader in dict.fromkeys(itertools.chain.from_iterable(readers(name) for name in ("clip", *SOLVER_OPTIONS))):
        if end is None or "end" in PATHS[reader[1]].options:
            count += accepted(NoiseSchedulerSettings(**settings_with(reader, "end", end)))
    assert count > 200


@pytest.mark.slow
@pytest.mark.parametrize("group", [f.name for f in fields(RunConfig)])
def test_the_command_line_refuses_the_same(group: str) -> None:
    for key, declared in OWN:
        if key.startswith(f"{group}.") and is_number(key) and not declared.words:
            value = "[nan]" if "list" in ANNOTATIONS[key] else "nan"
            with pytest.raises(ValueError, match=rf"^[^\n]*{key.rsplit('.', 1)[1]}[^\n]*$"):
                compose_run([f"{key}={value}"])
