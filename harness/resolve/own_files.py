"""What is wrong in a configuration file: its path, the key, and the nearest name, on one line.

Hydra names a file by its group and option (`In 'experiment/mine': ...`), and a broken one by a long error of PyYAML.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from harness.resolve.names import describe_unknown, nearest_option, one_line
from harness.resolve.search_path import groups_of

NOT_COMPOSED = (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError)
"""What Hydra raises if it cannot compose."""
FAILURES = (*NOT_COMPOSED, RecursionError, OSError)
"""The same, and what it raises if a defaults list leads back to its own file, or a file cannot be read."""
IN_FILE = re.compile(r"In '(?P<option>[^']+)': (?P<rest>.*)", re.DOTALL)
MERGED = re.compile(r"(?P<kind>\w+) raised while composing config:\n(?P<what>.*?)\n +full_key: (?P<key>\S*)", re.DOTALL)
NOT_FOUND = re.compile(r"Could not find '(?P<group>.+)/(?P<option>[^/']+)'")
NO_GROUP = re.compile(r"Could not override '(?P<group>[^']+)'\. No match in the defaults list")
GLOBAL = "# @package _global_"


def explain(error: Exception, roots: Sequence[Path]) -> str:
    """Return what Hydra found as one line.

    Args:
        error: An error of Hydra's, or of what it reads with.
        roots: Folders of the configurations.

    Returns:
        The message. It names the file if a file is at fault.
    """
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: not YAML: {error.problem}"
    if isinstance(error, UnicodeDecodeError | OSError) and not isinstance(error, HydraException):
        return _unreadable(roots) or one_line(error)
    if isinstance(error, RecursionError):
        return "a defaults list leads back to its own file; remove that line from your configurations"
    text = str(error)
    if text.startswith("Cannot find primary config"):
        return f"--config-name: no such file; {' '.join(text.splitlines()[0].split())}"
    if lost := NOT_FOUND.search(text):
        return _unknown_option(lost["group"], lost["option"], roots)
    found = IN_FILE.match(text)
    file = None if found is None else _file(found["option"], roots)
    if found is None or file is None:
        return one_line(error)
    if merged := MERGED.match(found["rest"]):
        return f"{file}: {_misfit(found['option'], merged)}"
    if lost := NO_GROUP.match(found["rest"]):
        return f"{file}: {describe_unknown(lost['group'].lstrip('/'), groups_of(roots))}"
    return f"{file}: {one_line(ValueError(found['rest']))}"


def _misfit(option: str, merged: re.Match[str]) -> str:
    """Return why the content of a file does not fit the configuration."""
    key, group = merged["key"], option.rpartition("/")[0].replace("/", ".")
    if merged["kind"] == "ConfigTypeError" and not key:
        return "a configuration is a mapping, KEY: VALUE"
    if merged["kind"] != "ConfigKeyError":
        return f"{key}: {' '.join(merged['what'].split())}"
    if key == group:
        return f"there is no key {key!r} for its content; begin the file with the line `{GLOBAL}`"
    return describe_unknown(key)


def _unknown_option(group: str, option: str, roots: Sequence[Path]) -> str:
    """Return that a group has no such option, and which file asks for it."""
    named = [file for root in roots for file in root.rglob("*.yaml") if option in _text(file)]
    places = f"{named[0]}: " if len(named) == 1 else ""
    return f"{places}{nearest_option(group, option, groups_of(roots).get(group, []))}"


def _unreadable(roots: Sequence[Path]) -> str | None:
    """Return the first file that cannot be read, with the reason."""
    for file in (file for root in roots for file in sorted(root.rglob("*.yaml"))):
        try:
            file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return f"{file}: not UTF-8; save it in UTF-8"
        except OSError as error:
            return f"{file}: {error.strerror}"
    return None


def _file(option: str, roots: Sequence[Path]) -> Path | None:
    return next((path for root in roots if (path := root / f"{option}.yaml").is_file()), None)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""
