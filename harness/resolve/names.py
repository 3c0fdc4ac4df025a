"""Names of groups, options and keys: an unknown one is refused with the nearest name that exists."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from harness.config.schema import CheckpointDefaults, ModelConfig, RunConfig
from harness.config.yaml import ConfigError as ConfigError
from harness.records.provenance import version
from harness.resolve.quoting import shell_quoted
from harness.resolve.search_path import SearchPath, conf_root, groups_of
from models.registry import did_you_mean
from schedulers.registry import plugin_options
from schedulers.tables import FAMILIES

PLUGINS = {  # which option of Hydra's groups needs which package, and what installs it
    ("hydra/launcher", "joblib"): ("hydra-joblib-launcher", "'triptych[joblib]'"),
    ("hydra/launcher", "slurm"): ("hydra-submitit-launcher", "'triptych[slurm]'"),
    ("hydra/launcher", "submitit_slurm"): ("hydra-submitit-launcher", "'triptych[slurm]'"),
    ("hydra/launcher", "submitit_local"): ("hydra-submitit-launcher", "'triptych[slurm]'"),
    ("hydra/sweeper", "optuna"): ("hydra-optuna-sweeper", "hydra-optuna-sweeper (or use optuna_search)"),
    ("hydra/sweeper", "optuna_search"): ("optuna", "'triptych[optuna]'"),
}

FREE = ("meta", "load.extra_body")  # dictionaries whose keys are the user's own

REMOVED = {
    "a": "compare.a",
    "b": "compare.b",
    "runs": "report.runs (task=report) or plan.runs (task=plan)",
    "task.out": "report.out",
    "task.bound": "task.max_pixel_error",
    "task.states": "task.fidelity_per_step",
    "model.trained": "model.checkpoint_defaults",
    "model.text.keep": "model.text.keep_loaded",
    "engine.eager.widen": "engine.eager.upcast",
    "serve.keep": "serve.max_stored_results",
    "serve.max_pictures": "serve.max_images",
    "train.shared": "train.base_model",
}
"""Keys that no longer exist, with the keys that took their place."""


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, without Hydra's advice to set variables."""
    text = str(error)
    if text.startswith("Could not override 'scheduler/solver'"):
        return (
            "scheduler/solver has no effect beside the checkpoint's own noise scheduler (scheduler=published, this "
            "model's default); add scheduler=rectified_flow, ddpm or sgm"
        )
    if text.startswith("Error merging override") and error.__cause__ is not None:
        text = f"{text.removeprefix('Error merging override ')}: {error.__cause__}"
    lines = [line.strip() for line in text.splitlines()]
    useful = [
        line for line in lines if line and not line.startswith(("Set the environment", "object_type", "reference_type"))
    ]
    return "; ".join(useful) or type(error).__name__


def check_names(overrides: Sequence[str], sweep: bool = False, search: SearchPath | None = None) -> None:
    """Refuse overrides whose group, option or key does not exist, and name the nearest one that does.

    Args:
        overrides: Overrides as on the command line.
        sweep: Whether a value may be a list of choices, each for one job.
        search: Search path of the configurations. None is conf/ and the folders of TRIPTYCH_CONF.

    Raises:
        ConfigError: A name is unknown; the message says what was probably meant.
    """
    for text in overrides:
        _check_removed(text.partition("=")[0].lstrip("+~"))
    parsed = [_parsed(text) for text in overrides]
    groups = groups_of((search or SearchPath.of_user()).roots(overrides))
    for override in parsed:
        _check_name(override, groups)
        if override.is_sweep_override() and not sweep:
            key, _, value = (override.input_line or override.key_or_group).partition("=")
            raise ConfigError(
                f"{key}={value} names several values; to mean one, quote it inside the argument: '{key}=\"{value}\"'; "
                "to run each, add -m"
            )


