"""The import rule: floors point one way, schedulers and models stay apart, clients start light, nothing is pickled.

`python -m tests.test_imports` writes the order of the rooms into harness/README.md.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.config.schema import ModelConfig, RunConfig
from harness.engines.preimport import required_modules
from harness.resolve.engines_table import BASELINES
from models.registry import ARCHITECTURES

ROOT = Path(__file__).parent.parent
PACKAGES = ("harness", "models", "schedulers")
FLOORS: tuple[tuple[str, ...], ...] = (
    ("schedulers.options",),
    ("schedulers.registry",),
    ("models", "schedulers", "harness.messages"),
    ("harness.config",),
    ("harness.plugins",),
    ("harness.datasets", "harness.device", "harness.metrics"),
    ("harness.parallel", "harness.records"),
    ("harness.loggers", "harness.optimize", "harness.resolve", "harness.search"),
    ("harness.pipeline",),
    ("harness.baselines", "harness.caching", "harness.serving"),
    ("harness.build",),
    ("harness.costs", "harness.engines"),
    ("harness.client",),
    ("harness.tasks",),
    ("harness.cli",),
    ("harness.__main__",),
)
"""The rooms from the ground up: a room imports only rooms of lower floors, and none of its own floor."""
PAGES = ("pandas", "matplotlib", "plotly", "fastapi", "uvicorn", "httpx", "wandb")
NEVER_BY_CLIENTS = ("torch", "transformers", "diffusers", "scipy", "PIL", *PAGES)  # before ranks are starting
NEVER_BY_RANKS = ("hydra", "omegaconf", "rich", *PAGES)
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> tuple[int, str] | None:
    """Return the floor and the room of a module, by the longest name that fits; None for a package itself."""
    found = [(len(room), number, room) for number, rooms in enumerate(FLOORS) for room in rooms if fits(module, room)]
    return max(found)[1:] if found else None


def fits(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def imported(source: str) -> list[tuple[int, str]]:
    """Return every module of ours that a source imports, type-checking imports too, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"line {node.lineno} is a relative import"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] in PACKAGES]


def wrong_imports(module: str, source: str) -> list[str]:
    """Return the imports of a module's source that do not point down, one line each."""
    importer = room_of(module)
    if importer is None:
        return [f"{module}:{line} is a package's face and imports {name}" for line, name in imported(source)]
    wrong = []
    for line, name in imported(source):
        target = room_of(name)
        if target is not None and target[1] != importer[1] and target[0] >= importer[0]:
            wrong.append(f"{module}:{line} imports {name} from floor {target[0]}, and is on floor {importer[0]}")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    module = module_of(path)
    assert room_of(module) is not None or module in PACKAGES, f"{module} has no floor; add it to FLOORS"
    assert not wrong_imports(module, path.read_text())


PLANTS = {
    "a model reads the configuration": ("models.plan", "from harness.config.schema import RunConfig"),
    "a solver knows a network": ("schedulers.grid", "from models.layers import RMSNorm"),
    "a lower room knows a higher one": ("harness.records.record", "from harness.loggers.wandb import log_run"),
    "two rooms of a floor": ("harness.caching.policies", "def late() -> None:\n    import harness.serving.worker"),
    "for its types alone": (
        "harness.parallel.mesh",
        "if TYPE_CHECKING:\n    import harness.pipeline.state",
    ),
    "a package's face": ("harness", "from harness import cli"),
}


@pytest.mark.parametrize(("module", "source"), PLANTS.values(), ids=PLANTS)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    assert wrong_imports(module, source)


README = ROOT / "harness" / "README.md"
MARKERS = ("<!-- rooms -->", "<!-- /rooms -->")


def order_of_rooms() -> str:
    """Return the floors as a table, from the ground up."""
    rows = []
    for number, rooms in enumerate(FLOORS):
        names = ", ".join(f"`{room.removeprefix('harness.')}`" for room in rooms)
        rows.append(f"| {number} | {names} |")
    return "\n".join(["| floor | rooms |", "|---|---|", *rows])


