"""What every key means, read from its declaration: the page conf/README.md, and the texts of --help.

python -m harness.resolve.reference    # writes conf/README.md
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from harness import __version__
from harness.config.cache import CACHES, cache_keys
from harness.config.schema import CheckpointDefaults, LoraConfig, PluginSource, RunConfig, Task
from harness.resolve.names import FREE, config_groups, refuse_unknown
from harness.resolve.search_path import conf_root, groups_of, option_file
from schedulers.compatibility import FLOW_LINSPACE_OPTIONS, PREDICTION_OPTIONS
from schedulers.options import Option, option_of
from schedulers.registry import OURS, REGISTRIES, Registry, plugin_options
from schedulers.tables import PATHS, SOLVERS, SPACINGS

TASKS = tuple(f"task={task.name}" for task in Task)
FAMILY = "<family>"
PLUGIN = "<plug-in>"
START, END = "<!-- compatibility -->", "<!-- /compatibility -->"
WIDTH = 100
HEAD = "| key | type | default | unit | values | meaning | only with |"
RULE = "|---|---|---|---|---|---|---|"
FROM = "from"
FROM_MEANING = (
    "Run the record in a folder again, with the overrides beside it; what differs is printed and recorded in `rerun`."
)

ABOUT = (
    "Triptych generates images and videos with diffusion models, on one device or many, and measures speed, memory "
    "and fidelity. One command line names a model, a noise scheduler, a layout of ranks and a task."
)
EXAMPLES = (
    ("python -m harness", "generate with the built-in model"),
    ("python -m harness request.prompt='a red fox' request.steps=8", "one prompt, 8 solver steps"),
    ("python -m harness task=bench parallel=ulysses2", "measure on two ranks, with intervals"),
    ("python -m harness -m scheduler=ddpm,rectified_flow,sgm task=bench", "a sweep: one run for each choice"),
    ("python -m harness task=compare compare.a='[]' compare.b='[cache=teacache]'", "two settings in alternation"),
    ("python -m harness task=serve", "an HTTP server with OpenAI's routes"),
)


@dataclass(frozen=True)
class Key:
    """One key of the configuration, or a group of keys.

    Attributes:
        name: Full name.
        type: Type in words, such as `int or null`; `group` for a group of keys.
        default: Default as in YAML; empty for a group.
        option: Declaration of the key.
        tasks: Tasks that read it, as task=NAME.
        only: Choices of other groups in which alone it is read, such as scheduler/solver=unipc.
    """

    name: str
    type: str
    default: str
    option: Option
    tasks: tuple[str, ...]
    only: tuple[str, ...]

    @property
    def allowed(self) -> str:
        """Allowed words or numbers; empty if any value of the type is allowed."""
        return ", ".join(map(str, self.option.words)) or self.option.range


def keys() -> list[Key]:
    """Return every key and every group of keys, as declared."""
    return list(_keys(RunConfig(), "", TASKS, ()))


def _keys(node: Any, prefix: str, tasks: tuple[str, ...], only: tuple[str, ...]) -> Iterator[Key]:
    hints = get_type_hints(type(node))
    for declared in fields(node):
        name, value, found = prefix + declared.name, getattr(node, declared.name), option_of(declared)
        own_tasks = tuple(choice for choice in found.reads if choice in TASKS) or tasks
        own_only = (*(choice for choice in found.reads if choice not in TASKS), *_choices(name)) or only
        if is_dataclass(value):
            yield Key(name, "group", "", found, own_tasks, own_only)
            yield from _keys(value, f"{name}.", own_tasks, own_only)
            continue
        yield Key(name, _type(hints[declared.name], found), _value(value), found, own_tasks, own_only)
        if name == "model.checkpoint_defaults":
            yield from _keys(CheckpointDefaults(), f"{name}.{FAMILY}.", own_tasks, own_only)
        if name == "model.lora":
            yield from _keys(LoraConfig(), f"{name}[].", own_tasks, own_only)
        if name == "plugin_sources":
            yield from _keys(PluginSource(), f"{name}.{PLUGIN}.", own_tasks, own_only)
        if name == "plugin":
            for registered, options in plugin_options().items():
                yield from _keys(options(), f"{name}.{registered}.", own_tasks, own_only)


def _choices(name: str) -> Iterator[str]:
    """Yield the caches, solvers, paths, spacings and predictions that alone use a key."""
    group, _, key = name.rpartition(".")
    tables: list[tuple[str, dict[str, tuple[str, ...]]]] = []
    if group == "cache" and key != "name":
        tables = [("cache", {cache: cache_keys(cache) for cache in CACHES})]
    if group == "scheduler.solver":
        tables = [("scheduler/solver", _takes(SOLVERS))]
    if group == "scheduler":
        tables = [
            ("scheduler.path", _takes(PATHS)),
            ("scheduler.prediction", PREDICTION_OPTIONS),
            ("scheduler.spacing", _takes(SPACINGS)),
        ]
    for choice, table in tables:
        names = [option for option, used in table.items() if key in used]
        if names:
            yield f"{choice}={','.join(names)}"
    if group == "scheduler" and key in FLOW_LINSPACE_OPTIONS:
        yield "scheduler.spacing=linspace of a flow"


def _takes(registry: Registry[Any]) -> dict[str, tuple[str, ...]]:
    """Return the keys that each entry takes, plug-ins' too."""
    return {name: entry.options for name, entry in registry.items()}