def _parsed(text: str) -> Override:
    """Parse one override with Hydra's grammar.

    Args:
        text: The override.

    Returns:
        The parsed override.

    Raises:
        ConfigError: It is no override; the message has the quotes that make it one, if they do.
    """
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ConfigError(f"{text!a} is not UTF-8; write it in UTF-8, or set the terminal's locale to a UTF-8 one")
    key, equals, _ = text.partition("=")
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        if not equals and not key.startswith("~"):
            raise ConfigError(f"{text}: an override is written KEY=VALUE, such as request.steps=8") from error
        quoted = shell_quoted(text)
        remedy = "" if quoted is None else f"; to mean all of it as one text, write {quoted}"
        raise ConfigError(f"{text}: not a value in Hydra's grammar{remedy}") from error


def _check_removed(key: str) -> None:
    """Refuse a removed key, or a key below one, and name its successor."""
    for old, new in REMOVED.items():
        if key == old or key.startswith(f"{old}."):
            raise ConfigError(f"{key} is now {new}{key.removeprefix(old)}; use that")


def _check_name(override: Override, groups: Mapping[str, list[str]]) -> None:
    key = override.key_or_group
    if key in ("hydra/launcher", "hydra/sweeper"):
        _check_plugin(key, str(override.value()))
    if key.split(".")[0] == "hydra" or key.startswith("hydra/"):
        return
    for option in _options(override) if key in groups else [None]:
        _refuse_unknown(key, option, groups)


def refuse_unknown(name: str, groups: Mapping[str, list[str]]) -> None:
    """Refuse a key, a group, or a GROUP=OPTION that does not exist.

    Args:
        name: The name; what follows the = of a key is not looked at.
        groups: Every group with its options.

    Raises:
        ConfigError: There is no such name; the message says what was probably meant.
    """
    key, _, option = name.partition("=")
    _check_removed(key)
    _refuse_unknown(key, option or None, groups)


def _refuse_unknown(key: str, option: str | None, groups: Mapping[str, list[str]]) -> None:
    if key in groups:
        if option is not None and option not in groups[key]:
            raise ConfigError(nearest_option(key, option, groups[key]))
        return
    if key not in _all_keys() and not key.startswith(tuple(f"{name}." for name in FREE)):
        raise ConfigError(describe_unknown(key, groups))


def nearest_option(group: str, option: str, known: Sequence[str]) -> str:
    """Return that a group has no such option, with the nearest one and all others."""
    return f"{group}={option}: no such option{_hint(option, known)} (there are {', '.join(known)})"


def describe_unknown(key: str, groups: Iterable[str] = ()) -> str:
    """Return that there is no such key, with the nearest key or group."""
    return f"unknown key {key!r}{_hint(key, _all_keys() | set(groups))}"


def _all_keys() -> set[str]:
    defaults = {family: CheckpointDefaults() for family in FAMILIES}
    plugin = {name: options() for name, options in plugin_options().items()}
    return set(_keys(RunConfig(model=ModelConfig(checkpoint_defaults=defaults), plugin=plugin)))


def _check_plugin(group: str, name: str) -> None:
    package, installed = PLUGINS.get((group, name), (None, None))
    if package is not None and version(package) is None:
        raise ConfigError(f"{group}={name} needs the package {package}: pip install {installed}")


def _options(override: Override) -> list[str | None]:
    value = override.value()
    if override.is_choice_sweep():
        return [str(v) for v in override.sweep_string_iterator()]
    if override.is_sweep_override():
        return []  # a glob or a range; Hydra resolves it
    return [None if value is None else str(value)]


def config_groups() -> dict[str, list[str]]:
    """Return every group of conf/ with its options; a nested group is given by its path."""
    return groups_of([conf_root()])


def _keys(node: Any, prefix: str = "") -> Iterable[str]:
    for name, value in (node if isinstance(node, dict) else vars(node)).items():
        yield prefix + name
        if is_dataclass(value) or isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")


def _hint(name: str, known: Iterable[str]) -> str:
    names = sorted(known, key=lambda n: (not n.startswith("request."), n.count("."), n))
    if "." in name and (near := did_you_mean(name, names)):
        return near
    leaves = [other.rsplit(".", 1)[-1] for other in names]
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, n=1)
    return f"; did you mean {names[leaves.index(close[0])]}?" if close else ""