def with_rooms(page: str) -> str:
    """Return a page with the table between the markers."""
    before, _, rest = page.partition(MARKERS[0])
    _, found, after = rest.partition(MARKERS[1])
    assert found, f"no {MARKERS[0]} and {MARKERS[1]} in the page"
    return f"{before}{MARKERS[0]}\n{order_of_rooms()}\n{MARKERS[1]}{after}"


def test_the_page_has_the_order_of_the_rooms() -> None:
    page = README.read_text()
    assert with_rooms(page) == page, "run python -m tests.test_imports"
    assert with_rooms(page.replace("| 0 |", "| 1 |")) == page
    with pytest.raises(AssertionError, match="no <!-- rooms -->"):
        with_rooms(page.replace(MARKERS[1], ""))


def test_every_room_exists() -> None:
    modules = {module_of(path) for path in FILES}
    for rooms in FLOORS:
        for room in rooms:
            assert room in modules, f"{room} is in FLOORS but not in the tree"


def test_clients_start_without_what_ranks_or_pages_need() -> None:
    found = f"print(*[m for m in {NEVER_BY_CLIENTS} if m in sys.modules])"
    code = f"import sys, harness.cli, harness.client.generator; {found}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, cwd=ROOT, check=True)
    assert done.stdout.split() == []


def run_at_import(nodes: list[ast.stmt]) -> Iterator[str]:
    """Yield what a module imports at import time, `a.b.c` also where c is a name in a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from run_at_import([*node.body, *node.orelse])
        elif isinstance(node, ast.Try | ast.With | ast.ClassDef):
            yield from run_at_import(node.body)


def test_ranks_start_without_what_clients_need() -> None:
    """All of our modules that a rank of any architecture or engine imports are checked, those of agents too."""
    sources = {module_of(path): path for path in FILES}
    configs = [RunConfig(model=ModelConfig(architecture=name)) for name in ARCHITECTURES]
    wanted = [
        "harness.engines.fork_agent",
        "harness.engines.rank",
        *(name for config in configs for name in required_modules(config)),
    ]
    wanted += ["harness.build.baseline", "harness.parallel.vae", *(row.module for row in BASELINES.values())]
    seen: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name not in sources or name in seen:
            continue
        seen.add(name)
        for found in run_at_import(ast.parse(sources[name].read_text()).body):
            assert found.split(".")[0] not in NEVER_BY_RANKS, f"{sources[name]} imports {found}"
            wanted += [found, found.rpartition(".")[0]]
    assert {"harness.build.worker", "models.flux.network", "harness.baselines.families.sd"} <= seen


@pytest.mark.slow
def test_native_ranks_import_the_modules_of_diffusers_that_they_need() -> None:
    """Code that needs the packages later gets them, with the same classes in them."""
    code = """
import sys
from harness.config.schema import ModelConfig, RunConfig
from harness.engines.preimport import import_required
from models.registry import ARCHITECTURES
for name in ARCHITECTURES:
    import_required(RunConfig(model=ModelConfig(architecture=name)))
print(*[name for name in sys.modules if name.startswith("diffusers.models.transformers.")])
from models.decoders import AutoencoderKL
import diffusers
from diffusers.models.transformers import FluxTransformer2DModel
assert diffusers.AutoencoderKL is AutoencoderKL
assert diffusers.FluxTransformer2DModel is FluxTransformer2DModel
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) < 5, done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_pickled(path: Path) -> None:
    """No pickle module, no torch.load, no collective of Python objects."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "cloudpickle", "dill", "joblib"} & set(names), f"{path}:{node.lineno}"
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            assert not node.attr.endswith(("object_list", "gather_object")), f"{path}:{node.lineno}"
            assert (owner, node.attr) not in {("torch", "load"), ("torch", "save")}, f"{path}:{node.lineno}"


if __name__ == "__main__":
    README.write_text(with_rooms(README.read_text()))
    print(order_of_rooms())
