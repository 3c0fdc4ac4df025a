"""The rules for tests: no test module is imported by another one, and helpers live in tests/fixtures."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FIXTURES = TESTS / "fixtures"
FILES = sorted(TESTS.rglob("*.py"))
COMMANDS = {
    "schedulers/parity_table.py",
    "models/published_table.py",
    "end_to_end/ruler.py",
    "end_to_end/startup.py",
}
"""Modules that the Makefile and the pages run with `python -m`; they may be imported like helpers."""
NOT_COLLECTED = {"build", "dist", "venv", "node_modules"}
"""Names of folders in which pytest looks for no tests."""


def is_test(name: str) -> bool:
    """Return whether a module of this name, without its package, holds tests or fixtures for the folder's tests."""
    return name.startswith("test_") or name == "conftest"


def imported_tests(source: str) -> list[str]:
    """Return the test modules and conftests that a source imports, with the line of each import."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} is a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            modules = parts if is_module(name) else parts[:-1]
            if parts[0] == "tests" and any(map(is_test, modules)):
                found.append(f"line {node.lineno}: {name}")
    return found


def is_module(name: str) -> bool:
    """Return whether a dotted name is a file of the tests and not a name in one."""
    return TESTS.parent.joinpath(*name.split(".")).with_suffix(".py").exists()


def misplaced(path: Path) -> bool:
    """Return whether a file under tests/ is a helper outside tests/fixtures."""
    known = is_test(path.stem) or path.stem == "__init__" or str(path.relative_to(TESTS)) in COMMANDS
    return not known and FIXTURES not in path.parents


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_module_is_imported_and_helpers_are_in_fixtures(path: Path) -> None:
    assert imported_tests(path.read_text()) == []
    assert not misplaced(path), f"{path.relative_to(TESTS)} is neither a test nor a command: move it to tests/fixtures"


def test_fixtures_hold_no_tests_and_every_folder_is_a_package_that_pytest_collects() -> None:
    """Without an __init__.py two files of one name collide; pytest never enters a folder named `build`."""
    assert not [path for path in FILES if FIXTURES in path.parents and is_test(path.stem)]
    folders = {path.parent for path in FILES}
    assert all((folder / "__init__.py").exists() for folder in folders)
    assert not [folder for folder in folders if folder.name in NOT_COLLECTED]


@pytest.mark.parametrize(
    "source",
    [
        "from tests.models.test_dit import their",
        "from tests.models import test_dit",
        "import tests.models.test_dit",
        "def late() -> None:\n    from tests.end_to_end.conftest import single",
        "from tests.end_to_end import conftest",
    ],
)
def test_a_planted_import_of_a_test_is_seen(source: str) -> None:
    assert imported_tests(source)
    assert not imported_tests("from tests.fixtures.models.parity import rel_l2\nimport harness.cli")


def test_a_planted_helper_beside_the_tests_is_seen() -> None:
    assert misplaced(TESTS / "models" / "helpers.py")
    assert not misplaced(FIXTURES / "models" / "helpers.py")
