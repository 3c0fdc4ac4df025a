"""The key reference and the help say what the declarations say."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from harness import cli
from harness.config.schema import RunConfig
from harness.resolve.names import config_groups
from harness.resolve.options import options
from harness.resolve.reference import describe, help_text, keys, page, page_path, read_compatibility

ROOT = Path(__file__).parents[3]


def test_the_page_is_what_the_command_writes() -> None:
    assert page_path().read_text() == page(read_compatibility()), "run: make pages"


def test_the_page_keeps_what_stands_between_the_markers() -> None:
    text = page("\n\n| a | table |\n\n")
    assert "<!-- compatibility -->\n\n| a | table |\n\n<!-- /compatibility -->" in text


def test_the_page_has_every_group_option_and_key() -> None:
    text = page_path().read_text()
    for group, names in config_groups().items():
        assert f"- `{group}`: {', '.join(names)}\n" in text
    for key, _, _ in options(RunConfig()):
        assert f"| `{key}` |" in text


def test_keys_say_which_choices_read_them() -> None:
    found = {key.name: key for key in keys()}
    assert found["scheduler.solver.eta"].only == ("scheduler/solver=ddim,dpm2",)
    assert found["cache.interval"].only == ("cache=taylorseer,guidance_skip",)
    assert found["scheduler.rho"].only == ("scheduler.spacing=karras",)
    assert found["train.vae.loop.images"].tasks == ("task=train",)
    assert found["train.vae.loop.images"].default == "50000"
    assert found["model.vae.dtype"].default == "float32"


def test_help_has_every_group_and_how_to_ask_for_a_key() -> None:
    text = help_text()
    for group in config_groups():
        assert f"\n  {group} " in text
    assert "--help KEY" in text
    assert text.count("python -m harness") >= 6


def test_a_key_is_described() -> None:
    text = describe("request.height")
    for part in ("int or null", "null", "pixels", "1 to 65536", "Height of the image", "task=plan"):
        assert part in text
    assert describe("request.height=3") == text


def test_a_group_and_an_option_are_described() -> None:
    assert describe("cache").startswith("cache: first_block, ")
    assert "  cache.interval " in describe("cache")
    assert "scheduler.solver.corrector          Whether the corrector runs" in describe("scheduler/solver=unipc")
    assert "arXiv:2411.19108" in describe("cache=teacache")
    assert "word or null" in describe("model.checkpoint_defaults.ddpm.end")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("request.stepz", "did you mean request.steps?"),
        ("scheduler/solver=unipcc", "did you mean unipc?"),
        ("chache", "did you mean cache"),
        ("task.out", "task.out is now report.out"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(
    name: str, hint: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.dispatch(["--help", name]) == 2
    assert hint in " ".join(capfd.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_version_and_help_need_no_torch() -> None:
    code = (
        "import sys; from harness.cli import dispatch; assert dispatch(['--version']) == 0; "
        "assert dispatch(['--help', 'request.steps']) == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    version, key, *_ = done.stdout.splitlines()
    assert (version, key) == (metadata.version("triptych"), "request.steps")
