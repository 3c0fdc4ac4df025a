"""Loading plug-ins: importing their modules and calling their `register()`, once in a process.

The launcher loads them before it checks a name, and every rank loads those of its configuration before it builds.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

from harness.config.schema import PluginSource
from harness.config.yaml import ConfigError
from schedulers.registry import OURS, owned_by, withdraw

GROUP = "triptych.plugins"
REGISTER = "register"
NAME = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
_loaded: dict[str, Plugin] = {}


@dataclass(frozen=True)
class Plugin:
    """A plug-in that is loaded.

    Attributes:
        name: Module, `module:function` if the function is not register(), or path of a file.
        version: The version of the package; empty if there is none.
        sha256: A hash of the source files, 16 hexadecimal digits.
        folder: The folder of the import.
        installed: Whether an entry point names it.
        module: Name of the module in sys.modules.
    """

    name: str
    version: str
    sha256: str
    folder: str
    installed: bool
    module: str

    @property
    def source(self) -> PluginSource:
        """Its code, as a configuration has it."""
        return PluginSource(self.version, self.sha256, self.folder)


def loaded() -> dict[str, Plugin]:
    """Return the plug-ins of this process by name, in the order in which they were loaded."""
    return dict(_loaded)


def load_plugins(names: Iterable[str] = ()) -> list[Plugin]:
    """Load installed plug-ins and named ones; one that is loaded already is left as it is.

    Args:
        names: Modules, each with a function register(), `module:function`, or paths of Python files.

    Returns:
        The plug-ins that are new in this process.

    Raises:
        ConfigError: A plug-in is missing, raises, or registers a name that is taken; one line says what to change.
    """
    before = set(_loaded)
    for point in metadata.entry_points(group=GROUP):
        _load(full_name(point.value), "" if point.dist is None else point.dist.version, installed=True)
    for name in names:
        _load(full_name(name))
    return [plugin for name, plugin in _loaded.items() if name not in before]


def load_sources(sources: Mapping[str, PluginSource]) -> None:
    """Load the plug-ins of a rank's configuration, and hold them to the launcher's code.

    Args:
        sources: The code of each plug-in, as the launcher has it.

    Raises:
        ConfigError: As `load_plugins`, or the code differs.
    """
    for name, source in sources.items():
        if source.folder not in sys.path:
            sys.path.append(source.folder)  # last, so that it hides no module
        _load(name, source.version)
        if _loaded[name].sha256 != source.sha256:
            raise ConfigError(
                f"plug-in {name}: its code differs from that of the launcher ({_loaded[name].folder} and "
                f"{source.folder}); install the same version everywhere, and start again"
            )


def full_name(name: str) -> str:
    """Return the one name of a plug-in: without the function's default, or the absolute path of a file."""
    if name.endswith(".py"):
        return str(Path(name).expanduser().resolve())
    return name.replace(" ", "").removesuffix(f":{REGISTER}")


def _load(name: str, version: str = "", installed: bool = False) -> None:
    if name in _loaded:
        _check_unchanged(_loaded[name])
        return
    path = Path(name) if name.endswith(".py") else None
    module_name, _, function = (path.stem, "", "") if path else name.partition(":")
    if not re.fullmatch(NAME, module_name) or module_name == OURS:
        raise ConfigError(f"plug-in {name}: {module_name} cannot name a plug-in; write plugins=[package.module]")
    known = set(sys.modules)
    try:
        with owned_by(name):
            module = _import_file(path) if path else _import(module_name)
            register = getattr(module, function or REGISTER, None)
            if register is None:
                raise ConfigError(
                    f"plug-in {name}: it has no function {function or REGISTER}(); write one that calls harness.plugins"
                )
            register()
    except (Exception, SystemExit) as error:
        _forget(module_name, known)  # so that a notebook loads the code again once it is mended
        if isinstance(error, ConfigError):
            raise
        remedy = "mend it, or uninstall its package" if installed else "mend it, or drop it from plugins"
        raise ConfigError(f"plug-in {name}: {_line(error)}; {remedy}") from error
    folder, files = _files(module)
    version = version or _version(module, module_name)
    _loaded[name] = Plugin(name, version, _hash(folder, files), str(folder), installed, module.__name__)


def unload_plugin(name: str) -> None:
    """Forget a plug-in and its module, for a notebook that loads it anew after an edit.

    Args:
        name: The plug-in's name; nothing is done if it is not loaded.
    """
    plugin = _loaded.pop(full_name(name), None)
    if plugin is not None:
        withdraw(plugin.name)
        _forget(plugin.module, set())


def _forget(module: str, known: set[str]) -> None:
    """Remove a module and those below it from the imported ones, except known ones."""
    for name in set(sys.modules) - known:
        if f"{name}.".startswith(f"{module}."):
            del sys.modules[name]


def _check_unchanged(plugin: Plugin) -> None:
    """Refuse code that was edited since it was imported: ranks would import other code than the launcher has."""
    module = sys.modules.get(plugin.module)
    if module is None or _hash(*_files(module)) != plugin.sha256:
        raise ConfigError(
            f"plug-in {plugin.name}: its files changed since it was loaded; start Python again, or call "
            f"harness.plugins.unload_plugin({plugin.name!r}) first"
        )


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"plug-in {name}: there is no module {error.name}; install its package, or give its file: "
            "plugins=[path/to/module.py]"
        ) from error


def _import_file(path: Path) -> ModuleType:
    """Import a file as the module of its stem, by which its text targets find it."""
    if not path.is_file():
        raise ConfigError(f"plug-in {path}: there is no such file; check plugins")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if path.stem in sys.modules or importlib.util.find_spec(path.stem) not in (None, spec):
        raise ConfigError(f"plug-in {path}: there is another module {path.stem}; rename the file")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _line(error: BaseException) -> str:
    """Return what went wrong in a plug-in on one line: the type, the message, and the plug-in's innermost line."""
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_foreign(frame.filename)]
    own = [frame for frame in frames if Path(frame.filename).parent == Path(frames[0].filename).parent]
    file, line = (own[-1].filename, own[-1].lineno) if own else ("", None)
    if isinstance(error, SyntaxError):
        file, line, text = error.filename or "", error.lineno, error.msg
    where = f" ({Path(file).name}, line {line})" if file else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"


def _is_foreign(file: str) -> bool:
    return not file.startswith("<frozen") and Path(file) != Path(__file__)


def _files(module: ModuleType) -> tuple[Path, list[Path]]:
    """Return the folder from which a module is imported, and the source files of its top-level package."""
    top = sys.modules.get(module.__name__.partition(".")[0], module)
    file = Path(top.__file__ or module.__file__ or "").resolve()
    if file.name != "__init__.py":
        return file.parent, [file]
    return file.parent.parent, sorted(file.parent.rglob("*.py"))


def _hash(folder: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _version(module: ModuleType, name: str) -> str:
    try:
        return metadata.version(name.partition(".")[0])
    except metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", ""))