def _type(hint: Any, declared: Option) -> str:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return " or ".join("null" if part is type(None) else _type_name(part, declared) for part in parts)


def _type_name(part: Any, declared: Option) -> str:
    if get_origin(part) is list:
        (item,) = get_args(part)
        return f"list of {'groups' if is_dataclass(item) else _type_name(item, declared)}"
    if get_origin(part) is dict:
        return "groups by name" if is_dataclass(get_args(part)[1]) else "values by name"
    if part is not int and declared.words:
        return "word"
    return {str: "text", bool: "bool"}.get(part, part.__name__)


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return value.name
    return '""' if value == "" else str(value)


def page(compatibility: str = "\n") -> str:
    """Return the text of conf/README.md.

    Args:
        compatibility: Text between the markers of the section on what goes together, line ends included.

    Returns:
        Markdown.
    """
    lines = [
        "# Configuration: groups, options and keys",
        "",
        "This page is written by `make pages` from the declarations in `harness/config/` and `schedulers/settings.py`.",
        "`GROUP=OPTION` chooses a file of this folder, `KEY=VALUE` sets one key, and `-m` sweeps over lists of values.",
        "`python -m harness --help KEY` prints the same about one key.",
        "",
        "## Groups",
        "",
        *(f"- `{group}`: {', '.join(options)}" for group, options in config_groups().items()),
        "",
        "## What goes together",
        "",
        f"{START}{compatibility}{END}",
        "",
        "## Keys",
        "",
        "A value of null means that something else decides, which the meaning says. A word is one of the values given.",
    ]
    own = [key for key in keys() if "." not in key.name and key.type != "group"]
    lines += ["", "### Keys without a group", "", HEAD, RULE, *map(_row, own)]
    lines += [f"| `{FROM}` | folder |  |  |  | {FROM_MEANING} | the command line |"]
    for key in [key for key in keys() if key not in own]:
        if "." not in key.name:
            lines += ["", f"### {key.name}", "", f"{key.option.meaning} {_read_by(key)}", ""]
            lines += [HEAD, RULE]
            if key.type == "group":
                continue
        lines.append(_row(key))
    return "\n".join(lines) + "\n"


def _row(key: Key) -> str:
    """Return a key's row of the page's tables."""
    name = f"`{key.name}.*`" if key.type == "group" else f"`{key.name}`"
    default = f"`{key.default}`" if key.default else ""
    only = ", ".join(key.only or ([task for task in key.tasks if key.tasks != TASKS] if "." not in key.name else ()))
    cells = (name, key.type, default, key.option.unit, key.allowed, key.option.meaning, only)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _read_by(key: Key) -> str:
    if key.tasks == TASKS:
        return "Read by every task."
    return f"Read by {', '.join(key.tasks)}."


def page_path() -> Path:
    """Return the path of the page."""
    return conf_root() / "README.md"


def read_compatibility() -> str:
    """Return what stands between the markers on the page, a line end if there is no page."""
    text = page_path().read_text() if page_path().is_file() else ""
    return text.partition(START)[2].partition(END)[0] or "\n"


def version_text() -> str:
    """Return the version of Triptych."""
    return __version__


