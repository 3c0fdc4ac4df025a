"""What is imported is declared, a plain run imports no extra, and versions are in one place."""

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import harness
from harness.config.schema import WandbMode
from harness.loggers import wandb
from harness.resolve import packages
from harness.resolve.compose import ConfigError, compose_run

ROOT = Path(__file__).parent.parent
OWN = ("harness", "models", "schedulers", "conf")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILES = sorted(path for package in OWN for path in (ROOT / package).rglob("*.py"))
NOT_INSTALLED = {"ftfy": "ftfy", "resvg_py": "resvg_py", "torchao": "torchao"}
"""Packages of modules that an environment for tests does not have."""
UNDECLARED = {"sglang", "_typeshed"}
"""A package whose own requirements would replace torch, so that the refusal says how to install it; mypy's types."""
PLACES = {
    "harness/tasks/serve/": "serve",
    "harness/tasks/load/": "serve",
    "harness/baselines/sglang.py": None,
}
"""Files that only a task or an engine of one extra imports, and that may import it at their head."""


def requirements(lines: Iterable[str]) -> dict[str, Requirement]:
    """Return requirements by name, those of the extras that they name too."""
    found: dict[str, Requirement] = {}
    for parsed in map(Requirement, lines):
        if parsed.name == "triptych":
            for extra in parsed.extras:
                found |= requirements(PROJECT["optional-dependencies"][extra])
        else:
            found[canonicalize_name(parsed.name)] = parsed
    return found


BASE = requirements(PROJECT["dependencies"])
EXTRAS = {name: requirements(lines) for name, lines in PROJECT["optional-dependencies"].items()}


installed_packages = cache(packages_distributions)


def distributions(module: str) -> set[str]:
    """Return the packages that a module may come from."""
    top = module.partition(".")[0]
    found = installed_packages().get(top, []) or [NOT_INSTALLED.get(top, f"no package of {top}")]
    return {canonicalize_name(name) for name in found}


def foreign(names: Iterable[str]) -> set[str]:
    """Return the modules that are neither Python's nor this project's."""
    tops = {name.partition(".")[0] for name in names}
    return tops - {*OWN, "__future__"} - sys.stdlib_module_names


