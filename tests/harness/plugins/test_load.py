"""A plug-in is loaded once, adds names, keys and options, and is refused in one line where it cannot run."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness.config.yaml import ConfigError, from_yaml
from harness.plugins import arguments_of, load_plugins, load_sources, loaded, unload_plugin
from harness.records.record import fingerprint
from harness.resolve.compose import check_composed, compose_run, load_plugins_of, to_dict, to_yaml
from harness.resolve.names import check_names
from harness.resolve.reference import describe
from harness.resolve.search_path import SearchPath
from schedulers.build import build
from schedulers.registry import REGISTRIES, Registry, registrations
from schedulers.tables import SOLVERS
from tests.fixtures.plugins import EXAMPLE, SOLVER, no_plugins_left, write

HALVES = 'register_solver("halves", Halves)'
OPTIONS = f"""{SOLVER}
from dataclasses import dataclass
@dataclass
class Options:
    share: float = option(0.5, "Share of the step.", low=0, high=1)
    way: str = option("up", "Way.", words=("up", "down"))
"""


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    with no_plugins_left():
        yield


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return "plugins=[triptych_example]"


def line_of(*overrides: str) -> str:
    """Return the one line that refuses overrides."""
    with pytest.raises(ConfigError) as refused:
        compose_run(overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_registered_solver_is_chosen_like_one_of_ours(example: str) -> None:
    for choice in ("scheduler/solver=example_euler", "scheduler.solver.name=example_euler"):
        run = compose_run([example, choice, "plugin.example_euler.factor=1.5"])
        assert run.noise_scheduler is not None
        assert build(run.noise_scheduler).solver.factor == 1.5
        ranks = from_yaml(to_yaml(run.config))
        assert arguments_of(ranks.plugin, "example_euler") == {"factor": 1.5}
        assert (run.config.plugins, [*run.config.plugin_sources]) == (["triptych_example"], ["triptych_example"])


def test_the_launcher_needs_no_torch_for_the_example(example: str) -> None:
    code = f"import sys, harness.resolve.compose as c; c.compose_run(['{example}']); print('torch' in sys.modules)"
    environment = {"PYTHONPATH": f"{Path(__file__).parents[3]}:{EXAMPLE}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("scheduler", ["rectified_flow", "ddpm", "sgm"])
def test_an_euler_of_ones_own_gives_the_same_bits_as_ours(example: str, scheduler: str) -> None:
    def sample(solver: str) -> torch.Tensor:
        run = compose_run([example, f"scheduler={scheduler}", f"scheduler/solver={solver}", "request.steps=7"])
        assert run.noise_scheduler is not None
        made = build(run.noise_scheduler)
        grid, noise = made.grid(7, 64), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        return made.sample(
            made.init_noise(noise, grid),
            grid,
            lambda x, point: made.prediction.estimate(torch.tanh(point.c_in * x), x, point),
            lambda i: noise,
        )

    ours, own = sample("euler"), sample("example_euler")
    assert torch.equal(ours, own)
    assert not torch.equal(ours, sample("heun"))


def test_a_registered_path_and_spacing_make_the_grid(example: str) -> None:
    run = compose_run([example, "scheduler.path=example_flow", "plugin.example_power.power=1", "request.steps=5"])
    assert run.noise_scheduler is not None
    ours = compose_run(["request.steps=5"]).noise_scheduler
    assert ours is not None
    torch.testing.assert_close(build(run.noise_scheduler).sigmas(5), build(ours).sigmas(5))
    given = ["scheduler=sgm", "scheduler.path=vp", "scheduler.prediction=eps", "model.load=dummy"]
    other = compose_run([example, "scheduler.spacing=example_power", *given])
    assert other.noise_scheduler is not None
    falling = build(other.noise_scheduler).sigmas(6)
    assert (falling.diff() < 0).all()


def test_options_are_typed_checked_and_shown(example: str) -> None:
    assert "give 0 to 2" in line_of(example, "plugin.example_euler.factor=3")
    assert "could not be converted to Float" in line_of(example, "plugin.example_euler.factor=much")
    assert "did you mean plugin.example_euler.factor?" in line_of(example, "plugin.example_euler.factr=1")
    load_plugins(["triptych_example"])
    assert "1 to 10" in describe("plugin.example_power.power")
    assert "example_euler" in describe("scheduler/solver")
    assert "solver of the plug-in triptych_example\n  plugin.example_euler.factor" in describe(
        "scheduler/solver=example_euler"
    )


def test_a_file_of_the_users_may_name_plugins(example: str, tmp_path: Path) -> None:
    """The names and keys that the plug-in adds are then known in the file, and on the command line."""
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nplugins: [triptych_example]\nscheduler:\n  solver:\n    name: example_euler\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    code = f"""
from hydra import compose, initialize_config_module
from harness.resolve.compose import check_composed, register_schema
from harness.resolve.plugins import load_named_plugins
def composed(overrides):
    register_schema()
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", ["hydra.searchpath=[file://{tmp_path}]", *overrides], return_hydra_config=True)
given = ["experiment=mine", "plugin.example_euler.factor=0.5"]
load_named_plugins(given, composed)
config, _ = check_composed(composed(given))
print(config.plugins, config.scheduler.solver.name, config.plugin["example_euler"].factor)
"""
    environment = {"PYTHONPATH": f"{Path(__file__).parents[3]}:{EXAMPLE}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == "['triptych_example'] example_euler 0.5", done.stderr


def test_a_file_is_a_plugin_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "halves_file", HALVES, SOLVER)
    monkeypatch.chdir(tmp_path)
    config = compose_run(["plugins=[halves_file.py]", "scheduler/solver=halves"]).config
    assert config.plugins == [str(file)]
    assert config.plugin_sources[str(file)].folder == str(tmp_path)


@pytest.mark.parametrize(
    ("body", "head", "message"),
    [
        ("1 / 0", "", "ZeroDivisionError: division by zero (bad.py, line 4); mend it, or drop it from plugins"),
        ("pass", "1 / 0", "ZeroDivisionError: division by zero (bad.py, line 2)"),
        ("pass", "import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found' (bad.py, l"),
        ("pass", "raise SystemExit(3)", "SystemExit: 3 (bad.py, line 2)"),
        ("pass", "def", "SyntaxError: "),
        ("pass", 'raise ValueError("two\\nlines")', "ValueError: two; lines (bad.py, line 2)"),
        (f"{HALVES}\n{HALVES}", SOLVER, "solver 'halves' is registered twice, by"),
        ('register_solver("euler", Halves)', SOLVER, "solver 'euler' is registered twice, by triptych and /"),
        ('register_solver("a b", Halves)', SOLVER, "a name has letters, digits and underscores only"),
        ('register_solver("a", Halves, layouts=("px",))', SOLVER, "layouts names 'px', which is not one of dp, cfg"),
        ('register_path("a", Halves, family="ddqm")', SOLVER, "there is no family 'ddqm'; use one of: rectified_flow"),
        (
            'register_solver("a", Halves, options=Halves)',
            SOLVER,
            "its options are no dataclass; write @dataclass above Halves",
        ),
        (
            'register_solver("a", Halves, options=O)',
            f"{SOLVER}\nfrom dataclasses import dataclass\n@dataclass\nclass O:\n    share: float = 1.0",
            "option 'share' is not declared; write share: TYPE = option(DEFAULT, MEANING)",
        ),
        (
            'register_solver("a", Halves, options=Options)\nregister_spacing("a", Halves, options=Options)',
            OPTIONS,
            "the keys plugin.a belong to another kind with options; rename one",
        ),
    ],
)
def test_a_plugin_that_fails_is_refused_in_one_line_and_leaves_nothing(
    tmp_path: Path, body: str, head: str, message: str
) -> None:
    file, before = write(tmp_path, "bad", body, head), registrations()
    line = line_of(f"plugins=[{file}]", "scheduler/solver=halves")
    assert line.startswith(f"plug-in {file}: "), line
    assert message in line
    assert registrations() == before
    assert "bad" not in sys.modules
    file.write_text(write(tmp_path, "other", HALVES, SOLVER).read_text())
    assert compose_run([f"plugins=[{file}]", "scheduler/solver=halves"]).config.scheduler.solver.name == "halves"


def test_a_name_of_two_plugins_is_refused_with_both(tmp_path: Path) -> None:
    one, two = (write(tmp_path, name, HALVES, SOLVER) for name in ("one", "two"))
    line = line_of(f"plugins=[{one},{two}]")
    assert f"solver 'halves' is registered twice, by {one} and {two}; rename one" in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module", "there is no module no_such_module; install its package, or give its file"),
        ("no/such/file.py", "there is no such file; check plugins"),
        ("json", "it has no function register(); write one that calls harness.plugins"),
        ("triptych", "triptych cannot name a plug-in"),
        ("a-b", "a-b cannot name a plug-in; write plugins=[package.module]"),
    ],
)
def test_what_is_no_plugin_is_refused(name: str, message: str) -> None:
    line = line_of(f"plugins=[{name}]")
    assert line.startswith("plug-in ")
    assert message in line


def test_a_file_that_would_hide_a_module_is_refused(tmp_path: Path) -> None:
    assert "there is another module json; rename the file" in line_of(f"plugins=[{write(tmp_path, 'json', 'pass')}]")


def test_layouts_and_step_batching_are_refused_where_they_cannot_run(tmp_path: Path) -> None:
    body = 'register_solver("halves", Halves, layouts=("dp", "cfg"), step_batching=False)'
    chosen = [f"plugins=[{write(tmp_path, 'limited', body, SOLVER)}]", "scheduler/solver=halves"]
    assert line_of(*chosen, "parallel=ulysses2") == (
        "scheduler.solver.name=halves does not go with parallel.ulysses=2; use parallel.dp, parallel.cfg"
    )
    assert line_of(*chosen, "task=serve", "serve.max_batch=4") == (
        "scheduler.solver.name=halves does not go with serve.max_batch=4: requests cannot share its forwards; set "
        "serve.max_batch=1"
    )
    for allowed in (["parallel=cfg2"], ["task=serve", "serve.max_batch=1"]):
        compose_run([*chosen, *allowed])
    compose_run([*chosen[:1], "parallel=ulysses2"])  # loaded, and not in use


def test_a_run_that_does_not_name_a_plugin_has_nothing_of_it(tmp_path: Path) -> None:
    """A sweep's jobs share a process, so an earlier job's plug-in is still loaded."""
    file = write(tmp_path, "first_job", 'register_solver("halves", Halves, options=Options)', OPTIONS)
    with_it = compose_run([f"plugins=[{file}]"]).config
    without = compose_run([]).config
    assert (without.plugins, without.plugin, without.plugin_sources) == ([], {}, {})
    assert fingerprint(to_dict(without)) != fingerprint(to_dict(with_it))
    assert f"scheduler.solver.name=halves is of the plug-in {file}; add plugins=[{file}]" == line_of(
        "scheduler/solver=halves"
    )
    assert f"plugin.halves is of the plug-in {file}; add plugins=[{file}]" == line_of("plugin.halves.share=0.1")


def test_the_fingerprint_has_the_code_and_not_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for folder, edit in (("a", ""), ("b", ""), ("c", "# edited")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, "coded", HALVES, SOLVER + edit)
        with monkeypatch.context() as inside:
            inside.syspath_prepend(str(tmp_path / folder))
            found.append(fingerprint(to_dict(compose_run(["plugins=[coded]"]).config)))
            unload_plugin("coded")
    assert found[0] == found[1] != found[2]


def test_code_that_was_edited_after_loading_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "edited", HALVES, SOLVER)
    sources = compose_run([f"plugins=[{file}]"]).config.plugin_sources
    file.write_text(file.read_text() + "\n# edited\n")
    assert "its files changed since it was loaded" in line_of(f"plugins=[{file}]")
    unload_plugin(str(file))
    with pytest.raises(ConfigError, match="its code differs from that of the launcher"):
        load_sources(sources)
    assert compose_run([f"plugins=[{file}]", "scheduler/solver=halves"]).config.plugins == [str(file)]


def test_a_rank_finds_a_module_where_the_launcher_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook searches its own folder, which no rank does."""
    write(tmp_path, "beside_the_notebook", HALVES, SOLVER)
    with monkeypatch.context() as inside:
        inside.syspath_prepend(str(tmp_path))
        sources = compose_run(["plugins=[beside_the_notebook]"]).config.plugin_sources
        unload_plugin("beside_the_notebook")
    with pytest.raises(ConfigError, match="there is no module beside_the_notebook"):
        load_plugins(["beside_the_notebook"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    load_sources(sources)
    assert "halves" in SOLVERS


def test_a_sweep_loads_the_plugins_of_all_its_jobs(tmp_path: Path) -> None:
    one = write(tmp_path, "of_one", HALVES, SOLVER)
    two = write(tmp_path, "of_two", HALVES.replace("halves", "thirds"), SOLVER)
    overrides = [f"plugins=[{one}],[{two}]", "scheduler/solver=euler,halves,thirds"]
    load_plugins_of(overrides, SearchPath.of_user())
    assert [*loaded()] == [str(one), str(two)]
    check_names(overrides, sweep=True)


def test_ours_are_registered_like_others() -> None:
    """One function fills each registry: an entry that a plug-in could not register would be a door for us alone."""
    assert {registry.kind for registry in REGISTRIES} >= {"solver", "path", "spacing"}
    for registry in REGISTRIES:
        assert isinstance(registry, Registry)
        assert all(row.owner == "triptych" for row in registry.registrations())
    assert check_composed.__module__ == compose_run.__module__
