"""Where configurations come from: conf/ of this project, then the user's own folders.

`--config-dir DIR`, the variable TRIPTYCH_CONF and the Python client's `config_dir` name such folders. A primary
configuration or a command line adds more with Hydra's `hydra.searchpath`. Hydra's loader reads all of them alike.
"""

from __future__ import annotations

import importlib.resources
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config.yaml import ConfigError
from schedulers.registry import OURS, REGISTRIES

if TYPE_CHECKING:  # ranks read a resolved configuration, and import no Hydra
    from hydra._internal.hydra import Hydra
    from hydra.core.config_search_path import ConfigSearchPath

CONF = "conf"
PRIMARY = "config"
VARIABLE = "TRIPTYCH_CONF"
PACKAGE = "pkg://"
PARENTS = ("hydra", "schema")  # Hydra's own providers: its package, and the dataclasses
MAX_DEPTH = 3  # parts of a group's name, such as hydra/launcher


@dataclass(frozen=True)
class SearchPath:
    """The places that are searched for configurations besides conf/.

    Attributes:
        folders: Absolute folders, or packages as pkg://NAME, in the order in which they are searched.
        primary: Name of the primary configuration.
    """

    folders: tuple[str, ...] = ()
    primary: str = PRIMARY

    @classmethod
    def of_user(cls, folders: Iterable[str | Path] = (), primary: str | None = None) -> SearchPath:
        """Return the search path of a command: the folders that it names, then those of TRIPTYCH_CONF.

        Args:
            folders: Folders, or packages as pkg://NAME.
            primary: Name of the primary configuration. None is the one of conf/.

        Returns:
            The search path.

        Raises:
            ConfigError: A folder does not exist.
        """
        named = [part for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]
        places = [_place(str(folder), "--config-dir or config_dir") for folder in folders]
        places += [_place(folder, VARIABLE) for folder in named]
        return cls(tuple(dict.fromkeys(places)), primary or PRIMARY)

    @contextmanager
    def hydra(self) -> Iterator[Hydra]:
        """Run Hydra on these places inside the context; also inside a job of a sweep, whose state is restored.

        Yields:
            Hydra's application.
        """
        from hydra import version
        from hydra._internal.hydra import Hydra
        from hydra.core.global_hydra import GlobalHydra

        outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
        version.setbase("1.3")
        try:
            yield Hydra.create_main_hydra2("triptych", self._places())
        finally:
            GlobalHydra.instance().hydra = outer

    def _places(self) -> ConfigSearchPath:
        """Return these places as Hydra's own search path."""
        from hydra._internal.utils import create_config_search_path
        from hydra.core.config_search_path import SearchPathQuery

        path = create_config_search_path(f"{PACKAGE}{CONF}")
        for folder in self.folders:
            place = folder if folder.startswith(PACKAGE) else f"file://{folder}"
            path.prepend("command-line", place, SearchPathQuery(provider="schema"))
        return path

    def roots(self, overrides: Sequence[str] = ()) -> list[Path]:
        """Return the folders that Hydra's loader searches, conf/ first.

        Args:
            overrides: The command's overrides; hydra.searchpath among them adds folders.

        Returns:
            The folders, all of which exist.

        Raises:
            ConfigError: A folder or a package does not exist.
        """
        own = [override for override in overrides if override.startswith("hydra.searchpath=")]
        from hydra._internal.config_loader_impl import ConfigLoaderImpl

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Hydra, about what is refused here
            loader = ConfigLoaderImpl(self._places())
            _, repository = loader._parse_overrides_and_create_caching_repo(self.primary, own)
            sources = [source for source in repository.get_sources() if source.provider not in PARENTS]
        for source in sources:
            if not source.available():
                raise ConfigError(f"{source.scheme()}://{source.path}: no such folder of configurations")
        found = [_folder(source.scheme(), source.path) for source in sources]
        return list(dict.fromkeys(found))


def _place(folder: str, named_by: str) -> str:
    """Return a folder as Hydra takes it, or refuse it.

    Raises:
        ConfigError: It is not a folder.
    """
    if folder.startswith(PACKAGE):
        return folder
    path = Path(folder.removeprefix("file://")).expanduser()
    if not path.is_dir():
        raise ConfigError(f"{named_by}={folder}: no such folder; it holds files such as model/NAME.yaml")
    return str(path.resolve())


def _folder(scheme: str, path: str) -> Path:
    """Return the folder of one of Hydra's sources."""
    return Path(str(importlib.resources.files(path.replace("/", ".")))) if scheme == "pkg" else Path(path).resolve()


def conf_root() -> Path:
    """Return the folder conf/ of this project."""
    return _folder("pkg", CONF)


def groups_of(roots: Sequence[Path]) -> dict[str, list[str]]:
    """Return every group of these folders with its options, and those that loaded plug-ins add.

    A nested group is given by its path.

    Args:
        roots: Folders of configurations.

    Returns:
        The options of each group, in alphabetical order.

    Raises:
        ConfigError: A folder has an option that another one before it has, so that Hydra would never read it.
    """
    groups: dict[str, dict[str, Path]] = {}
    for root in roots:
        for file in _files(root, MAX_DEPTH):
            group = file.parent.relative_to(root).as_posix()
            first = groups.setdefault(group, {}).setdefault(file.stem, file)
            if first != file:
                raise ConfigError(f"{file}: {first} has the same name and is read in its place; rename yours")
    found = {group: sorted(groups[group]) for group in sorted(groups) if group != "."}
    for registry in REGISTRIES:
        if registry.group:
            found.setdefault(registry.group, []).extend(
                row.name for row in registry.registrations() if row.owner != OURS
            )
    return found


def _files(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the YAML files of a folder and of folders in it; hidden folders are left out."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith((".", "_")):
            continue
        if entry.suffix == ".yaml":
            yield entry
        elif depth > 0 and entry.is_dir():
            yield from _files(entry, depth - 1)


def option_file(roots: Sequence[Path], group: str, option: str) -> Path:
    """Return the file of a group's option, which exists in one of these folders."""
    return next(path for root in roots if (path := root / group / f"{option}.yaml").is_file())