def imports(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module


def at_head(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Yield the statements that run when a module is imported."""
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_head(ast.iter_child_nodes(node))


def undeclared(source: str, declared: Iterable[str]) -> set[str]:
    """Return the modules that a source imports anywhere and no declared package has."""
    modules = foreign(imports(ast.walk(ast.parse(source)))) - UNDECLARED
    return {module for module in modules if not distributions(module) & set(declared)}


def eager(path: str, source: str) -> set[str]:
    """Return the modules that importing a file imports, and a plain installation does not have."""
    extra = next((extra for place, extra in PLACES.items() if path.startswith(place)), "")
    allowed = {*BASE, *(EXTRAS[extra] if extra else {})}
    modules = foreign(imports(at_head(ast.parse(source).body))) - (UNDECLARED if extra is None else set())
    return {module for module in modules if not distributions(module) & allowed}


def test_what_is_imported_is_declared() -> None:
    declared = {name for found in (BASE, *EXTRAS.values()) for name in found}
    assert {str(path): found for path in FILES if (found := undeclared(path.read_text(), declared))} == {}
    assert undeclared("def late():\n    import yaml, pygments.lexers", declared) == {"pygments"}


def test_a_plain_run_imports_no_package_of_an_extra() -> None:
    names = {str(path.relative_to(ROOT)): path for path in FILES}
    assert {name: found for name, path in names.items() if (found := eager(name, path.read_text()))} == {}
    assert eager("harness/cli.py", "import yaml\ntry:\n    import wandb\nexcept ImportError: ...") == {"wandb"}
    assert eager("harness/tasks/serve/app.py", "import fastapi, wandb") == {"wandb"}
    assert not eager("harness/cli.py", "def late():\n    import wandb\nif TYPE_CHECKING:\n    import fastapi")


def test_the_table_of_packages_is_that_of_the_project() -> None:
    for name, (oldest, too_new) in packages.VERSIONS.items():
        assert {(part.operator, part.version) for part in BASE[name].specifier} == {(">=", oldest), ("<", too_new)}
    for extra, names in packages.EXTRAS.items():
        assert set(names) == set(EXTRAS[extra])


def test_the_constraints_have_one_version_of_every_package_that_the_makefile_installs() -> None:
    pins = {}
    for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, _, pinned = line.partition("==")
            assert canonicalize_name(name) not in pins, line
            pins[canonicalize_name(name)] = Version(pinned)
    makefile = (ROOT / "Makefile").read_text()
    installed = dict(re.findall(r"^EXTRAS_(\w+) := (\S+)$", makefile, re.MULTILINE))
    assert set(installed) == set(re.findall(r"\.ready-(\w+)$", makefile, re.MULTILINE))
    for extras in installed.values():
        for name, wanted in (BASE | requirements([f"triptych[{extras}]"])).items():
            assert wanted.specifier.contains(pins[name], prereleases=True), wanted


def test_there_is_one_version() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert f"version: {harness.__version__}" in (ROOT / "CITATION.cff").read_text().splitlines()


def test_images_and_editors_use_the_commands_of_the_makefile() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    image = (ROOT / ".devcontainer" / "Dockerfile").read_text()
    editor = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    used = re.findall(r"\bmake\b[\", ]+(\w+)", f"{image}\n{editor['postCreateCommand']}")
    assert len(used) >= 3
    assert set(used) - {"python3"} <= targets
    assert (ROOT / ".devcontainer" / editor["build"]["dockerfile"]).is_file()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str | None]]:
    """Yield versions that replace those of this environment; None is for a package that is missing."""
    versions: dict[str, str | None] = {}
    real = packages.version
    for module in (packages, wandb):
        monkeypatch.setattr(module, "version", lambda name: versions[name] if name in versions else real(name))
    packages.check_versions.cache_clear()
    yield versions
    packages.check_versions.cache_clear()


@pytest.mark.parametrize("found", ["2.10.1", "2.14.0", "3.0.0+cu130", "2.14.0.dev20270101", None])
def test_a_torch_out_of_range_is_one_line(installed: dict[str, str | None], found: str | None) -> None:
    installed["torch"] = found
    with pytest.raises(ConfigError, match=r"^torch .*: pip install 'torch>=2\.11,<2\.14'$") as refused:
        compose_run([])
    assert (f"{found} is installed" if found else "is not installed") in str(refused.value)


@pytest.mark.parametrize("found", ["2.11", "2.11.0+cpu", "2.13.1+cu130"])
def test_a_torch_in_range_runs(installed: dict[str, str | None], found: str) -> None:
    installed["torch"] = found
    compose_run([])


MISSING = (
    ("fastapi", "task=serve", "serve", "task=serve needs the package fastapi"),
    ("httpx", "task=load", "serve", "task=load needs the package httpx"),
    ("imageio-ffmpeg", "request.frames=5", "video", "request.frames=5 needs the package imageio-ffmpeg"),
    ("wandb", "logger.wandb.mode=online", "wandb", "logger.wandb.mode=online needs the package wandb"),
    ("torchao", "model.quantize=fp8", "quantize", "model.quantize=fp8 needs the package torchao"),
)


@pytest.mark.parametrize(("package", "override", "extra", "line"), MISSING, ids=[row[1] for row in MISSING])
def test_a_missing_extra_is_one_line_with_its_command(
    installed: dict[str, str | None], package: str, override: str, extra: str, line: str
) -> None:
    installed[package] = None
    model = ["model=wan_1_3b", "model.load=dummy"] if "frames" in override else []
    with pytest.raises(ConfigError, match=re.escape(f"{line}: pip install 'triptych[{extra}]'")):
        compose_run([*model, override])


def test_a_run_without_wandb_says_so_and_mirrors_nothing(
    installed: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb.resolve_mode(WandbMode.auto) == "offline"
    assert wandb.mode_notes(WandbMode.auto) == []
    installed["wandb"] = None
    assert wandb.resolve_mode(WandbMode.auto) == "disabled"
    assert "pip install 'triptych[wandb]'" in wandb.mode_notes(WandbMode.auto)[0]
    assert wandb.mode_notes(WandbMode.disabled) == []