def help_text(roots: Sequence[Path] = (conf_root(),)) -> str:
    """Return the text of --help.

    Args:
        roots: Folders of the configurations.
    """
    width = max(len(command) for command, _ in EXAMPLES)
    lines = [f"Triptych {version_text()}", "", *textwrap.wrap(ABOUT, WIDTH), "", "Examples:"]
    lines += [f"  {command:{width}}  {what}" for command, what in EXAMPLES]
    lines += ["", "Groups, chosen by GROUP=OPTION:"]
    for group, options in groups_of(roots).items():
        lines.append(f"  {group:16}  {textwrap.shorten(', '.join(options), WIDTH - 20, placeholder=' ...')}")
    lines += ["", "Keys, set by KEY=VALUE:"]
    lines += [f"  {key.name:16}  {key.option.meaning}" for key in keys() if "." not in key.name]
    lines += [
        "",
        "--help KEY describes a key, a group or an option: --help request.steps, --help cache, --help cache=teacache.",
        "conf/README.md lists every key. --version prints the version. --hydra-help lists Hydra's own flags.",
        "--config-dir DIR adds a folder of your own configurations to all of these. from=FOLDER runs a record again.",
    ]
    return "\n".join(lines)


def describe(name: str, roots: Sequence[Path] = (conf_root(),)) -> str:
    """Return what --help says about one name.

    Args:
        name: A key, a group of keys, a group of options, or GROUP=OPTION; the value of a KEY=VALUE is not looked at.
        roots: Folders of the configurations.

    Returns:
        The text.

    Raises:
        ConfigError: There is no such name; the message has the nearest one.
    """
    if name.partition("=")[0] == FROM:
        return f"{FROM}=FOLDER\n  {FROM_MEANING}"
    groups = groups_of(roots)
    refuse_unknown(name, groups)
    name, _, option = name.partition("=")
    if name in groups and option:
        return _describe_registered(name, option) or _describe_option(name, option, roots)
    name = next((free for free in FREE if name.startswith(f"{free}.")), name)
    name = re.sub(r"^(model\.checkpoint_defaults)\.\w+", rf"\1.{FAMILY}", name)
    found = {key.name: key for key in keys()}
    lines = [f"{name}: {', '.join(groups[name])}"] if name in groups else []
    dotted = name.replace("/", ".")
    if dotted in found:
        lines += _describe_key(found[dotted])
    below = [key for key in found.values() if key.name.startswith(f"{dotted}.")]
    if below:
        lines.append("keys:")
        width = max(len(key.name) for key in below)
        lines += [f"  {key.name:{width}}  {key.option.meaning}" for key in below]
    return "\n".join(lines)


def _describe_key(key: Key) -> list[str]:
    if key.type == "group":
        rows = [("meaning", key.option.meaning), ("read by", ", ".join(key.tasks)), ("only with", ", ".join(key.only))]
        return [f"{label + ':':10} {value}" for label, value in rows if value]
    rows = [
        ("type", key.type),
        ("default", key.default),
        ("unit", key.option.unit),
        ("values", key.allowed),
        ("meaning", key.option.meaning),
        ("read by", ", ".join(key.tasks)),
        ("only with", ", ".join(key.only)),
    ]
    return [key.name, *(f"  {label + ':':10} {value}" for label, value in rows if value)]


def _describe_registered(group: str, option: str) -> str | None:
    """Return who registered an option that has no file, and its keys; None for an option of a file."""
    for registry in REGISTRIES:
        if registry.group == group and option in registry and registry.owner(option) != OURS:
            lines = [f"{group}={option}", f"  {registry.kind} of the plug-in {registry.owner(option)}"]
            lines += [f"  {key.name}  {key.option.meaning}" for key in keys() if f"plugin.{option}." in key.name]
            return "\n".join(lines)
    return None


def _describe_option(group: str, option: str, roots: Sequence[Path]) -> str:
    """Return the comment and the settings of an option's file, and the keys that its choice uses."""
    choice = [key for key in keys() if any(_names(only, group, option) for only in key.only) and key.type != "group"]
    file = option_file(roots, group, option)
    place = "" if file.is_relative_to(roots[0]) else f" ({file})"
    lines = [f"{group}={option}{place}", textwrap.indent(file.read_text().rstrip(), "  ")]
    if choice:
        lines.append("keys that it uses:")
        width = max(len(key.name) for key in choice)
        lines += [f"  {key.name:{width}}  {key.option.meaning}" for key in choice]
    return "\n".join(lines)


def _names(only: str, group: str, option: str) -> bool:
    left, _, right = only.partition("=")
    return left == group and option in right.split(",")


if __name__ == "__main__":
    page_path().write_text(page(read_compatibility()))
    print(page_path())
