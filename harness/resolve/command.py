"""A command line in its parts: overrides, the places of the user's own configurations, and Hydra's flags.

`from=FOLDER` among the overrides stands for those of the run in that folder.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from harness.config.yaml import ConfigError
from harness.resolve.comparison import quote_overrides
from harness.resolve.rerun import with_record
from harness.resolve.search_path import SearchPath
from models.registry import did_you_mean

PRINTS = ("shell_completion", "hydra_help", "info", "cfg")  # flags that print something in place of a run

CONFIG_DIR = ("--config-dir", "-cd")


@dataclass(frozen=True)
class Command:
    """The parts of a command line.

    Attributes:
        overrides: Overrides, those of a run that is repeated among them, in the form that Hydra takes.
        search: Search path of the configurations.
        flags: Hydra's flags, as parsed.
    """

    overrides: list[str]
    search: SearchPath
    flags: Namespace

    def without_flags(self, place: str) -> Command:
        """Return this command if it runs one configuration, as it has to in some places.

        Args:
            place: What takes no flags.

        Raises:
            ConfigError: It sweeps or prints.
        """
        if self.flags.multirun or self.prints is not None:
            raise ConfigError(
                f"-m and flags that print do not go with {place}; sweep outside: python -m harness -m ..."
            )
        return self

    @property
    def prints(self) -> str | None:
        """The flag that prints something in place of a run, such as cfg; None if there is none."""
        return next((name for name in PRINTS if getattr(self.flags, name) not in (None, False)), None)


def parse_flags(arguments: Sequence[str]) -> Namespace:
    """Parse Hydra's flags, wherever they stand among the overrides.

    Args:
        arguments: The command line without the program's name.

    Returns:
        The flags, with the other arguments as `overrides`.

    Raises:
        ConfigError: There is no such flag, or it lacks its value.
    """
    parser = get_args_parser()
    flags = [flag for action in parser._actions for flag in action.option_strings]

    def refuse(message: str) -> NoReturn:
        unknown = message.rpartition(": ")[2] if message.startswith("unrecognized") else ""
        raise ConfigError(f"{message}{did_you_mean(unknown.split('=')[0], flags)}; --hydra-help lists the flags")

    parser.error = refuse  # type: ignore[method-assign]
    if sum(argument.partition("=")[0] in CONFIG_DIR for argument in arguments) > 1:
        raise ConfigError(
            "--config-dir is given twice; for several folders: hydra.searchpath=[DIR,DIR] or TRIPTYCH_CONF"
        )
    return parser.parse_intermixed_args(list(arguments))


def parse_command(arguments: Sequence[str], config_dir: str | Path | None = None) -> Command:
    """Parse a command line.

    Args:
        arguments: The command line without the program's name.
        config_dir: A folder of configurations, besides one that a flag names.

    Returns:
        Its parts.

    Raises:
        ConfigError: A flag or a folder does not exist, or a flag replaces what this project needs.
    """
    flags = parse_flags(arguments)
    if flags.config_path is not None:
        raise ConfigError(f"--config-path={flags.config_path} leaves conf/ out; add a folder to it: --config-dir DIR")
    if flags.experimental_rerun is not None:
        raise ConfigError("--experimental-rerun reads a pickle; repeat a run by its record: from=runs/DATE/TIME")
    if (flags.package or flags.resolve) and not flags.cfg:
        raise ConfigError("--package and --resolve say how --cfg prints a configuration; add --cfg job")
    folders = [folder for folder in (flags.config_dir, config_dir) if folder is not None]
    search = SearchPath.of_user(folders, flags.config_name)
    if flags.shell_completion:
        return Command(flags.overrides, search, flags)
    overrides, search = with_record(flags.overrides, search)
    return Command([quote_overrides(override) for override in overrides], search, flags)
